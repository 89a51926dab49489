//! Random surgery under full load: nothing fails for the guest, nothing is lost, nothing hangs.
//!
//! `RINGBLK_SURGERIES` sets how many; the default suits a run per change, 10000 a night. `RINGBLK_SEED` repeats a run. The
//! pauses the guest saw are printed, not judged: other programs run on the same processors.

use std::process::Command;
use std::time::{Duration, Instant};

use client::Setup;
use ringblk_scenarios::Rig;
use ringblk_scenarios::surgeon::{Surgeon, number};
use serde_json::json;

use crate::load::Load;
use crate::qcow2;

/// Bytes of the disk.
const SIZE: u64 = 16 << 20;

#[test]
fn random_surgery_under_load() {
    let count = number("RINGBLK_SURGERIES", 300);
    let seed = number("RINGBLK_SEED", 1);
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    qcow2(&image, SIZE);
    let mut rig = Rig::start_with(&[], &["--object", "iothread,id=t0", "--object", "iothread,id=t1"]);
    Surgeon::prepare(&mut rig.qmp, folder.path(), &image, SIZE);
    let mapping = json!([{"iothread": "t0"}, {"iothread": "t1"}]);
    let options = json!({"writable": true, "num-queues": 2, "iothread-vq-mapping": mapping});
    rig.add_export("disk", "image", &options).unwrap();
    let mut load = Load::start(rig.disk("disk", &Setup { queues: 2, ..Setup::default() }), SIZE, seed);
    let mut pauses = Vec::new();
    let mut surgeon = Surgeon::new(&mut rig.qmp, folder.path(), SIZE, seed);
    for n in 0..count {
        let before = load.done();
        let _ = load.take_longest();
        let (what, result) = surgeon.cut();
        assert!(result.is_ok(), "surgery {n} (seed {seed}), {what}: {result:?}");
        // The guest goes on after each.
        let deadline = Instant::now() + Duration::from_secs(60);
        while load.done() < before + 20 {
            load.check();
            assert!(Instant::now() < deadline, "surgery {n} (seed {seed}), {what}: the guest stands");
            std::thread::sleep(Duration::from_micros(100));
        }
        pauses.push(load.take_longest());
    }
    let counts = surgeon.counts().clone();
    let (_, images) = surgeon.images();
    let (disk, _) = load.end();
    drop(disk);
    pauses.sort_unstable();
    let at = |share: usize| pauses[(pauses.len() - 1) * share / 100] as f64 / 1e6;
    eprintln!("{count} surgeries, seed {seed}: {counts:?}");
    eprintln!(
        "longest request around each: p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms, most {:.2} ms",
        at(50),
        at(90),
        at(99),
        at(100)
    );
    rig.command("quit", json!({}));
    assert!(rig.daemon.wait(Duration::from_secs(60)).unwrap().success());
    for image in images {
        let check =
            Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&image).output().unwrap();
        assert!(check.status.success(), "{}: {}", image.display(), String::from_utf8_lossy(&check.stderr));
    }
}
