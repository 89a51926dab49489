//! The split virtqueue (virtio 1.3 §2.7), device side. One iothread owns a queue and turns it: `fetch`, `pop`, then
//! `push_used`, `publish`. It must not know what a request means, log, or block.
//!
//! Memory ordering, each with its partner in the driver: the Acquire load of `avail.idx` pairs with the driver's barrier
//! before it stores the index; the Release store of `used.idx` pairs with the barrier after the driver reads it; the
//! SeqCst fence between `used.idx` and `used_event`/`avail.flags` pairs with the driver's fence between writing those
//! and re-reading `used.idx`; the one in `enable_notification` pairs with the driver's fence between `avail.idx` and
//! reading `avail_event`/`used.flags`.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use crate::chain::Chain;
use crate::error::QueueError;
use crate::inflight::{InflightError, Tracker};
use crate::layout::{RingAddresses, Rings};
use crate::memory::{Flat, Memory};
use crate::walk::Walk;

#[cfg(test)]
mod tests;

/// How a ring is set up: what SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE and SET_FEATURES said.
#[derive(Clone, Copy, Debug)]
pub struct SplitConfig {
    /// Entries: a power of two from 2 to `max_size`.
    pub size: u32,
    /// The largest size the device admits, at most [`crate::MAX_QUEUE_SIZE`]; it bounds the memory of the requests.
    pub max_size: u16,
    /// Where the rings are.
    pub addresses: RingAddresses,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// Next entry of the available ring to take (SET_VRING_BASE); [`SplitQueue::track`] knows better.
    pub last_avail: u16,
    /// The used index to go on from; `None`: what the ring says.
    pub used_idx: Option<u16>,
}

/// Where a queue stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Next entry of the available ring to take (the answer to GET_VRING_BASE).
    pub last_avail: u16,
    /// The used index the driver has been told.
    pub used_idx: u16,
}

/// A completion that waits for [`SplitQueue::publish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedElement {
    /// Head of the chain.
    pub head: u16,
    /// Bytes written to its writable part.
    pub len: u32,
}

/// What the device knows of a descriptor as a head.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Head {
    Free,
    /// Given out by `pop`.
    InFlight,
    /// Completed by `push_used`, not yet published.
    Pending,
}

/// The device side of one split virtqueue.
///
/// # Order of use
/// [`fetch`](Self::fetch) looks at the available index once and says how many chains wait; [`pop`](Self::pop) unpacks
/// them one by one, never more than were there at `fetch`, which is never more than the ring has entries. Completions
/// are collected by [`push_used`](Self::push_used) in any order and made visible together by
/// [`publish`](Self::publish), which says whether the driver wants to be told.
///
/// # Tracking for restarts
/// [`track`](Self::track) hands a new queue its part of the in-flight area. From then on `pop` marks each chain there and
/// `publish` unmarks it, in the order that lets a successor of this process know what it must do again; those heads
/// [`resubmit`](Self::resubmit) takes in. Without it neither costs anything but a test.
///
/// # Memory
/// Chains point into [`epoch`](Self::epoch). Whoever has one in flight keeps that epoch alive; a clone of the `Arc` per
/// iothread and epoch with a plain counter of requests will do, none per request is needed.
///
/// A queue may move to another thread, but not be shared.
pub struct SplitQueue {
    /// Tables of the ring; valid while `memory` lives, and of `size` entries.
    rings: Rings,
    /// Last region hit; of `memory`.
    hint: Flat,
    size: u16,
    mask: u16,
    /// Next entry of the available ring to pop.
    next_avail: u16,
    /// The available index at the last `fetch`.
    avail_end: u16,
    /// The used index that was published.
    used_idx: u16,
    /// The used index at the last notification decision.
    signalled: u16,
    /// Whether `signalled` means anything: the first decision after a start is always yes.
    signalled_valid: bool,
    event_idx: bool,
    indirect: bool,
    /// Chains popped and not published.
    in_flight: u32,
    /// One entry per descriptor; its length is `size`.
    heads: Box<[Head]>,
    pending: Vec<UsedElement>,
    /// The ring's part of the in-flight area.
    tracker: Option<Tracker>,
    memory: Arc<Memory>,
    broken: Option<QueueError>,
    addresses: RingAddresses,
    /// Not `Sync`: the indices below the tables have one owner.
    _owned: PhantomData<*mut ()>,
}

// SAFETY: the pointers in `rings` and `hint` point into mappings that `memory`, which moves along, keeps alive and that
// no thread has a claim on. All fields else are owned. Not Sync (PhantomData): the device side of a ring has one owner.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// Sets a ring up.
    ///
    /// The caller scans it once and notifies once without being asked, since kicks and interrupts may have been lost
    /// while the ring did not run; the first [`publish`](Self::publish) says so by itself.
    ///
    /// # Errors
    /// [`QueueError::Size`], [`QueueError::RingUnmapped`], [`QueueError::RingUnaligned`].
    pub fn new(memory: Arc<Memory>, config: &SplitConfig) -> Result<Self, QueueError> {
        let bad_size = QueueError::Size { size: config.size };
        let size = u16::try_from(config.size).map_err(|_| bad_size)?;
        if !(2..=config.max_size.min(crate::MAX_QUEUE_SIZE)).contains(&size) || !size.is_power_of_two() {
            return Err(bad_size);
        }
        let rings = Rings::resolve(&memory, &config.addresses, size)?;
        // SAFETY: `rings` was just resolved in `memory`, which is alive.
        let used_idx = config
            .used_idx
            .unwrap_or_else(|| u16::from_le(unsafe { rings.used_idx() }.load(Ordering::Relaxed)));
        Ok(Self {
            rings,
            hint: Flat::NOTHING,
            size,
            mask: size - 1,
            next_avail: config.last_avail,
            avail_end: config.last_avail,
            used_idx,
            signalled: used_idx,
            signalled_valid: false,
            event_idx: config.event_idx,
            indirect: config.indirect,
            in_flight: 0,
            heads: vec![Head::Free; usize::from(size)].into_boxed_slice(),
            pending: Vec::with_capacity(usize::from(size)),
            tracker: None,
            memory,
            broken: None,
            addresses: config.addresses,
            _owned: PhantomData,
        })
    }

    /// Tracks the ring in its part of the in-flight area from now on, and returns the heads that an earlier run of the device
    /// had taken and not completed, oldest first: [`resubmit`](Self::resubmit) them before anything is fetched. To be
    /// called once, before the first `fetch`.
    ///
    /// Where the ring goes on follows from its used index and those heads alone. What the front end said
    /// ([`SplitConfig::last_avail`]) is not looked at: after a lost connection QEMU says the used index, which would
    /// repeat some requests and forget others, cloud-hypervisor the available index, which would forget those that were never taken.
    ///
    /// # Errors
    /// What is wrong with the area; the queue must not be used then.
    pub fn track(&mut self, mut tracker: Tracker) -> Result<Vec<u16>, InflightError> {
        if tracker.size() != self.size {
            return Err(InflightError::RingSize { ring: self.size, tracked: tracker.size() });
        }
        let again = tracker.recover(self.used_idx)?;
        // At most `size` <= 32768 heads.
        self.next_avail = self.used_idx.wrapping_add(again.len() as u16);
        self.avail_end = self.next_avail;
        self.tracker = Some(tracker);
        Ok(again)
    }

    /// The front end takes the ring back (GET_VRING_BASE, a reset) and is told where it stands: chains that were taken and
    /// never completed, because they were what broke the ring, are its own affair from now on. After a lost connection
    /// it is not told, so their marks stay.
    pub fn forget_taken(&mut self) {
        if let Some(tracker) = &mut self.tracker
            && self.in_flight > 0
        {
            tracker.forget(self.used_idx);
        }
    }

    /// Whether the front end has cut the file of the in-flight area: the ring must not go on then.
    #[inline]
    #[must_use]
    pub fn tracking_is_lost(&self) -> bool {
        self.tracker.as_ref().is_some_and(Tracker::is_lost)
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory that chains popped from now on point into.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Chains that were popped and are not published yet; at most [`size`](Self::size).
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Why the ring is stopped, if it is.
    #[must_use]
    pub fn broken(&self) -> Option<QueueError> {
        self.broken
    }

    /// Where the queue stands. After `publish`, with nothing in flight, this is all there is to know about it.
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState { last_avail: self.next_avail, used_idx: self.used_idx }
    }

    /// Looks how far the driver is and returns how many chains [`pop`](Self::pop) will give: 0 to
    /// [`size`](Self::size).
    ///
    /// # Errors
    /// [`QueueError::AvailIndex`], or what broke the ring before.
    #[inline]
    pub fn fetch(&mut self) -> Result<u16, QueueError> {
        if let Some(e) = self.broken {
            return Err(e);
        }
        let idx = u16::from_le(self.avail_idx().load(Ordering::Acquire));
        let waiting = idx.wrapping_sub(self.next_avail);
        if waiting > self.size {
            return Err(self.fail(QueueError::AvailIndex { idx, next: self.next_avail }));
        }
        self.avail_end = idx;
        Ok(waiting)
    }

    /// Unpacks the next chain of the last [`fetch`](Self::fetch) into `chain`; `false` when there is none.
    ///
    /// # Errors
    /// What is wrong with the chain; the ring is stopped then, and `chain` holds nothing of use.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_avail == self.avail_end {
            return self.broken.map_or(Ok(false), Err);
        }
        // SAFETY: `rings` is valid for `size` entries while `self.memory` lives; the mask keeps the slot below `size`.
        let head = unsafe { self.rings.avail_entry(self.next_avail & self.mask) };
        self.prefetch();
        match self.unpack(head, chain) {
            Ok(()) => {
                if let Some(tracker) = &mut self.tracker {
                    tracker.taken(head);
                }
                self.next_avail = self.next_avail.wrapping_add(1);
                Ok(true)
            }
            Err(e) => Err(self.fail(e)),
        }
    }

    /// Takes in again a chain that an earlier run of the device had popped and not completed. The available ring is not
    /// looked at; [`track`](Self::track) has counted it already.
    ///
    /// # Errors
    /// As for [`pop`](Self::pop).
    pub fn resubmit(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        if let Some(e) = self.broken {
            return Err(e);
        }
        self.unpack(head, chain).map_err(|e| self.fail(e))
    }

    #[inline(always)]
    fn unpack(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        // `heads` has `size` entries, so this is also the range check the walk relies on.
        let Some(state) = self.heads.get_mut(usize::from(head)) else {
            return Err(QueueError::HeadRange { head });
        };
        if *state != Head::Free {
            return Err(QueueError::HeadInFlight { head });
        }
        chain.begin(head, self.memory.epoch());
        let walk = Walk {
            table: self.rings.descriptors(),
            size: self.size,
            indirect: self.indirect,
            memory: &self.memory,
            hint: &mut self.hint,
            writable_seen: false,
        };
        walk.run(head, chain)?;
        *state = Head::InFlight;
        self.in_flight += 1;
        Ok(())
    }

    /// Asks the cache for the descriptor of a chain that comes soon. What is read here is not used for anything else.
    #[inline(always)]
    fn prefetch(&self) {
        const AHEAD: u16 = 4;
        let slot = self.next_avail.wrapping_add(AHEAD) & self.mask;
        // SAFETY: the mask keeps the slot below `size`; `rings` is valid while `self.memory` lives. Beyond `avail_end` the
        // entry is stale, which is harmless: it is only a hint, and clamped.
        let head = unsafe { self.rings.avail_entry(slot) };
        self.rings.prefetch_descriptor(head & self.mask);
    }

    /// Notes that the chain at `head` is done, with `len` bytes of its writable part written. The driver sees it after
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`QueueError::NotInFlight`] when it is not, or was completed already; nothing changes then.
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        match self.heads.get_mut(usize::from(head)) {
            Some(state) if *state == Head::InFlight => *state = Head::Pending,
            _ => return Err(QueueError::NotInFlight { head }),
        }
        // Never grows: each head is pending at most once, and there is room for all.
        self.pending.push(UsedElement { head, len });
        Ok(())
    }

    /// Completions that wait for [`publish`](Self::publish), in the order they will have in the used ring.
    #[inline]
    #[must_use]
    pub fn pending(&self) -> &[UsedElement] {
        &self.pending
    }

    /// Makes all collected completions visible with one index store, and returns whether the driver wants a
    /// notification. Without completions: nothing, `false`.
    ///
    /// The answer covers all entries since the previous one, so it must be acted upon, not dropped. The first one of a
    /// ring's life is always yes.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.link(&self.pending);
        }
        let mut idx = self.used_idx;
        for element in &self.pending {
            // SAFETY: `rings` is valid for `size` entries while `self.memory` lives; the mask keeps the slot below `size`.
            unsafe { self.rings.write_used(idx & self.mask, *element) };
            if let Some(state) = self.heads.get_mut(usize::from(element.head)) {
                *state = Head::Free;
            }
            idx = idx.wrapping_add(1);
        }
        // At most `size` <= 32768 elements, counted in `in_flight`.
        self.in_flight -= self.pending.len() as u32;
        self.used_idx = idx;
        // SAFETY: `rings` is valid while `self.memory` lives.
        unsafe { self.rings.used_idx() }.store(idx.to_le(), Ordering::Release);
        // Also what `Tracker::clear` relies on.
        fence(Ordering::SeqCst);
        if let Some(tracker) = &mut self.tracker {
            tracker.clear(&self.pending);
            tracker.settle(idx);
        }
        self.pending.clear();
        self.wants_notification()
    }

    #[inline(always)]
    fn wants_notification(&mut self) -> bool {
        if !self.event_idx {
            // SAFETY: `rings` is valid while `self.memory` lives.
            let flags = u16::from_le(unsafe { self.rings.avail_flags() }.load(Ordering::Relaxed));
            // Also here the first decision is yes: an interrupt may have been lost before the ring started.
            let first = !std::mem::replace(&mut self.signalled_valid, true);
            return first || flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0;
        }
        // SAFETY: as above.
        let event = u16::from_le(unsafe { self.rings.used_event() }.load(Ordering::Relaxed));
        let old = std::mem::replace(&mut self.signalled, self.used_idx);
        let first = !std::mem::replace(&mut self.signalled_valid, true);
        first || passes_event(event, old, self.used_idx)
    }

    /// Asks the driver to kick when it makes chains available, and returns whether some are waiting already: then
    /// `fetch` again before sleeping, no kick may come for those. Call with everything of the last `fetch` popped.
    ///
    /// A stopped ring answers `false`.
    pub fn enable_notification(&mut self) -> bool {
        if self.event_idx {
            // SAFETY: `rings` is valid while `self.memory` lives.
            unsafe { self.rings.avail_event() }.store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            // SAFETY: as above.
            unsafe { self.rings.used_flags() }.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Tells the driver that kicks are not needed while the device polls. With EVENT_IDX nothing is written: an event
    /// index that lies behind silences the driver by itself.
    pub fn disable_notification(&mut self) {
        if !self.event_idx {
            // SAFETY: `rings` is valid while `self.memory` lives.
            unsafe { self.rings.used_flags() }
                .store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed);
        }
    }

    /// Whether the driver has published chains that are not popped yet: one load, for polling.
    #[inline]
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.broken.is_none() && u16::from_le(self.avail_idx().load(Ordering::Relaxed)) != self.next_avail
    }

    /// Turns EVENT_IDX on or off. The next notification decision is yes.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
        self.signalled_valid = false;
    }

    /// Goes over to the next epoch of guest memory: the rings are looked up again under the addresses they had. Chains
    /// in flight keep pointing into the old epoch, which their holders keep alive.
    ///
    /// # Errors
    /// [`QueueError::RingUnmapped`] or [`QueueError::RingUnaligned`]: the ring is stopped. It keeps the old memory, so
    /// what is in flight may still be completed and published there.
    pub fn rebase(&mut self, memory: Arc<Memory>) -> Result<(), QueueError> {
        match Rings::resolve(&memory, &self.addresses, self.size) {
            Ok(rings) => {
                self.rings = rings;
                self.hint = Flat::NOTHING;
                self.memory = memory;
                Ok(())
            }
            Err(e) => Err(self.fail(e)),
        }
    }

    #[inline(always)]
    fn avail_idx(&self) -> &AtomicU16 {
        // SAFETY: `rings` is valid while `self.memory` lives, which the borrow of `self` outlasts.
        unsafe { self.rings.avail_idx() }
    }

    /// Stops the ring for good.
    #[cold]
    #[inline(never)]
    fn fail(&mut self, e: QueueError) -> QueueError {
        self.avail_end = self.next_avail;
        *self.broken.get_or_insert(e)
    }
}

/// Whether one of the used entries `old .. new` (wrapping) is the one the driver asked to be told about
/// (§2.7.7.2: an interrupt is due when the entry at index `event` has been written).
#[inline(always)]
fn passes_event(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl fmt::Debug for SplitQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitQueue")
            .field("size", &self.size)
            .field("state", &self.state())
            .field("in_flight", &self.in_flight)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}
