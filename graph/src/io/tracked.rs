//! Requests on their way through a node, as far as they must keep out of each other's way.
//!
//! A write below the node's `request_alignment` is read-modify-write of whole blocks: it is *serialising*, nothing else may
//! change those blocks between its read and its write. Aligned writes only need to be seen by it. Who calls: `io` for
//! driven requests. What must not happen: a wait that depends on a later request.
//!
//! **Aligned writes** pay two atomic operations: they add themselves to `counted` and go ahead if `serialising` is 0.
//! **Serialising writes** add themselves to `serialising` first, and then wait until `counted` is 0 and until every
//! earlier overlapping entry of the list has gone. Whoever finds `serialising` non-zero steps back from `counted` and enters
//! the list instead.
//!
//! *Why nobody is missed*: both sides write their own counter and then read the other's, all sequentially consistent.
//! Of the two writes one comes first in the single total order, so its author is seen by the other's later read: either the
//! aligned write sees `serialising` and steps back, or the serialising write sees `counted` and waits. Both may happen; that
//! costs time only. *Why it ends*: while `serialising` is not 0 `counted` only falls; within the list an entry waits for
//! smaller numbers alone.
//!
//! **Fast-path writes** (`View::resolve`) are in neither place. They may pass a node with an alignment only if every user
//! of the node promised requests in multiples of that alignment (`RootOptions::granularity`, `ViewNode::new`): such users
//! never send a misaligned request, so what serialises can only come from a format driver rewriting its own metadata, and a
//! block that is wholly a user's data holds no metadata.
//!
//! Lock order: `list` is a leaf; wakers are called after it is released.

use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::{Poll, Waker};

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard, atomic::AtomicUsize, atomic::Ordering::SeqCst};
#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard, atomic::AtomicUsize, atomic::Ordering::SeqCst};

#[derive(Default)]
struct List {
    next: u64,
    entries: Vec<Entry>,
    waiters: Vec<Waker>,
}

struct Entry {
    number: u64,
    start: u64,
    end: u64,
    serialising: bool,
}

impl List {
    /// Whether entry `number` has to wait for an earlier one.
    fn blocked(&self, number: u64) -> bool {
        let Some(own) = self.entries.iter().find(|e| e.number == number) else { return false };
        self.entries.iter().any(|e| {
            e.number < own.number
                && (e.serialising || own.serialising)
                && e.start < own.end
                && own.start < e.end
        })
    }
}

/// The tracked writes of one node, all iothreads together.
#[derive(Default)]
pub struct Tracker {
    counted: AtomicUsize,
    serialising: AtomicUsize,
    list: Mutex<List>,
}

/// A request that is being tracked; ends when dropped.
pub struct Token<'a> {
    tracker: &'a Tracker,
    /// Number of the list entry and whether it serialises; `None` for a request that is only counted.
    entry: Option<(u64, bool)>,
}

impl Tracker {
    fn list(&self) -> MutexGuard<'_, List> {
        // No code that can panic runs between two changes that belong together.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a write of `start..end` (rounded to the alignment by the caller), waiting for what it must not overlap.
    pub async fn begin(&self, start: u64, end: u64, serialising: bool) -> Token<'_> {
        if !serialising {
            self.counted.fetch_add(1, SeqCst);
            let token = Token { tracker: self, entry: None };
            between();
            // Pairs with the read of `counted` in the wait below, see the head of this file.
            if self.serialising.load(SeqCst) == 0 {
                return token;
            }
        }
        if serialising {
            self.serialising.fetch_add(1, SeqCst);
            between();
        }
        let token = {
            let mut list = self.list();
            let number = list.next;
            list.next += 1;
            list.entries.push(Entry { number, start, end, serialising });
            // Made before the wait: dropping the waiting future takes the entry out again.
            Token { tracker: self, entry: Some((number, serialising)) }
        };
        let number = token.entry.map_or(0, |e| e.0);
        poll_fn(|cx| {
            let mut list = self.list();
            // Read under the lock: whoever brings `counted` to 0 takes the lock afterwards to wake us.
            if (serialising && self.counted.load(SeqCst) != 0) || list.blocked(number) {
                if !list.waiters.iter().any(|w| w.will_wake(cx.waker())) {
                    list.waiters.push(cx.waker().clone());
                }
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        token
    }

    fn wake(&self, waiters: Vec<Waker>) {
        waiters.into_iter().for_each(Waker::wake);
    }

    /// Whether nothing is tracked.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.counted.load(SeqCst) == 0 && self.list().entries.is_empty()
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        let tracker = self.tracker;
        match self.entry {
            None => {
                let last = tracker.counted.fetch_sub(1, SeqCst) == 1;
                between();
                // If this reads 0 the serialising write has yet to add itself, and will see `counted` without us.
                if last && tracker.serialising.load(SeqCst) != 0 {
                    let waiters = std::mem::take(&mut tracker.list().waiters);
                    tracker.wake(waiters);
                }
            }
            Some((number, serialising)) => {
                let waiters = {
                    let mut list = tracker.list();
                    list.entries.retain(|e| e.number != number);
                    if serialising {
                        tracker.serialising.fetch_sub(1, SeqCst);
                    }
                    std::mem::take(&mut list.waiters)
                };
                tracker.wake(waiters);
            }
        }
    }
}

/// Loom takes sequentially consistent accesses for weaker ones unless a fence stands between them.
fn between() {
    #[cfg(loom)]
    loom::sync::atomic::fence(SeqCst);
}

#[cfg(test)]
#[path = "tracked_tests.rs"]
mod tests;
