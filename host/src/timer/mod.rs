//! Timers of one thread, ordered by deadline.
//!
//! Owned by a `Local`; fired by its loop. It knows no clock: the loop says what time it is.

use std::collections::BTreeMap;
use std::task::Waker;

#[cfg(test)]
mod tests;

/// Deadlines and whom to wake.
#[derive(Default)]
pub(crate) struct Timers {
    /// Keyed by (deadline in ns, serial number): equal deadlines fire in the order of setting.
    all: BTreeMap<(u64, u64), Option<Waker>>,
    next: u64,
}

impl Timers {
    /// Sets a timer; the key identifies it.
    pub(crate) fn insert(&mut self, deadline: u64) -> (u64, u64) {
        let key = (deadline, self.next);
        self.next += 1;
        self.all.insert(key, None);
        key
    }

    /// False if it has fired (or never was).
    pub(crate) fn register(&mut self, key: (u64, u64), waker: &Waker) -> bool {
        match self.all.get_mut(&key) {
            Some(Some(w)) => w.clone_from(waker),
            Some(w) => *w = Some(waker.clone()),
            None => return false,
        }
        true
    }

    /// Forgets a timer.
    pub(crate) fn remove(&mut self, key: (u64, u64)) {
        self.all.remove(&key);
    }

    /// When the next one is due, in ns.
    #[inline]
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.all.first_key_value().map(|((d, _), _)| *d)
    }

    /// Takes one that is due. The caller wakes without holding a borrow.
    pub(crate) fn pop_due(&mut self, now: u64) -> Option<Option<Waker>> {
        let first = self.all.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}
