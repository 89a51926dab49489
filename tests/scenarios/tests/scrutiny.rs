//! Drivers that look at what passes, below a front end at work: a quorum with a child that fails, a format beside its raw
//! twin, errors on purpose, and a log of writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use client::blk::{op, status};
use client::disk::{Payload, Request, Token};
use client::{Disk, Setup};
use ringblk_scenarios::{Rig, Rng, pattern};
use serde_json::{Value, json};

const SIZE: usize = 4 << 20;
const BLOCK: usize = 4096;
/// Requests kept in flight on each queue.
const DEPTH: usize = 16;

/// A file of zeroes in the rig's folder, as the definition of a node of that name.
fn file(rig: &Rig, name: &str) -> Value {
    let path = rig.folder().join(name);
    std::fs::File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
    json!({"driver": "file", "node-name": name, "filename": path.display().to_string()})
}

/// Exports the node, on two queues.
fn export(rig: &mut Rig, mut node: Value) -> Disk {
    node["node-name"] = json!("top");
    rig.command("blockdev-add", node);
    rig.add_export("e", "top", &json!({"writable": true, "num-queues": 2})).unwrap();
    rig.disk("e", &Setup { queues: 2, ..Setup::default() })
}

/// Random reads and writes of blocks on two queues, many at a time, none of them beside another one of the same block.
/// Everything must succeed and read what was written. Returns what the disk holds.
fn work(disk: &mut Disk, requests: usize, seed: u64) -> Vec<u8> {
    let mut content = vec![0u8; SIZE];
    let mut rng = Rng::new(seed);
    let mut flying: Vec<(Token, usize, bool)> = Vec::new();
    // Completions as they come: the name of one that is kept for later would be given out again.
    let finish_one = |disk: &mut Disk, content: &[u8], queue: u16, flying: &mut Vec<(Token, usize, bool)>| {
        let done = disk.wait_any(queue).unwrap();
        let at = flying.iter().position(|f| f.0 == done.token).unwrap();
        let (_, block, reads) = flying.swap_remove(at);
        assert_eq!(done.status, status::OK, "block {block}, a read: {reads}");
        if reads {
            assert!(done.data == content[block * BLOCK..][..BLOCK], "block {block} reads as something else");
        }
    };
    for n in 0..requests {
        let block = rng.below((SIZE / BLOCK) as u64) as usize;
        while let Some((token, ..)) = flying.iter().find(|f| f.1 == block) {
            finish_one(disk, &content, token.queue, &mut flying);
        }
        while flying.len() >= 2 * DEPTH {
            finish_one(disk, &content, flying[0].0.queue, &mut flying);
        }
        let sector = (block * BLOCK / 512) as u64;
        let reads = rng.below(2) == 0;
        let request = if reads {
            Request::new(op::IN, sector, Payload::In(BLOCK as u32))
        } else {
            let data = pattern(seed + n as u64, BLOCK);
            content[block * BLOCK..][..BLOCK].copy_from_slice(&data);
            Request::new(op::OUT, sector, Payload::Out(data))
        };
        let queue = (n % 2) as u16;
        flying.push((disk.submit(queue, &request).unwrap(), block, reads));
        disk.kick(queue).unwrap();
    }
    while let Some((token, ..)) = flying.first() {
        finish_one(disk, &content, token.queue, &mut flying);
    }
    disk.flush().unwrap();
    content
}

fn image(rig: &Rig, name: &str) -> Vec<u8> {
    std::fs::read(rig.folder().join(name)).unwrap()
}

#[test]
fn a_guest_does_not_notice_that_a_child_of_a_quorum_fails() {
    let mut rig = Rig::start(&[]);
    let bad = json!({"driver": "blkdebug", "node-name": "bad", "image": file(&rig, "b"),
                     "inject-error": [{"event": "none", "iotype": "read"}, {"event": "none", "iotype": "write"},
                                      {"event": "none", "iotype": "flush"}]});
    let quorum = json!({"driver": "quorum", "vote-threshold": 2,
                        "children": [file(&rig, "a"), bad, file(&rig, "c")]});
    let mut disk = export(&mut rig, quorum);
    let content = work(&mut disk, 2000, 1);
    for kind in ["read", "write", "flush"] {
        let event = rig.qmp.wait_event_where("QUORUM_REPORT_BAD", |d| d["type"] == kind).unwrap();
        assert_eq!(event["data"]["node-name"], "bad", "{event}");
        assert_eq!(event["data"]["error"], "Input/output error", "{event}");
    }
    let events = rig.qmp.take_events();
    assert!(events.iter().all(|e| e["event"] == "QUORUM_REPORT_BAD"), "{events:?}");
    assert!(image(&rig, "a") == content && image(&rig, "c") == content);
    assert!(image(&rig, "b").iter().all(|b| *b == 0), "nothing went past the failing node");
    // Two children that fail are one too many: the guest is told, and so is the operator.
    disk.write((SIZE - BLOCK) as u64, &[7; BLOCK]).unwrap();
    let other = rig.folder().join("c");
    std::fs::OpenOptions::new().write(true).open(&other).unwrap().set_len(BLOCK as u64).unwrap();
    let last = (SIZE / 512 - 8) as u64;
    let done = disk.run(0, &Request::new(op::IN, last, Payload::In(BLOCK as u32))).unwrap();
    assert_eq!(done.status, status::IOERR);
    let event = rig.qmp.wait_event("QUORUM_FAILURE").unwrap();
    assert_eq!(event["data"]["reference"], "top", "{event}");
    assert_eq!(event["data"]["sector-num"], last, "{event}");
    assert_eq!(event["data"]["sectors-count"], 8, "{event}");
    rig.assert_running();
}

#[test]
fn a_child_that_rots_is_repaired_while_the_guest_works() {
    let mut rig = Rig::start(&[]);
    let quorum = json!({"driver": "quorum", "vote-threshold": 2, "rewrite-corrupted": true,
                        "children": [file(&rig, "a"), file(&rig, "b"), file(&rig, "c")]});
    let mut disk = export(&mut rig, quorum);
    let content = work(&mut disk, 500, 2);
    std::fs::write(rig.folder().join("b"), pattern(9, SIZE)).unwrap();
    for block in 0..SIZE / BLOCK {
        let data = disk.read((block * BLOCK) as u64, BLOCK as u32).unwrap();
        assert!(data == content[block * BLOCK..][..BLOCK], "block {block}");
    }
    let event = rig.qmp.wait_event("QUORUM_REPORT_BAD").unwrap();
    assert_eq!((&event["data"]["node-name"], event["data"].get("error")), (&json!("b"), None), "{event}");
    assert!(image(&rig, "b") == content);
}

#[test]
fn a_format_beside_its_raw_twin() {
    let mut rig = Rig::start(&[]);
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(rig.folder().join("test"))
        .arg(SIZE.to_string())
        .status();
    if !made.is_ok_and(|s| s.success()) {
        eprintln!("skipped: no qemu-img");
        return;
    }
    let path = rig.folder().join("test").display().to_string();
    let test = json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}});
    let verify = json!({"driver": "blkverify", "raw": file(&rig, "raw"), "test": test});
    let mut disk = export(&mut rig, verify);
    let content = work(&mut disk, 1000, 3);
    assert!(image(&rig, "raw") == content);
    // The twin is changed behind its back: an error for the guest and a line in the log, and life goes on.
    let mut rotten = content.clone();
    rotten[BLOCK + 7] ^= 1;
    std::fs::write(rig.folder().join("raw"), &rotten).unwrap();
    let done = disk.run(0, &Request::new(op::IN, 8, Payload::In(BLOCK as u32))).unwrap();
    assert_eq!(done.status, status::IOERR);
    assert_eq!(disk.read(0, BLOCK as u32).unwrap(), content[..BLOCK]);
    let words = format!(
        "blkverify 'top': read offset={BLOCK} bytes={BLOCK} contents mismatch at offset {}",
        BLOCK + 7
    );
    rig.wait_for(&format!("'{words}' in the log"), |rig| rig.daemon.stderr().contains(&words));
    rig.assert_running();
}

#[test]
fn a_guest_sees_the_errors_that_were_asked_for() {
    let mut rig = Rig::start(&[]);
    let debug = json!({"driver": "blkdebug", "image": file(&rig, "image"),
                       "inject-error": [{"event": "pwritev", "sector": 8, "errno": 28, "once": true}]});
    let mut disk = export(&mut rig, debug);
    disk.write(0, &[1; BLOCK]).unwrap();
    let write = Request::new(op::OUT, 8, Payload::Out(vec![2; BLOCK]));
    assert_eq!(disk.run(1, &write).unwrap().status, status::IOERR);
    let event = rig.qmp.wait_event("BLOCK_IO_ERROR").unwrap();
    assert_eq!(event["data"]["nospace"], true, "{event}");
    assert_eq!(disk.run(1, &write).unwrap().status, status::OK);
    assert_eq!(disk.read(BLOCK as u64, BLOCK as u32).unwrap(), [2; BLOCK]);
}

#[test]
fn a_log_of_what_a_guest_wrote_says_what_is_on_its_disk() {
    let mut rig = Rig::start(&[]);
    let node = json!({"driver": "blklogwrites", "file": file(&rig, "image"), "log": file(&rig, "log")});
    let mut disk = export(&mut rig, node);
    let content = work(&mut disk, 1000, 4);
    // Flushed: the log is complete, whatever becomes of the process.
    let log = image(&rig, "log");
    let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(8)), (0x6a_7366_7773_6872, 1));
    let mut replayed = vec![0; SIZE];
    let mut at = 512;
    for _ in 0..word(16) {
        let (sector, len) = (word(at) as usize * 512, word(at + 8) as usize * 512);
        replayed[sector..sector + len].copy_from_slice(&log[at + 512..at + 512 + len]);
        at += 512 + len;
    }
    assert!(replayed == content && image(&rig, "image") == content);
}
