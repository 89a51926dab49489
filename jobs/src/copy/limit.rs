//! Bytes per second, in slices of 100 ms as QEMU counts them.
//!
//! Shared by all tasks of a copy. A task asks before it takes a range; what it then moves is charged afterwards, so a slice
//! may be exceeded by the requests in flight and the next ones pay for it.

use std::sync::{Mutex, PoisonError};

/// Length of a slice, ns.
pub(super) const SLICE_NS: u64 = 100_000_000;

#[derive(Default)]
struct State {
    /// End of the slice, ns of the monotonic clock.
    until: u64,
    /// Bytes charged to it; may exceed what a slice has.
    used: u64,
}

/// See the module's words.
#[derive(Default)]
pub(super) struct Limiter(Mutex<State>);

impl Limiter {
    /// How long to wait before the next range, ns; 0: go on. `rate` is bytes per second, 0 for no limit.
    pub(super) fn wait_ns(&self, rate: u64, now: u64) -> u64 {
        if rate == 0 {
            return 0;
        }
        let quota = quota(rate);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= state.until {
            // What was borrowed from later slices is paid back by those that have passed.
            let passed = (now - state.until) / SLICE_NS + 1;
            state.used = state.used.saturating_sub(quota.saturating_mul(passed));
            state.until = now + SLICE_NS;
        }
        if state.used < quota { 0 } else { state.until - now }
    }

    /// Charges what was moved.
    pub(super) fn charge(&self, bytes: u64) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.used = state.used.saturating_add(bytes);
    }
}

/// Bytes of one slice; at least 1, so that the slowest rate still moves.
fn quota(rate: u64) -> u64 {
    (u128::from(rate) * u128::from(SLICE_NS) / 1_000_000_000).max(1) as u64
}
