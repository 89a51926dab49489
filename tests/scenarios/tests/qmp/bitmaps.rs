//! Dirty bitmaps and internal snapshots: each command with the same answer as from qemu-storage-daemon, good or bad.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use client::daemon::{Daemon, Launch};
use client::{Error, qmp};
use ringblk_scenarios::{image, rig};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A daemon with a raw node `r` over a file `rf`, an empty node `n`, `q`: a qcow2 image over another one, `v2`: one of the
/// old version, and `ro`: a read-only one.
struct Program {
    control: qmp::Client,
    _daemon: Daemon,
    _folder: TempDir,
}

impl Program {
    fn start(program: &Path) -> Program {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        image::create(&folder.path().join("image"), 1 << 20);
        let make = |options: &[&str], name: &str| {
            let mut all = vec!["create", "-q", "-f", "qcow2"];
            all.extend(options);
            let made = Command::new("qemu-img").args(all).arg(at(name)).arg("64M").status().unwrap();
            assert!(made.success());
        };
        make(&[], "base");
        make(&["-b", "base", "-F", "qcow2"], "top");
        make(&["-o", "compat=0.10,cluster_size=4096"], "old");
        make(&["-o", "extended_l2=on,compression_type=zstd,lazy_refcounts=on,refcount_bits=8"], "readable");
        let qcow2 = |name: &str, file: &str, more: &str| {
            format!("qcow2,node-name={name},file.driver=file,file.filename={}{more}", at(file))
        };
        let launch = Launch::new(program)
            .args(["--blockdev", &format!("file,node-name=rf,filename={}", at("image"))])
            .args(["--blockdev", "raw,node-name=r,file=rf"])
            .args(["--blockdev", "null-co,node-name=n,size=1073741824"])
            .args(["--blockdev", &qcow2("q", "top", "")])
            .args(["--blockdev", &qcow2("v2", "old", "")])
            .args(["--blockdev", &qcow2("ro", "readable", ",read-only=on")])
            .args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", at("qmp"))])
            .args(["--monitor", "c"]);
        let daemon = launch.spawn().unwrap();
        let control = qmp::Client::connect(&folder.path().join("qmp")).unwrap();
        Program { control, _daemon: daemon, _folder: folder }
    }

    /// The answer, or class and words of the refusal.
    fn answer(&mut self, command: &str, arguments: &Value) -> Value {
        match self.control.execute(command, arguments.clone()) {
            Ok(value) => json!({"return": value}),
            Err(Error::Qmp { class, desc, .. }) => json!({"class": class, "desc": desc}),
            Err(e) => panic!("{command} {arguments}: {e}"),
        }
    }

    /// What is known of the named nodes, without what is another one's to decide: times, names of folders, allocation.
    fn nodes(&mut self) -> BTreeMap<String, Value> {
        let folder = self._folder.path().display().to_string();
        let nodes = self.answer("query-named-block-nodes", &json!({}));
        let text = nodes["return"].to_string().replace(&folder, "/folder");
        let mut nodes: Vec<Value> = serde_json::from_str(&text).unwrap();
        nodes.retain(|n| !n["node-name"].as_str().unwrap().starts_with('#'));
        nodes.iter_mut().for_each(mask);
        for node in nodes.iter_mut().filter(|n| n["drv"] == "null-co") {
            // The peer leaves it out of nodes without an image, ours says no.
            node["image"].as_object_mut().unwrap().remove("dirty-flag");
        }
        nodes.into_iter().map(|n| (n["node-name"].as_str().unwrap().to_owned(), n)).collect()
    }

    /// The bitmaps of all nodes.
    fn bitmaps(&mut self) -> Vec<(String, Value)> {
        let nodes = self.answer("query-named-block-nodes", &json!({"flat": true}));
        let mut all: Vec<_> = nodes["return"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| (n["node-name"].as_str().unwrap().to_owned(), n["dirty-bitmaps"].clone()))
            .filter(|(name, _)| !name.starts_with('#'))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

/// Takes out what no two runs have in common.
fn mask(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(mask),
        Value::Object(members) => {
            for name in ["actual-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"] {
                if let Some(member) = members.get_mut(name) {
                    assert!(member.is_u64(), "{name}: {member}");
                    *member = json!(0);
                }
            }
            members.values_mut().for_each(mask);
        }
        _ => {}
    }
}

fn same_answers(steps: &[(&str, Value)]) {
    let Some(peer) = crate::peer() else { return };
    let (mut peer, mut ours) = (Program::start(peer), Program::start(&rig::ringblk()));
    for (command, arguments) in steps {
        let (mut theirs, mut mine) = (peer.answer(command, arguments), ours.answer(command, arguments));
        mask(&mut theirs);
        mask(&mut mine);
        assert_eq!(mine, theirs, "{command} {arguments}");
        assert_eq!(ours.bitmaps(), peer.bitmaps(), "after {command} {arguments}");
    }
    assert_eq!(ours.nodes(), peer.nodes());
}

#[test]
fn bitmap_commands_answer_as_the_peer_does() {
    let add = "block-dirty-bitmap-add";
    let merge = "block-dirty-bitmap-merge";
    let long = "x".repeat(1024);
    same_answers(&[
        (add, json!({"node": "nope", "name": "b"})),
        (add, json!({"node": "r", "name": ""})),
        (add, json!({"node": "r"})),
        (add, json!({"node": "r", "name": long})),
        (add, json!({"node": "r", "name": long[1..]})),
        ("block-dirty-bitmap-remove", json!({"node": "r", "name": long[1..]})),
        (add, json!({"node": "r", "name": "b", "granularity": 256})),
        (add, json!({"node": "r", "name": "b", "granularity": 1000})),
        (add, json!({"node": "r", "name": "b", "granularity": 0})),
        (add, json!({"node": "r", "name": "b", "granularity": 1u64 << 31})),
        (add, json!({"node": "r", "name": "c"})),
        (add, json!({"node": "r", "name": "c"})),
        (add, json!({"node": "rf", "name": "c"})),
        (add, json!({"node": "r", "name": "off", "disabled": true, "granularity": 4096})),
        (add, json!({"node": "r", "name": "p", "persistent": true})),
        (add, json!({"node": "n", "name": "p", "persistent": true})),
        (add, json!({"node": "n", "name": "n", "granularity": 65536})),
        ("block-dirty-bitmap-remove", json!({"node": "n", "name": "nope"})),
        ("block-dirty-bitmap-remove", json!({"node": "nope", "name": "nope"})),
        ("block-dirty-bitmap-clear", json!({"node": "r", "name": "nope"})),
        ("block-dirty-bitmap-clear", json!({"node": "r", "name": "c"})),
        ("block-dirty-bitmap-disable", json!({"node": "r", "name": "c"})),
        ("block-dirty-bitmap-disable", json!({"node": "r", "name": "c"})),
        ("block-dirty-bitmap-enable", json!({"node": "r", "name": "c"})),
        ("block-dirty-bitmap-enable", json!({"node": "r", "name": "nope"})),
        (merge, json!({"node": "r", "target": "nope", "bitmaps": ["c"]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["nope"]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["c"]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["off", {"node": "r", "name": "b"}]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["off", {"node": "n", "name": "n"}]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["off", {"node": "n", "name": "nope"}]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["off", {"node": "nope", "name": "n"}]})),
        (merge, json!({"node": "r", "target": "c", "bitmaps": ["off", {"name": "n"}]})),
    ]);
}

#[test]
fn bitmaps_of_an_image_answer_as_the_peer_does() {
    let add = "block-dirty-bitmap-add";
    same_answers(&[
        (add, json!({"node": "q", "name": "a"})),
        (add, json!({"node": "v2", "name": "a"})),
        (add, json!({"node": "q", "name": "kept", "persistent": true})),
        (add, json!({"node": "q", "name": "kept", "persistent": true})),
        (add, json!({"node": "q", "name": "coarse", "persistent": true, "granularity": 1u64 << 31})),
        (add, json!({"node": "v2", "name": "kept", "persistent": true})),
        (add, json!({"node": "q", "name": "n".repeat(1023), "persistent": true})),
        ("block-dirty-bitmap-remove", json!({"node": "q", "name": "n".repeat(1023)})),
        ("block_resize", json!({"node-name": "q", "size": 128 << 20})),
        ("block-dirty-bitmap-clear", json!({"node": "q", "name": "kept"})),
        ("block-dirty-bitmap-disable", json!({"node": "q", "name": "kept"})),
        ("block-dirty-bitmap-remove", json!({"node": "q", "name": "kept"})),
        ("block-dirty-bitmap-remove", json!({"node": "q", "name": "coarse"})),
    ]);
}

#[test]
fn snapshots_of_an_image_answer_as_the_peer_does() {
    let (create, delete) = ("blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync");
    same_answers(&[
        (create, json!({"device": "q", "name": ""})),
        (create, json!({"device": "ro", "name": "s"})),
        (create, json!({"device": "q", "name": "s"})),
        (create, json!({"device": "q", "name": "s"})),
        (create, json!({"device": "q", "name": "1"})),
        (create, json!({"device": "q", "name": "third"})),
        (create, json!({"device": "v2", "name": "old"})),
        (delete, json!({"device": "q"})),
        (delete, json!({"device": "q", "id": ""})),
        (delete, json!({"device": "q", "name": ""})),
        (delete, json!({"device": "q", "id": "77"})),
        (delete, json!({"device": "q", "name": "nope"})),
        (delete, json!({"device": "q", "id": "1", "name": "nope"})),
        (delete, json!({"device": "ro", "name": "nope"})),
        (delete, json!({"device": "q", "id": "1", "name": "s"})),
        (create, json!({"device": "q", "name": "again"})),
        (delete, json!({"device": "q", "name": "1"})),
    ]);
}

#[test]
fn snapshot_commands_refuse_as_the_peer_does() {
    let (create, delete) = ("blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync");
    same_answers(&[
        (create, json!({"device": "nope", "name": "s"})),
        (create, json!({"device": "r", "name": "s"})),
        (create, json!({"device": "rf", "name": "s"})),
        (create, json!({"device": "n", "name": "s"})),
        (delete, json!({"device": "r"})),
        (delete, json!({"device": "nope", "name": "s"})),
        (delete, json!({"device": "r", "name": "s"})),
        (delete, json!({"device": "n", "name": "s"})),
    ]);
}
