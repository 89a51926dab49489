//! Whether a source stands still, for those of its queues that start at any moment, on any thread.
//!
//! The main thread stops a source and lets it go on ([`crate::RequestSource`]); queues that run hear of it by messages to
//! their iothreads. A queue that starts meanwhile asks here, *on its iothread*: then either the message to pause comes after
//! the start, and finds the queue, or the start sees that the source stands still. Must not know what a queue is.
//!
//! Model-checked together with drains, the mailbox and the answers that cross threads (`standing_tests`).

use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync::{Mutex, atomic::AtomicBool, atomic::Ordering::SeqCst};
#[cfg(not(loom))]
use std::sync::{Mutex, atomic::AtomicBool, atomic::Ordering::SeqCst};

/// See the module's words. `V` is what queues serve requests with: a view.
///
/// Lock order: `view` is a leaf.
#[derive(Debug)]
pub struct Standing<V> {
    still: AtomicBool,
    view: Mutex<Option<V>>,
}

impl<V: Clone> Standing<V> {
    /// A source that has not been started.
    pub fn new() -> Standing<V> {
        Standing { still: AtomicBool::new(true), view: Mutex::new(None) }
    }

    /// From now on queues start paused. Call it before the queues that run are asked to pause.
    pub fn stop(&self) {
        self.still.store(true, SeqCst);
    }

    /// From now on queues start running, with this view. Call it before the queues that are paused are told to go on.
    pub fn go(&self, view: V) {
        // Before the flag: see `join`.
        self.set(Some(view));
        self.still.store(false, SeqCst);
    }

    /// How a queue starts: whether paused, and with which view; `None` where the source has ended. Asked on the queue's
    /// iothread.
    pub fn join(&self) -> Option<(bool, V)> {
        // The flag first. The other way round, a start between the two steps of `go` would serve the graph of before the
        // pause, unpaused, until the message to go on arrives.
        let still = self.still.load(SeqCst);
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        view.map(|view| (still, view))
    }

    /// The source has ended: its view is given back, no queue starts any more.
    pub fn end(&self) {
        self.set(None);
    }

    fn set(&self, view: Option<V>) {
        let old = std::mem::replace(&mut *self.view.lock().unwrap_or_else(PoisonError::into_inner), view);
        drop(old);
    }
}

impl<V: Clone> Default for Standing<V> {
    fn default() -> Standing<V> {
        Standing::new()
    }
}

#[cfg(test)]
#[path = "standing_tests.rs"]
mod tests;
