//! Exclusion between serialising and other writes, on real threads, and wake-ups after dropped waits.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(not(loom))]
use std::sync::{Arc, atomic::AtomicI64};
#[cfg(not(loom))]
use std::task::Context;

use super::*;

#[cfg(not(loom))]
#[test]
fn nobody_is_inside_with_a_serialising_write() {
    const BLOCKS: usize = 4;
    let tracker = Arc::new(Tracker::default());
    // Per block: the number of writers, or -1 while one has it alone.
    let inside: Arc<[AtomicI64; BLOCKS]> = Arc::default();
    let threads: Vec<_> = (0..4u64)
        .map(|seed| {
            let (tracker, inside) = (Arc::clone(&tracker), Arc::clone(&inside));
            std::thread::spawn(move || {
                let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                for _ in 0..20_000 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let first = (random % BLOCKS as u64) as usize;
                    let last = (first + (random >> 8) as usize % 2).min(BLOCKS - 1);
                    let serialising = (random >> 16) % 4 == 0;
                    let (start, end) = (first as u64 * 512, (last as u64 + 1) * 512);
                    let token = host::exec::block_on(tracker.begin(start, end, serialising));
                    for block in &inside[first..=last] {
                        if serialising {
                            assert_eq!(block.swap(-1, SeqCst), 0, "not alone");
                        } else {
                            assert!(block.fetch_add(1, SeqCst) >= 0, "let in");
                        }
                    }
                    for block in &inside[first..=last] {
                        if serialising {
                            assert_eq!(block.swap(0, SeqCst), -1, "not alone");
                        } else {
                            assert!(block.fetch_sub(1, SeqCst) > 0);
                        }
                    }
                    drop(token);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(tracker.is_idle());
}

#[cfg(not(loom))]
#[test]
fn a_wait_that_is_dropped_leaves_no_trace() {
    let tracker = Tracker::default();
    let mut cx = Context::from_waker(Waker::noop());
    let held = host::exec::block_on(tracker.begin(0, 512, false));
    {
        let mut waiting = Box::pin(tracker.begin(0, 512, true));
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        // What comes later queues behind it, what does not overlap goes on.
        let mut behind = Box::pin(tracker.begin(0, 512, false));
        assert!(behind.as_mut().poll(&mut cx).is_pending());
        let mut beside = Box::pin(tracker.begin(512, 1024, false));
        assert!(beside.as_mut().poll(&mut cx).is_ready());
        drop(waiting);
        assert!(behind.as_mut().poll(&mut cx).is_ready());
    }
    drop(held);
    assert!(tracker.is_idle());
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p ringblk-graph --lib --release loom_`.
#[cfg(loom)]
mod loom_models {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    use super::*;

    /// Each thread enters with its kind (serialising or not); nobody else is inside with a serialising one, and all end.
    fn model(kinds: &'static [bool]) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(if kinds.len() > 2 { 2 } else { 3 });
        builder.check(move || {
            let tracker = Arc::new(Tracker::default());
            let inside = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
            let enter = move |tracker: &Tracker, inside: &(AtomicUsize, AtomicUsize), serialising: bool| {
                let token = loom::future::block_on(tracker.begin(0, 512, serialising));
                let (shared, alone) = inside;
                if serialising {
                    assert_eq!(alone.fetch_add(1, SeqCst), 0);
                    loom::sync::atomic::fence(SeqCst);
                    assert_eq!(shared.load(SeqCst), 0);
                    alone.fetch_sub(1, SeqCst);
                } else {
                    shared.fetch_add(1, SeqCst);
                    loom::sync::atomic::fence(SeqCst);
                    assert_eq!(alone.load(SeqCst), 0);
                    shared.fetch_sub(1, SeqCst);
                }
                drop(token);
            };
            let threads: Vec<_> = kinds[1..]
                .iter()
                .map(|kind| {
                    let (tracker, inside) = (Arc::clone(&tracker), Arc::clone(&inside));
                    loom::thread::spawn(move || enter(&tracker, &inside, *kind))
                })
                .collect();
            enter(&tracker, &inside, kinds[0]);
            threads.into_iter().for_each(|t| t.join().unwrap());
            assert!(tracker.is_idle());
        });
    }

    #[test]
    fn loom_an_aligned_write_beside_a_serialising_one() {
        model(&[false, true]);
    }

    #[test]
    fn loom_two_serialising_writes() {
        model(&[true, true]);
    }

    #[test]
    fn loom_three_writes() {
        model(&[false, true, false]);
    }
}
