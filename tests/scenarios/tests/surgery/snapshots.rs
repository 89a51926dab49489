//! Overlays under a guest: where they go, what they and the images below hold, one point in time for several disks.

use std::process::Command;

use client::Setup;
use ringblk_scenarios::{Rig, Wanted, pattern};
use serde_json::{Value, json};

use crate::{qcow2, try_command};

/// Bytes of a disk.
const SIZE: u64 = 4 << 20;

fn edges(graph: &Value) -> Vec<String> {
    let name = |id: &Value| {
        let node = graph["nodes"].as_array().unwrap().iter().find(|n| n["id"] == *id);
        node.map_or("guest", |n| n["node-name"].as_str().unwrap()).to_owned()
    };
    let list = graph["edges"].as_array().unwrap().iter();
    let mut out: Vec<String> = list
        .map(|e| format!("{} -{}-> {}", name(&e["parent"]), e["name"].as_str().unwrap(), name(&e["child"])))
        .filter(|text| !text.contains('#'))
        .collect();
    out.sort();
    out
}

#[test]
fn an_overlay_goes_below_filters() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    qcow2(&folder.path().join("image"), SIZE);
    let image = format!("qcow2,node-name=image,file.driver=file,file.filename={}", at("image"));
    let mut rig = Rig::start_with(&[Wanted::node("disk", "raw,file=image")], &["--blockdev", &image]);
    // A format without an offset shows its child as it is, and is no filter to a snapshot.
    let filter = json!({"driver": "raw", "node-name": "plain", "file": "node-disk"});
    rig.command("blockdev-insert-node", json!({"node": filter, "parent": "disk"}));
    let mut disk = rig.disk("disk", &Setup::default());
    disk.write(0, &pattern(1, 4096)).unwrap();
    rig.command(
        "blockdev-snapshot-sync",
        json!({"device": "disk", "snapshot-file": at("above"), "snapshot-node-name": "above"}),
    );
    disk.write(4096, &pattern(2, 4096)).unwrap();
    assert!(disk.read(0, 8192).unwrap() == [pattern(1, 4096), pattern(2, 4096)].concat());
    let graph = rig.command("query-block-graph", json!({}));
    assert_eq!(
        edges(&graph),
        [
            "above -backing-> plain",
            "guest -root-> above",
            "node-disk -file-> image",
            "plain -file-> node-disk"
        ]
    );
    // Its image names the one below by a path that leads there.
    drop(disk);
    rig.command("block-export-del", json!({"id": "disk", "mode": "hard"}));
    let info = Command::new("qemu-img").args(["info", "-U", "--output=json", &at("above")]).output().unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["full-backing-filename"], json!(at("image")));
}

#[test]
fn encrypted_images_stay_encrypted() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    // Room for the header of LUKS before the data.
    let size = SIZE + (4 << 20);
    qcow2(&folder.path().join("image"), size);
    let secret = "secret,id=key,data=geheim";
    let image = format!("qcow2,node-name=image,file.driver=file,file.filename={}", at("image"));
    let mut rig = Rig::start_with(&[], &["--object", secret, "--blockdev", &image]);
    rig.command(
        "blockdev-create",
        json!({"job-id": "make", "options": {
            "driver": "luks", "file": "image", "key-secret": "key", "size": SIZE, "iter-time": 10,
        }}),
    );
    rig.wait_for("the image", |rig| {
        let jobs = rig.command("query-jobs", json!({}));
        assert_eq!(jobs[0]["error"], Value::Null);
        jobs[0]["status"] == "concluded"
    });
    rig.command(
        "blockdev-add",
        json!({"driver": "luks", "node-name": "clear", "file": "image", "key-secret": "key"}),
    );
    rig.add_export("disk", "clear", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("disk", &Setup::default());
    disk.write(0, &pattern(1, 4096)).unwrap();
    rig.command(
        "blockdev-snapshot-sync",
        json!({"node-name": "clear", "snapshot-file": at("above"), "snapshot-node-name": "above"}),
    );
    disk.write(4096, &pattern(2, 4096)).unwrap();
    disk.flush().unwrap();
    assert!(disk.read(0, 8192).unwrap() == [pattern(1, 4096), pattern(2, 4096)].concat());
    let graph = rig.command("query-block-graph", json!({}));
    assert_eq!(edges(&graph), ["above -backing-> image", "clear -file-> above", "guest -root-> clear"]);
    // Nothing of it lies in the overlay in the clear.
    let bytes = std::fs::read(at("above")).unwrap();
    assert!(!bytes.windows(64).any(|w| w == &pattern(2, 4096)[..64]));
}

#[test]
fn several_disks_stop_at_one_point_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (mut nodes, mut wanted) = (Vec::new(), Vec::new());
    for id in ["a", "b"] {
        qcow2(&folder.path().join(id), SIZE);
        nodes.push(format!("file,node-name=file-{id},filename={}", at(id)));
        wanted.push(Wanted::node(id, &format!("qcow2,file=file-{id}")));
    }
    let mut arguments = vec!["--object", "iothread,id=t0"];
    for node in &nodes {
        arguments.extend(["--blockdev", node]);
    }
    let mut rig = Rig::start_with(&wanted, &arguments);
    let (mut a, mut b) = (rig.disk("a", &Setup::default()), rig.disk("b", &Setup::default()));
    let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = end.clone();
    // What is on b was on a before.
    let writer = std::thread::spawn(move || {
        let mut n = 0u64;
        while !ended.load(std::sync::atomic::Ordering::Relaxed) {
            n += 1;
            let mut block = vec![0; 512];
            block[..8].copy_from_slice(&n.to_le_bytes());
            a.write(0, &block).unwrap();
            b.write(0, &block).unwrap();
        }
        n
    });
    for round in 0..20 {
        let action = |id: &str| {
            let below = if round == 0 { format!("node-{id}") } else { format!("{id}{}", round - 1) };
            let name = format!("{id}{round}");
            json!({"type": "blockdev-snapshot-sync", "data": {
                "node-name": below, "snapshot-file": at(&name), "snapshot-node-name": name,
            }})
        };
        rig.command("transaction", json!({"actions": [action("a"), action("b")]}));
    }
    end.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(writer.join().unwrap() > 0);
    rig.command("quit", json!({}));
    rig.daemon.wait(std::time::Duration::from_secs(30)).unwrap();
    let read = |name: &str| {
        let (from, to) = (at(name), at("raw"));
        let done = Command::new("qemu-img").args(["convert", "-O", "raw", &from, &to]).status().unwrap();
        assert!(done.success());
        let bytes = std::fs::read(&to).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    };
    let mut last = 0;
    for round in std::iter::once(String::new()).chain((0..19).map(|n| n.to_string())) {
        let (first, second) = (read(&format!("a{round}")), read(&format!("b{round}")));
        assert!(first == second || first == second + 1, "after round {round}: {first} and {second}");
        assert!(first >= last);
        last = first;
    }
}

#[test]
fn a_backing_file_comes_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for name in ["base", "top"] {
        qcow2(&folder.path().join(name), SIZE);
    }
    let node = |name: &str| format!("file,node-name=file-{name},filename={}", at(name));
    let top = json!({"driver": "qcow2", "node-name": "top", "file": "file-top", "backing": null});
    let (file_base, file_top, top_text) = (node("base"), node("top"), top.to_string());
    let mut rig = Rig::start_with(
        &[Wanted::node("base", "qcow2,file=file-base")],
        &["--blockdev", &file_base, "--blockdev", &file_top, "--blockdev", &top_text],
    );
    rig.disk("base", &Setup::default()).write(0, &pattern(1, 4096)).unwrap();
    rig.command("block-export-del", json!({"id": "base", "mode": "hard"}));
    rig.wait_for("the export's end", |rig| rig.command("query-block-exports", json!({})) == json!([]));
    rig.add_export("disk", "top", &json!({"writable": true})).unwrap();
    let mut disk = rig.disk("disk", &Setup::default());
    assert!(disk.read(0, 4096).unwrap() == [0; 4096]);
    let mut options = top.clone();
    options["backing"] = json!("node-base");
    rig.command("blockdev-reopen", json!({"options": [options]}));
    assert!(disk.read(0, 4096).unwrap() == pattern(1, 4096));
    disk.write(512, &pattern(2, 512)).unwrap();
    assert!(
        disk.read(512, 512).unwrap() == pattern(2, 512)
            && disk.read(0, 512).unwrap() == pattern(1, 4096)[..512]
    );
    let absent = json!({"driver": "qcow2", "node-name": "top", "file": "file-top"});
    let said = try_command(&mut rig.qmp, "blockdev-reopen", &json!({"options": [absent]}));
    assert_eq!(said, Err("backing is missing for 'top'".into()));
    rig.command(
        "change-backing-file",
        json!({"device": "top", "image-node-name": "top", "backing-file": at("base")}),
    );
    rig.command("blockdev-reopen", json!({"options": [top]}));
    // What was not copied is gone from view, what was stays.
    assert!(disk.read(8192, 4096).unwrap() == [0; 4096]);
    assert!(disk.read(512, 512).unwrap() == pattern(2, 512));
    let info = Command::new("qemu-img").args(["info", "-U", "--output=json", &at("top")]).output().unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&json!(at("base")), &json!("qcow2"))
    );
}
