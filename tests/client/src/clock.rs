//! A clock cheap enough to read once per batch.
//!
//! Used by the benchmark. On x86-64 it is the time stamp counter, measured against the monotonic clock once;
//! elsewhere the monotonic clock itself. It is not used to judge tests.

#![allow(unsafe_code)]

use std::time::{Duration, Instant};

/// Converts ticks of `now` to nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    ns_per_tick: f64,
}

/// Current tick count.
#[cfg(target_arch = "x86_64")]
#[inline]
#[must_use]
pub fn now() -> u64 {
    // SAFETY: RDTSC is part of the x86-64 base set and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Current tick count.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
#[must_use]
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Clock {
    /// Measures the tick against the monotonic clock for 50 ms, which leaves an error far below 0.1 %.
    #[must_use]
    pub fn calibrate() -> Self {
        let (start, ticks) = (Instant::now(), now());
        while start.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let (elapsed, ticks) = (start.elapsed(), now().wrapping_sub(ticks));
        Self { ns_per_tick: elapsed.as_nanos() as f64 / ticks.max(1) as f64 }
    }

    /// Nanoseconds in so many ticks.
    #[must_use]
    pub fn ns(&self, ticks: u64) -> f64 {
        ticks as f64 * self.ns_per_tick
    }

    /// Ticks in so many seconds.
    #[must_use]
    pub fn ticks(&self, seconds: f64) -> u64 {
        (seconds * 1e9 / self.ns_per_tick) as u64
    }
}
