//! The clock of an iothread: the kernel's monotonic one, or a virtual one that a simulation moves.
//!
//! Owned by a `Local`. Wall-clock time has no place here: nothing on the data path may depend on it.

use std::cell::Cell;
use std::rc::Rc;

/// Source of nanoseconds.
#[derive(Clone)]
pub(crate) enum Clock {
    /// `CLOCK_MONOTONIC`.
    Real,
    /// Moves only when told to.
    Virtual(Rc<Cell<u64>>),
}

impl Clock {
    /// Nanoseconds since an arbitrary start.
    pub(crate) fn now(&self) -> u64 {
        match self {
            Clock::Real => {
                let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64)
            }
            Clock::Virtual(t) => t.get(),
        }
    }
}
