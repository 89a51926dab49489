//! Where an allocation comes from: free runs that are known, freed clusters whose time has come, blocks that were not looked
//! at yet, the end of the file.
//!
//! Called with `slow` held. Opening an image scans nothing: the end is found by the last refcount blocks, holes are looked for a
//! few blocks at a time when somebody allocates.

use graph::{BlockError, DebugEvent, Errno, NodeIo, Result, StatusFlags, ZeroFlags};

use super::{Extent, Space, lock};

/// Refcount blocks looked at in one allocation before the file is rather grown: so many, and more of small ones, up to as
/// many clusters.
const SCANS: u32 = 4;
const SCANNED_CLUSTERS: u64 = 1 << 16;
/// A free run that is used for a reservation even if it is shorter than asked, bytes.
const GOOD_RUN: u64 = 1 << 20;

impl Space {
    /// Finds the end of what is used: from the last refcount block backwards. `slow` is held.
    pub(super) async fn find_end(&self, file: &NodeIo) -> Result<u64> {
        if let Some(end) = lock(&self.state).end {
            return Ok(end);
        }
        let mut index = lock(&self.state).reftable.len() as u64;
        let mut end = 1;
        while index > 0 {
            index -= 1;
            let since = lock(&self.state).blocks.now();
            if !self.load(file, index).await? {
                continue;
            }
            let last = {
                let mut state = lock(&self.state);
                let last = state.blocks.last_used(index);
                state.blocks.shrink(since);
                last
            };
            if let Some(last) = last {
                end = last + 1;
                break;
            }
        }
        let size = file.size();
        let mut state = lock(&self.state);
        state.file_end = size;
        state.opened = size;
        state.virgin = size.div_ceil(self.geo.cluster_size());
        state.unscanned = (0..=self.geo.reftable_index(end - 1)).collect();
        state.end = Some(end);
        Ok(end)
    }

    /// Puts the free clusters of one more block into the map; false if all have been. `slow` is held.
    async fn scan_one(&self, file: &NodeIo) -> Result<bool> {
        let Some(index) = lock(&self.state).unscanned.first().copied() else { return Ok(false) };
        let first = index << self.geo.refblock_bits();
        self.load_range(file, first, 1).await?;
        let mut state = lock(&self.state);
        let end = state.end.unwrap_or(1);
        let exists = state.reftable.get(index as usize).is_some_and(|b| *b != 0);
        let runs =
            if exists { state.blocks.free_runs(index) } else { vec![(first, self.geo.refblock_entries())] };
        state.free.remove(first, first + self.geo.refblock_entries());
        state.unscanned.remove(&index);
        for (start, len) in runs {
            // Cluster 0 is the header's, whatever its refcount says.
            let (start, stop) = (start.max(1), (start + len).min(end));
            if stop > start {
                state.free.add(start, stop - start);
            }
        }
        Ok(true)
    }

    /// Keeps the map of free runs bounded: forgets the shortest ones, whose blocks will be scanned again.
    pub(super) fn relieve(&self, state: &mut super::State) {
        while state.free.is_crowded() {
            let Some((start, len)) = state.free.shortest() else { return };
            for index in self.block_range(start, len) {
                let first = index << self.geo.refblock_bits();
                state.free.remove(first, first + self.geo.refblock_entries());
                state.unscanned.insert(index);
            }
        }
    }

    /// A run out of the map, not taken out yet.
    fn candidate(&self, want: u64, contiguous: bool, picky: bool) -> Option<(u64, u64)> {
        let state = lock(&self.state);
        if let Some(start) = state.free.best(want) {
            return Some((start, want));
        }
        if contiguous {
            return None;
        }
        let (start, len) = state.free.longest()?;
        let good = len << self.geo.cluster_bits() >= GOOD_RUN;
        // Much of the file is free in small pieces: better use them than grow for ever.
        let much = state.free.total() * 8 > state.end.unwrap_or(0);
        (!picky || good || much).then_some((start, len))
    }

    /// Allocates past the slots. `picky`: rather grow the file than take a short run. `slow` is held.
    pub(super) async fn take(
        &self,
        file: &NodeIo,
        want: u64,
        contiguous: bool,
        picky: bool,
    ) -> Result<Extent> {
        self.find_end(file).await?;
        let mut picky = picky;
        let mut released = false;
        let mut drained = false;
        let mut scans = SCANS.max((SCANNED_CLUSTERS >> self.geo.refblock_bits()) as u32);
        loop {
            if let Some((start, len)) = self.candidate(want, contiguous, picky) {
                match self.take_run(file, start, len, contiguous).await? {
                    Some(extent) => return Ok(extent),
                    // Making a refcount block has changed the picture.
                    None => continue,
                }
            }
            if !released {
                released = true;
                if self.release_passed(file, false).await? {
                    continue;
                }
            }
            if scans > 0 && self.scan_one(file).await? {
                scans -= 1;
                continue;
            }
            let error = match self.extend(file, want, contiguous).await {
                Ok(extent) => return Ok(extent),
                Err(e) if ![Errno::ENOSPC, Errno::EFBIG].contains(&e.errno()) => return Err(e),
                Err(e) => e,
            };
            // The end cannot move: whatever there is.
            if picky || scans != u32::MAX {
                picky = false;
                scans = u32::MAX;
            } else if !drained {
                drained = true;
                if !self.drain_slots() {
                    return Err(error);
                }
                released = false;
            } else {
                return Err(error);
            }
        }
    }

    /// Takes a free run; `None` if a refcount block had to be made first. Shortened at the border of a block unless `contiguous`.
    async fn take_run(
        &self,
        file: &NodeIo,
        start: u64,
        len: u64,
        contiguous: bool,
    ) -> Result<Option<Extent>> {
        let index = self.geo.reftable_index(start);
        let border = (index + 1) << self.geo.refblock_bits();
        let len = if contiguous { len } else { len.min(border - start) };
        let mut made = false;
        for index in self.block_range(start, len) {
            if lock(&self.state).reftable.get(index as usize).is_none_or(|b| *b == 0) {
                self.create_block(file, index).await?;
                made = true;
            }
        }
        if made {
            return Ok(None);
        }
        self.load_range(file, start, len).await?;
        self.check_fresh(start, len)?;
        let mut state = lock(&self.state);
        self.mark_used(&mut state, start, len)?;
        state.free.remove(start, start + len);
        Ok(Some(Extent { offset: start << self.geo.cluster_bits(), clusters: len, zero: false }))
    }

    /// Whether a run that was used before reads as zeroes now, making it so where that is cheap.
    pub(super) async fn make_zero(&self, file: &NodeIo, extent: Extent) -> bool {
        file.debug_event(DebugEvent::ClusterAllocSpace);
        let bytes = extent.clusters << self.geo.cluster_bits();
        match file.block_status(extent.offset, bytes).await {
            Ok(s) if s.flags.contains(StatusFlags::ZERO) && s.len >= bytes => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
        self.back(file, extent).await
    }

    /// Zeroes a run where that is cheap; whether it was. For a hole: the file system finds room for all of it at once rather
    /// than for each of the small writes into it, which is dear with direct I/O and in memory.
    pub(super) async fn back(&self, file: &NodeIo, extent: Extent) -> bool {
        let bytes = extent.clusters << self.geo.cluster_bits();
        // Devices zero slowly where they can at all; a part of a file is zeroed by its file system.
        let device = file.node().is_ok_and(|n| n.driver_name() == "host_device");
        !device && file.write_zeroes(extent.offset, bytes, ZeroFlags::NO_FALLBACK).await.is_ok()
    }

    /// The largest cluster number that may be used, exclusive.
    pub(super) fn limit(&self) -> u64 {
        (1u64 << 56).min(i64::MAX as u64) >> self.geo.cluster_bits()
    }

    /// Too large for what the format can address.
    pub(super) fn too_large() -> BlockError {
        BlockError::new(Errno::EFBIG, "The image file is too large for the format")
    }
}
