//! Actions on bitmaps and snapshots inside images: all of a transaction, or none, in ours and in the peer.

use std::path::Path;

use client::daemon::Launch;
use client::{Daemon, qmp};
use ringblk_scenarios::rig;
use serde_json::{Value, json};

use crate::{qcow2, try_command};

/// A daemon with node `q` over an image, and bitmaps `a` (with marks), `b` and `p` (persistent).
struct Program {
    qmp: qmp::Client,
    _daemon: Daemon,
    _folder: tempfile::TempDir,
}

impl Program {
    fn start(program: &Path) -> Program {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        qcow2(&folder.path().join("image"), 1 << 20);
        let node = format!("qcow2,node-name=q,file.driver=file,file.filename={}", at("image"));
        let control = format!("socket,id=c,path={},server=on,wait=off", at("qmp"));
        let launch =
            Launch::new(program).args(["--blockdev", &node, "--chardev", &control, "--monitor", "c"]);
        let daemon = launch.spawn().unwrap();
        let qmp = qmp::Client::connect(&folder.path().join("qmp")).unwrap();
        let mut program = Program { qmp, _daemon: daemon, _folder: folder };
        for (name, persistent) in [("a", false), ("b", false), ("p", true)] {
            let bitmap = json!({"node": "q", "name": name, "persistent": persistent, "granularity": 65536});
            program.qmp.execute("block-dirty-bitmap-add", bitmap).unwrap();
        }
        program
    }

    /// The bitmaps and snapshots of the node, without what differs by nature.
    fn state(&mut self) -> Value {
        let nodes = self.qmp.execute("query-named-block-nodes", json!({})).unwrap();
        let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "q").unwrap().clone();
        let snapshots = node["image"]["snapshots"].as_array().cloned().unwrap_or_default();
        let names: Vec<&Value> = snapshots.iter().map(|s| &s["name"]).collect();
        json!([node["dirty-bitmaps"], names])
    }
}

/// Lists of actions; every one is tried as it is, and once more with `abort` at its end.
fn transactions() -> Vec<Value> {
    let bitmap = |name: &str| json!({"node": "q", "name": name});
    let act = |name: &str, data: Value| json!({"type": format!("block-dirty-bitmap-{name}"), "data": data});
    let inside = |name: &str| json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "q", "name": name}});
    vec![
        json!([act("clear", bitmap("a")), act("disable", bitmap("a"))]),
        json!([
            act("add", json!({"node": "q", "name": "new", "granularity": 4096})),
            act("disable", bitmap("new"))
        ]),
        json!([act(
            "merge",
            json!({"node": "q", "target": "b", "bitmaps": ["a", {"node": "q", "name": "p"}]})
        )]),
        json!([act("disable", bitmap("b")), act("add", json!({"node": "q", "name": "b"}))]),
        json!([act("clear", bitmap("none"))]),
        json!([act("enable", bitmap("b")), inside("one"), act("clear", bitmap("b"))]),
        json!([inside("two"), inside("two")]),
        json!([
            act("remove", bitmap("p")),
            act("add", json!({"node": "q", "name": "other", "persistent": true}))
        ]),
        json!([act("remove", bitmap("a")), act("clear", bitmap("a"))]),
        json!([act("remove", bitmap("a")), act("remove", bitmap("b")), act("remove", bitmap("new"))]),
        json!([]),
    ]
}

#[test]
fn actions_on_bitmaps_are_all_done_or_none() {
    let peer = Path::new("/usr/bin/qemu-storage-daemon");
    let mut ours = Program::start(&rig::ringblk());
    let mut theirs = peer.exists().then(|| Program::start(peer));
    let mut wrong = Vec::new();
    for actions in transactions() {
        let mut aborted = actions.clone();
        aborted.as_array_mut().unwrap().push(json!({"type": "abort", "data": {}}));
        for actions in [aborted, actions] {
            let before = ours.state();
            let said = try_command(&mut ours.qmp, "transaction", &json!({"actions": actions}));
            let after = ours.state();
            if said.is_err() && before != after {
                wrong.push(format!("{actions} failed and left a trace: {before}, {after}"));
            }
            let Some(theirs) = &mut theirs else { continue };
            let peer = try_command(&mut theirs.qmp, "transaction", &json!({"actions": actions}));
            if said != peer {
                wrong.push(format!("{actions}: {said:?}, the peer {peer:?}"));
            }
            let peer = theirs.state();
            if after != peer {
                wrong.push(format!("{actions}: {after}, the peer {peer}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
