//! Changes from the control channel at the worst moments: while requests are in flight, while queues are being told to
//! pause, while the process is told to end. Nothing is forgotten, nothing hangs, nothing is answered twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use client::blk::{op, status};
use client::disk::{Payload, Request};
use client::{Disk, Setup, qmp};
use ringblk_scenarios::{Rig, Rng, Wanted};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
const SIZE: u64 = 8 << 20;

fn setup(queues: u16) -> Setup {
    Setup { queues, memory: vec![(0, 16 << 20), (4 << 30, 4 << 20)], ..Setup::default() }
}

fn read(sector: u64) -> Request {
    Request::new(op::IN, sector, Payload::In(4096))
}

/// A node whose requests take a while, with half a ring of them under way.
fn loaded(rig: &Rig) -> Disk {
    let mut disk = rig.disk("e", &setup(2));
    for queue in 0..2 {
        for i in 0..32 {
            disk.submit(queue, &read(i * 8)).unwrap();
        }
        disk.kick(queue).unwrap();
    }
    disk
}

const SLOW: &str = "null-co,size=8388608,latency-ns=20000000,read-zeroes=on";

#[test]
fn an_export_is_removed_under_load() {
    let mut rig = Rig::start(&[Wanted::node("e", SLOW).options("writable=on,num-queues=2")]);
    for round in 0..20 {
        let disk = loaded(&rig);
        rig.command("block-export-del", json!({"id": "e", "mode": "hard"}));
        rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
        // Whatever was taken was answered, once: an index that is behind or ahead would be a request lost or repeated.
        for queue in &disk.session().guest.queues {
            assert!(queue.used_idx() == 32 || queue.used_idx() == 0, "round {round}: {}", queue.used_idx());
        }
        rig.command("blockdev-del", json!({"node-name": "node-e"}));
        let node =
            json!({"driver": "null-co", "node-name": "node-e", "size": SIZE, "latency-ns": 20_000_000});
        rig.command("blockdev-add", node);
        rig.add_export("e", "node-e", &json!({"writable": true, "num-queues": 2})).unwrap();
        // The same guest goes on where it was.
        let mut disk = disk.reconnect(&rig.socket("e")).unwrap();
        let deadline = Instant::now() + LIMIT;
        while disk.in_flight() > 0 {
            assert!(Instant::now() < deadline, "round {round}: {} requests forgotten", disk.in_flight());
            for queue in 0..2 {
                while let Some(done) = disk.poll(queue).unwrap() {
                    assert_eq!(done.status, status::OK);
                }
            }
            std::thread::yield_now();
        }
    }
    rig.assert_running();
}

#[test]
fn the_process_ends_under_load() {
    for polite in [true, false] {
        let mut rig = Rig::start(&[Wanted::node("e", SLOW).options("writable=on,num-queues=2")]);
        let disk = loaded(&rig);
        if polite {
            rig.qmp
                .send_raw(b"{'execute': 'block-export-del', 'arguments': {'id': 'e', 'mode': 'hard'}}")
                .unwrap();
            rig.qmp.send_raw(b"{'execute': 'quit'}").unwrap();
        } else {
            rig.daemon.signal(rustix::process::Signal::TERM).unwrap();
        }
        let ended = rig.daemon.wait(LIMIT).unwrap();
        assert!(ended.success(), "{ended}: {}", rig.daemon.stderr());
        for queue in &disk.session().guest.queues {
            assert!(queue.used_idx() == 32 || queue.used_idx() == 0, "{}", queue.used_idx());
        }
    }
}

/// Resizes and users that come and go pause and resume both queues. A kick that is lost in between is a request that
/// never ends.
fn storm(poll_max_ns: u64) {
    let thread = |id, aio| format!("iothread,id={id},aio={aio},poll-max-ns={poll_max_ns}");
    let mapping = "iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.1.iothread=b";
    let wanted = Wanted::file("e", SIZE).options(&format!("writable=on,num-queues=2,share-rw=on,{mapping}"));
    let mut rig =
        Rig::start_with(&[wanted], &["--object", &thread("a", "auto"), "--object", &thread("b", "threads")]);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (control, path) = (rig.folder().join("qmp"), rig.socket("other").display().to_string());
        let (over, disk) = (&over, rig.disk("e", &setup(2)));
        let changer = scope.spawn(move || {
            let mut control = qmp::Client::connect(&control).unwrap();
            let mut changes = 0u64;
            while !over.load(Ordering::Relaxed) {
                for size in [SIZE * 2, SIZE] {
                    control.execute("block_resize", json!({"node-name": "node-e", "size": size})).unwrap();
                }
                let other = json!({
                    "type": "vhost-user-blk", "id": "other", "node-name": "node-e", "writable": true, "share-rw": true,
                    "logical-block-size": 4096, "addr": {"type": "unix", "path": path},
                });
                control.execute("block-export-add", other).unwrap();
                control.execute("block-export-del", json!({"id": "other"})).unwrap();
                control.wait_event("BLOCK_EXPORT_DELETED").unwrap();
                changes += 1;
            }
            changes
        });
        let drive = move |mut disk: Disk| {
            let mut rng = Rng::new(poll_max_ns + 7);
            let end = Instant::now() + Duration::from_secs(2);
            let mut done = 0u64;
            while Instant::now() < end {
                // A handful per kick, then all of them waited for: nothing else would wake the queue again.
                let queue = rng.below(2) as u16;
                let n = 1 + rng.below(4);
                for _ in 0..n {
                    let sector = rng.below(SIZE / 512 - 8);
                    let request = match rng.below(8) {
                        0 => Request::new(op::FLUSH, 0, Payload::None),
                        1 => Request::new(op::OUT, sector, Payload::Out(vec![7; 4096])),
                        _ => read(sector),
                    };
                    disk.submit(queue, &request).unwrap();
                }
                disk.kick(queue).unwrap();
                for _ in 0..n {
                    assert_eq!(disk.wait_any(queue).unwrap().status, status::OK);
                    done += 1;
                }
            }
            done
        };
        let done = drive(disk);
        over.store(true, Ordering::Relaxed);
        let changes = changer.join().unwrap();
        assert!(done > 0 && changes > 0, "{done} requests, {changes} changes");
    });
    rig.assert_running();
}

#[test]
fn no_kick_is_lost_when_the_iothreads_sleep_at_once() {
    storm(0);
}

#[test]
fn no_kick_is_lost_when_the_iothreads_poll() {
    storm(100_000);
}

#[test]
fn without_descriptors_the_front_end_waits_and_is_served_later() {
    let mut rig = Rig::start(&[Wanted::file("e", SIZE)]);
    let pid = rustix::process::Pid::from_raw(i32::try_from(rig.daemon.pid()).unwrap()).unwrap();
    // The hard limit, which the daemon inherited, stays: raising it again takes privileges.
    let maximum = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let limit = |n| rustix::process::Rlimit { current: Some(n), maximum };
    // Below any free number: not even the first of the descriptors of a connection can be had.
    let all = rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, limit(3)).unwrap();
    let connection = rig.connection("e");
    rig.wait_for("refusal in the log", |rig| rig.daemon.stderr().contains("cannot serve a front end"));
    rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, all).unwrap();
    let mut front = client::Frontend::new(connection);
    assert_ne!(front.get_features().unwrap(), 0);
    assert!(rig.connected("e"));
}

/// The flags of a descriptor belong to both sides: a front end can make its call descriptor block, and fill it. It stops
/// the iothread that writes to it, but only as long as it is connected.
#[test]
fn a_call_descriptor_that_blocks_holds_nobody_after_its_front_end() {
    let mut rig = Rig::start(&[Wanted::file("e", SIZE), Wanted::file("other", SIZE)]);
    let mut disk = rig.disk("e", &setup(1));
    disk.read(0, 4096).unwrap();
    let queue = &mut disk.session_mut().guest.queues[0];
    queue.take_interrupts();
    rustix::fs::fcntl_setfl(queue.call_fd(), rustix::fs::OFlags::empty()).unwrap();
    rustix::io::write(queue.call_fd(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
    for _ in 0..4 {
        disk.session_mut().guest.queues[0].request_interrupt();
        disk.submit(0, &read(0)).unwrap();
        disk.session_mut().guest.queues[0].publish().unwrap();
        disk.session_mut().guest.queues[0].kick().unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    // Held open: nobody else will ever empty it.
    let _held = disk.session().guest.queues[0].call_fd().try_clone_to_owned().unwrap();
    drop(disk);
    rig.wait_disconnected("e");
    rig.disk("other", &setup(1)).read(0, 4096).unwrap();
    rig.disk("e", &setup(1)).read(0, 4096).unwrap();
}
