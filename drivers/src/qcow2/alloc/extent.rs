//! Runs of clusters each thread has set aside: an allocation that hits its run neither waits nor takes a shared lock.
//!
//! Called by the request path, `try_fresh` under the lock of an L2 slot. The refcounts of a run are 1 in memory from the
//! moment it is set aside, so that publishing a mapping into it needs nothing else. What is left of it goes back when the image is
//! closed, leaks in a crash.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use graph::{DebugEvent, NodeIo, Result, Ticket};

use crate::qcow2::node::FILE;

use super::{Extent, FIRST_EXTENT, FreeKind, Freed, LAST_EXTENT, SLOTS, Space, lock};

/// Who asks for this much at once, bytes, writes in large pieces: the file system finds room for those better by itself.
const BULK: u64 = 512 << 10;

/// One thread's run.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// First cluster left.
    next: u64,
    /// End of the run.
    end: u64,
    /// Reads as zeroes.
    zero: bool,
    /// Size of the last reservation, clusters.
    size: u64,
}

/// A number of its own for each thread, modulo the slots.
fn slot_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: usize = NEXT.fetch_add(1, Relaxed) % SLOTS);
    MINE.try_with(|m| *m).unwrap_or(0)
}

impl Space {
    fn slot(&self) -> &std::sync::Mutex<Slot> {
        // The index is below SLOTS; the first one stands in without a panic.
        self.slots.get(slot_of_thread()).unwrap_or(&self.slots[0])
    }

    /// Host offset of that many clusters in a row that read as zeroes and were never used; `None`: ask [`Space::alloc`]. Does not
    /// wait, and takes no lock another thread holds for long.
    pub(crate) fn try_fresh(&self, clusters: u64) -> Option<u64> {
        let mut slot = lock(self.slot());
        if !slot.zero || slot.end - slot.next < clusters || clusters == 0 {
            return None;
        }
        let first = slot.next;
        slot.next += clusters;
        Some(first << self.geo.cluster_bits())
    }

    /// Up to `clusters` out of this thread's run.
    fn next_of_slot(&self, clusters: u64, contiguous: bool) -> Option<Extent> {
        let mut slot = lock(self.slot());
        let left = slot.end - slot.next;
        if left == 0 || (contiguous && left < clusters) {
            return None;
        }
        let clusters = clusters.min(left);
        let extent = Extent { offset: slot.next << self.geo.cluster_bits(), clusters, zero: slot.zero };
        slot.next += clusters;
        Some(extent)
    }

    /// Allocates host clusters: all of them in a row if `contiguous`, otherwise as many in a row as there are, at least one. Their
    /// refcount is 1 in memory; nothing refers to them yet.
    ///
    /// # Errors
    /// `ENOSPC` where the file cannot grow, `EFBIG` past what the format can address, what the file says. Everything is
    /// as before then.
    pub(crate) async fn alloc_in(&self, file: &NodeIo, clusters: u64, contiguous: bool) -> Result<Extent> {
        let result = self.alloc_unmarked(file, clusters, contiguous).await;
        self.marked(file, result).await
    }

    /// An error passes through; if it tells of damage the image is marked first.
    pub(super) async fn marked<T>(&self, file: &NodeIo, result: Result<T>) -> Result<T> {
        if result.is_err()
            && self.health.take_unmarked()
            && let Err(e) = self.header.mark_corrupt(file).await
        {
            log::warn!("an image that was found damaged could not be marked: {e}");
        }
        result
    }

    async fn alloc_unmarked(&self, file: &NodeIo, clusters: u64, contiguous: bool) -> Result<Extent> {
        self.health.check()?;
        file.debug_event(DebugEvent::ClusterAlloc);
        let clusters = clusters.max(1);
        if let Some(extent) = self.next_of_slot(clusters, contiguous) {
            return Ok(extent);
        }
        let slow = self.slow.lock().await;
        // Another task of this thread may have filled it meanwhile.
        if let Some(extent) = self.next_of_slot(clusters, contiguous) {
            return Ok(extent);
        }
        let last = (LAST_EXTENT >> self.geo.cluster_bits()).max(1);
        if contiguous && clusters > last {
            return self.take(file, clusters, true, false).await;
        }
        let first = (FIRST_EXTENT >> self.geo.cluster_bits()).max(1);
        let size = lock(self.slot()).size;
        let size = if size == 0 { first } else { (size * 2).min(last) };
        let taken = match self.take(file, size.max(clusters), false, true).await {
            Ok(extent) if contiguous && extent.clusters < clusters => {
                self.return_now(extent);
                self.take(file, clusters, true, false).await?
            }
            Ok(extent) => extent,
            // Perhaps less is to be had.
            Err(_) => self.take(file, clusters, contiguous, false).await?,
        };
        let zero = match taken.zero {
            true => {
                if clusters << self.geo.cluster_bits() < BULK {
                    // A hole it is either way.
                    self.back(file, taken).await;
                }
                true
            }
            false => self.make_zero(file, taken).await,
        };
        let taken = Extent { zero, ..taken };
        let left = {
            let mut slot = lock(self.slot());
            slot.size = size;
            let start = taken.offset >> self.geo.cluster_bits();
            let old = (slot.next, slot.end);
            if slot.end == start && slot.zero == taken.zero {
                slot.end += taken.clusters;
                None
            } else {
                let zero = slot.zero;
                *slot = Slot { next: start, end: start + taken.clusters, zero: taken.zero, size };
                (old.1 > old.0).then_some((old, zero))
            }
        };
        if let Some(((next, end), zero)) = left {
            self.return_now(Extent { offset: next << self.geo.cluster_bits(), clusters: end - next, zero });
        }
        drop(slow);
        match self.next_of_slot(clusters, contiguous) {
            Some(extent) => Ok(extent),
            // Another task of this thread cannot have been faster: there was no wait in between. Other threads share the
            // slot when there are many; they have taken all of it.
            None => {
                let _slow = self.slow.lock().await;
                self.take(file, clusters, contiguous, false).await
            }
        }
    }

    /// As [`Space::alloc_in`] with the node's own `io`, as many in a row as there are.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn alloc(&self, io: &NodeIo, clusters: u64) -> Result<Extent> {
        self.alloc_in(&io.child(FILE), clusters, false).await
    }

    /// Gives back what was allocated (by clusters or by bytes) and never published. Anything may have been written there.
    pub(crate) fn give_back(&self, offset: u64, bytes: u64) {
        let freed = Freed { offset, bytes, kind: FreeKind::Keep };
        // Nobody has ever seen it: nothing to wait for.
        lock(&self.state).waiting.push_front((Ticket::default(), vec![freed]));
    }

    /// As `give_back` for an extent.
    pub(super) fn return_now(&self, extent: Extent) {
        self.give_back(extent.offset, extent.clusters << self.geo.cluster_bits());
    }

    /// Takes all runs back, for a close or because space has become scarce; whether there was any.
    pub(super) fn drain_slots(&self) -> bool {
        let mut any = false;
        for slot in &self.slots {
            let old = std::mem::take(&mut *lock(slot));
            if old.end > old.next {
                any = true;
                let offset = old.next << self.geo.cluster_bits();
                self.return_now(Extent { offset, clusters: old.end - old.next, zero: old.zero });
            }
        }
        any
    }
}
