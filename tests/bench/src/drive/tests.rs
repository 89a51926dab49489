//! The load generator against a device in another thread.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use client::loopback::Loopback;
use client::session::Guest;

use super::{Chooser, Load, Mode, Pattern, check, drive, layout, parse_pattern, prepare};

fn load() -> Load {
    Load {
        queues: 2,
        depth: 8,
        block_size: 4096,
        rw: Pattern { random: true, reads: 70 },
        mode: Mode::Poll,
        seconds: 0.05,
        region: None,
        batch: false,
        indirect: false,
        no_event_idx: false,
    }
}

#[test]
fn every_way_of_driving_completes_all_requests() {
    let variants = [
        load(),
        Load { batch: true, ..load() },
        Load { mode: Mode::Sleep, ..load() },
        Load { mode: Mode::Sleep, no_event_idx: true, indirect: true, ..load() },
        Load { depth: 1, queues: 1, rw: Pattern { random: false, reads: 0 }, ..load() },
    ];
    for load in variants {
        let mut guest = Guest::new(&layout(&load)).unwrap();
        for queue in &mut guest.queues {
            queue.set_event_idx(!load.no_event_idx);
        }
        let mut devices: Vec<Loopback> =
            guest.queues.iter().map(|queue| Loopback::new(&guest.memory, queue).unwrap()).collect();
        let mut queues = prepare(&mut guest, &load).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                for device in &mut devices {
                    device.poll();
                }
            }
            devices.iter().map(|device| device.completed).sum::<u64>()
        });
        let outcome = drive(&mut queues, &load, 1 << 30, None).unwrap();
        stop.store(true, Ordering::Relaxed);
        assert!(thread.join().unwrap() >= outcome.requests);
        check(&outcome).unwrap();
        assert!(queues.iter().all(|queue| queue.in_flight() == 0));
    }
}

#[test]
fn places_stay_on_the_disk_and_shares_are_kept() {
    let pattern = parse_pattern("randrw:30").unwrap();
    let mut chooser = Chooser { state: 1, next: 0, blocks: 100, sectors_per_block: 8, pattern };
    let mut writes = 0;
    let mut seen = [false; 100];
    for _ in 0..100_000 {
        let (write, sector) = chooser.choose();
        assert!(sector.is_multiple_of(8));
        seen[(sector / 8) as usize] = true;
        writes += u32::from(write);
    }
    assert!(seen.iter().all(|&seen| seen));
    assert!((68_000..72_000).contains(&writes), "{writes}");
    chooser.pattern = parse_pattern("write").unwrap();
    let places: Vec<_> = (0..201).map(|_| chooser.choose()).collect();
    assert_eq!(places[99..102], [(true, 99 * 8), (true, 0), (true, 8)]);
    for wrong in ["", "randrw", "randrw:101", "rand", "randrw:-1"] {
        assert!(parse_pattern(wrong).is_err(), "{wrong}");
    }
}
