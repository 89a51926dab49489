//! Who runs when: negotiation, order, one at a time, lost clients, panics, events.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::Waker;

use serde_json::json;

use super::*;
use crate::command::{Commands, NoArguments, Version};
use crate::event::BlockExportDeleted;

/// What handlers see: a gate that holds those that wait, and a log.
#[derive(Clone, Default)]
struct State {
    open: Rc<Cell<bool>>,
    log: Rc<RefCell<Vec<String>>>,
    events: Events,
}

#[derive(serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

fn server() -> (Server<State>, State) {
    let state = State::default();
    let mut commands = Commands::new(Version::default(), |_: &State| {});
    commands.register("wait", "Waits for the gate.", |s: State, a: Name| async move {
        s.log.borrow_mut().push(format!("begin {}", a.name));
        poll_fn(|_| if s.open.get() { Poll::Ready(()) } else { Poll::Pending }).await;
        s.log.borrow_mut().push(format!("end {}", a.name));
        Ok(())
    });
    commands.register("panic", "Panics.", |_: State, _: NoArguments| async move {
        if true {
            panic!("on purpose");
        }
        Ok(())
    });
    commands.register("emit", "Emits.", |s: State, a: Name| async move {
        s.events.emit(&BlockExportDeleted { id: a.name });
        Ok(())
    });
    commands.event::<BlockExportDeleted>();
    let server = Server::new(commands.finish(), state.clone(), state.events.clone());
    (server, state)
}

fn poll(server: &mut Server<State>) {
    server.poll(&mut Context::from_waker(Waker::noop()));
}

fn send(server: &mut Server<State>, id: SessionId, text: &str) -> Vec<Value> {
    server.session(id).unwrap().receive(text.as_bytes());
    poll(server);
    read(server, id)
}

fn read(server: &mut Server<State>, id: SessionId) -> Vec<Value> {
    let session = server.session(id).unwrap();
    let text = String::from_utf8(session.output().to_vec()).unwrap();
    session.consume(text.len());
    text.split_terminator("\r\n").map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn negotiated(server: &mut Server<State>) -> SessionId {
    let id = server.connect(SessionOptions::default()).unwrap();
    assert_eq!(send(server, id, "{\"execute\": \"qmp_capabilities\"}").len(), 2);
    id
}

#[test]
fn negotiation() {
    let (mut server, _) = server();
    let id = server.connect(SessionOptions::default()).unwrap();
    let greeting = read(&mut server, id);
    assert_eq!(greeting[0]["QMP"]["capabilities"], json!([]));
    assert!(greeting[0]["QMP"]["version"]["package"].as_str().unwrap().starts_with("ringblk "));
    for command in ["query-version", "no-such-command"] {
        assert_eq!(
            send(&mut server, id, &format!("{{\"execute\": \"{command}\", \"id\": 1}}")),
            [json!({"id": 1, "error": {"class": "CommandNotFound",
                "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}})]
        );
    }
    let refused = "{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}";
    assert_eq!(send(&mut server, id, refused)[0]["error"]["class"], "GenericError");
    // Two in one packet: the second is judged after the first.
    let both = "{\"execute\": \"qmp_capabilities\", \"id\": [1]}{\"execute\": \"qmp_capabilities\"}";
    assert_eq!(
        send(&mut server, id, both),
        [
            json!({"return": {}, "id": [1]}),
            json!({"error": {"class": "CommandNotFound",
                "desc": "Capabilities negotiation is already complete, command ignored"}})
        ]
    );
    assert!(send(&mut server, id, "{\"execute\": \"query-version\"}")[0].get("return").is_some());
    // Another session negotiates for itself.
    let other = server.connect(SessionOptions::default()).unwrap();
    assert_eq!(
        send(&mut server, other, "{\"execute\": \"query-version\"}")[1]["error"]["class"],
        "CommandNotFound"
    );
}

#[test]
fn requests_of_a_session_run_in_order() {
    let (mut server, state) = server();
    let id = negotiated(&mut server);
    let text = "{\"execute\": \"wait\", \"arguments\": {\"name\": \"a\"}, \"id\": 1}\
                {\"execute\": \"query-version\", \"id\": 2}";
    assert_eq!(send(&mut server, id, text), [] as [Value; 0]);
    state.open.set(true);
    poll(&mut server);
    let ids: Vec<Value> = read(&mut server, id).iter().map(|l| l["id"].clone()).collect();
    assert_eq!(ids, [json!(1), json!(2)]);
}

#[test]
fn commands_run_one_at_a_time_and_queries_beside_them() {
    let (mut server, state) = server();
    let (a, b, c) = (negotiated(&mut server), negotiated(&mut server), negotiated(&mut server));
    let wait = |name: &str| format!("{{\"execute\": \"wait\", \"arguments\": {{\"name\": \"{name}\"}}}}");
    send(&mut server, a, &(wait("a1") + &wait("a2")));
    send(&mut server, b, &wait("b"));
    assert_eq!(*state.log.borrow(), ["begin a1"]);
    assert!(send(&mut server, c, "{\"execute\": \"query-commands\"}")[0].get("return").is_some());
    assert_eq!(*state.log.borrow(), ["begin a1"]);
    state.open.set(true);
    poll(&mut server);
    // The session that had its turn comes last.
    assert_eq!(*state.log.borrow(), ["begin a1", "end a1", "begin b", "end b", "begin a2", "end a2"]);
    assert!(!server.is_busy());
}

#[test]
fn a_command_outlives_its_client() {
    let (mut server, state) = server();
    let (a, b) = (negotiated(&mut server), negotiated(&mut server));
    let wait = |name: &str| format!("{{\"execute\": \"wait\", \"arguments\": {{\"name\": \"{name}\"}}}}");
    send(&mut server, a, &(wait("a1") + &wait("a2")));
    server.disconnect(a);
    assert!(server.session(a).is_none() && server.is_busy());
    send(&mut server, b, &wait("b"));
    assert_eq!(*state.log.borrow(), ["begin a1"]);
    state.open.set(true);
    poll(&mut server);
    poll(&mut server);
    assert_eq!(*state.log.borrow(), ["begin a1", "end a1", "begin b", "end b"]);
    assert_eq!(read(&mut server, b), [json!({"return": {}})]);
}

#[test]
fn a_panic_fails_the_command_alone() {
    let (mut server, _) = server();
    let id = negotiated(&mut server);
    let answers = send(&mut server, id, "{\"execute\": \"panic\"}{\"execute\": \"query-version\"}");
    assert_eq!(answers[0]["error"]["desc"], "Internal error in panic; see the log");
    assert!(answers[1].get("return").is_some());
    // And the next command that runs alone is not locked out.
    assert!(send(&mut server, id, "{\"execute\": \"emit\", \"arguments\": {\"name\": \"x\"}}").len() == 2);
}

#[test]
fn events_reach_negotiated_sessions_before_the_answer() {
    let (mut server, _) = server();
    let (a, b) = (negotiated(&mut server), negotiated(&mut server));
    let silent = server.connect(SessionOptions::default()).unwrap();
    let answers = send(&mut server, a, "{\"execute\": \"emit\", \"arguments\": {\"name\": \"x\"}}");
    assert_eq!(answers[0]["event"], "BLOCK_EXPORT_DELETED");
    assert_eq!(answers[0]["data"], json!({"id": "x"}));
    assert_eq!(answers[1], json!({"return": {}}));
    assert_eq!(read(&mut server, b).len(), 1);
    assert_eq!(read(&mut server, silent).len(), 1, "the greeting");
}

#[test]
fn an_event_nobody_announced_is_not_delivered() {
    #[derive(serde::Serialize, schemars::JsonSchema)]
    struct Secret {}
    impl crate::event::Event for Secret {
        const NAME: &'static str = "SECRET";
        const DOC: &'static str = "";
    }
    let (mut server, state) = server();
    let a = negotiated(&mut server);
    state.events.emit(&Secret {});
    poll(&mut server);
    assert_eq!(read(&mut server, a), [] as [Value; 0]);
}

#[test]
fn sessions_are_bounded() {
    let (mut server, _) = server();
    let first = server.connect(SessionOptions::default()).unwrap();
    for _ in 1..MAX_SESSIONS {
        server.connect(SessionOptions::default()).unwrap();
    }
    assert_eq!(server.connect(SessionOptions::default()), None);
    server.disconnect(first);
    assert!(server.connect(SessionOptions::default()).is_some_and(|id| id != first));
}
