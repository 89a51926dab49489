//! Other options for nodes in use: what changes in the process, in the image and in the locks other programs see.

use std::path::Path;
use std::process::Command;

use client::Setup;
use ringblk_scenarios::{Rig, Wanted, pattern};
use serde_json::{Value, json};

use crate::load::Load;
use crate::{locks, qcow2, try_command};

/// Bytes of a disk.
const SIZE: u64 = 4 << 20;

fn info(image: &Path) -> Value {
    let out = Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(image).output().unwrap();
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

/// Whether qemu-img may write to an image now.
fn is_free(image: &Path) -> bool {
    let out = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2", "-r", "leaks"])
        .arg(image)
        .output()
        .unwrap();
    out.status.success()
}

#[test]
fn a_file_changes_its_descriptor_and_keeps_its_locks() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let pid = rig.daemon.pid();
    let image = rig.image("disk").display().to_string();
    let mut load = Load::start(rig.disk("disk", &Setup { queues: 1, ..Setup::default() }), SIZE, 3);
    let before = (locks(pid), rig.holdings());
    assert!(!before.0.is_empty());
    let file = |more: Value| {
        let mut options = json!({"driver": "file", "node-name": "node-disk", "filename": image});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        json!({"options": [options]})
    };
    for round in 0..20 {
        let more = match round % 4 {
            0 => json!({"aio": "threads"}),
            1 => json!({"discard": "unmap", "detect-zeroes": "on"}),
            2 => json!({"auto-read-only": true}),
            _ => json!({"cache": {"no-flush": true}}),
        };
        rig.command("blockdev-reopen", file(more));
        // Direct I/O, where the file system has it.
        let _ = try_command(&mut rig.qmp, "blockdev-reopen", &file(json!({"cache": {"direct": true}})));
        assert_eq!(locks(pid), before.0, "round {round}");
        load.check();
    }
    rig.command("blockdev-reopen", file(json!({})));
    let words = try_command(&mut rig.qmp, "blockdev-reopen", &file(json!({"locking": "off"}))).unwrap_err();
    assert_eq!(words, "Cannot change the option 'locking'");
    assert_eq!(locks(pid), before.0);
    load.end();
    rig.wait_holdings(before.1);
}

#[test]
fn an_image_becomes_read_only_and_writable_again() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    qcow2(&image, SIZE);
    let node = format!(
        "qcow2,node-name=image,file.driver=file,file.node-name=file,file.filename={}",
        image.display()
    );
    let mut rig = Rig::start_with(&[], &["--blockdev", &node]);
    let options = |read_only: bool| {
        let options =
            json!({"driver": "qcow2", "node-name": "image", "file": "file", "read-only": read_only});
        json!({"options": [options]})
    };
    rig.command(
        "block-dirty-bitmap-add",
        json!({"node": "image", "name": "marks", "granularity": 65536, "persistent": true}),
    );
    rig.add_export("disk", "image", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("disk", &Setup::default());
    disk.write(0, &pattern(1, 4096)).unwrap();
    let said = try_command(&mut rig.qmp, "blockdev-reopen", &options(true));
    assert_eq!(said, Err("Read-only block node 'image' cannot support read-write users".into()));
    disk.write(65536, &pattern(2, 4096)).unwrap();
    drop(disk);
    rig.command("block-export-del", json!({"id": "disk", "mode": "hard"}));
    rig.wait_for("the export's end", |rig| rig.command("query-block-exports", json!({})) == json!([]));
    assert!(!is_free(&image));
    let stored = |image: &Path| info(image)["format-specific"]["data"]["bitmaps"].clone();
    assert_eq!(stored(&image), Value::Null);
    for round in 0..3 {
        rig.command("blockdev-reopen", options(true));
        // The file followed, nothing is left to be done, and the marks are on disk for whoever reads the image now.
        let nodes = rig.command("query-named-block-nodes", json!({}));
        assert!(nodes.as_array().unwrap().iter().all(|n| n["ro"] == true), "{nodes}");
        assert_eq!(stored(&image)[0]["flags"], json!(["auto"]), "round {round}");
        let check =
            Command::new("qemu-img").args(["check", "-q", "-U", "-f", "qcow2"]).arg(&image).status().unwrap();
        assert!(check.success());
        rig.add_export("reader", "image", &json!({})).unwrap();
        let mut disk = rig.disk("reader", &Setup::default());
        assert!(disk.read(0, 4096).unwrap() == pattern(1, 4096));
        drop(disk);
        rig.command("block-export-del", json!({"id": "reader", "mode": "hard"}));
        rig.wait_for("the export's end", |rig| rig.command("query-block-exports", json!({})) == json!([]));
        rig.command("blockdev-reopen", options(false));
        assert_eq!(stored(&image)[0]["flags"], json!(["in-use", "auto"]), "round {round}");
    }
    rig.add_export("disk", "image", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("disk", &Setup::default());
    assert!(disk.read(65536, 4096).unwrap() == pattern(2, 4096));
    disk.write(1 << 20, &pattern(3, 4096)).unwrap();
    let marked = rig.command("query-named-block-nodes", json!({"flat": true}));
    let marked = marked.as_array().unwrap().iter().find(|n| n["node-name"] == "image").unwrap().clone();
    assert_eq!(marked["dirty-bitmaps"][0]["count"], json!(3 * 65536));
    assert_eq!(marked["dirty-bitmaps"][0]["recording"], true);
}

#[test]
fn an_image_goes_over_to_another_process_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    qcow2(&image, SIZE);
    let node = |active: bool| {
        json!({
            "driver": "qcow2", "node-name": "image", "active": active,
            "file": {"driver": "file", "node-name": "file", "filename": image.display().to_string()},
        })
    };
    let (mut here, mut there) = (Rig::start(&[]), Rig::start(&[]));
    here.command("blockdev-add", node(true));
    assert!(try_command(&mut there.qmp, "blockdev-add", &node(true)).is_err());
    // An inactive node stands the one that writes.
    there.command("blockdev-add", node(false));
    for round in 0..3u64 {
        here.add_export("disk", "image", &json!({"writable": true})).unwrap();
        let words = try_command(
            &mut here.qmp,
            "blockdev-set-active",
            &json!({"active": false, "node-name": "image"}),
        );
        assert_eq!(words, Err("Failed to inactivate node: Operation not permitted".into()));
        let words =
            try_command(&mut here.qmp, "blockdev-set-active", &json!({"active": false, "node-name": "file"}));
        assert_eq!(words, Err("Node has active parent node".into()));
        let mut disk = here.disk("disk", &Setup::default());
        for n in 0..round {
            assert!(disk.read(n * 65536, 4096).unwrap() == pattern(n, 4096), "round {round}, {n}");
        }
        disk.write(round * 65536, &pattern(round, 4096)).unwrap();
        drop(disk);
        // Taking it over fails as long as the other one has it.
        assert!(try_command(&mut there.qmp, "blockdev-set-active", &json!({"active": true})).is_err());
        here.command("block-export-del", json!({"id": "disk", "mode": "hard"}));
        here.wait_for("the export's end", |rig| rig.command("query-block-exports", json!({})) == json!([]));
        here.command("blockdev-set-active", json!({"active": false}));
        there.command("blockdev-set-active", json!({"active": true, "node-name": "image"}));
        std::mem::swap(&mut here, &mut there);
    }
    here.command("blockdev-del", json!({"node-name": "image"}));
    assert!(is_free(&image));
}

#[test]
fn caches_change_under_load() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    qcow2(&image, SIZE);
    let file = format!("file,node-name=file,filename={}", image.display());
    let mut rig = Rig::start_with(&[Wanted::node("disk", "qcow2,file=file")], &["--blockdev", &file]);
    let mut load = Load::start(rig.disk("disk", &Setup::default()), SIZE, 5);
    for round in 0..30u64 {
        let options = json!({
            "driver": "qcow2", "node-name": "node-disk", "file": "file",
            "l2-cache-size": 65536 << (round % 6), "l2-cache-entry-size": 512 << (round % 4),
            "refcount-cache-size": 65536 * (round % 5), "lazy-refcounts": round % 2 == 0,
        });
        rig.command("blockdev-reopen", json!({"options": [options]}));
        let done = load.done();
        while load.done() < done + 50 {
            load.check();
            std::thread::yield_now();
        }
    }
    load.end();
    rig.command("quit", json!({}));
    rig.daemon.wait(std::time::Duration::from_secs(30)).unwrap();
    assert!(is_free(&image));
}
