//! Refcount blocks in memory: the truth about every loaded count, and which 512-byte sectors of it the disk has not seen.
//!
//! Used under the state's lock. Pure. Dirty blocks and blocks that are being written stay; clean ones are kept up to
//! `refcount-cache-size`.

use std::collections::{BTreeSet, HashMap};

use crate::qcow2::commit::MetaWrite;
use crate::qcow2::format::{Geometry, refcount};

/// The unit the disk is trusted to write as a whole.
pub(super) const SECTOR: usize = 512;

struct Block {
    /// Where it lies in the file, bytes.
    offset: u64,
    data: Box<[u8]>,
    /// One bit per sector.
    dirty: Vec<u64>,
    /// Writes of copies under way: it must not be read from disk again before they have ended.
    writing: u32,
    used: u64,
}

/// Copies of dirty sectors on their way to the disk; goes back by `written` or `failed`.
#[derive(Debug, Default)]
pub(super) struct RefcountWrites {
    /// What goes where, ascending within a block.
    pub(super) writes: Vec<MetaWrite>,
    /// Which sectors of which block that was, in the same order.
    sectors: Vec<(u64, Vec<u64>)>,
}

/// See the module's page.
pub(super) struct Blocks {
    geo: Geometry,
    limit: usize,
    map: HashMap<u64, Block>,
    dirty: BTreeSet<u64>,
    tick: u64,
    /// The time of the last [`Blocks::clean`].
    cleaned: u64,
    /// Blocks that changed since a check looked at them, while there is one.
    touched: Option<BTreeSet<u64>>,
}

impl Blocks {
    pub(super) fn new(geo: Geometry, cache_bytes: u64) -> Blocks {
        // QEMU's least: four blocks.
        let limit = usize::try_from(cache_bytes / geo.cluster_size()).unwrap_or(usize::MAX).max(4);
        Blocks { geo, limit, map: HashMap::new(), dirty: BTreeSet::new(), tick: 0, cleaned: 0, touched: None }
    }

    /// The same without any block.
    pub(super) fn emptied(&self) -> Blocks {
        Blocks { limit: self.limit, ..Blocks::new(self.geo, 0) }
    }

    /// Notes the time: blocks used since are not dropped by [`Blocks::shrink`].
    pub(super) fn now(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    pub(super) fn is_loaded(&mut self, index: u64) -> bool {
        let tick = self.tick;
        self.map.get_mut(&index).map(|b| b.used = tick).is_some()
    }

    /// Adds a block as it is on disk.
    pub(super) fn insert(&mut self, index: u64, offset: u64, data: Box<[u8]>) {
        let words = data.len().div_ceil(SECTOR).div_ceil(64);
        let block = Block { offset, data, dirty: vec![0; words], writing: 0, used: self.tick };
        self.map.insert(index, block);
    }

    /// Notes which blocks change from now on, or no longer.
    pub(super) fn watch(&mut self, on: bool) {
        self.touched = on.then(BTreeSet::new);
    }

    /// A check looks at a block: what changes from here on is noted. Whether the disk has all of it.
    pub(super) fn look(&mut self, index: u64) -> bool {
        if let Some(touched) = &mut self.touched {
            touched.remove(&index);
        }
        self.map.get(&index).is_none_or(|b| b.writing == 0) && !self.dirty.contains(&index)
    }

    /// Whether a block changed since a check looked at it.
    pub(super) fn is_touched(&self, index: u64) -> bool {
        self.touched.as_ref().is_none_or(|t| t.contains(&index))
    }

    /// A block as it is in memory, where it is loaded.
    pub(super) fn bytes(&self, index: u64) -> Option<&[u8]> {
        self.map.get(&index).map(|b| &*b.data)
    }

    /// Drops clean blocks nobody used since `since`, least recently used first, down to the limit.
    pub(super) fn shrink(&mut self, since: u64) {
        while self.map.len().saturating_sub(self.dirty.len()) > self.limit {
            let idle = |(i, b): &(&u64, &Block)| !self.dirty.contains(i) && b.writing == 0 && b.used < since;
            let Some(index) = self.map.iter().filter(idle).min_by_key(|(_, b)| b.used).map(|(i, _)| *i)
            else {
                return;
            };
            self.map.remove(&index);
        }
    }

    /// Drops clean blocks that were not used since the last call. Whether any are left.
    pub(super) fn clean(&mut self) -> bool {
        let (since, dirty) = (std::mem::replace(&mut self.cleaned, self.tick), &self.dirty);
        self.map.retain(|i, b| dirty.contains(i) || b.writing != 0 || b.used > since);
        self.tick += 1;
        !self.map.is_empty()
    }

    /// A count; `None` if its block is not loaded.
    pub(super) fn get(&self, cluster: u64) -> Option<u64> {
        let block = self.map.get(&self.geo.reftable_index(cluster))?;
        Some(refcount::get(&block.data, self.geo.refcount_order(), self.geo.refblock_index(cluster) as usize))
    }

    /// Sets a count; false if its block is not loaded or the value does not fit.
    pub(super) fn set(&mut self, cluster: u64, value: u64) -> bool {
        let order = self.geo.refcount_order();
        let (index, at) = (self.geo.reftable_index(cluster), self.geo.refblock_index(cluster) as usize);
        let Some(block) = self.map.get_mut(&index) else { return false };
        if !refcount::set(&mut block.data, order, at, value) {
            return false;
        }
        let sector = (at << order) / 8 / SECTOR;
        if let Some(word) = block.dirty.get_mut(sector / 64) {
            *word |= 1 << (sector % 64);
        }
        self.dirty.insert(index);
        if let Some(touched) = &mut self.touched {
            touched.insert(index);
        }
        true
    }

    /// Runs of clusters with count 0 in a loaded block: (first cluster, clusters).
    pub(super) fn free_runs(&self, index: u64) -> Vec<(u64, u64)> {
        let Some(block) = self.map.get(&index) else { return Vec::new() };
        let first = index << self.geo.refblock_bits();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for i in 0..self.geo.refblock_entries() {
            if refcount::get(&block.data, self.geo.refcount_order(), i as usize) != 0 {
                continue;
            }
            match runs.last_mut() {
                Some((start, len)) if *start + *len == first + i => *len += 1,
                _ => runs.push((first + i, 1)),
            }
        }
        runs
    }

    /// The last cluster with a count in a loaded block.
    pub(super) fn last_used(&self, index: u64) -> Option<u64> {
        let block = self.map.get(&index)?;
        let used = |i: &u64| refcount::get(&block.data, self.geo.refcount_order(), *i as usize) != 0;
        (0..self.geo.refblock_entries()).rev().find(used).map(|i| (index << self.geo.refblock_bits()) + i)
    }

    /// How many blocks have dirty sectors.
    pub(super) fn dirty_blocks(&self) -> usize {
        self.dirty.len()
    }

    /// Copies dirty sectors, of one block or of all, widened to `unit` bytes (a power of two), the least the file takes
    /// without reading first; they count as clean from here on.
    pub(super) fn collect(&mut self, only: Option<u64>, unit: usize) -> RefcountWrites {
        let mut out = RefcountWrites::default();
        let which: Vec<u64> = match only {
            Some(index) => self.dirty.take(&index).into_iter().collect(),
            None => std::mem::take(&mut self.dirty).into_iter().collect(),
        };
        for index in which {
            let Some(block) = self.map.get_mut(&index) else { continue };
            let mask = std::mem::take(&mut block.dirty);
            block.dirty = vec![0; mask.len()];
            block.writing += 1;
            let sectors = block.data.len().div_ceil(SECTOR);
            let per_unit = (unit / SECTOR).clamp(1, sectors.max(1));
            let is_set = |s: usize| mask.get(s / 64).is_some_and(|w| w >> (s % 64) & 1 != 0);
            let is_dirty = |s: usize| (s / per_unit * per_unit..).take(per_unit).any(is_set);
            let mut s = 0;
            while s < sectors {
                if !is_dirty(s) {
                    s += 1;
                    continue;
                }
                let begin = s;
                while s < sectors && is_dirty(s) {
                    s += 1;
                }
                let range = begin * SECTOR..(s * SECTOR).min(block.data.len());
                let data = block.data.get(range).unwrap_or_default().to_vec();
                out.writes.push(MetaWrite { offset: block.offset + (begin * SECTOR) as u64, data });
            }
            out.sectors.push((index, mask));
        }
        out
    }

    /// The copies are on disk (or in its cache).
    pub(super) fn written(&mut self, writes: &RefcountWrites) {
        for (index, _) in &writes.sectors {
            if let Some(block) = self.map.get_mut(index) {
                block.writing = block.writing.saturating_sub(1);
            }
        }
    }

    /// The copies may not be on disk: their sectors are dirty again.
    pub(super) fn failed(&mut self, writes: &RefcountWrites) {
        self.written(writes);
        for (index, mask) in &writes.sectors {
            if let Some(block) = self.map.get_mut(index) {
                block.dirty.iter_mut().zip(mask).for_each(|(d, m)| *d |= m);
                self.dirty.insert(*index);
            }
        }
    }

    /// How many blocks are in memory.
    #[cfg(test)]
    pub(super) fn loaded(&self) -> usize {
        self.map.len()
    }
}
