//! Commands that must fail: each with one clear sentence, the peer's own where it has the same command, and without a
//! trace in graph, exports and objects, while a guest goes on.

use client::daemon::Launch;
use client::{Setup, qmp};
use ringblk_scenarios::{Rig, Wanted};
use serde_json::{Value, json};

use crate::refusal;
use crate::state::snapshot;

/// What the answer is held against.
enum Says {
    /// The same class and words as qemu-storage-daemon.
    AsPeer,
    /// Something of our own, since the peer cannot do it, does not refuse it, or says less.
    Own(&'static str),
}
use Says::{AsPeer, Own};

fn node(options: Value) -> (&'static str, Value) {
    ("blockdev-add", options)
}

fn export(more: Value) -> (&'static str, Value) {
    let mut arguments = json!({
        "type": "vhost-user-blk", "id": "x", "node-name": "null", "addr": {"type": "unix", "path": "@/x"},
    });
    for (name, value) in more.as_object().unwrap() {
        if value.is_null() {
            arguments.as_object_mut().unwrap().remove(name);
        } else {
            arguments[name] = value.clone();
        }
    }
    ("block-export-add", arguments)
}

/// Everything that is tried: a daemon with the node `null`, the export `e` on node `node-e`, and the iothread `t0`.
/// `@` stands for the daemon's folder.
fn attempts() -> Vec<((&'static str, Value), Says)> {
    let mapping = |m: Value| export(json!({"num-queues": 2, "iothread-vq-mapping": m}));
    vec![
        (node(json!({"driver": "null-co", "node-name": "null"})), AsPeer),
        (node(json!({"driver": "no-such-driver", "node-name": "n"})), AsPeer),
        (node(json!({"driver": "null-co"})), AsPeer),
        (node(json!({"node-name": "n"})), AsPeer),
        (node(json!({"driver": "null-co", "node-name": "0x"})), AsPeer),
        (node(json!({"driver": "null-co", "node-name": ""})), AsPeer),
        (node(json!({"driver": "null-co", "node-name": "x".repeat(40)})), AsPeer),
        (node(json!({"driver": "null-co", "node-name": "n", "sizee": 1})), AsPeer),
        (node(json!({"driver": "null-co", "node-name": "n", "size": "1M"})), AsPeer),
        (node(json!({"driver": "null-co", "node-name": 5})), AsPeer),
        (node(json!({"driver": "file", "node-name": "n"})), AsPeer),
        (node(json!({"driver": "file", "node-name": "n", "filename": 5})), AsPeer),
        (node(json!({"driver": "file", "node-name": "n", "filename": "@/missing"})), AsPeer),
        (node(json!({"driver": "file", "node-name": "n", "filename": "@"})), AsPeer),
        (
            node(json!({"driver": "file", "node-name": "n", "filename": "@/plain", "discard": "maybe"})),
            AsPeer,
        ),
        (
            node(json!({"driver": "file", "node-name": "n", "filename": "@/plain", "read-only": "yes"})),
            AsPeer,
        ),
        (node(json!({"driver": "file", "node-name": "n", "filename": "@/plain", "aio": "psync"})), AsPeer),
        (
            node(json!({"driver": "file", "node-name": "n", "filename": "@/plain", "cache": {"direct": 1}})),
            AsPeer,
        ),
        (
            node(
                json!({"driver": "file", "node-name": "n", "filename": "@/plain", "cache": {"writeback": true}}),
            ),
            AsPeer,
        ),
        (node(json!({"driver": "file", "node-name": "n", "filename": "/dev/null"})), Own("")),
        (node(json!({"driver": "raw", "node-name": "n"})), AsPeer),
        (node(json!({"driver": "raw", "node-name": "n", "file": "missing"})), AsPeer),
        (node(json!({"driver": "raw", "node-name": "n", "file": 5})), AsPeer),
        (
            node(
                json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "@/missing"}}),
            ),
            AsPeer,
        ),
        (
            node(json!({"driver": "raw", "node-name": "n", "file": {"driver": "null-co", "node-name": "n"}})),
            Own(""),
        ),
        (node(json!({"driver": "raw", "node-name": "n", "file": {"driver": "null-co", "sizee": 1}})), AsPeer),
        (node(json!({"driver": "raw", "node-name": "n", "file": "null", "offset": -1})), Own("'offset'")),
        (node(json!({"driver": "raw", "node-name": "n", "file": "null", "offset": 1_u64 << 50})), Own("")),
        // The inner node is already open when the outer fails.
        (
            node(
                json!({"driver": "raw", "node-name": "null", "file": {"driver": "null-co", "node-name": "i"}}),
            ),
            Own("null"),
        ),
        (("blockdev-del", json!({"node-name": "missing"})), AsPeer),
        (("blockdev-del", json!({"node-name": 1})), AsPeer),
        (("blockdev-del", json!({})), AsPeer),
        (("blockdev-del", json!({"node-name": "null", "force": true})), AsPeer),
        (
            ("blockdev-del", json!({"node-name": "node-e"})),
            Own("Node node-e is in use: it is used by block export 'e'"),
        ),
        (export(json!({"id": "e"})), AsPeer),
        (export(json!({"id": "0e"})), Own("'id' expects an identifier")),
        (export(json!({"id": null})), AsPeer),
        (export(json!({"type": "no-such-type"})), AsPeer),
        (export(json!({"node-name": "missing"})), AsPeer),
        (export(json!({"node-name": null})), AsPeer),
        (export(json!({"addr": null})), AsPeer),
        (export(json!({"addr": {"type": "unix"}})), AsPeer),
        (export(json!({"addr": "@/x"})), AsPeer),
        (export(json!({"addr": {"type": "unix", "path": "/no/such/folder/x"}})), Own("/no/such/folder/x")),
        (
            export(json!({"addr": {"type": "unix", "path": format!("@/{}", "x".repeat(120))}})),
            Own("at most 107"),
        ),
        (export(json!({"addr": {"type": "fd", "str": "77"}})), Own("'77' was not passed")),
        (export(json!({"addr": {"type": "fd", "str": "name"}})), Own("LISTEN_FDNAMES")),
        (export(json!({"num-queues": 0})), Own("'num-queues'")),
        (export(json!({"num-queues": 257})), Own("'num-queues'")),
        (export(json!({"num-queues": 65536})), AsPeer),
        (export(json!({"num-queues": "2"})), Own("Invalid parameter type for 'num-queues'")),
        (export(json!({"queue-size": 3})), Own("'queue-size'")),
        (export(json!({"serial": "x".repeat(21)})), Own("'serial'")),
        (export(json!({"logical-block-size": 513})), Own("'logical-block-size'")),
        (export(json!({"writable": "on"})), AsPeer),
        (export(json!({"iothread": "missing"})), AsPeer),
        (
            export(json!({"iothread": "t0", "iothread-vq-mapping": [{"iothread": "t0"}]})),
            Own("mutually exclusive"),
        ),
        (mapping(json!([])), Own("at least one")),
        (mapping(json!([{"iothread": "missing"}])), Own("\"missing\"")),
        (mapping(json!([{"iothread": "t0"}, {"iothread": "t0"}])), Own("twice")),
        (mapping(json!([{"iothread": "t0", "vqs": [0]}])), Own("vq 1")),
        (mapping(json!([{"iothread": "t0", "vqs": [0, 1, 2]}])), Own("vq 2")),
        (export(json!({"node-name": "node-e", "writable": true})), Own("Permission conflict")),
        (("block-export-del", json!({"id": "missing"})), AsPeer),
        (("block-export-del", json!({"id": "e", "mode": "gentle"})), AsPeer),
        (("block-export-del", json!({"id": "e"})), Own("still in use")),
        (("block_resize", json!({"node-name": "missing", "size": 1})), AsPeer),
        (("block_resize", json!({"device": "missing", "size": 1})), AsPeer),
        (("block_resize", json!({"size": 1})), AsPeer),
        (("block_resize", json!({"device": "e", "node-name": "node-e", "size": 1})), Own("")),
        (("block_resize", json!({"node-name": "null", "size": -1})), Own("'size' expects a")),
        (("block_resize", json!({"node-name": "null", "size": 1 << 20})), AsPeer),
        (("object-add", json!({"qom-type": "iothread", "id": "t0"})), AsPeer),
        (("object-add", json!({"qom-type": "no-such-type", "id": "t1"})), AsPeer),
        (("object-add", json!({"qom-type": "iothread"})), AsPeer),
        (("object-add", json!({"qom-type": "iothread", "id": "0"})), AsPeer),
        (
            ("object-add", json!({"qom-type": "iothread", "id": "t1", "poll-max-ns": -1})),
            Own("must be in range"),
        ),
        (("object-add", json!({"qom-type": "iothread", "id": "t1", "poll-max-ns": "x"})), AsPeer),
        (("object-add", json!({"qom-type": "iothread", "id": "t1", "x": 1})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "t0", "data": "x"})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "s"})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "s", "data": "x", "file": "@/plain"})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "s", "data": "x", "format": "hex"})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "s", "data": 5})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "s", "data": "?", "format": "base64"})), AsPeer),
        (("object-add", json!({"qom-type": "secret", "id": "s", "data": "x", "keyid": "missing"})), AsPeer),
        (
            ("object-add", json!({"qom-type": "secret", "id": "s", "file": "@/missing"})),
            Own("Unable to read"),
        ),
        (node(json!({"driver": "luks", "node-name": "n", "file": "null"})), AsPeer),
        (node(json!({"driver": "luks", "node-name": "n", "file": "null", "key-secret": "missing"})), AsPeer),
        (node(json!({"driver": "luks", "node-name": "n", "key-secret": "missing"})), AsPeer),
        (("object-del", json!({"id": "missing"})), AsPeer),
        (("object-del", json!({"id": "t0"})), Own("export 'e' runs on it")),
        (("qom-get", json!({"path": "/objects/t0", "property": "missing"})), AsPeer),
        (("qom-get", json!({"path": "/objects/missing", "property": "poll-max-ns"})), AsPeer),
        (("qom-set", json!({"path": "/objects/t0", "property": "poll-max-ns", "value": "x"})), AsPeer),
        (
            ("qom-set", json!({"path": "/objects/t0", "property": "poll-max-ns", "value": -1})),
            Own("must be in range"),
        ),
        (("qom-set", json!({"path": "/objects/t0", "property": "missing", "value": 1})), AsPeer),
        (
            ("qom-set", json!({"path": "/objects/t0", "property": "thread-id", "value": 1})),
            Own("'thread-id'"),
        ),
        (("qom-list", json!({"path": "/objects/missing"})), AsPeer),
        (("query-named-block-nodes", json!({"flat": "x"})), AsPeer),
        (("query-blockstats", json!({"query-nodes": 1})), AsPeer),
        (("query-version", json!({"x": 1})), AsPeer),
        (("quit", json!({"x": 1})), AsPeer),
        (("no-such-command", json!({})), AsPeer),
        (("migrate", json!({"uri": "x"})), AsPeer),
    ]
}

/// The peer, with what the attempts suppose.
struct Peer {
    control: qmp::Client,
    _daemon: client::Daemon,
    folder: tempfile::TempDir,
}

impl Peer {
    fn start() -> Option<Self> {
        let program = crate::peer()?;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("plain"), [0; 4096]).unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let launch = Launch::new(program)
            .args(["--object", "iothread,id=t0", "--blockdev", "null-co,node-name=null", "--blockdev"])
            .args(["null-co,node-name=node-e", "--export"])
            .args([format!("vhost-user-blk,id=e,node-name=node-e,addr.type=unix,addr.path={}", at("e"))])
            .args([
                "--chardev",
                &format!("socket,id=c,path={},server=on,wait=off", at("qmp")),
                "--monitor",
                "c",
            ]);
        let daemon = launch.spawn().unwrap();
        let control = qmp::Client::connect(&folder.path().join("qmp")).unwrap();
        Some(Self { control, _daemon: daemon, folder })
    }
}

/// Replaces `@` in all strings.
fn in_folder(value: &Value, folder: &str) -> Value {
    serde_json::from_str(&value.to_string().replace('@', folder)).unwrap()
}

#[test]
fn each_refusal_says_why_and_changes_nothing() {
    let wanted = [Wanted::file("e", 1 << 20).options("writable=on,iothread=t0")];
    let mut rig =
        Rig::start_with(&wanted, &["--object", "iothread,id=t0", "--blockdev", "null-co,node-name=null"]);
    std::fs::write(rig.folder().join("plain"), [0; 4096]).unwrap();
    let mut disk = rig.disk("e", &Setup::default());
    let mut peer = Peer::start();
    // The blocks that are written below: the image's allocation is part of what must not change.
    disk.write(0, &[0xee; 4096]).unwrap();
    let before = snapshot(&mut rig.qmp);
    let place = rig.folder().to_owned();
    let files = || {
        let mut names: Vec<_> = std::fs::read_dir(&place).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let files_before = files();
    let folder = rig.folder().display().to_string();
    let mut differences = Vec::new();
    for (round, ((command, arguments), says)) in attempts().into_iter().enumerate() {
        let (class, desc) = refusal(&mut rig.qmp, command, in_folder(&arguments, &folder));
        let ours = format!("{class}: {}", desc.replace(&folder, "@"));
        assert!(!desc.contains('\n') && !desc.is_empty(), "{command} {arguments}: {desc:?}");
        match says {
            Own(part) => {
                if !desc.contains(part) {
                    differences.push(format!("{command} {arguments}\n  ours  {ours}\n  lacks {part}"));
                }
            }
            AsPeer => {
                let Some(peer) = &mut peer else { continue };
                let theirs = peer.folder.path().display().to_string();
                let (class, desc) = refusal(&mut peer.control, command, in_folder(&arguments, &theirs));
                let theirs = format!("{class}: {}", desc.replace(&theirs, "@"));
                if ours != theirs {
                    differences.push(format!("{command} {arguments}\n  ours  {ours}\n  peer  {theirs}"));
                }
            }
        }
        if snapshot(&mut rig.qmp) != before {
            differences.push(format!(
                "{command} {arguments}: changed {} to {}",
                before,
                snapshot(&mut rig.qmp)
            ));
            break;
        }
        let sector = round as u64 % 8 * 512;
        disk.write(sector, &[round as u8; 512]).unwrap();
        assert_eq!(disk.read(sector, 512).unwrap(), [round as u8; 512], "after {command} {arguments}");
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(files(), files_before, "files were made or removed");
}

#[test]
fn nodes_and_objects_come_and_go() {
    let mut rig = Rig::start(&[]);
    let empty = snapshot(&mut rig.qmp);
    rig.command("object-add", json!({"qom-type": "iothread", "id": "t0", "poll-max-ns": 1000}));
    let listed = rig.command("qom-list", json!({"path": "/objects"}));
    assert!(
        listed.as_array().unwrap().contains(&json!({"name": "t0", "type": "child<iothread>"})),
        "{listed}"
    );
    for (property, value) in [("poll-max-ns", 0), ("poll-grow", 4), ("poll-shrink", 2), ("aio-max-batch", 16)]
    {
        rig.command("qom-set", json!({"path": "/objects/t0", "property": property, "value": value}));
        let read = rig.command("qom-get", json!({"path": "t0", "property": property}));
        assert_eq!(read, value, "{property}");
        let threads = rig.command("query-iothreads", json!({}));
        assert_eq!(threads[0][property], value, "{threads}");
    }
    // One by reference, one nested; the nested one goes with its parent.
    rig.command("blockdev-add", json!({"driver": "null-co", "node-name": "low", "size": 4 << 20}));
    rig.command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "by-name", "file": "low", "size": 1 << 20}),
    );
    let nested = json!({"driver": "null-co", "node-name": "inner", "size": 2 << 20});
    rig.command("blockdev-add", json!({"driver": "raw", "node-name": "nested", "file": nested}));
    let anonymous = json!({"driver": "null-co", "size": 3 << 20});
    rig.command("blockdev-add", json!({"driver": "raw", "node-name": "above-anonymous", "file": anonymous}));
    let nodes = rig.command("query-named-block-nodes", json!({}));
    let size = |name: &str| {
        let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == name);
        node.unwrap_or_else(|| panic!("no {name} in {nodes}"))["image"]["virtual-size"].as_u64().unwrap()
    };
    assert_eq!(
        [size("low"), size("by-name"), size("inner"), size("nested")],
        [4 << 20, 1 << 20, 2 << 20, 2 << 20]
    );
    assert_eq!(size("above-anonymous"), 3 << 20);
    assert_eq!(nodes.as_array().unwrap().len(), 6);
    let graph = rig.command("x-debug-query-block-graph", json!({}));
    assert_eq!(graph["edges"].as_array().unwrap().len(), 3, "{graph}");
    assert!(refusal(&mut rig.qmp, "blockdev-del", json!({"node-name": "low"})).1.contains("in use"));
    assert!(refusal(&mut rig.qmp, "blockdev-del", json!({"node-name": "inner"})).1.contains("not owned"));
    for name in ["nested", "above-anonymous", "by-name", "low"] {
        rig.command("blockdev-del", json!({"node-name": name}));
    }
    rig.command("object-del", json!({"id": "t0"}));
    assert_eq!(snapshot(&mut rig.qmp), empty);
}

#[test]
fn sizes_change_where_it_is_possible() {
    let mut rig = Rig::start(&[Wanted::file("e", 1 << 20)]);
    for (who, size) in [(json!({"node-name": "node-e"}), 4_u64 << 20), (json!({"device": "e"}), 512 << 10)] {
        let mut arguments = who;
        arguments["size"] = json!(size);
        rig.command("block_resize", arguments);
        assert_eq!(std::fs::metadata(rig.image("e")).unwrap().len(), size);
        let disk = rig.disk("e", &Setup::default());
        assert_eq!(disk.session().config.capacity, size / 512);
        drop(disk);
        rig.wait_disconnected("e");
    }
    let before = snapshot(&mut rig.qmp);
    let (_, text) = refusal(&mut rig.qmp, "block_resize", json!({"node-name": "node-e", "size": i64::MAX}));
    assert!(!text.is_empty());
    assert_eq!(snapshot(&mut rig.qmp), before);
    assert_eq!(std::fs::metadata(rig.image("e")).unwrap().len(), 512 << 10);
}
