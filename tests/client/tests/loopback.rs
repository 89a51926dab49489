//! The driver's rings against the loopback device: formats, wrap-around, interrupts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringblk_client::fast::{FastQueue, Format, ring_size};
use ringblk_client::loopback::Loopback;
use ringblk_client::memory::GuestMemory;
use ringblk_client::queue::{Buffer, Queue};

fn memory() -> GuestMemory {
    GuestMemory::new(&[(0x10_0000, 16 << 20)]).unwrap()
}

#[test]
fn both_formats_survive_index_wrap_around() {
    for format in [Format::Direct, Format::Indirect] {
        for event_idx in [false, true] {
            let mut memory = memory();
            let mut queue = Queue::new(&mut memory, 0, ring_size(32, format)).unwrap();
            queue.set_event_idx(event_idx);
            let mut device = Loopback::new(&memory, &queue).unwrap();
            let mut fast = FastQueue::new(queue, &mut memory, 32, 4096, format).unwrap();
            fast.queue_mut().suppress_interrupts();
            let mut done: Vec<u16> = (0..32).collect();
            for round in 0..3000u64 {
                for slot in done.drain(..) {
                    fast.submit(slot, (round + u64::from(slot)).is_multiple_of(3), round).unwrap();
                }
                fast.publish().unwrap();
                assert_eq!(device.poll(), 32);
                fast.reap(&mut done).unwrap();
                done.sort_unstable();
                assert_eq!(done, (0..32).collect::<Vec<u16>>(), "{format:?} round {round}");
            }
            assert_eq!((fast.errors, fast.in_flight()), (0, 0));
            assert_eq!(device.completed, 96_000);
        }
    }
}

#[test]
fn a_status_that_nobody_wrote_counts_as_an_error() {
    let mut memory = memory();
    let queue = Queue::new(&mut memory, 0, 8).unwrap();
    let (_, _, used) = queue.addresses();
    let mut fast = FastQueue::new(queue, &mut memory, 2, 512, Format::Direct).unwrap();
    fast.submit(1, false, 0).unwrap();
    fast.publish().unwrap();
    memory.write(used + 4, &3u32.to_le_bytes()).unwrap();
    memory.write(used + 2, &1u16.to_le_bytes()).unwrap();
    let mut done = Vec::new();
    fast.reap(&mut done).unwrap();
    assert_eq!((done, fast.errors), (vec![1], 1));
}

#[test]
fn completions_nobody_asked_for_are_refused() {
    let mut memory = memory();
    let queue = Queue::new(&mut memory, 0, 8).unwrap();
    let (_, _, used) = queue.addresses();
    let mut fast = FastQueue::new(queue, &mut memory, 2, 512, Format::Direct).unwrap();
    memory.write(used + 2, &1u16.to_le_bytes()).unwrap();
    assert!(fast.reap(&mut Vec::new()).is_err(), "nothing is in flight");
    fast.submit(1, false, 0).unwrap();
    fast.publish().unwrap();
    assert!(fast.reap(&mut Vec::new()).is_err(), "slot 0 is not in flight");
    memory.write(used + 4, &u32::MAX.to_le_bytes()).unwrap();
    assert!(fast.reap(&mut Vec::new()).is_err(), "no such head");
}

#[test]
fn sleeping_driver_is_woken_by_the_device() {
    for event_idx in [false, true] {
        let mut memory = memory();
        let mut queue = Queue::new(&mut memory, 0, 16).unwrap();
        queue.set_event_idx(event_idx);
        let device = Loopback::new(&memory, &queue).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || device.run(&stop)
        });
        let header = memory.block(16).unwrap();
        let status = memory.block(16).unwrap();
        let chain =
            [Buffer { addr: header, len: 16, write: false }, Buffer { addr: status, len: 1, write: true }];
        for round in 0..70_000u32 {
            memory.write(status, &[0xff]).unwrap();
            let head = queue.add(&chain, round % 2 == 0).unwrap();
            queue.publish().unwrap();
            let used = queue.pop_within(Duration::from_secs(20)).unwrap();
            assert_eq!(used.id, u32::from(head));
            let mut byte = [0xff];
            memory.read(status, &mut byte).unwrap();
            assert_eq!(byte, [0]);
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(thread.join().unwrap(), 70_000);
        assert_eq!(queue.in_flight(), 0);
    }
}
