//! The control channel on real sockets under a real event loop. The loop turns until what is awaited is there; nothing is
//! measured.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::net::Shutdown;
use std::path::PathBuf;
use std::rc::Rc;

use event_manager::{EventManager, SubscriberOps};
use serde_json::{Value, json};

use super::*;
use crate::command::{Commands, NoArguments, Version};
use crate::event::{BlockErrorAction, BlockIoError, Events, IoOperationType};

#[derive(Clone, Default)]
struct State {
    events: Events,
    done: Rc<Cell<bool>>,
    runs: Rc<Cell<u32>>,
}

struct Rig {
    manager: EventManager<Rc<RefCell<ControlChannel<State>>>>,
    channel: Rc<RefCell<ControlChannel<State>>>,
    state: State,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

/// A thread that answers later, as an iothread would.
struct Elsewhere {
    shared: Arc<std::sync::Mutex<(bool, Option<Waker>)>>,
}

impl Elsewhere {
    fn start() -> Self {
        let shared = Arc::new(std::sync::Mutex::new((false, None::<Waker>)));
        let theirs = shared.clone();
        std::thread::spawn(move || {
            // Until somebody waits: then the wake crosses threads for certain.
            loop {
                let mut state = theirs.lock().unwrap();
                if let Some(waker) = state.1.take() {
                    state.0 = true;
                    waker.wake();
                    return;
                }
                drop(state);
                std::thread::yield_now();
            }
        });
        Elsewhere { shared }
    }
}

impl Future for Elsewhere {
    type Output = ();

    fn poll(self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> std::task::Poll<()> {
        let mut state = self.shared.lock().unwrap();
        if state.0 {
            return std::task::Poll::Ready(());
        }
        state.1 = Some(cx.waker().clone());
        std::task::Poll::Pending
    }
}

fn rig() -> Rig {
    let state = State::default();
    let mut commands = Commands::new(Version::default(), |s: &State| s.done.set(true));
    commands.register("elsewhere", "Waits for a thread.", |s: State, _: NoArguments| async move {
        Elsewhere::start().await;
        s.runs.set(s.runs.get() + 1);
        Ok(())
    });
    commands.event::<BlockIoError>();
    let mut channel =
        ControlChannel::new(Server::new(commands.finish(), state.clone(), state.events.clone())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    channel.listen(Listener::bind(&path, None).unwrap(), SessionOptions::default());
    let channel = Rc::new(RefCell::new(channel));
    let mut manager = EventManager::new().unwrap();
    manager.add_subscriber(channel.clone());
    Rig { manager, channel, state, path, _dir: dir }
}

impl Rig {
    /// Turns the loop until `ready`; a loop that has nothing to do for a minute in all is a failure.
    fn until(&mut self, mut ready: impl FnMut(&mut Rig) -> bool) {
        for _ in 0..6000 {
            if ready(self) {
                return;
            }
            self.manager.run_with_timeout(10).unwrap();
        }
        panic!("it never happened");
    }

    fn connect(&mut self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        Client { stream, buffer: Vec::new(), ended: false }
    }

    fn sessions(&self) -> usize {
        self.channel.borrow_mut().server().sessions().len()
    }

    /// Sends and waits for so many messages.
    fn talk(&mut self, client: &mut Client, text: &str, count: usize) -> Vec<Value> {
        let mut rest = text.as_bytes();
        let mut out = Vec::new();
        self.until(|_| {
            if let Ok(n) = client.stream.write(rest)
                && !rest.is_empty()
            {
                rest = &rest[n..];
            }
            out.extend(client.messages());
            rest.is_empty() && out.len() >= count
        });
        out
    }

    fn negotiated(&mut self) -> Client {
        let mut client = self.connect();
        let answers = self.talk(&mut client, "{\"execute\": \"qmp_capabilities\"}", 2);
        assert_eq!(answers[1], json!({"return": {}}));
        client
    }
}

struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    ended: bool,
}

impl Client {
    fn messages(&mut self) -> Vec<Value> {
        let mut chunk = [0; 65536];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
        }
        let Some(end) = self.buffer.iter().rposition(|b| *b == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = self.buffer.drain(..=end).collect();
        String::from_utf8(whole).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }
}

#[test]
fn several_clients_talk_at_once() {
    let mut rig = rig();
    let mut a = rig.negotiated();
    let mut b = rig.negotiated();
    assert_eq!(rig.talk(&mut a, "{\"execute\": \"query-version\", \"id\": 1}", 1)[0]["id"], 1);
    assert_eq!(rig.talk(&mut b, "{\"execute\": \"query-version\", \"id\": 2}", 1)[0]["id"], 2);
    drop(a);
    rig.until(|r| r.sessions() == 1);
    assert_eq!(rig.talk(&mut b, "{\"execute\": \"query-version\", \"id\": 3}", 1)[0]["id"], 3);
}

#[test]
fn a_future_is_woken_from_another_thread() {
    let mut rig = rig();
    let mut client = rig.negotiated();
    assert_eq!(rig.talk(&mut client, "{\"execute\": \"elsewhere\"}", 1), [json!({"return": {}})]);
}

#[test]
fn quit_is_answered() {
    let mut rig = rig();
    let mut client = rig.negotiated();
    assert_eq!(rig.talk(&mut client, "{\"execute\": \"quit\"}", 1), [json!({"return": {}})]);
    assert!(rig.state.done.get());
}

#[test]
fn requests_sent_before_the_end_are_executed() {
    for shutdown in [Shutdown::Write, Shutdown::Both] {
        let mut rig = rig();
        let mut client = rig.negotiated();
        // More than a queue holds, so that reading stops in between.
        let text = "{\"execute\": \"elsewhere\"}".repeat(20);
        client.stream.write_all(text.as_bytes()).unwrap();
        client.stream.shutdown(shutdown).unwrap();
        rig.until(|r| r.sessions() == 0);
        assert_eq!(rig.state.runs.get(), 20, "{shutdown:?}");
        if shutdown == Shutdown::Write {
            assert_eq!(client.messages().len(), 20);
            assert!(client.ended);
        }
    }
}

#[test]
fn a_large_answer_and_a_slow_reader() {
    let mut rig = rig();
    let mut client = rig.negotiated();
    // Far more than a socket buffers: the server has to stop and go on.
    let text = "{\"execute\": \"query-qmp-schema\"}\n".repeat(200);
    let answers = rig.talk(&mut client, &text, 200);
    assert_eq!(answers.len(), 200);
    assert!(answers.iter().all(|a| a["return"].is_array()));
}

#[test]
fn a_held_back_event_comes_by_the_timer() {
    let mut rig = rig();
    let mut client = rig.negotiated();
    for reason in ["first", "second", "third"] {
        rig.state.events.emit(&BlockIoError {
            qom_path: "d".into(),
            device: "d".into(),
            node_name: None,
            operation: IoOperationType::Read,
            action: BlockErrorAction::Report,
            nospace: None,
            reason: reason.into(),
        });
    }
    let events = rig.talk(&mut client, "", 2);
    let reasons: Vec<&str> = events.iter().map(|e| e["data"]["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["first", "third"]);
}

#[test]
fn one_client_too_many_is_told() {
    let mut rig = rig();
    let mut clients = Vec::new();
    for count in 1..=MAX_SESSIONS {
        // One by one: the loop that accepts is this thread's.
        clients.push(rig.connect());
        rig.until(|r| r.sessions() == count);
    }
    let mut extra = rig.connect();
    let mut told = Vec::new();
    rig.until(|_| {
        told.extend(extra.messages());
        extra.ended
    });
    assert!(told[0]["error"]["desc"].as_str().unwrap().starts_with("Too many QMP sessions"));
    clients.pop();
    rig.until(|r| r.sessions() == MAX_SESSIONS - 1);
    rig.negotiated();
}

#[test]
fn an_attached_client_is_greeted() {
    let state = State::default();
    let commands = Commands::new(Version::default(), |_: &State| {});
    let mut channel =
        ControlChannel::new(Server::new(commands.finish(), state.clone(), state.events.clone())).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    channel.attach(ours, SessionOptions::default()).unwrap();
    channel.pump();
    theirs.set_nonblocking(true).unwrap();
    let mut client = Client { stream: theirs, buffer: Vec::new(), ended: false };
    assert!(client.messages()[0].get("QMP").is_some());
}
