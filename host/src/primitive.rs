//! The locks and atomics of everything that crosses threads, so that loom can stand in for them.
//!
//! Used by the mailbox, the wakers and the oneshot. Nothing else belongs here.

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// Locks, also after another thread panicked inside: each critical section here leaves the data usable at every step.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    match m.lock() {
        Ok(g) => g,
        Err(poisoned) => poisoned.into_inner(),
    }
}
