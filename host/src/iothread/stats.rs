//! Counters of an iothread: written by its loop alone, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the thread started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoThreadStats {
    /// Turns of the loop that found something to do.
    pub turns: u64,
    /// Times the thread went to sleep.
    pub sleeps: u64,
    /// Times busy polling found something before it would have slept.
    pub poll_hits: u64,
    /// System calls of the reactor.
    pub enters: u64,
    /// Operations started, inline ones included.
    pub ops: u64,
    /// Operations done on the spot, without the ring.
    pub inline_ops: u64,
    /// Requests that sources reported.
    pub requests: u64,
}

/// The shared form.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) turns: Counter,
    pub(crate) sleeps: Counter,
    pub(crate) poll_hits: Counter,
    pub(crate) enters: Counter,
    pub(crate) ops: Counter,
    pub(crate) inline_ops: Counter,
    pub(crate) requests: Counter,
}

/// One writer, many readers.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// A load and a store: there is one writer, a locked addition would be wasted.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(crate) fn snapshot(&self) -> IoThreadStats {
        IoThreadStats {
            turns: self.turns.get(),
            sleeps: self.sleeps.get(),
            poll_hits: self.poll_hits.get(),
            enters: self.enters.get(),
            ops: self.ops.get(),
            inline_ops: self.inline_ops.get(),
            requests: self.requests.get(),
        }
    }
}
