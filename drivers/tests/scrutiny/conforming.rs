//! Each of the drivers through the conformance suite, with nothing to do and with much.

use std::path::Path;

use conformance::{Discarded, DriverCase};
use serde_json::{Value, json};

use crate::common::{registry, tool};

const SIZE: u64 = 3 << 19;

fn check(case: &DriverCase) {
    if let Err(e) = conformance::run(case) {
        panic!("{e}");
    }
}

/// A node over empty files of the node's size, which `options` name `FILE0`, `FILE1`...
fn case(name: &str, files: usize, options: Value) -> DriverCase {
    fn put(value: &Value, dir: &Path) -> Value {
        match value {
            Value::String(s) if s.starts_with("FILE") => {
                json!({"driver": "file", "filename": dir.join(s).to_str().unwrap(), "discard": "unmap"})
            }
            Value::String(s) if s.starts_with("PATH") => json!(dir.join(&s[4..]).to_str().unwrap()),
            Value::Object(members) => members.iter().map(|(k, v)| (k.clone(), put(v, dir))).collect(),
            Value::Array(all) => all.iter().map(|v| put(v, dir)).collect(),
            other => other.clone(),
        }
    }
    DriverCase::new(
        name,
        registry(),
        SIZE,
        move |dir| {
            for n in 0..files {
                let file = std::fs::File::create(dir.join(format!("FILE{n}"))).map_err(|e| e.to_string())?;
                file.set_len(SIZE).map_err(|e| e.to_string())?;
            }
            Ok(())
        },
        move |dir| put(&options, dir),
    )
}

#[test]
fn quorum_of_three() {
    let options = json!({"driver": "quorum", "vote-threshold": 2, "children": ["FILE0", "FILE1", "FILE2"],
                         "discard": "unmap"});
    check(&case("quorum", 3, options));
}

#[test]
fn quorum_with_one_child_that_always_fails() {
    let bad = json!({"driver": "blkdebug", "image": "FILE1", "inject-error": [{"event": "none"}]});
    let options = json!({"driver": "quorum", "vote-threshold": 2, "rewrite-corrupted": true,
                         "children": ["FILE0", bad, "FILE2"]});
    // Rewriting takes the permission to write, which a read-only quorum has not.
    check(&DriverCase { read_only: false, ..case("quorum, one child failing", 3, options) });
}

#[test]
fn quorum_one_after_the_other() {
    let options = json!({"driver": "quorum", "vote-threshold": 1, "read-pattern": "fifo",
                         "children": ["FILE0", "FILE1"]});
    check(&case("quorum fifo", 2, options));
}

#[test]
fn quorum_that_verifies_one_with_another_alignment() {
    let aligned = json!({"driver": "blkdebug", "image": "FILE1", "align": 4096, "max-transfer": 8192});
    let options = json!({"driver": "quorum", "vote-threshold": 2, "blkverify": true,
                         "children": ["FILE0", aligned]});
    check(&case("quorum blkverify", 2, options));
}

#[test]
fn blkverify_of_qcow2() {
    if tool("qemu-img", &["--version"]).is_none() {
        return;
    }
    let options = json!({"driver": "blkverify", "raw": "FILE0",
        "test": {"driver": "qcow2", "file": {"driver": "file", "filename": "PATHtest"}, "discard": "unmap"}});
    let mut case = case("blkverify", 1, options);
    let files = std::mem::replace(&mut case.create, Box::new(|_| Ok(())));
    case.create = Box::new(move |dir| {
        files(dir)?;
        let (path, size) = (dir.join("test"), SIZE.to_string());
        let output = tool("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &size]);
        if output.is_some_and(|o| o.status.success()) { Ok(()) } else { Err("qemu-img create".to_owned()) }
    });
    check(&DriverCase { resizable: true, ..case });
}

#[test]
fn blkdebug_without_rules() {
    let options = json!({"driver": "blkdebug", "image": "FILE0"});
    check(&DriverCase { resizable: true, ..case("blkdebug", 1, options) });
}

#[test]
fn blkdebug_with_rules_that_never_fire() {
    let options = json!({"driver": "blkdebug", "image": "FILE0", "discard": "unmap",
                         "inject-error": [{"event": "vmstate_load"}],
                         "set-state": [{"event": "pwritev", "state": 1, "new_state": 2}]});
    let case = case("blkdebug, rules", 1, options);
    check(&DriverCase { resizable: true, discarded: Discarded::Zeroes, ..case });
}

#[test]
fn blkdebug_with_limits() {
    let options = json!({"driver": "blkdebug", "image": "FILE0", "discard": "unmap", "align": 512,
                         "max-transfer": 4096, "opt-write-zero": 8192, "max-write-zero": 16384,
                         "opt-discard": 4096, "max-discard": 65536});
    let case = case("blkdebug, limits", 1, options);
    check(&DriverCase { resizable: true, discarded: Discarded::Anything, ..case });
}

#[test]
fn blklogwrites() {
    let options = json!({"driver": "blklogwrites", "file": "FILE0", "discard": "unmap",
                         "log": {"driver": "file", "filename": "PATHFILE1"}});
    let case = case("blklogwrites", 2, options);
    check(&DriverCase { resizable: true, discarded: Discarded::Zeroes, ..case });
}

#[test]
fn blklogwrites_in_large_sectors() {
    let options = json!({"driver": "blklogwrites", "file": "FILE0", "log-sector-size": 4096,
                         "log-super-update-interval": 1, "log": {"driver": "file", "filename": "PATHFILE1"}});
    check(&DriverCase { resizable: true, ..case("blklogwrites 4096", 2, options) });
}
