//! L1 in memory and the cache of L2 slices: where guest data lies, and what of that waits for the next commit.
//!
//! Memory is the truth, the disk lags behind. Lookups answer at once from what is cached; `load` fetches what is not;
//! `own` makes a table that may be changed. Who publishes entries (`io/`) works on a [`Slice`] under its mutex; the commit
//! takes copies with [`Tables::collect`]. This folder does not decide where data goes, and frees nothing.

mod cache;
pub(crate) mod entry;
mod l1;
mod load;
mod own;
#[cfg(test)]
mod tests;
pub(crate) mod watch;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use graph::{DebugEvent, NodeIo, Result};
use host::sync::{Event, WaitQueue};

pub(crate) use cache::Slice;
pub(crate) use entry::{Decoder, Kind, Run};
pub(crate) use load::strip_copied;

use super::format::{Geometry, OFFSET_MASK};
use super::node::Qcow2;
use cache::Cache;
use l1::L1;
use watch::Watch;

/// One piece of a table on its way to the image file.
pub(crate) struct TableWrite {
    /// Where it goes, bytes.
    pub(crate) offset: u64,
    /// What goes there.
    pub(crate) data: Vec<u8>,
    /// Of the L1 table; otherwise of an L2 table.
    pub(crate) l1: bool,
}

/// Everything of L1 and L2 that was dirty when it was collected; all of it belongs behind the first barrier.
pub(crate) struct DirtyTables {
    /// What to write, ascending, neighbours merged.
    pub(crate) writes: Vec<TableWrite>,
    slices: Vec<(u64, u128)>,
    l1: Vec<u32>,
}

impl DirtyTables {
    /// Tells the file that it is about to be written.
    pub(crate) fn tell(&self, file: &NodeIo) {
        if !self.slices.is_empty() {
            file.debug_event(DebugEvent::L2Update);
        }
        if !self.l1.is_empty() {
            file.debug_event(DebugEvent::L1Update);
        }
    }
}

/// What the shortest lookup says.
pub(crate) enum Glance {
    /// Nothing is allocated for so many bytes.
    Absent(u64),
    /// All of the range lies in one cluster with data of its own, at this host offset; `copied`: there and nowhere else.
    Host {
        /// Bytes.
        host: u64,
        /// May be written in place.
        copied: bool,
    },
    /// Anything else.
    Closer,
}

/// See the module's words.
pub(crate) struct Tables {
    /// log2 of the guest bytes of an L1 entry, a cluster, a slice.
    shifts: [u32; 3],
    /// Bits that a standard entry for plain data has not; all of them with extended entries, which are never glanced at.
    odd: u64,
    decoder: Decoder,
    l1: L1,
    cache: Cache,
    /// log2 of the entries of a slice.
    slice_bits: u32,
    /// Bytes of a dirty sector.
    sector: u64,
    /// Slices that are being loaded.
    loading: Mutex<HashMap<u64, Arc<Event>>>,
    /// L1 entries whose table is being made.
    making: Mutex<HashMap<u64, Arc<Event>>>,
    /// Waiting for a slot.
    room: WaitQueue,
    /// Told of every change.
    watch: Arc<Watch>,
}

impl Tables {
    /// For an active L1 table that was read. `cache_bytes` is what L2 slices may take, `slice_bytes` the size of one (a power
    /// of two, 512 … cluster size), `sector` the unit the image file is written in (a power of two, 512 … slice size).
    pub(crate) fn new(
        geo: Geometry,
        l1_offset: u64,
        l1: &[u64],
        cache_bytes: u64,
        slice_bytes: u64,
        sector: u64,
    ) -> Tables {
        // The mask of dirty sectors has 128 bits.
        let slice_bytes = slice_bytes.clamp(512, geo.cluster_size().min(64 << 10));
        let sector = sector.clamp(512, slice_bytes).max(slice_bytes / 128);
        let words = (slice_bytes / 8) as usize;
        let slice_bits = (slice_bytes / geo.l2_entry_size()).trailing_zeros();
        let decoder = Decoder::new(geo);
        Tables {
            shifts: [geo.l1_shift(), geo.cluster_bits(), geo.cluster_bits() + slice_bits],
            odd: if geo.extended_l2() { u64::MAX } else { decoder.odd() },
            decoder,
            l1: L1::new(l1_offset, l1),
            cache: Cache::new(cache_bytes / slice_bytes, words, (sector / 8) as usize),
            slice_bits,
            sector,
            loading: Mutex::default(),
            making: Mutex::default(),
            room: WaitQueue::new(),
            watch: Arc::default(),
        }
    }

    /// The decoder of entries.
    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn geo(&self) -> Geometry {
        self.decoder.geo
    }

    /// Number of the slice with the entry of a guest offset.
    #[inline]
    pub(crate) fn slice_of(&self, guest: u64) -> u64 {
        guest >> (self.geo().cluster_bits() + self.slice_bits)
    }

    /// Entries of a slice.
    pub(crate) fn slice_entries(&self) -> usize {
        1 << self.slice_bits
    }

    /// Index within its slice of the entry of a guest offset.
    #[inline]
    pub(crate) fn index_of(&self, guest: u64) -> usize {
        ((guest >> self.geo().cluster_bits()) & ((1 << self.slice_bits) - 1)) as usize
    }

    /// log2 of the slices of a table.
    fn slices_per_table_bits(&self) -> u32 {
        self.geo().l2_bits() - self.slice_bits
    }

    /// The most frequent answers of [`Tables::lookup`], at the least cost.
    #[inline]
    pub(crate) fn glance(&self, guest: u64, len: u64) -> Glance {
        let [l1_shift, cluster_bits, slice_shift] = self.shifts;
        if self.l1.get(guest >> l1_shift) & OFFSET_MASK == 0 {
            return Glance::Absent(len.min((1 << l1_shift) - (guest & ((1 << l1_shift) - 1))));
        }
        let within = guest & ((1 << cluster_bits) - 1);
        if len > (1 << cluster_bits) - within || self.odd == u64::MAX {
            return Glance::Closer;
        }
        let index = ((guest & ((1 << slice_shift) - 1)) >> cluster_bits) as usize;
        match self.cache.word(guest >> slice_shift, index) {
            Some(0) => Glance::Absent(len),
            Some(entry) if entry & self.odd == 0 && entry & OFFSET_MASK != 0 => Glance::Host {
                host: (entry & OFFSET_MASK) + within,
                copied: entry & super::format::COPIED != 0,
            },
            _ => Glance::Closer,
        }
    }

    /// Where `guest` lies, without waiting or locking. `None`: ask again with [`Tables::find`].
    #[inline]
    pub(crate) fn lookup(&self, guest: u64, len: u64) -> Option<Run> {
        if let Some(run) = self.absent(guest, len) {
            return Some(run);
        }
        let index = self.index_of(guest);
        let count = self.slice_entries();
        let extended = self.geo().extended_l2();
        self.cache.read(self.slice_of(guest), |words| {
            let blank = |i: usize| {
                if extended { words.is_zero(2 * i) && words.is_zero(2 * i + 1) } else { words.is_zero(i) }
            };
            if blank(index) {
                return self.blank_run(blank, index, count, guest, len);
            }
            let get = |i: usize| {
                if extended { (words.get(2 * i), words.get(2 * i + 1)) } else { (words.get(i), 0) }
            };
            self.decoder.run(get, index, count, guest, len)
        })
    }

    /// A run of entries that are 0: nothing is allocated.
    #[inline]
    fn blank_run(
        &self,
        blank: impl Fn(usize) -> bool,
        index: usize,
        count: usize,
        guest: u64,
        len: u64,
    ) -> Run {
        let size = self.geo().cluster_size();
        let mut have = size - self.geo().in_cluster(guest);
        let mut at = index + 1;
        while have < len && at < count && blank(at) {
            have += size;
            at += 1;
        }
        Run { kind: Kind::Unallocated, len: have.min(len), host: None, copied: false, entry: 0 }
    }

    /// The answer where there is no L2 table.
    #[inline]
    fn absent(&self, guest: u64, len: u64) -> Option<Run> {
        let geo = self.geo();
        if self.l1.get(geo.l1_index(guest)) & OFFSET_MASK != 0 {
            return None;
        }
        let room = geo.bytes_per_l1_entry() - (guest & (geo.bytes_per_l1_entry() - 1));
        Some(Run { kind: Kind::Unallocated, len: len.min(room), host: None, copied: false, entry: 0 })
    }

    /// Where `guest` lies; loads what is missing. Invalid entries are answered as such.
    ///
    /// # Errors
    /// The table could not be read, or lies at an impossible place (the image is marked corrupt).
    pub(crate) async fn find(&self, node: &Qcow2, io: &NodeIo, guest: u64, len: u64) -> Result<Run> {
        loop {
            if let Some(run) = self.lookup(guest, len) {
                return Ok(run);
            }
            let slice = self.slice_of(guest);
            let (index, count) = (self.index_of(guest), self.slice_entries());
            let run =
                self.cache.with(slice, |s| self.decoder.run(|i| self.entry(s, i), index, count, guest, len));
            match run {
                Some(run) => return Ok(run),
                None => self.load(node, io, slice).await?,
            }
        }
    }

    /// An entry of a slice with its bitmap.
    #[inline]
    pub(crate) fn entry(&self, slice: &Slice<'_>, index: usize) -> (u64, u64) {
        if self.geo().extended_l2() {
            (slice.word(2 * index), slice.word(2 * index + 1))
        } else {
            (slice.word(index), 0)
        }
    }

    /// Changes an entry; what is equal stays clean.
    pub(crate) fn set_entry(&self, slice: &mut Slice<'_>, index: usize, entry: u64, bitmap: u64) {
        let old = self.entry(slice, index);
        if old == (entry, bitmap) {
            return;
        }
        let word = if self.geo().extended_l2() { 2 * index } else { index };
        self.watch.entry_changes(slice.number(), slice.sector_of(word), old.0, entry);
        if self.geo().extended_l2() {
            slice.set_word(2 * index, entry);
            slice.set_word(2 * index + 1, bitmap);
        } else {
            slice.set_word(index, entry);
        }
    }

    /// Works on the cached slice of `guest` under its mutex; `None`: not cached.
    pub(crate) fn with<R>(&self, guest: u64, f: impl FnOnce(&mut Slice<'_>) -> R) -> Option<R> {
        self.cache.with(self.slice_of(guest), f)
    }

    /// Whether the table of `guest` exists and may be changed in place.
    #[inline]
    pub(crate) fn is_owned(&self, guest: u64) -> bool {
        let entry = self.l1.get(self.geo().l1_index(guest));
        entry & super::format::COPIED != 0 && entry & OFFSET_MASK != 0
    }

    /// After records ended or slots became clean.
    pub(crate) fn wake(&self) {
        self.room.notify_all();
    }

    /// Whether so much is dirty that whoever notices had better run a commit.
    pub(crate) fn wants_commit(&self) -> bool {
        self.cache.dirty_slices() as u64 * 2 > self.cache.slots()
    }

    /// Whether anything waits for a commit.
    pub(crate) fn has_dirty(&self) -> bool {
        self.cache.dirty_slices() != 0 || self.l1.is_dirty()
    }

    /// Entries of the L1 table.
    pub(crate) fn l1_len(&self) -> u32 {
        self.l1.len()
    }

    /// Where the L1 table lies, bytes.
    pub(crate) fn l1_offset(&self) -> u64 {
        self.l1.offset()
    }

    /// An L1 entry as it stands, 0 past the end.
    pub(crate) fn l1(&self, index: u64) -> u64 {
        self.l1.get(index)
    }

    /// All L1 entries.
    pub(crate) fn l1_entries(&self) -> Vec<u64> {
        self.l1.entries()
    }

    /// The L1 table lies elsewhere and has another length; the disk has what memory has. Drained.
    pub(crate) fn l1_moved(&self, offset: u64, len: u32) {
        self.l1.moved(offset, len);
    }

    /// Another L1 table is the active one (snapshots). Drained, committed.
    pub(crate) fn replace_l1(&self, offset: u64, entries: &[u64]) {
        self.l1.replace(offset, entries);
        self.cache.clear();
    }

    /// Forgets all clean slices: what the tables on disk say was changed behind the cache. Drained, committed.
    pub(crate) fn forget(&self) {
        self.cache.clear();
    }

    /// Forgets slices that were not used since the last call, and gives their memory back. Whether any are left.
    pub(crate) fn clean(&self) -> bool {
        self.cache.clean()
    }

    /// Whether any slice is cached.
    pub(crate) fn has_any(&self) -> bool {
        self.cache.has_any()
    }

    /// Takes copies of everything dirty, for one commit. Exactly one [`Tables::finish`] follows.
    pub(crate) fn collect(&self) -> DirtyTables {
        let mut out = DirtyTables { writes: Vec::new(), slices: Vec::new(), l1: Vec::new() };
        let in_table = (1u64 << self.slices_per_table_bits()) - 1;
        let slice_bytes = self.geo().l2_entry_size() << self.slice_bits;
        let mut pieces: Vec<TableWrite> = Vec::new();
        for dirty in self.cache.collect() {
            let table = self.l1.get(dirty.slice >> self.slices_per_table_bits()) & OFFSET_MASK;
            let base = table + (dirty.slice & in_table) * slice_bytes;
            for (sector, data) in dirty.sectors {
                pieces.push(TableWrite { offset: base + u64::from(sector) * self.sector, data, l1: false });
            }
            out.slices.push((dirty.slice, dirty.mask));
        }
        for (sector, offset, data) in self.l1.collect() {
            pieces.push(TableWrite { offset, data, l1: true });
            out.l1.push(sector);
        }
        pieces.sort_unstable_by_key(|w| w.offset);
        for piece in pieces {
            match out.writes.last_mut() {
                Some(last) if last.offset + last.data.len() as u64 == piece.offset && last.l1 == piece.l1 => {
                    last.data.extend_from_slice(&piece.data);
                }
                _ => out.writes.push(piece),
            }
        }
        out
    }

    /// What was collected is on disk, or (`!ok`) is not and stays dirty.
    pub(crate) fn finish(&self, collected: DirtyTables, ok: bool) {
        for (slice, mask) in collected.slices {
            self.cache.written(slice, mask, ok);
        }
        if !ok {
            collected.l1.into_iter().for_each(|sector| self.l1.restore(sector));
        }
        self.wake();
    }
}
