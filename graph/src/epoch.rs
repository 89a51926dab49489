//! Grace periods: when a mapping has been taken back, how long may a request still be using it?
//!
//! A driver that frees a host cluster takes the mapping out of its tables, asks for a [`Ticket`], and reuses the cluster only
//! when [`Epochs::passed`]: then every request that may have looked the mapping up before has ended. Neither call
//! waits, and requests pay next to nothing.
//!
//! **Readers.** Each view in use on a thread has one [`Participant`], written by that thread alone: two counters of requests
//! under way, of which new requests take the one that `phase` names. Whoever brings a counter from 0 to 1 issues a
//! sequentially consistent fence before looking anything up ([`Participant::enter`]); while the counter is above 0 further
//! requests just count themselves.
//!
//! **Grace period** of a participant: each of its two counters has been *seen at 0 once* since it began. To get there under
//! steady load, `phase` is turned away from the counter that is still waited for.
//!
//! *Why it is safe*: let U be the fence in [`Epochs::ticket`], after the unlink, and R the fence of the request that brought the
//! counter above 0 (our request's own, or an earlier one's: the counter has not been 0 in between). Either U comes first: then everything
//! looked up after R sees the unlink. Or R comes first: then every load of the counter that happens after U sees that increment or
//! something later in the counter's modification order, which is not 0 before our request has left. Which of the two
//! counters a request took does not matter, both are waited for: a `phase` read too late costs time only. A participant
//! that registers after the ticket has taken the lock of the list sees the unlink through that lock.
//!
//! Leaving is a release store, the look an acquire load: what a request did happens before the reuse.
//!
//! Locks, leaves, held for a few instructions: `Epochs::participants`, `Participant::grace`.

use std::cell::Cell;
use std::marker::PhantomData;
use std::rc::Rc;

#[cfg(loom)]
use loom::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU32, Ordering, fence},
};
#[cfg(not(loom))]
use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU32, Ordering, fence},
};

use Ordering::{Acquire, Relaxed, Release, SeqCst};

/// Grace periods of one participant.
#[derive(Debug, Default)]
struct Grace {
    /// How many have ended.
    done: u64,
    /// The counters the running one still waits for; `None` when none runs.
    waits: Option<[bool; 2]>,
}

/// One thread's requests through one view.
#[derive(Debug)]
pub struct Participant {
    /// Requests under way. Written by one thread alone ([`Stays`]).
    counts: [AtomicU32; 2],
    /// Which counter new requests take.
    phase: AtomicU32,
    grace: Mutex<Grace>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs between two changes that belong together.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Participant {
    fn new() -> Participant {
        Participant {
            counts: [AtomicU32::new(0), AtomicU32::new(0)],
            phase: AtomicU32::new(0),
            grace: Mutex::new(Grace::default()),
        }
    }

    fn count(&self, phase: usize) -> &AtomicU32 {
        &self.counts[phase & 1]
    }

    /// The number of a grace period that begins from now on; `None` if nothing is under way.
    fn next_grace(&self) -> Option<u64> {
        if self.counts.iter().all(|c| c.load(Acquire) == 0) {
            return None;
        }
        let grace = lock(&self.grace);
        Some(grace.done + if grace.waits.is_some() { 2 } else { 1 })
    }

    /// Whether that many grace periods have ended; moves the running one on, or starts one, if not.
    fn reached(&self, number: u64) -> bool {
        let mut grace = lock(&self.grace);
        while grace.done < number {
            let mut waits = grace.waits.unwrap_or([true; 2]);
            for (wait, count) in waits.iter_mut().zip(&self.counts) {
                *wait = *wait && count.load(Acquire) != 0;
            }
            match waits {
                [false, false] => {
                    grace.done += 1;
                    grace.waits = None;
                    continue;
                }
                [true, false] => self.phase.store(1, Relaxed),
                [false, true] => self.phase.store(0, Relaxed),
                [true, true] => {}
            }
            grace.waits = Some(waits);
            return false;
        }
        true
    }
}

/// A thread's side of a participant: the only one that counts. Stays on its thread.
#[derive(Clone, Debug)]
pub struct Stays {
    participant: Arc<Participant>,
    /// Not to be sent: the counters have one writer.
    single: PhantomData<Rc<Cell<()>>>,
}

impl Stays {
    pub(crate) fn new() -> Stays {
        Stays { participant: Arc::new(Participant::new()), single: PhantomData }
    }

    /// Counts one request, from before its mapping is looked up. The number goes to [`Stays::leave`].
    #[inline]
    pub fn enter(&self) -> u8 {
        let phase = self.participant.phase.load(Relaxed) as usize & 1;
        let count = self.participant.count(phase);
        let under_way = count.load(Relaxed);
        count.store(under_way.wrapping_add(1), Relaxed);
        if under_way == 0 {
            // Pairs with the one in `Epochs::ticket`.
            fence(SeqCst);
        }
        phase as u8
    }

    /// Counts one more request beside one that is under way under `phase`, without a fence.
    #[inline]
    pub fn join(&self, phase: u8) {
        let count = self.participant.count(phase.into());
        let under_way = count.load(Relaxed);
        debug_assert!(under_way > 0, "nobody to join");
        count.store(under_way.wrapping_add(1), Relaxed);
    }

    /// The request that entered under `phase` has ended.
    #[inline]
    pub fn leave(&self, phase: u8) {
        let count = self.participant.count(phase.into());
        let under_way = count.load(Relaxed);
        debug_assert!(under_way > 0, "left twice");
        count.store(under_way.wrapping_sub(1), Release);
    }

    /// As [`Stays::enter`], leaving when dropped.
    #[inline]
    pub fn stay(&self) -> Stay<'_> {
        Stay { stays: self, phase: self.enter() }
    }
}

/// A request under way.
#[derive(Debug)]
pub struct Stay<'a> {
    stays: &'a Stays,
    phase: u8,
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        self.stays.leave(self.phase);
    }
}

/// What has to pass before something that was unlinked may be reused.
#[derive(Debug, Default)]
pub struct Ticket {
    waits: Vec<(Arc<Participant>, u64)>,
}

/// The grace periods of one node: the participants are all views that reach it.
#[derive(Debug)]
pub struct Epochs {
    participants: Mutex<Vec<Arc<Participant>>>,
}

impl Default for Epochs {
    fn default() -> Epochs {
        Epochs { participants: Mutex::new(Vec::new()) }
    }
}

impl Epochs {
    /// Requests counted there may look mappings of this node up.
    pub(crate) fn register(&self, stays: &Stays) {
        let mut list = lock(&self.participants);
        // Those of views that are no longer used by their thread have nothing under way.
        list.retain(|p| Arc::strong_count(p) > 1);
        // A view may know a node twice.
        if !list.iter().any(|p| Arc::ptr_eq(p, &stays.participant)) {
            list.push(Arc::clone(&stays.participant));
        }
    }

    /// Call after the unlink is visible in memory (any store will do, no fence is needed).
    pub fn ticket(&self) -> Ticket {
        // Pairs with the one in `Stays::enter`.
        fence(SeqCst);
        let list = lock(&self.participants);
        let waits = list.iter().filter_map(|p| Some((Arc::clone(p), p.next_grace()?))).collect();
        Ticket { waits }
    }

    /// Whether no request can still use what was unlinked before the ticket. Never waits; ask again later. Asking is what
    /// moves things on.
    pub fn passed(&self, ticket: &Ticket) -> bool {
        // All of them, also after a first no: each is moved on by being asked.
        ticket.waits.iter().fold(true, |all, (p, number)| p.reached(*number) && all)
    }
}

#[cfg(test)]
#[path = "epoch_tests.rs"]
mod tests;
