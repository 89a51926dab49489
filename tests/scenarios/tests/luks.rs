//! LUKS over anything: real cryptography on top of other formats and filters, with snapshots below, under a guest's writes,
//! and as QEMU reads it afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

use client::Setup;
use ringblk_scenarios::Rig;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const PASSPHRASE: &str = "over anything";

/// Runs a job that creates an image, to its good end.
fn create(rig: &mut Rig, id: &str, options: Value) {
    rig.command("blockdev-create", json!({"job-id": id, "options": options}));
    rig.qmp.wait_event_where("JOB_STATUS_CHANGE", |d| d["id"] == id && d["status"] == "concluded").unwrap();
    let jobs = rig.command("query-jobs", json!({}));
    let job = jobs.as_array().unwrap().iter().find(|j| j["id"] == id).unwrap().clone();
    assert_eq!(job.get("error"), None, "{job}");
    rig.command("job-dismiss", json!({"id": id}));
}

/// An empty file of the daemon's folder, as a node of that name.
fn file(rig: &mut Rig, name: &str) {
    let path = rig.folder().join(name);
    std::fs::write(&path, []).unwrap();
    rig.command("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path}));
}

fn qcow2(rig: &mut Rig, name: &str, size: u64) {
    let under = format!("{name}.file");
    file(rig, &under);
    create(rig, name, json!({"driver": "qcow2", "file": under, "size": size}));
    rig.command(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": name, "file": under, "discard": "unmap"}),
    );
}

/// Makes the node `below` a LUKS volume of 8 MiB, `luks` on top, exported as `e`.
fn encrypt(rig: &mut Rig, below: &str) {
    format(rig, below);
    open(rig, below);
}

/// The first half of it.
fn format(rig: &mut Rig, below: &str) {
    rig.command("object-add", json!({"qom-type": "secret", "id": "key", "data": PASSPHRASE}));
    create(
        rig,
        "luks",
        json!({"driver": "luks", "file": below, "size": 8 * MIB, "key-secret": "key", "iter-time": 10}),
    );
}

/// The second half.
fn open(rig: &mut Rig, below: &str) {
    rig.command(
        "blockdev-add",
        json!({"driver": "luks", "node-name": "luks", "file": below, "key-secret": "key"}),
    );
    rig.add_export("e", "luks", &json!({"writable": true, "num-queues": 2})).unwrap();
}

/// What is written at each place, in this round.
fn pattern(at: u64, round: u8) -> Vec<u8> {
    (0..4096u32).map(|i| (i as u8).wrapping_mul(31) ^ (at >> 12) as u8 ^ round).collect()
}

fn places() -> impl Iterator<Item = u64> {
    (0..8 * MIB).step_by(73 * 4096)
}

/// Writes a pattern through the export, and reads what was written.
fn work(rig: &Rig, round: u8) {
    let mut disk = rig.disk("e", &Setup::default());
    for at in places() {
        disk.write(at, &pattern(at, round)).unwrap();
    }
    disk.flush().unwrap();
    for at in places() {
        assert!(disk.read(at, 4096).unwrap() == pattern(at, round), "{at}");
    }
}

fn still_there(rig: &Rig, round: u8) {
    let mut disk = rig.disk("e", &Setup::default());
    for at in places() {
        assert!(disk.read(at, 4096).unwrap() == pattern(at, round), "{at}");
    }
}

/// What qemu-io reads of the volume in the options; nothing without the tool.
fn qemu_reads(options: &str, round: u8) {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-io is not installed");
        return;
    }
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    for at in places().take(5) {
        let read = format!("read -v {at} 4096");
        let output = Command::new("qemu-io")
            .args(["--object", &secret, "--image-opts", "-r", "-c", &read, options])
            .output()
            .unwrap();
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{shown}{}", String::from_utf8_lossy(&output.stderr));
        let bytes: Vec<u8> = shown
            .lines()
            .filter_map(|l| l.split_once(":  "))
            .flat_map(|(_, hex)| {
                hex.split("  ").next().unwrap_or("").split(' ').map(str::to_owned).collect::<Vec<_>>()
            })
            .filter_map(|h| u8::from_str_radix(&h, 16).ok())
            .collect();
        assert!(bytes == pattern(at, round), "{at}: {shown}");
    }
}

/// No plaintext in the file.
fn ciphertext(path: &Path, round: u8) {
    let disk = std::fs::read(path).unwrap();
    for at in places().take(4) {
        let plain = pattern(at, round);
        assert!(!disk.windows(64).any(|w| w == &plain[..64]), "plaintext of {at} in {}", path.display());
    }
}

#[test]
fn over_qcow2_with_a_snapshot_below() {
    let mut rig = Rig::start(&[]);
    qcow2(&mut rig, "q", 16 * MIB);
    encrypt(&mut rig, "q");
    work(&rig, 1);
    rig.wait_disconnected("e");
    // The overlay comes between the volume and what it lay on.
    file(&mut rig, "o.file");
    create(&mut rig, "o", json!({"driver": "qcow2", "file": "o.file", "size": 16 * MIB}));
    rig.command(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "o", "file": "o.file", "backing": null}),
    );
    rig.command("blockdev-snapshot", json!({"node": "q", "overlay": "o"}));
    still_there(&rig, 1);
    rig.wait_disconnected("e");
    work(&rig, 2);
    rig.wait_disconnected("e");
    let (below, above) = (rig.folder().join("q.file"), rig.folder().join("o.file"));
    rig.command("quit", json!({}));
    assert!(rig.daemon.wait(std::time::Duration::from_secs(30)).unwrap().success());
    ciphertext(&below, 1);
    ciphertext(&above, 2);
    let (below, above) = (below.display(), above.display());
    qemu_reads(&format!("driver=luks,key-secret=key,file.driver=qcow2,file.file.filename={below}"), 1);
    let chain = format!(
        "driver=luks,key-secret=key,file.driver=qcow2,file.file.filename={above},file.backing.driver=qcow2,\
         file.backing.file.filename={below}"
    );
    qemu_reads(&chain, 2);
}

#[test]
fn over_a_window_of_a_file() {
    let mut rig = Rig::start(&[]);
    let path = rig.folder().join("w");
    std::fs::write(&path, vec![0; 20 << 20]).unwrap();
    rig.command("blockdev-add", json!({"driver": "file", "node-name": "w", "filename": path}));
    rig.command("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "w", "offset": MIB}));
    encrypt(&mut rig, "r");
    work(&rig, 3);
    rig.wait_disconnected("e");
    let path = rig.folder().join("w");
    ciphertext(&path, 3);
    rig.command("quit", json!({}));
    assert!(rig.daemon.wait(std::time::Duration::from_secs(30)).unwrap().success());
    let shown = path.display();
    qemu_reads(
        &format!("driver=luks,key-secret=key,file.driver=raw,file.offset={MIB},file.file.filename={shown}"),
        3,
    );
}

#[test]
fn over_a_cache_that_is_written_back() {
    let mut rig = Rig::start(&[]);
    qcow2(&mut rig, "q", 16 * MIB);
    rig.command(
        "blockdev-add",
        json!({"driver": "cache", "node-name": "c", "file": "q", "mode": "writeback", "size": MIB}),
    );
    encrypt(&mut rig, "c");
    work(&rig, 4);
    still_there(&rig, 4);
    rig.wait_disconnected("e");
    let path = rig.folder().join("q.file");
    rig.command("quit", json!({}));
    assert!(rig.daemon.wait(std::time::Duration::from_secs(30)).unwrap().success());
    ciphertext(&path, 4);
    let shown = path.display();
    qemu_reads(&format!("driver=luks,key-secret=key,file.driver=qcow2,file.file.filename={shown}"), 4);
}

#[test]
fn over_a_throttle_over_a_quorum() {
    let mut rig = Rig::start(&[]);
    // A quorum has no size to change: the volume is made in one of its children, the others are copies of it.
    file(&mut rig, "a");
    format(&mut rig, "a");
    for name in ["b", "c"] {
        file(&mut rig, name);
        std::fs::copy(rig.folder().join("a"), rig.folder().join(name)).unwrap();
        let size = std::fs::metadata(rig.folder().join(name)).unwrap().len();
        rig.command("block_resize", json!({"node-name": name, "size": size}));
    }
    rig.command(
        "blockdev-add",
        json!({"driver": "quorum", "node-name": "q", "vote-threshold": 2, "children": ["a", "b", "c"]}),
    );
    rig.command(
        "object-add",
        json!({"qom-type": "throttle-group", "id": "g", "limits": {"bps-total": 1_u64 << 40}}),
    );
    rig.command(
        "blockdev-add",
        json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "q"}),
    );
    open(&mut rig, "t");
    work(&rig, 5);
    rig.wait_disconnected("e");
    let paths = ["a", "b", "c"].map(|name| rig.folder().join(name));
    rig.command("quit", json!({}));
    assert!(rig.daemon.wait(std::time::Duration::from_secs(30)).unwrap().success());
    for path in &paths {
        ciphertext(path, 5);
        // Each copy is the volume.
        qemu_reads(
            &format!("driver=luks,key-secret=key,file.driver=file,file.filename={}", path.display()),
            5,
        );
    }
}
