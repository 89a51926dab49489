//! A longer file, a new refcount block, a larger refcount table.
//!
//! Called with `slow` held. Order (invariants I1, I3, I7, I12): the file is long enough first; a block is written whole
//! and durable before the table points to it; a larger table is written and durable before the header points to it. A
//! failure on the way leaves everything as it was, at worst with clusters that leak.

use graph::{BlockError, DebugEvent, Errno, NodeIo, Result, StatusFlags, WriteFlags};
use host::IoVecs;

use super::{Extent, FreeKind, Freed, Kind, Kinds, Space, lock};
use crate::qcow2::commit::{META_ALIGN, MetaWrite, write_all};
use crate::qcow2::format::{MAX_REFTABLE_BYTES, refcount};

/// Least and most the file grows by, bytes.
const STEP: std::ops::RangeInclusive<u64> = (4 << 20)..=(1 << 30);
/// What is written to make the file longer begins at multiples of this, bytes: no file system tells data from holes in larger
/// units, so that what lies before is seen to be a hole.
const TAIL: u64 = 64 << 10;

/// A refcount block that is durable while the table does not surely point to it: the write of the entry failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spare {
    index: u64,
    cluster: u64,
}

impl Space {
    /// Allocates behind everything that is used. `slow` is held.
    pub(super) async fn extend(&self, file: &NodeIo, want: u64, contiguous: bool) -> Result<Extent> {
        let mut want = want;
        let (start, clusters) = loop {
            let start = self.find_end(file).await?;
            let index = self.geo.reftable_index(start);
            let border = (index + 1) << self.geo.refblock_bits();
            let clusters = if contiguous { want } else { want.min(border - start) };
            if start.checked_add(clusters).is_none_or(|e| e > self.limit()) {
                return Err(Self::too_large());
            }
            let missing = self
                .block_range(start, clusters)
                .find(|i| lock(&self.state).reftable.get(*i as usize).is_none_or(|b| *b == 0));
            if let Some(index) = missing {
                self.create_block(file, index).await?;
                continue;
            }
            self.load_range(file, start, clusters).await?;
            self.check_fresh(start, clusters)?;
            match self.ensure_file(file, start + clusters).await {
                Ok(()) => break (start, clusters),
                // Half a reservation is better than none.
                Err(e) if e.errno() == Errno::ENOSPC && !contiguous && want > 1 => want = clusters / 2,
                Err(e) => return Err(e),
            }
            want = want.max(1);
        };
        let mut state = lock(&self.state);
        self.mark_used(&mut state, start, clusters)?;
        state.end = Some(start + clusters);
        let zero = start >= state.virgin;
        Ok(Extent { offset: start << self.geo.cluster_bits(), clusters, zero })
    }

    /// Makes the file reach to the end of the clusters before `end`, and some way further.
    async fn ensure_file(&self, file: &NodeIo, end: u64) -> Result<()> {
        let need = end << self.geo.cluster_bits();
        let have = lock(&self.state).file_end.max(file.size());
        lock(&self.state).file_end = have;
        if need <= have {
            return Ok(());
        }
        let step = (have / 16).clamp(*STEP.start(), *STEP.end());
        let ahead = have.saturating_add(step).next_multiple_of(self.geo.cluster_size());
        let ahead = ahead.min(self.limit() << self.geo.cluster_bits()).max(need);
        let (reached, hole) = match self.lengthen(file, have, ahead).await {
            Ok(hole) => (ahead, hole),
            // A limit on the size of files, perhaps.
            Err(_) if ahead > need => (need, self.lengthen(file, have, need).await?),
            Err(e) => return Err(e),
        };
        let virgin = lock(&self.state).virgin;
        // What lies before the part just written is a hole, unless the file is none.
        let from = (virgin << self.geo.cluster_bits()).max(have);
        let zero = virgin != u64::MAX
            && (from >= hole
                || file
                    .block_status(from, hole - from)
                    .await
                    .is_ok_and(|s| s.flags.contains(StatusFlags::ZERO) && s.len >= hole - from));
        let mut state = lock(&self.state);
        if !zero {
            state.virgin = u64::MAX;
        }
        state.file_end = reached;
        Ok(())
    }

    /// Writes zeroes to the end of a longer file: one write in place of a change of size, which requests could run into. Where
    /// they begin, not before `have`: there may be data.
    async fn lengthen(&self, file: &NodeIo, have: u64, end: u64) -> Result<u64> {
        let start = ((end - 1) & !(TAIL - 1)).max(have);
        let zeroes = IoVecs::alloc((end - start) as usize, META_ALIGN)?;
        file.write(start, &zeroes, WriteFlags::empty()).await?;
        Ok(start)
    }

    /// Gives the image a refcount block for a range that has none. May move the end. `slow` is held.
    pub(super) async fn create_block(&self, file: &NodeIo, index: u64) -> Result<()> {
        let size = self.geo.cluster_size();
        if index >= lock(&self.state).reftable.len() as u64 {
            return self.grow_table(file, index).await;
        }
        let spare = lock(&self.spare).filter(|s| s.index == index);
        let cluster = match spare {
            Some(spare) => spare.cluster,
            None => {
                let cluster = self.find_end(file).await?;
                let own = self.geo.reftable_index(cluster);
                if own != index && lock(&self.state).reftable.get(own as usize).is_none_or(|b| *b == 0) {
                    // First one for the range it would lie in; the caller looks again.
                    return Box::pin(self.create_block(file, own)).await;
                }
                if cluster + 1 > self.limit() {
                    return Err(Self::too_large());
                }
                self.write_block(file, index, cluster).await?;
                cluster
            }
        };
        file.debug_event(DebugEvent::RefblockAllocHookup);
        let entry = self.reftable_sector(index, cluster << self.geo.cluster_bits());
        self.guard(entry.offset, entry.data.len() as u64, Kinds::of(&[Kind::RefcountTable]))?;
        *lock(&self.spare) = Some(Spare { index, cluster });
        // In place, one sector, its neighbours unchanged. Its durability is the next barrier's, which comes before any pointer that
        // needs it.
        write_all(file, vec![entry]).await?;
        *lock(&self.spare) = None;
        let mut data = vec![0; size as usize].into_boxed_slice();
        if self.geo.reftable_index(cluster) == index {
            refcount::set(&mut data, self.geo.refcount_order(), self.geo.refblock_index(cluster) as usize, 1);
        }
        let offset = cluster << self.geo.cluster_bits();
        {
            let mut state = lock(&self.state);
            state.blocks.now();
            state.blocks.insert(index, offset, data);
            if let Some(entry) = state.reftable.get_mut(index as usize) {
                *entry = offset;
            }
        }
        self.add_metadata(Kind::RefcountBlock, offset, size);
        Ok(())
    }

    /// Writes an empty block at the end of the image and makes it durable.
    async fn write_block(&self, file: &NodeIo, index: u64, cluster: u64) -> Result<()> {
        let offset = cluster << self.geo.cluster_bits();
        let own = self.geo.reftable_index(cluster);
        file.debug_event(DebugEvent::RefblockAlloc);
        self.check_fresh(cluster, 1)?;
        self.ensure_file(file, cluster + 1).await?;
        let mut data = vec![0; self.geo.cluster_size() as usize];
        if own == index {
            refcount::set(&mut data, self.geo.refcount_order(), self.geo.refblock_index(cluster) as usize, 1);
        } else {
            self.load_range(file, cluster, 1).await?;
            self.mark_used(&mut lock(&self.state), cluster, 1)?;
        }
        {
            let mut state = lock(&self.state);
            state.end = Some(cluster + 1);
            // Also after a failure: who knows what was written.
            if state.virgin != u64::MAX {
                state.virgin = state.virgin.max(cluster + 1);
            }
        }
        let result = async {
            file.debug_event(DebugEvent::RefblockAllocWrite);
            write_all(file, vec![MetaWrite { offset, data }]).await?;
            if own != index {
                self.write_counts(file, Some(own)).await?;
            }
            self.health.barrier(file, None).await
        }
        .await;
        if result.is_err() {
            // Nothing points there.
            let mut state = lock(&self.state);
            if own != index {
                state.blocks.set(cluster, 0);
            }
            state.free.add(cluster, 1);
        }
        result
    }

    /// The sector of the refcount table with one entry changed.
    fn reftable_sector(&self, index: u64, value: u64) -> MetaWrite {
        let state = lock(&self.state);
        let first = index / 64 * 64;
        let entries = (first..first + 64)
            .map(|i| if i == index { value } else { state.reftable.get(i as usize).copied().unwrap_or(0) });
        MetaWrite {
            offset: state.reftable_offset + first * 8,
            data: entries.flat_map(u64::to_be_bytes).collect(),
        }
    }

    /// Moves the refcount table to a larger place that describes itself, and makes it reach `index`.
    async fn grow_table(&self, file: &NodeIo, index: u64) -> Result<()> {
        file.debug_event(DebugEvent::ReftableGrow);
        let bits = self.geo.cluster_bits();
        let size = self.geo.cluster_size();
        let per_cluster = self.geo.reftable_entries_per_cluster();
        let per_block = self.geo.refblock_entries();
        let old_end = self.find_end(file).await?;
        let (old_table, old_offset, old_clusters) = {
            let state = lock(&self.state);
            (state.reftable.clone(), state.reftable_offset, state.reftable_clusters)
        };
        // The first cluster the table does not reach: there the new blocks describe themselves.
        let first_index = old_table.len() as u64;
        let start = old_end.max(first_index << self.geo.refblock_bits());
        let first_index = self.geo.reftable_index(start);
        let mut table = (old_clusters + old_clusters.div_ceil(2)).max((index + 1).div_ceil(per_cluster));
        let mut blocks = 1;
        loop {
            let end = start + blocks + table;
            let needed = self.geo.reftable_index(end - 1) + 1;
            if needed - first_index > blocks {
                blocks = needed - first_index;
            } else if needed.max(index + 1) > table * per_cluster {
                table = needed.max(index + 1).div_ceil(per_cluster);
            } else {
                break;
            }
            if table * size > MAX_REFTABLE_BYTES {
                return Err(Self::too_large());
            }
        }
        if table * size > MAX_REFTABLE_BYTES || start + blocks + table > self.limit() {
            return Err(Self::too_large());
        }
        let end = start + blocks + table;
        self.check_fresh(start, blocks + table)?;
        self.ensure_file(file, end).await?;
        {
            let mut state = lock(&self.state);
            if state.virgin != u64::MAX {
                state.virgin = state.virgin.max(end);
            }
        }
        let mut entries = old_table;
        entries.resize((table * per_cluster) as usize, 0);
        let mut writes = Vec::new();
        for block in 0..blocks {
            let first = (first_index + block) * per_block;
            let mut data = vec![0; size as usize];
            for cluster in first.max(start)..(first + per_block).min(end) {
                let at = self.geo.refblock_index(cluster) as usize;
                refcount::set(&mut data, self.geo.refcount_order(), at, 1);
            }
            let offset = (start + block) << bits;
            if let Some(entry) = entries.get_mut((first_index + block) as usize) {
                *entry = offset;
            }
            writes.push(MetaWrite { offset, data });
        }
        let table_offset = (start + blocks) << bits;
        let new_blocks: Vec<MetaWrite> = writes.clone();
        writes.push(MetaWrite {
            offset: table_offset,
            data: entries.iter().flat_map(|e| e.to_be_bytes()).collect(),
        });
        // Blocks and table go together.
        file.debug_event(DebugEvent::RefblockAllocWriteBlocks);
        file.debug_event(DebugEvent::RefblockAllocWriteTable);
        write_all(file, writes).await?;
        self.health.barrier(file, None).await?;
        file.debug_event(DebugEvent::RefblockAllocSwitchTable);
        let clusters = u32::try_from(table).map_err(|_| Self::too_large())?;
        if let Err(e) = self.header.switch_reftable(file, table_offset, clusters).await {
            // The header may point there by now, on disk: those clusters are never used.
            lock(&self.state).end = Some(end);
            return Err(e);
        }
        {
            let mut state = lock(&self.state);
            state.blocks.now();
            for (i, block) in new_blocks.into_iter().enumerate() {
                state.blocks.insert(first_index + i as u64, block.offset, block.data.into_boxed_slice());
            }
            state.reftable = entries;
            state.reftable_offset = table_offset;
            state.reftable_clusters = table;
            state.end = Some(end);
            // What was skipped.
            for skipped in self.block_range(old_end, (start - old_end).max(1)) {
                if start > old_end {
                    state.unscanned.insert(skipped);
                }
            }
            let ticket = self.epochs.ticket();
            let old = Freed { offset: old_offset, bytes: old_clusters << bits, kind: FreeKind::Other };
            state.waiting.push_back((ticket, vec![old]));
        }
        self.remove_metadata(old_offset, old_clusters << bits);
        self.add_metadata(Kind::RefcountTable, table_offset, table << bits);
        for block in 0..blocks {
            self.add_metadata(Kind::RefcountBlock, (start + block) << bits, size);
        }
        Ok(())
    }

    /// Cuts what the file was grown by ahead of its use. The image is being closed and everything is on disk.
    ///
    /// # Errors
    /// What the file says; it stays long then, which is harmless.
    pub(crate) async fn finish(&self, file: &NodeIo) -> Result<()> {
        let _slow = self.slow.lock().await;
        let target = {
            let mut state = lock(&self.state);
            let Some(mut end) = state.end else { return Ok(()) };
            while let Some(start) = state.free.ending_at(end) {
                state.free.remove(start, end);
                end = start;
            }
            state.end = Some(end);
            state.file_end = 0;
            (end << self.geo.cluster_bits()).max(state.opened)
        };
        if file.size() <= target {
            return Ok(());
        }
        let how = graph::Truncate { exact: false, ..graph::Truncate::default() };
        file.truncate(target, how).await.map_err(|e| BlockError::context(e, "Could not cut the image file"))
    }
}
