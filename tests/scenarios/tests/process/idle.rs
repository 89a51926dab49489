//! What the process costs when nothing happens: threads, processor time, memory.

use std::collections::BTreeMap;
use std::time::Duration;

use client::Setup;
use ringblk_scenarios::{Rig, Wanted, rig::ringblk};

/// Processor time and voluntary switches of each thread; the kernel's own workers left out.
fn activity(rig: &Rig) -> BTreeMap<u32, (String, u64, u64)> {
    let threads = rig.daemon.threads().unwrap().into_iter().filter(|t| !t.name.starts_with("iou-"));
    threads.map(|t| (t.tid, (t.name, t.cpu_ns, t.voluntary_switches))).collect()
}

/// A daemon with two iothreads, four queues and some work behind it.
fn worked() -> (Rig, client::Disk) {
    let mapping =
        "writable=on,num-queues=4,iothread-vq-mapping.0.iothread=t0,iothread-vq-mapping.1.iothread=t1";
    let rig = Rig::start_with(
        &[Wanted::file("e", 1 << 20).options(mapping)],
        &["--object", "iothread,id=t0", "--object", "iothread,id=t1"],
    );
    let mut disk = rig.disk("e", &Setup { queues: 4, ..Setup::default() });
    for block in 0..64 {
        disk.write(block * 4096, &[block as u8; 4096]).unwrap();
        disk.read(block * 4096, 4096).unwrap();
    }
    disk.flush().unwrap();
    (rig, disk)
}

#[test]
fn one_thread_for_the_process_one_for_each_iothread_one_for_each_connection() {
    let (mut rig, disk) = worked();
    // Helpers of a moment may still be ending.
    rig.wait_for("return to four threads", |rig| rig.holdings().threads == 1 + 2 + 1);
    drop(disk);
    rig.wait_disconnected("e");
    rig.wait_for("return to three threads", |rig| rig.holdings().threads == 1 + 2);
}

#[test]
fn an_idle_process_uses_no_processor() {
    let (mut rig, _disk) = worked();
    // Polling ends soon after the last request, workers a while later.
    let mut last = activity(&rig);
    rig.wait_for("rest", |rig| {
        std::thread::sleep(Duration::from_millis(300));
        let now = activity(rig);
        std::mem::replace(&mut last, now.clone()) == now
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(activity(&rig), last, "(name, ns on a processor, times it woke up) of each thread");
}

#[test]
fn memory_stays_small() {
    let (rig, _disk) = worked();
    let resident = rig.daemon.resident().unwrap();
    eprintln!("resident: {resident:?}");
    let own = resident.total - resident.shared;
    if ringblk().components().any(|c| c.as_os_str() == "release") {
        assert!(own <= 8 << 20, "{resident:?}");
    } else {
        assert!(own <= 64 << 20, "{resident:?}");
    }
}
