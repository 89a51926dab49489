//! Jobs of a running daemon over its control channel: images are created, and checked while a guest writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

use client::Setup;
use ringblk_scenarios::Rig;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Starts the creation of an image and waits for its end; the states on the way and the job as it is then.
fn create(rig: &mut Rig, id: &str, options: Value) -> (Vec<String>, Value) {
    rig.qmp.take_events();
    rig.command("blockdev-create", json!({"job-id": id, "options": options}));
    ended(rig, id)
}

fn ended(rig: &mut Rig, id: &str) -> (Vec<String>, Value) {
    let mut states = Vec::new();
    while states.last().is_none_or(|s| s != "concluded") {
        let is_ours = |data: &Value| data["id"] == id;
        let event = rig.qmp.wait_event_where("JOB_STATUS_CHANGE", is_ours).unwrap();
        states.push(event["data"]["status"].as_str().unwrap().to_owned());
    }
    let jobs = rig.command("query-jobs", json!({}));
    let job = jobs.as_array().unwrap().iter().find(|j| j["id"] == id).unwrap().clone();
    (states, job)
}

const GOOD: [&str; 5] = ["created", "running", "waiting", "pending", "concluded"];
const BAD: [&str; 4] = ["created", "running", "aborting", "concluded"];

fn allocated(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
}

#[test]
fn a_file_is_created_as_asked_and_opened_afterwards() {
    let mut rig = Rig::start(&[]);
    for (prealloc, least) in [("off", 0), ("falloc", MIB), ("full", MIB)] {
        let path = rig.folder().join(prealloc);
        // One that is there already is emptied.
        std::fs::write(&path, [7; 4096]).unwrap();
        let options = json!({"driver": "file", "filename": path, "size": MIB, "preallocation": prealloc});
        let (states, job) = create(&mut rig, prealloc, options);
        assert_eq!(states, GOOD, "{job}");
        assert_eq!(job["type"], "create");
        assert_eq!(job["current-progress"], job["total-progress"]);
        assert!(std::fs::read(&path).unwrap() == vec![0; MIB as usize]);
        assert!(allocated(&path) >= least, "{prealloc}: {}", allocated(&path));
        rig.command("blockdev-add", json!({"driver": "file", "node-name": prealloc, "filename": path}));
        rig.command("job-dismiss", json!({"id": prealloc}));
    }
    assert_eq!(rig.command("query-jobs", json!({})), json!([]));
}

#[test]
fn an_image_in_use_is_not_emptied() {
    let mut rig = Rig::start(&[]);
    let path = rig.folder().join("used");
    std::fs::write(&path, vec![7; MIB as usize]).unwrap();
    let file = json!({"driver": "file", "node-name": "n", "filename": path});
    rig.command("blockdev-add", file);
    rig.add_export("e", "n", &json!({"writable": true})).unwrap();
    let options = json!({"driver": "file", "filename": path, "size": 512});
    let (states, job) = create(&mut rig, "c", options);
    assert_eq!(states, BAD);
    let error = job["error"].as_str().unwrap();
    assert!(error.contains("lock") && error.contains("Is another process using the image"), "{error}");
    assert!(std::fs::read(&path).unwrap() == vec![7; MIB as usize]);
}

#[test]
fn what_cannot_be_created_is_said_by_the_job_and_leaves_nothing_open() {
    let mut rig = Rig::start(&[]);
    let before = rig.command("x-debug-query-block-graph", json!({}));
    for (id, options, words) in [
        ("a", json!({"driver": "file", "filename": "/no/such/folder/x", "size": 1}), "No such file"),
        ("b", json!({"driver": "file", "filename": rig.folder(), "size": 1}), "Is a directory"),
        ("c", json!({"driver": "raw", "file": "nobody", "size": 512}), "Cannot find device="),
        (
            "d",
            json!({"driver": "qcow2", "size": MIB, "file": {"driver": "file", "filename": "/no/such"}}),
            "No such file",
        ),
    ] {
        let (states, job) = create(&mut rig, id, options);
        assert_eq!(states, BAD, "{job}");
        assert!(job["error"].as_str().unwrap().contains(words), "{job}");
    }
    let refused =
        rig.qmp.execute("blockdev-create", json!({"job-id": "e", "options": {"driver": "null-co"}}));
    assert!(refused.unwrap_err().to_string().contains("Driver does not support blockdev-create"));
    assert_eq!(rig.command("x-debug-query-block-graph", json!({})), before);
}

/// A qcow2 image made and opened by the daemon, as node `q`.
fn qcow2(rig: &mut Rig) -> std::path::PathBuf {
    let path = rig.folder().join("q.qcow2");
    let (states, job) = create(rig, "f", json!({"driver": "file", "filename": path, "size": 0}));
    assert_eq!(states, GOOD, "{job}");
    rig.command("blockdev-add", json!({"driver": "file", "node-name": "file", "filename": path}));
    let (states, job) = create(rig, "g", json!({"driver": "qcow2", "file": "file", "size": 64 * MIB}));
    assert_eq!(states, GOOD, "{job}");
    rig.command("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "file"}));
    path
}

#[test]
fn an_image_is_checked_while_a_guest_writes() {
    let mut rig = Rig::start(&[]);
    let path = qcow2(&mut rig);
    rig.add_export("e", "q", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("e", &Setup::default());
    for round in 0..4u64 {
        for at in 0..32 {
            disk.write((round * 32 + at) << 16, &[round as u8 + 1; 65536]).unwrap();
        }
        let id = format!("check{round}");
        rig.qmp.take_events();
        rig.command("block-check", json!({"job-id": id, "node-name": "q"}));
        // Goes on meanwhile, or waits for the check: it is the guest's own in any case.
        disk.write((32 << 20) + (round << 20), &[9; 4096]).unwrap();
        let (states, job) = ended(&mut rig, &id);
        assert_eq!(states, GOOD, "{job}");
        let report = rig.command("query-block-check", json!({"id": id}));
        assert_eq!(report["corruptions"], 0, "{report}");
        assert_eq!(report["check-errors"], 0, "{report}");
        assert_eq!(report["leaks"], 0, "{report}");
        assert!(report["allocated-clusters"].as_u64().unwrap() >= (round + 1) * 32, "{report}");
        rig.command("job-dismiss", json!({"id": id}));
    }
    drop(disk);
    rig.wait_disconnected("e");
    rig.command("block-export-del", json!({"id": "e"}));
    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    rig.command("blockdev-del", json!({"node-name": "q"}));
    if let Ok(out) = Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(&path).output() {
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    }
}

#[test]
fn a_format_without_metadata_has_nothing_to_check() {
    let mut rig = Rig::start(&[]);
    rig.command("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    rig.command("block-check", json!({"job-id": "c", "node-name": "n"}));
    let (states, job) = ended(&mut rig, "c");
    assert_eq!(states, BAD);
    assert_eq!(job["error"], "The format of node 'n' does not support checks");
    assert!(rig.qmp.execute("query-block-check", json!({"id": "c"})).is_err());
    rig.command("job-dismiss", json!({"id": "c"}));
    rig.command("blockdev-del", json!({"node-name": "n"}));
}
