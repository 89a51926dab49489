//! Who counts along: references of the active tables, kept true while the tables change.
//!
//! A check that goes on beside requests (`check/online/`) walks the tables in the order of the disk. What it has not come to yet
//! may change as it likes; a change of what it has counted already is counted by whoever makes it, under the same lock. So at
//! any moment the cells hold what the part that was walked refers to now. Nobody watches, usually: then a change
//! costs one load.
//!
//! **Order of locks**: `loading` → a slot's mutex → the watch's → the L1 table's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Tables;
use super::load::strip_copied;
use crate::qcow2::check::online::cells::{Cells, Class};
use crate::qcow2::format::entry::compressed_range;
use crate::qcow2::format::{COMPRESSED, COPIED, Geometry, OFFSET_MASK};

/// What a running check has counted so far.
pub(crate) struct Census {
    geo: Geometry,
    /// References of what was walked.
    pub(crate) cells: Cells,
    /// The first slice that was not walked.
    slices: u64,
    /// The first L1 entry that was not walked.
    l1: u64,
    /// The first slice behind the last table whose walk began.
    end: u64,
    /// Sectors that changed since the walk of their table began, by slice, from `slices` to `end`.
    touched: BTreeMap<u64, u128>,
    /// The table being walked lies elsewhere now.
    moved: bool,
    /// Refcount blocks some cluster of which got or lost a reference; where that is noted.
    pub(crate) blocks: Option<BTreeSet<u64>>,
}

impl Census {
    fn change(&mut self, cluster: u64, class: Class, up: bool) {
        self.cells.change(cluster, class, up);
        if let Some(blocks) = &mut self.blocks {
            blocks.insert(self.geo.reftable_index(cluster));
        }
    }

    /// One reference more, or less, to every cluster a range touches.
    pub(crate) fn range(&mut self, offset: u64, bytes: u64, up: bool) {
        let bits = self.geo.cluster_bits();
        for cluster in offset >> bits..=offset.saturating_add(bytes.max(1) - 1) >> bits {
            self.change(cluster, Class::Other, up);
        }
    }

    /// What an entry of a table refers to; one of L1 looks like one of L2 for that.
    fn entry(&mut self, word: u64, up: bool) {
        let host = word & OFFSET_MASK;
        if word & COMPRESSED != 0 {
            let (offset, bytes) = compressed_range(word, self.geo);
            self.range(offset, bytes, up);
        } else if host != 0 && self.geo.in_cluster(host) != 0 {
            self.range(host, self.geo.cluster_size(), up);
        } else if host != 0 {
            let class = if word & COPIED != 0 { Class::Sole } else { Class::Shared };
            self.change(host >> self.geo.cluster_bits(), class, up);
        }
    }

    /// An entry of an L2 table.
    fn data(&mut self, word: u64, up: bool) {
        // A data file has no refcounts.
        if word != 0 && !self.geo.data_file() {
            self.entry(word, up);
        }
    }
}

/// See the module's page. One per image.
#[derive(Default)]
pub(crate) struct Watch {
    /// Somebody counts. Looked at without the lock: see [`Tables::begin_table`] for why that is enough.
    active: AtomicBool,
    /// How often the image was changed as a whole, past these tables.
    upheavals: AtomicU64,
    census: Mutex<Option<Census>>,
}

/// The right to count; gone, nobody counts.
pub(crate) struct Turn(Arc<Watch>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.active.store(false, Relaxed);
        *self.0.census() = None;
    }
}

impl Turn {
    /// Whether it is one of this watch.
    pub(crate) fn is_of(&self, watch: &Arc<Watch>) -> bool {
        Arc::ptr_eq(&self.0, watch)
    }
}

impl Watch {
    /// What was counted. Not to be held across waiting.
    pub(crate) fn census(&self) -> MutexGuard<'_, Option<Census>> {
        self.census.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to count, with at most `budget` bytes of memory; `None`: somebody else does.
    pub(crate) fn begin(self: &Arc<Watch>, geo: Geometry, budget: u64) -> Option<Turn> {
        let mut census = self.census();
        if census.is_some() {
            return None;
        }
        *census = Some(Census {
            geo,
            cells: Cells::new(budget),
            slices: 0,
            l1: 0,
            end: 0,
            touched: BTreeMap::new(),
            moved: false,
            blocks: None,
        });
        self.active.store(true, Relaxed);
        Some(Turn(Arc::clone(self)))
    }

    /// Drained: tables, snapshots or bitmaps are about to be changed as a whole. Who counts has to begin again.
    pub(crate) fn upheaval(&self) {
        self.upheavals.fetch_add(1, Relaxed);
    }

    /// Changes when an upheaval comes.
    pub(crate) fn generation(&self) -> u64 {
        self.upheavals.load(Relaxed)
    }

    /// An entry of a slice changes, its sector in the slice being `sector`. Under the slot's mutex.
    #[inline]
    pub(super) fn entry_changes(&self, slice: u64, sector: u32, old: u64, new: u64) {
        if self.active.load(Relaxed) {
            self.note(slice, sector, old, new);
        }
    }

    #[cold]
    fn note(&self, slice: u64, sector: u32, old: u64, new: u64) {
        let mut census = self.census();
        let Some(census) = census.as_mut() else { return };
        if slice < census.slices {
            census.data(old, false);
            census.data(new, true);
        } else if slice < census.end {
            *census.touched.entry(slice).or_default() |= 1u128.checked_shl(sector).unwrap_or(0);
        }
    }
}

/// What came of counting a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// It is counted. `differs`: the disk has something else where it should have the same.
    Yes {
        /// See above.
        differs: bool,
    },
    /// What was read may be out of date: read again, with a new [`Tables::steady`].
    Again,
    /// The table lies elsewhere by now: [`Tables::begin_table`].
    Moved,
}

impl Tables {
    /// Who counts along.
    pub(crate) fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// Comes to the table of an L1 entry, or comes back to it because it moved; its L1 entry. `None`: there is no table, and
    /// its slices count as walked.
    pub(crate) fn begin_table(&self, index: u64) -> Option<u64> {
        let mut census = self.watch.census();
        let census = census.as_mut()?;
        let entry = self.l1.get(index);
        if census.l1 <= index {
            census.l1 = index + 1;
            if entry & OFFSET_MASK != 0 {
                census.entry(entry, true);
            }
        }
        census.moved = false;
        census.end = (index + 1) << self.slices_per_table_bits();
        census.touched = census.touched.split_off(&census.slices);
        if entry & OFFSET_MASK == 0 {
            census.slices = census.end;
            return None;
        }
        Some(entry)
    }

    /// The sectors of a slice that memory is ahead of the disk with; all of them where that is not known. To be asked before
    /// the disk is read.
    ///
    /// Taking `loading` first is what makes a look at [`Watch::active`] without the lock enough: whoever changes an entry does
    /// so under the mutex of a slot, filled by a loader that has taken `loading`. If the slice is cached now, its slot's mutex
    /// comes after ours; if not, its next loader takes `loading` after us. In both cases it sees that somebody counts.
    pub(crate) fn steady(&self, slice: u64) -> u128 {
        let loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        // First: what changes from here on is noted, what changed before is unwritten, or on disk.
        if let Some(census) = self.watch.census().as_mut() {
            census.touched.remove(&slice);
        }
        let unsteady = self.cache.with(slice, |s| s.unwritten());
        unsteady.unwrap_or(if loading.contains_key(&slice) { u128::MAX } else { 0 })
    }

    /// Counts a slice of a table that began, the next one not walked. `disk` is what was read after `unsteady` was asked for
    /// with [`Tables::steady`], `l1` what [`Tables::begin_table`] answered; `see` hears of each entry with its bitmap as they count.
    pub(crate) fn count_slice(
        &self,
        slice: u64,
        l1: u64,
        disk: &mut [u64],
        unsteady: u128,
        mut see: impl FnMut(u64, u64),
    ) -> Counted {
        let step = if self.geo().extended_l2() { 2 } else { 1 };
        // In a table others share COPIED means nothing, on disk as in memory; see `load`.
        let stripped = l1 & COPIED == 0 && !self.geo().data_file();
        let flagged = stripped && disk.iter().step_by(step).any(|e| e & COMPRESSED == 0 && e & COPIED != 0);
        if stripped {
            strip_copied(disk, step);
        }
        let cached = self.cache.with(slice, |s| {
            let mut guard = self.watch.census();
            let Some(census) = guard.as_mut() else { return Counted::Yes { differs: false } };
            if census.moved {
                return Counted::Moved;
            }
            let unknown = unsteady | s.unwritten() | census.touched.get(&slice).copied().unwrap_or(0);
            let differs = (0..disk.len()).any(|i| {
                let sector = s.sector_of(i);
                unknown.checked_shr(sector).unwrap_or(1) & 1 == 0 && disk.get(i) != Some(&s.word(i))
            });
            for index in 0..self.slice_entries() {
                let (entry, bitmap) = self.entry(s, index);
                census.data(entry, true);
                see(entry, bitmap);
            }
            census.slices = slice + 1;
            Counted::Yes { differs: differs || flagged }
        });
        if let Some(counted) = cached {
            return counted;
        }
        let mut guard = self.watch.census();
        let Some(census) = guard.as_mut() else { return Counted::Yes { differs: false } };
        if census.moved {
            return Counted::Moved;
        }
        if unsteady != 0 || census.touched.contains_key(&slice) {
            return Counted::Again;
        }
        for entry in disk.chunks(step) {
            let (word, bitmap) = (entry.first().copied().unwrap_or(0), entry.get(1).copied().unwrap_or(0));
            census.data(word, true);
            see(word, bitmap);
        }
        census.slices = slice + 1;
        Counted::Yes { differs: flagged }
    }

    /// Changes an L1 entry; the next commit writes it.
    pub(crate) fn set_l1(&self, index: u64, entry: u64) {
        // Always under the lock: it is rare, and there is no other lock to order it by.
        let mut census = self.watch.census();
        let old = self.l1.get(index);
        self.l1.set(index, entry);
        let Some(census) = census.as_mut().filter(|c| index < c.l1) else { return };
        // The last one that began, unless it is walked to its end.
        census.moved |= index + 1 == census.l1 && census.slices < census.end;
        for (word, up) in [(old, false), (entry, true)] {
            if word & OFFSET_MASK != 0 {
                census.entry(word, up);
            }
        }
    }

    /// A slice as it is in memory, where it is cached; drained.
    pub(crate) fn cached_words(&self, slice: u64) -> Option<Vec<u64>> {
        let words = self.slice_entries() * if self.geo().extended_l2() { 2 } else { 1 };
        self.cache.with(slice, |s| (0..words).map(|i| s.word(i)).collect())
    }

    /// Bytes of a slice.
    pub(crate) fn slice_bytes(&self) -> usize {
        self.slice_entries() * self.geo().l2_entry_size() as usize
    }

    /// Slices of a table.
    pub(crate) fn slices_per_table(&self) -> u64 {
        1 << self.slices_per_table_bits()
    }
}
