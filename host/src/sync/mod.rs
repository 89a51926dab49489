//! Waiting for one another across executors: oneshot, mutex, wait queue, event.
//!
//! Used by drivers and by whoever answers across threads. Wakers carry a wake to the right thread by themselves. Nothing
//! here blocks a thread for longer than a few instructions.

mod event;
mod mutex;
pub mod oneshot;

pub use event::{Event, WaitQueue};
pub use mutex::{Mutex, MutexGuard};

#[cfg(test)]
mod tests;
