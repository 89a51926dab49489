//! Tests of the worker pool.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

use super::*;
use crate::exec::block_on;

#[test]
fn jobs_run_side_by_side_up_to_the_bound_and_threads_leave() {
    static P: Pool = Pool::new("test-pool", 3);
    // Three at once, or the barrier never opens.
    let barrier = Arc::new(Barrier::new(4));
    for _ in 0..3 {
        let b = Arc::clone(&barrier);
        P.submit(Box::new(move || {
            b.wait();
        }));
    }
    assert_eq!(P.threads(), 3);
    let done = Arc::new(AtomicUsize::new(0));
    for _ in 0..100 {
        let d = Arc::clone(&done);
        P.submit(Box::new(move || {
            d.fetch_add(1, Ordering::Relaxed);
        }));
    }
    assert_eq!(P.threads(), 3, "the bound holds");
    assert_eq!(done.load(Ordering::Relaxed), 0);
    barrier.wait();
    while done.load(Ordering::Relaxed) < 100 {
        std::thread::yield_now();
    }
    while P.threads() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn answers_and_panics_come_back() {
    assert_eq!(block_on(run(|| 5)), 5);
    let r = catch_unwind(|| block_on(run(|| -> u8 { panic!("as intended") })));
    assert_eq!(panic_text(r.unwrap_err().as_ref()), "as intended");
    assert_eq!(block_on(run(|| 6)), 6);
}

#[test]
fn workers_get_no_signals() {
    let blocked = block_on(run(|| {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("SigBlk:")).unwrap().trim().to_owned();
        u64::from_str_radix(&line, 16).unwrap()
    }));
    for s in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD, libc::SIGUSR1] {
        assert_ne!(blocked & 1 << (s - 1), 0, "signal {s}");
    }
    assert_eq!(blocked & 1 << (libc::SIGBUS - 1), 0);
}
