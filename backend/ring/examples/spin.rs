//! What the ring layer costs: nanoseconds per request for fetch, unpack, header copy, status byte, used element and
//! publication, with a driver in the same thread (the ring is in the cache) and with one on another core.
//!
//! `cargo run --release -p ringblk-ring --example spin [samples]`. Figures only; nothing is asserted.
#![allow(clippy::print_stdout, clippy::expect_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ringblk_ring::{Chain, InflightRegion, Memory, QueueError, RingAddresses, SplitConfig, SplitQueue};

const SIZE: u16 = 256;
const USER: u64 = 0x7000_0000_0000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x4000;
const TABLES: u64 = 0x10000;
const HEADERS: u64 = 0x20000;
const DATA: u64 = 0x100_0000;
const BATCH: u16 = 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn descriptor(memory: &Memory, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write(at, &bytes).expect("descriptor");
}

/// 64 reads of 4 KiB: header, data, status; heads 0, 4, 8, ... so that direct chains fit.
fn prepare(memory: &Memory, indirect: bool) {
    for slot in 0..SIZE / 4 {
        let head = 4 * slot;
        let n = u64::from(slot);
        let table = if indirect { TABLES + 64 * n } else { DESC + 16 * u64::from(head) };
        let base = if indirect { 0 } else { head };
        descriptor(memory, table, HEADERS + 64 * n, 16, NEXT, base + 1);
        descriptor(memory, table + 16, DATA + 4096 * n, 4096, NEXT | WRITE, base + 2);
        descriptor(memory, table + 32, HEADERS + 64 * n + 16, 1, WRITE, 0);
        if indirect {
            descriptor(memory, DESC + 16 * u64::from(head), table, 48, INDIRECT, 0);
        }
    }
    // Entry i of the ring always offers chain i % 64: the driver only has to move the index.
    for i in 0..SIZE {
        let head = 4 * (i % (SIZE / 4));
        memory.write(AVAIL + 4 + 2 * u64::from(i), &head.to_le_bytes()).expect("available ring");
    }
}

fn queue(memory: &Arc<Memory>) -> SplitQueue {
    let config = SplitConfig {
        size: u32::from(SIZE),
        max_size: SIZE,
        addresses: RingAddresses { descriptors: USER + DESC, available: USER + AVAIL, used: USER + USED },
        event_idx: true,
        indirect: true,
        last_avail: 0,
        used_idx: None,
    };
    SplitQueue::new(memory.clone(), &config).expect("queue")
}

fn index(memory: &Memory, at: u64) -> u16 {
    let mut bytes = [0; 2];
    memory.read(at, &mut bytes).expect("index");
    u16::from_le_bytes(bytes)
}

/// One pass: everything that waits, straight to completion. Returns how many.
#[inline(never)]
fn pass(
    queue: &mut SplitQueue,
    memory: &Memory,
    chains: &mut [Chain],
    sum: &mut u64,
) -> Result<u16, QueueError> {
    let waiting = queue.fetch()?.min(BATCH);
    for chain in chains.iter_mut().take(usize::from(waiting)) {
        queue.pop(chain)?;
        let mut header = [0; 16];
        if chain.take_header(memory, &mut header).is_ok() && chain.reserve_last().is_ok() {
            *sum += chain.writable().len() as u64 + u64::from(header[0]);
        }
    }
    for chain in chains.iter_mut().take(usize::from(waiting)) {
        let len = chain.writable_len() as u32 + 1;
        let _ = chain.write_last(memory, 0);
        queue.push_used(chain.head(), len)?;
    }
    if queue.publish() {
        *sum += 1;
    }
    Ok(waiting)
}

fn same_core(indirect: bool, batch: u16, rounds: u64, tracked: bool) -> f64 {
    let memory = Arc::new(Memory::anonymous(&[(0, USER, 64 << 20)]).expect("memory"));
    prepare(&memory, indirect);
    let mut queue = queue(&memory);
    if tracked {
        let (fd, size) = InflightRegion::create(1, SIZE).expect("in-flight area");
        let area = Arc::new(InflightRegion::map(fd, 0, size, 1, SIZE).expect("in-flight area"));
        let again = queue.track(area.tracker(0, SIZE).expect("its part")).expect("a fresh area");
        assert!(again.is_empty());
    }
    let mut chains: Vec<_> = (0..BATCH).map(|_| Chain::new()).collect();
    let (mut idx, mut sum) = (0_u16, 0);
    let start = Instant::now();
    for _ in 0..rounds {
        idx = idx.wrapping_add(batch);
        // What the driver does is part of the figure; it is one translated store per batch.
        memory.write(AVAIL + 2, &idx.to_le_bytes()).expect("index");
        pass(&mut queue, &memory, &mut chains, &mut sum).expect("a sane ring");
    }
    std::hint::black_box(sum);
    start.elapsed().as_nanos() as f64 / (rounds * u64::from(batch)) as f64
}

fn other_core(indirect: bool, batch: u16, requests: u64) -> f64 {
    let memory = Arc::new(Memory::anonymous(&[(0, USER, 64 << 20)]).expect("memory"));
    prepare(&memory, indirect);
    let mut queue = queue(&memory);
    let mut chains: Vec<_> = (0..BATCH).map(|_| Chain::new()).collect();
    let done = AtomicBool::new(false);
    let (mut total, mut sum) = (0_u64, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut idx = 0_u16;
            while !done.load(Ordering::Relaxed) {
                while index(&memory, USED + 2) != idx && !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                // Dirties what a driver dirties: table, header.
                for i in 0..batch {
                    let n = u64::from(idx.wrapping_add(i) % (SIZE / 4));
                    let table = if indirect { TABLES + 64 * n } else { DESC + 64 * n };
                    let _ = memory.write(HEADERS + 64 * n, &[0; 8]);
                    let _ = memory.write(table + 16, &(DATA + 4096 * n).to_le_bytes());
                }
                idx = idx.wrapping_add(batch);
                // Pairs with the queue's Acquire load of the available index.
                std::sync::atomic::fence(Ordering::Release);
                let _ = memory.write(AVAIL + 2, &idx.to_le_bytes());
            }
        });
        // Only the time inside passes that found work counts.
        let mut spent = 0_u128;
        while total < requests {
            if !queue.has_work() {
                std::hint::spin_loop();
                continue;
            }
            let start = Instant::now();
            total += u64::from(pass(&mut queue, &memory, &mut chains, &mut sum).expect("a sane ring"));
            spent += start.elapsed().as_nanos();
        }
        done.store(true, Ordering::Relaxed);
        std::hint::black_box(sum);
        spent as f64 / total as f64
    })
}

fn main() {
    let samples: u32 = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(100);
    for (name, indirect) in [("indirect", true), ("direct", false)] {
        for batch in [32, 1] {
            // The best of many short runs: this is about the code, not about what else the machine does.
            let best = |f: &dyn Fn() -> f64| (0..samples).map(|_| f()).fold(f64::INFINITY, f64::min);
            let requests = 40_000;
            let here = best(&|| same_core(indirect, batch, requests / u64::from(batch), false));
            let tracked = best(&|| same_core(indirect, batch, requests / u64::from(batch), true));
            let there = best(&|| other_core(indirect, batch, requests));
            println!(
                "{name:8} chains of 3, batches of {batch:2}: {here:5.1} ns same core ({tracked:5.1} tracked), \
                 {there:5.1} ns other core"
            );
        }
    }
}
