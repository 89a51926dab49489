//! What control clients can make the daemon hold is bounded, the bound is told, and giving back makes room again.

use client::{Error, qmp};
use ringblk_scenarios::{Rig, Wanted};
use serde_json::{Value, json};

use crate::refusal;

/// Documented in docs/reference/limits.md.
const SESSIONS: usize = 32;
const IOTHREADS: usize = 256;
const NODES: usize = 4096;

#[test]
fn sessions_beyond_the_limit_are_turned_away_until_one_ends() {
    let mut rig = Rig::start(&[]);
    let path = rig.folder().join("qmp");
    // The rig has one.
    let mut sessions: Vec<_> = (1..SESSIONS).map(|_| qmp::Client::connect(&path).unwrap()).collect();
    let before = rig.holdings();
    for _ in 0..3 {
        match qmp::Client::connect_raw(&path) {
            Err(Error::Protocol(said)) => {
                assert!(said.contains("Too many QMP sessions (limit 32)"), "{said}")
            }
            other => panic!("session {} is let in: {other:?}", SESSIONS + 1),
        }
    }
    for session in &mut sessions {
        session.execute("query-version", json!({})).unwrap();
    }
    rig.wait_holdings(before);
    sessions.pop();
    rig.wait_for("room for a session", |_| qmp::Client::connect(&path).is_ok());
    rig.command("query-version", json!({}));
}

/// Repeats a command with numbered names until it is refused: how often it worked, and what was said.
fn until_refused(rig: &mut Rig, command: &str, arguments: impl Fn(usize) -> Value) -> (usize, String) {
    for n in 0.. {
        match rig.qmp.execute(command, arguments(n)) {
            Ok(_) => {}
            Err(Error::Qmp { desc, .. }) => return (n, desc),
            Err(e) => panic!("{e}: {}", rig.daemon.stderr()),
        }
    }
    unreachable!("an endless loop ends")
}

#[test]
fn iothreads_are_bounded() {
    let mut rig = Rig::start(&[]);
    let (count, said) =
        until_refused(&mut rig, "object-add", |n| json!({"qom-type": "iothread", "id": format!("t{n}")}));
    assert_eq!(count, IOTHREADS, "{said}");
    assert!(said.contains("256") && said.contains("iothread"), "{said}");
    for n in 0..IOTHREADS {
        rig.command("object-del", json!({"id": format!("t{n}")}));
    }
    assert_eq!(rig.command("query-iothreads", json!({})), json!([]));
    rig.wait_for("end of all threads", |rig| rig.holdings().threads <= 2);
    rig.command("object-add", json!({"qom-type": "iothread", "id": "again"}));
}

#[test]
fn nodes_are_bounded() {
    let mut rig = Rig::start(&[]);
    let add = |n: usize| json!({"driver": "null-co", "node-name": format!("n{n}")});
    let (count, said) = until_refused(&mut rig, "blockdev-add", add);
    assert_eq!(count, NODES, "{said}");
    assert!(said.contains("4096"), "{said}");
    rig.command("blockdev-del", json!({"node-name": "n7"}));
    rig.command("blockdev-add", add(7));
    assert_eq!(refusal(&mut rig.qmp, "blockdev-add", add(NODES)).1, said);
    assert_eq!(
        rig.command("query-named-block-nodes", json!({"flat": true})).as_array().unwrap().len(),
        NODES
    );
}

#[test]
fn nodes_inside_one_another_are_bounded() {
    let mut rig = Rig::start(&[]);
    let nested = |depth: usize| {
        let mut options = json!({"driver": "null-co"});
        for _ in 1..depth {
            options = json!({"driver": "raw", "file": options});
        }
        options["node-name"] = json!("top");
        options
    };
    rig.command("blockdev-add", nested(32));
    rig.command("blockdev-del", json!({"node-name": "top"}));
    for depth in [65, 200, 500] {
        let (_, said) = refusal(&mut rig.qmp, "blockdev-add", nested(depth));
        assert!(said.contains("64"), "{depth} levels: {said}");
        assert_eq!(rig.command("query-named-block-nodes", json!({})), json!([]));
    }
}

#[test]
fn refused_exports_leave_no_descriptor_behind() {
    let mut rig = Rig::start(&[Wanted::file("e", 1 << 20)]);
    // Whatever the first attempt starts for good is there afterwards.
    let attempt = |rig: &mut Rig| {
        let told = rig.add_export("late", "node-e", &json!({"writable": true, "num-queues": 64}));
        assert!(told.unwrap_err().starts_with("Permission conflict"));
        let told = rig.add_export("late", "missing", &json!({"num-queues": 64}));
        assert!(told.unwrap_err().contains("'missing'"));
        let missing = json!({"driver": "file", "node-name": "n", "filename": "/no/such/file"});
        refusal(&mut rig.qmp, "blockdev-add", json!({"driver": "raw", "node-name": "r", "file": missing}));
    };
    attempt(&mut rig);
    let before = rig.holdings();
    for _ in 0..200 {
        attempt(&mut rig);
    }
    rig.wait_holdings(before);
}
