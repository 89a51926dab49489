//! Images that are checked while a front end writes to them at full load: nothing is found where nothing is wrong, and what
//! is wrong is found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use client::blk::{Segment, op, status};
use client::disk::{Disk, Payload, Request};
use client::{Setup, qmp};
use ringblk_scenarios::{Rig, Rng, Wanted};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const MAPPING: &str =
    "writable=on,num-queues=2,iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.1.iothread=b";

fn tool(name: &str, arguments: &[&str]) -> (i32, String) {
    let out = Command::new(name).args(arguments).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap_or(-1), text)
}

fn done(name: &str, arguments: &[&str]) {
    let (code, text) = tool(name, arguments);
    assert_eq!(code, 0, "{name} {arguments:?}: {text}");
}

/// Random requests on two queues from a thread of its own, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Disk, u64)>,
}

impl Load {
    /// In `range` of the disk, bytes.
    fn start(mut disk: Disk, range: std::ops::Range<u64>, seed: u64) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rng = Rng::new(seed);
            let mut finished = 0;
            while !told.load(Relaxed) {
                for queue in 0..2 {
                    for _ in 0..8 {
                        disk.submit(queue, &random(&mut rng, &range)).unwrap();
                    }
                    disk.kick(queue).unwrap();
                }
                for queue in 0..2 {
                    for _ in 0..8 {
                        assert_eq!(disk.wait_any(queue).unwrap().status, status::OK);
                        finished += 1;
                    }
                }
            }
            (disk, finished)
        });
        Load { stop, thread }
    }

    /// The disk again, and how many requests there were.
    fn end(self) -> (Disk, u64) {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap()
    }
}

fn random(rng: &mut Rng, range: &std::ops::Range<u64>) -> Request {
    let sectors = (range.end - range.start) / 512;
    let count = 1 + rng.below(256);
    let at = range.start / 512 + rng.below(sectors - count);
    let segment = |flags| {
        // Long enough for whole clusters to go.
        let count = (count * 8).min(range.end / 512 - at);
        Payload::Out(Segment { sector: at, sectors: count as u32, flags }.encode().to_vec())
    };
    match rng.below(10) {
        0 | 1 => Request::new(op::DISCARD, 0, segment(0)),
        2 => Request::new(op::WRITE_ZEROES, 0, segment(rng.below(2) as u32)),
        3 => Request::new(op::FLUSH, 0, Payload::None),
        4 => Request::new(op::IN, at, Payload::In(count as u32 * 512)),
        _ => Request::new(op::OUT, at, Payload::Out(vec![rng.bits() as u8; count as usize * 512])),
    }
}

/// A daemon with an image behind two queues on two iothreads, as node `node-e`.
fn serve(path: &Path, node: &str) -> Rig {
    let node = format!("qcow2,discard=unmap,file.driver=file,file.filename={},{node}", path.display());
    let wanted = Wanted::node("e", node.trim_end_matches(',')).options(MAPPING);
    Rig::start_with(&[wanted], &["--object", "iothread,id=a", "--object", "iothread,id=b"])
}

fn disk(rig: &Rig) -> Disk {
    rig.disk("e", &Setup { queues: 2, memory: vec![(0, 64 << 20)], ..Setup::default() })
}

/// Checks once; the report.
fn check(qmp: &mut qmp::Client, id: &str) -> Value {
    let run = |qmp: &mut qmp::Client, command: &str, arguments| qmp.execute(command, arguments).unwrap();
    run(qmp, "block-check", json!({"job-id": id, "node-name": "node-e"}));
    loop {
        let ours = |data: &Value| data["id"] == id;
        let event = qmp.wait_event_where("JOB_STATUS_CHANGE", ours).unwrap();
        if event["data"]["status"] == "concluded" {
            break;
        }
    }
    let jobs = run(qmp, "query-jobs", json!({}));
    let job = jobs.as_array().unwrap().iter().find(|j| j["id"] == id).unwrap().clone();
    assert_eq!(job["error"], Value::Null, "{job}");
    assert_eq!(job["current-progress"], job["total-progress"], "{job}");
    let report = run(qmp, "query-block-check", json!({"id": id}));
    run(qmp, "job-dismiss", json!({"id": id}));
    report
}

fn assert_clean(report: &Value, what: &str) {
    for figure in ["corruptions", "leaks", "check-errors"] {
        assert_eq!(report[figure], 0, "{what}: {report}");
    }
    assert_eq!(report["messages"], json!([]), "{what}: {report}");
}

#[test]
fn an_image_in_order_stays_without_findings_under_load() {
    for (seed, options, node, size) in [
        (1, "cluster_size=64k", "", 256 * MIB),
        (2, "cluster_size=4k,refcount_bits=8", "l2-cache-size=65536,l2-cache-entry-size=512", 64 * MIB),
        (3, "extended_l2=on,cluster_size=32k", "", 128 * MIB),
        (4, "lazy_refcounts=on,cluster_size=16k", "", 128 * MIB),
        (5, "cluster_size=512,refcount_bits=64", "l2-cache-size=65536,l2-cache-entry-size=512", 8 * MIB),
        (6, "compat=0.10,cluster_size=8k", "pass-discard-other=on", 64 * MIB),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let name = path.to_str().unwrap();
        done("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, &size.to_string()]);
        if seed % 2 == 0 {
            // Clusters that are shared: each write takes its own copy, of tables too.
            done("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 1 0 {}", size / 2), name]);
            done("qemu-img", &["snapshot", "-c", "then", name]);
        }
        let mut rig = serve(&path, node);
        let load = Load::start(disk(&rig), 0..size, seed);
        for n in 0..8 {
            let report = check(&mut rig.qmp, &format!("c{n}"));
            assert_clean(&report, options);
            assert_eq!(report["total-clusters"].as_u64().unwrap() % 2048, 0);
            if n == 5 && seed % 2 == 0 {
                let snapshot = json!({"device": "node-e", "name": "then"});
                rig.command("blockdev-snapshot-delete-internal-sync", snapshot);
            }
        }
        let (disk, finished) = load.end();
        assert!(finished > 100, "{finished} requests during eight checks");
        // At rest the figures are those of the offline check.
        let report = check(&mut rig.qmp, "rest");
        assert_clean(&report, options);
        let (code, text) = tool("qemu-img", &["check", "-U", "--output=json", "-f", "qcow2", name]);
        assert_eq!(code, 0, "{options}: {text}");
        let theirs: Value = serde_json::from_str(&text).unwrap();
        for figure in [
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
            "image-end-offset",
        ] {
            let theirs = theirs.get(figure).cloned().unwrap_or(json!(0));
            assert_eq!(report[figure], theirs, "{options}: {figure}");
        }
        drop(disk);
        assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
        let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", name]);
        assert_eq!(code, 0, "{options}: {text}");
    }
}

/// An image, and where its metadata is on disk.
struct Image {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Image {
    /// The first half has data.
    fn new(size: u64) -> Image {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let name = path.to_str().unwrap();
        done("qemu-img", &["create", "-q", "-f", "qcow2", name, &size.to_string()]);
        done("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 1 0 {}", size / 2), name]);
        Image { path, _folder: folder }
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        std::fs::File::open(&self.path).unwrap().read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        std::fs::OpenOptions::new().write(true).open(&self.path).unwrap().write_all_at(bytes, at).unwrap();
    }

    /// Where the L2 entry of a guest offset is.
    fn l2_entry(&self, guest: u64) -> u64 {
        let table = self.word(self.word(40) + guest / (512 * MIB) * 8) & 0x00ff_ffff_ffff_fe00;
        table + guest % (512 * MIB) / 65536 * 8
    }

    /// Where the refcount of the host cluster of a guest offset is.
    fn refcount(&self, guest: u64) -> u64 {
        let cluster = (self.word(self.l2_entry(guest)) & 0x00ff_ffff_ffff_fe00) / 65536;
        let block = self.word(self.word(48) + cluster / 32768 * 8);
        block + cluster % 32768 * 2
    }
}

#[test]
fn damage_is_found_under_load() {
    // What is damaged lies where the load is not, so that nothing puts it right by the way.
    let victim = 17 * MIB;
    for cached in [false, true] {
        let image = Image::new(128 * MIB);
        let mut rig = serve(&image.path, "");
        let mut disk = disk(&rig);
        if cached {
            assert_eq!(disk.read(victim, 4096).unwrap(), [1; 4096]);
        }
        let load = Load::start(disk, 64 * MIB..128 * MIB, 7);
        assert_clean(&check(&mut rig.qmp, "before"), "before");

        // A count that is too high: a leak, and an entry that says it is the only one.
        let count = image.refcount(victim);
        image.poke(count, &2u16.to_be_bytes());
        let report = check(&mut rig.qmp, "high");
        assert_eq!((&report["leaks"], &report["corruptions"]), (&json!(1), &json!(1)), "{report}");
        let text = report["messages"].to_string();
        assert!(text.contains("refcount=2 reference=1") && text.contains("OFLAG_COPIED"), "{report}");

        // One that is too low.
        image.poke(count, &0u16.to_be_bytes());
        let report = check(&mut rig.qmp, "low");
        assert_eq!(report["leaks"], 0, "{report}");
        assert!(report["corruptions"].as_u64().unwrap() >= 1, "{report}");
        assert!(report["messages"].to_string().contains("refcount=0 reference=1"), "{report}");

        image.poke(count, &1u16.to_be_bytes());
        assert_clean(&check(&mut rig.qmp, "right-again"), "right again");

        // An entry that points where another one does, and one that points nowhere sensible.
        let (entry, other) = (image.l2_entry(victim), image.l2_entry(victim + MIB));
        let (right, wrong) = (image.word(entry), image.word(other));
        for bad in [wrong, right | 0x200, 1 << 55 | 1 << 63, right & !(1 << 63)] {
            image.poke(entry, &bad.to_be_bytes());
            let report = check(&mut rig.qmp, "entry");
            assert!(report["corruptions"].as_u64().unwrap() >= 1, "{bad:x}: {report}");
            image.poke(entry, &right.to_be_bytes());
            assert_clean(&check(&mut rig.qmp, "entry-again"), "entry again");
        }

        // Tables that are elsewhere than memory has them.
        for (place, name) in
            [(image.word(40), "L1 entry"), (image.word(48), "refcount table entry"), (28, "header")]
        {
            let right = image.word(place);
            image.poke(place, &(right ^ 0x10_0000).to_be_bytes());
            let report = check(&mut rig.qmp, "table");
            assert!(report["corruptions"].as_u64().unwrap() >= 1, "{name}: {report}");
            assert!(report["messages"].to_string().contains(name), "{name}: {report}");
            image.poke(place, &right.to_be_bytes());
        }
        assert_clean(&check(&mut rig.qmp, "after"), "after");
        let (disk, finished) = load.end();
        assert!(finished > 0);
        drop(disk);
        assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
        let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", image.path.to_str().unwrap()]);
        assert_eq!(code, 0, "{text}");
    }
}

#[test]
fn a_check_can_be_cancelled_half_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let name = path.to_str().unwrap();
    // Many tables, so that there is a half way.
    let options = "cluster_size=4k,preallocation=metadata";
    done("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, "8G"]);
    let mut rig = serve(&path, "");
    let load = Load::start(disk(&rig), 0..8 << 30, 3);
    rig.command("block-check", json!({"job-id": "c", "node-name": "node-e"}));
    let mut seen = Vec::new();
    rig.wait_for("progress", |rig| {
        let jobs = rig.command("query-jobs", json!({}));
        let (now, total) = (jobs[0]["current-progress"].as_u64(), jobs[0]["total-progress"].as_u64());
        seen.push((now.unwrap(), total.unwrap()));
        seen.last().is_some_and(|(now, _)| *now > 0)
    });
    rig.command("job-cancel", json!({"id": "c"}));
    let is_over = |data: &Value| data["id"] == "c" && data["status"] == "concluded";
    rig.qmp.wait_event_where("JOB_STATUS_CHANGE", is_over).unwrap();
    let (now, total) = *seen.last().unwrap();
    assert!(now < total, "{seen:?}");
    assert!(rig.qmp.execute("query-block-check", json!({"id": "c"})).is_err());
    rig.command("job-dismiss", json!({"id": "c"}));
    // The next one begins anew, and comes to its end.
    assert_clean(&check(&mut rig.qmp, "whole"), "whole");
    drop(load.end());
}

#[test]
fn an_image_in_use_is_repaired_while_a_front_end_waits() {
    let image = Image::new(128 * MIB);
    let mut rig = serve(&image.path, "");
    let load = Load::start(disk(&rig), 64 * MIB..128 * MIB, 11);
    image.poke(image.refcount(17 * MIB), &2u16.to_be_bytes());
    // A number too low, which two entries share.
    let shared = image.word(image.l2_entry(20 * MIB));
    image.poke(image.l2_entry(21 * MIB), &shared.to_be_bytes());
    let found = check(&mut rig.qmp, "look");
    assert!(found["leaks"].as_u64().unwrap() >= 2 && found["corruptions"].as_u64().unwrap() >= 2, "{found}");
    for (id, fix) in [("leaks", "leaks"), ("all", "all")] {
        let arguments = json!({"job-id": id, "node-name": "node-e", "fix": fix});
        rig.command("block-check", arguments);
        let is_over = |data: &Value| data["id"] == id && data["status"] == "concluded";
        rig.qmp.wait_event_where("JOB_STATUS_CHANGE", is_over).unwrap();
        let report = rig.command("query-block-check", json!({"id": id}));
        assert_eq!(report["leaks"], 0, "{report}");
        let figure = if fix == "leaks" { "leaks-fixed" } else { "corruptions-fixed" };
        assert!(report[figure].as_u64().unwrap() > 0, "{report}");
        rig.command("job-dismiss", json!({"id": id}));
    }
    assert_clean(&check(&mut rig.qmp, "after"), "after");
    let (mut disk, _) = load.end();
    for at in [17 * MIB, 20 * MIB, 21 * MIB] {
        assert_eq!(disk.read(at, 4096).unwrap(), [1; 4096]);
    }
    // What one of the two writes is not the other's.
    disk.write(20 * MIB, &[5; 4096]).unwrap();
    assert_eq!(disk.read(21 * MIB, 4096).unwrap(), [1; 4096]);
    drop(disk);
    assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
    // One reference is left, and its entry does not say so: QEMU leaves it at that, too.
    let name = image.path.to_str().unwrap();
    let (_, text) = tool("qemu-img", &["check", "-r", "all", "--output=json", "-f", "qcow2", name]);
    let mut values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
    let report = values.next().unwrap().unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(report["corruptions-fixed"].as_u64().unwrap_or(0), 1, "{text}");
    assert_eq!(report["leaks-fixed"].as_u64().unwrap_or(0), 0, "{text}");
}
