//! Connections without number: descriptors, threads and memory of the daemon return to where they were.
//!
//! `RINGBLK_CYCLES` sets the number of cycles; the default suits a run per change, 10000 a release.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use client::blk::op;
use client::disk::{Payload, Request};
use client::session::Order;
use client::{Disk, Frontend, Setup};
use ringblk_scenarios::{Rig, Wanted, pattern, read_at};
use serde_json::json;

/// Anonymous memory that may be added in all the cycles together, in bytes: an allocator's and a kernel's slack, and far
/// less than one leaked request, region or thread per cycle would come to.
const SLACK: u64 = 2 << 20;

fn cycles() -> u64 {
    std::env::var("RINGBLK_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(2000)
}

fn setup() -> Setup {
    Setup { memory: vec![(0, 4 << 20), (4 << 30, 1 << 20)], queue_size: 64, ..Setup::default() }
}

#[test]
fn connect_and_disconnect() {
    let mut rig = Rig::start(&[Wanted::file("disk", 4 << 20)]);
    let cycle = |rig: &mut Rig, n: u64| {
        match n % 4 {
            // A whole session with I/O, in either VMM's order, ended in order or by vanishing with requests in flight.
            0 | 1 => {
                let order = if n % 8 < 4 { Order::Qemu } else { Order::CloudHypervisor };
                let mut disk = rig.disk("disk", &Setup { order, ..setup() });
                let data = pattern(n, 4096);
                disk.write(n % 1000 * 4096, &data).unwrap();
                if n.is_multiple_of(4) {
                    disk.session().stop().unwrap();
                } else {
                    for at in 0..16 {
                        disk.submit(0, &Request::new(op::IN, at, Payload::In(512))).unwrap();
                    }
                    disk.kick(0).unwrap();
                }
            }
            // Negotiation only.
            2 => {
                let mut f = Frontend::new(rig.connection("disk"));
                f.get_features().unwrap();
                let offered = f.get_protocol_features().unwrap();
                f.set_protocol_features(offered).unwrap();
                f.get_queue_num().unwrap();
            }
            // Nothing at all.
            _ => drop(rig.connection("disk")),
        }
    };
    // The first ones bring up what stays: threads, pools, tables of the allocator.
    for n in 0..100 {
        cycle(&mut rig, n);
    }
    rig.wait_disconnected("disk");
    let before = rig.holdings();
    let memory = rig.daemon.resident().unwrap();
    for n in 0..cycles() {
        cycle(&mut rig, n);
        if n % 50 == 0 {
            rig.assert_running();
        }
    }
    rig.wait_disconnected("disk");
    rig.wait_holdings(before);
    let after = rig.daemon.resident().unwrap();
    assert!(
        after.anon <= memory.anon + SLACK,
        "{} KiB more after {} cycles",
        (after.anon - memory.anon) >> 10,
        cycles()
    );
    // Guest memory is unmapped: nothing of it counts any more.
    assert!(after.shared <= memory.shared, "{memory:?} -> {after:?}");
    let mut disk = rig.disk("disk", &setup());
    disk.write(0, &pattern(1, 4096)).unwrap();
    assert!(read_at(&rig.image("disk"), 0, 4096) == pattern(1, 4096));
}

#[test]
fn the_same_guest_again_and_again() {
    let mut rig = Rig::start(&[Wanted::file("disk", 4 << 20)]);
    let mut disk: Option<Disk> = Some(rig.disk("disk", &setup()));
    let mut before = None;
    for n in 0..cycles() / 2 + 20 {
        let mut now = disk.take().unwrap();
        let data = pattern(n, 4096);
        now.write(n % 1000 * 4096, &data).unwrap();
        assert!(now.read(n % 1000 * 4096, 4096).unwrap() == data);
        disk = Some(now.reconnect(&rig.socket("disk")).unwrap());
        if n == 20 {
            // Both are seen with one front end connected.
            disk.as_mut().unwrap().read(0, 512).unwrap();
            before = Some(rig.holdings());
        }
    }
    disk.as_mut().unwrap().read(0, 512).unwrap();
    rig.wait_holdings(before.unwrap());
}

#[test]
fn exports_and_nodes_come_and_go() {
    let mut rig = Rig::start(&[Wanted::file("stays", 4 << 20)]);
    let mut other = rig.disk("stays", &setup());
    let mut round = |rig: &mut Rig, n: u64| {
        rig.command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "guest", "size": 1 << 20, "read-zeroes": true}),
        );
        rig.add_export("goes", "guest", &json!({"writable": true})).unwrap();
        let mut disk = rig.disk("goes", &setup());
        assert!(disk.read(0, 512).unwrap() == [0; 512]);
        if n.is_multiple_of(2) {
            drop(disk);
            rig.wait_disconnected("goes");
            rig.command("block-export-del", json!({"id": "goes"}));
        } else {
            rig.command("block-export-del", json!({"id": "goes", "mode": "hard"}));
        }
        rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
        assert!(!rig.socket("goes").exists());
        rig.command("blockdev-del", json!({"node-name": "guest"}));
        other.write(0, &pattern(n, 512)).unwrap();
    };
    for n in 0..20 {
        round(&mut rig, n);
    }
    let before = rig.holdings();
    let memory = rig.daemon.resident().unwrap();
    for n in 0..cycles() / 4 {
        round(&mut rig, n);
    }
    rig.wait_holdings(before);
    let after = rig.daemon.resident().unwrap();
    assert!(after.anon <= memory.anon + SLACK, "{memory:?} -> {after:?}");
}
