//! A Linux guest that writes and verifies on two queues while the graph below its disk is cut up and sewn together again.
//!
//! `RINGBLK_SURGERIES` sets how many cuts; the default suits a run per change, 10000 a night. The time each command took is
//! printed, not judged: the guest's requests stood still for a part of it at most, and other programs run on the same
//! processors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use ringblk_scenarios::Rig;
use ringblk_scenarios::surgeon::{Surgeon, number};
use serde_json::json;

use super::boot::{Boot, available, turn};
use super::qcow2::{made, qemu_img};
use super::{SIZE, TWO_IOTHREADS, said};

#[test]
fn random_surgery_under_fio_goes_unnoticed() {
    if !available() {
        return;
    }
    let _turn = turn();
    let count = number("RINGBLK_SURGERIES", 300);
    let seed = number("RINGBLK_SEED", 1);
    // In memory, so that what is seen is not the disk of the machine.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let image = folder.path().join("image");
    made(&["create", "-q", "-f", "qcow2", &image.display().to_string(), &SIZE.to_string()]);
    let mut rig = Rig::start_with(&[], &TWO_IOTHREADS);
    Surgeon::prepare(&mut rig.qmp, folder.path(), &image, SIZE);
    let mapping = json!([{"iothread": "t0"}, {"iothread": "t1"}]);
    let options = json!({"writable": true, "num-queues": 2, "iothread-vq-mapping": mapping});
    rig.add_export("disk", "image", &options).unwrap();
    let boot = Boot::new(&rig.socket("disk"))
        .arg("--queues", "2")
        .script("surgery", "SIZE_MIB=4")
        .shell(super::PRINT_SHA256);
    let mut surgeon = Surgeon::new(&mut rig.qmp, folder.path(), SIZE, seed);
    let output = boot.run_with(|question| {
        assert_eq!(question, "surgery");
        for n in 0..count {
            let (what, result) = surgeon.cut();
            if let Err(e) = result {
                return format!("error: surgery {n} (seed {seed}), {what}: {e}");
            }
        }
        "ok".to_owned()
    });
    eprintln!("{count} surgeries, seed {seed}: {:?}", surgeon.counts());
    let mut times = surgeon.times().to_vec();
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    eprintln!("commands: p50 {:?}, p90 {:?}, p99 {:?}, most {:?}", at(50), at(90), at(99), at(100));
    assert!(output.contains("passes written and verified"), "{output}");
    let (top, images) = surgeon.images();
    rig.wait_disconnected("disk");
    assert!(rig.daemon.terminate(Duration::from_secs(30)).unwrap().success(), "{}", rig.daemon.stderr());
    // What the guest saw is what is in the chain of images.
    let copy = folder.path().join("copy.raw").display().to_string();
    for image in images {
        let (code, text) = qemu_img(&["check", "-f", "qcow2", &image.display().to_string()]);
        assert_eq!(code, 0, "{}: {text}", image.display());
    }
    let top = top.display().to_string();
    made(&["convert", "-f", "qcow2", "-O", "raw", &top, &copy]);
    let sum = std::process::Command::new("sha256sum").arg(&copy).output().unwrap();
    assert!(String::from_utf8_lossy(&sum.stdout).starts_with(said(&output, "disk")));
}
