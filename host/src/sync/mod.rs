//! Waiting for one another across executors: oneshot, mutex, wait queue, event, claims on ranges.
//!
//! Used by drivers and by whoever answers across threads. Wakers carry a wake to the right thread by themselves. Nothing
//! here blocks a thread for longer than a few instructions.

mod event;
mod mutex;
pub mod oneshot;
mod ranges;

pub use event::{Event, WaitQueue};
pub use mutex::{Mutex, MutexGuard};
pub use ranges::{RangeGuard, Ranges};

#[cfg(test)]
mod tests;
