//! Refcounts: loading their blocks, reading and changing them.
//!
//! Used by the other files here with `slow` held, and by snapshots. A change is made in memory only, and as a whole or
//! not at all.

use graph::{BlockError, DebugEvent, Errno, NodeIo, Result};
use host::IoVecs;

use super::{Kind, Kinds, Space, State, lock};
use crate::qcow2::commit::{META_ALIGN, write_all};
use crate::qcow2::format::Geometry;

impl State {
    /// A count; `None` if its block has to be loaded first.
    pub(super) fn count(&self, geo: Geometry, cluster: u64) -> Option<u64> {
        match self.reftable.get(geo.reftable_index(cluster) as usize) {
            None | Some(0) => Some(0),
            Some(_) => self.blocks.get(cluster),
        }
    }
}

/// Nothing of this kind happens while `slow` is held.
fn not_loaded(cluster: u64) -> BlockError {
    BlockError::new(Errno::EIO, format!("The refcount block of host cluster {cluster} is not in memory"))
}

impl Space {
    /// The refcount blocks of a range of clusters.
    pub(super) fn block_range(&self, first: u64, clusters: u64) -> std::ops::RangeInclusive<u64> {
        self.geo.reftable_index(first)..=self.geo.reftable_index(first + clusters.max(1) - 1)
    }

    /// Loads a block unless it is there; false if the image has none for that range. `slow` is held.
    pub(super) async fn load(&self, file: &NodeIo, index: u64) -> Result<bool> {
        let offset = {
            let mut state = lock(&self.state);
            match state.reftable.get(index as usize).copied() {
                None | Some(0) => return Ok(false),
                Some(_) if state.blocks.is_loaded(index) => return Ok(true),
                Some(offset) => offset,
            }
        };
        let size = self.geo.cluster_size();
        if !offset.is_multiple_of(size) || offset >= file.size() {
            let what =
                if offset.is_multiple_of(size) { "is beyond the end of the file" } else { "unaligned" };
            let message = format!("Refblock offset {offset:#x} {what} (reftable index: {index:#x})");
            self.health.damaged(&message, Some(offset), Some(size));
            return Err(BlockError::new(Errno::EIO, message));
        }
        let buffer = IoVecs::alloc(size as usize, META_ALIGN)?;
        file.debug_event(DebugEvent::RefblockLoad);
        file.read(offset, &buffer).await?;
        let mut state = lock(&self.state);
        state.blocks.insert(index, offset, buffer.to_vec().into_boxed_slice());
        Ok(true)
    }

    /// Loads all blocks of a range that exist; drops others that are clean. `slow` is held.
    pub(super) async fn load_range(&self, file: &NodeIo, first: u64, clusters: u64) -> Result<()> {
        let since = lock(&self.state).blocks.now();
        for index in self.block_range(first, clusters) {
            self.load(file, index).await?;
        }
        lock(&self.state).blocks.shrink(since);
        Ok(())
    }

    /// Counts free clusters as used once. Their blocks are loaded; all of them must be free.
    pub(super) fn mark_used(&self, state: &mut State, first: u64, clusters: u64) -> Result<()> {
        for cluster in first..first + clusters {
            match state.blocks.get(cluster) {
                Some(0) => {}
                Some(_) => {
                    let offset = cluster << self.geo.cluster_bits();
                    let message =
                        format!("Host cluster at offset {offset:#x} is in use and was taken for free");
                    self.health.damaged(&message, Some(offset), Some(self.geo.cluster_size()));
                    return Err(BlockError::new(Errno::EIO, message));
                }
                None => return Err(not_loaded(cluster)),
            }
        }
        for cluster in first..first + clusters {
            if !state.blocks.set(cluster, 1) {
                return Err(not_loaded(cluster));
            }
        }
        Ok(())
    }

    /// The refcount of the cluster at a host offset.
    ///
    /// # Errors
    /// Its block cannot be read, or lies where it cannot.
    pub(crate) async fn refcount(&self, file: &NodeIo, offset: u64) -> Result<u64> {
        let cluster = offset >> self.geo.cluster_bits();
        if let Some(count) = lock(&self.state).count(self.geo, cluster) {
            return Ok(count);
        }
        let _slow = self.slow.lock().await;
        self.load_range(file, cluster, 1).await?;
        lock(&self.state).count(self.geo, cluster).ok_or_else(|| not_loaded(cluster))
    }

    /// One more reference to every cluster the ranges (offset, bytes) touch; a cluster touched by several ranges gets as many. All or
    /// nothing: a count that would overflow is found before anything changed. What was counted before here is
    /// in memory only; see `commit` for when it reaches the disk.
    ///
    /// # Errors
    /// `EINVAL` where a count is at its maximum (invariant I16); the blocks cannot be read; a count is 0 (the image is
    /// damaged).
    pub(crate) async fn add_refs(&self, file: &NodeIo, ranges: &[(u64, u64)]) -> Result<()> {
        let _slow = self.slow.lock().await;
        let mut done: Vec<(u64, u64)> = Vec::new();
        let mut result = Ok(());
        'all: for (offset, bytes) in ranges {
            let (first, clusters) = self.touched(*offset, *bytes);
            let mut at = first;
            while at < first + clusters {
                // By block, so that a long range does not need all of its blocks at once.
                let block_end = ((self.geo.reftable_index(at)) + 1) << self.geo.refblock_bits();
                let end = (first + clusters).min(block_end);
                result = match self.load_range(file, at, end - at).await {
                    Ok(()) => self.add_ref_run(at, end - at),
                    Err(e) => Err(e),
                };
                if result.is_err() {
                    break 'all;
                }
                done.push((at, end - at));
                at = end;
            }
        }
        if result.is_err() {
            // Back as it was. Blocks that were counted in are dirty, hence loaded, unless a commit wrote them meanwhile.
            for (first, clusters) in done {
                if self.load_range(file, first, clusters).await.is_err() {
                    continue; // A leak.
                }
                let mut state = lock(&self.state);
                for cluster in first..first + clusters {
                    if let Some(count) = state.blocks.get(cluster) {
                        state.blocks.set(cluster, count.saturating_sub(1));
                    }
                }
            }
        }
        result
    }

    /// One more reference to clusters of one loaded block.
    fn add_ref_run(&self, first: u64, clusters: u64) -> Result<()> {
        let mut state = lock(&self.state);
        for cluster in first..first + clusters {
            let offset = cluster << self.geo.cluster_bits();
            match state.count(self.geo, cluster) {
                None => return Err(not_loaded(cluster)),
                Some(0) => {
                    let message = format!("Host cluster at offset {offset:#x} is referenced with refcount 0");
                    self.health.damaged(&message, Some(offset), Some(self.geo.cluster_size()));
                    return Err(BlockError::new(Errno::EIO, message));
                }
                Some(n) if n >= self.geo.max_refcount() => {
                    return Err(BlockError::invalid(format!(
                        "The refcount of the host cluster at offset {offset:#x} is at its maximum of {n}"
                    )));
                }
                Some(_) => {}
            }
        }
        for cluster in first..first + clusters {
            if let Some(count) = state.blocks.get(cluster) {
                state.blocks.set(cluster, count + 1);
            }
        }
        Ok(())
    }

    /// Whether counts wait to be written that nothing on disk demands yet: an image at rest had better have them.
    pub(crate) fn wants_writing(&self) -> bool {
        lock(&self.state).blocks.dirty_blocks() != 0
    }

    /// Writes what is dirty of the refcounts, of one block or of all. Durable with the next barrier.
    ///
    /// # Errors
    /// What the file says; what was not written stays dirty.
    pub(crate) async fn write_counts(&self, file: &NodeIo, only: Option<u64>) -> Result<()> {
        let _turn = self.writes.lock().await;
        let unit = file.limits().request_alignment as usize;
        let mut copies = lock(&self.state).blocks.collect(only, unit);
        let own = Kinds::of(&[Kind::RefcountBlock]);
        let guarded = copies.writes.iter().try_for_each(|w| self.guard(w.offset, w.data.len() as u64, own));
        if !copies.writes.is_empty() {
            file.debug_event(DebugEvent::RefblockUpdatePart);
        }
        let result = match guarded {
            Ok(()) => write_all(file, std::mem::take(&mut copies.writes)).await,
            Err(e) => Err(e),
        };
        match result {
            Ok(()) => lock(&self.state).blocks.written(&copies),
            Err(_) => lock(&self.state).blocks.failed(&copies),
        }
        // What is clean now need not stay, unless somebody is just using what it has loaded.
        if let Some(_slow) = self.slow.try_lock() {
            let mut state = lock(&self.state);
            let now = state.blocks.now();
            state.blocks.shrink(now);
        }
        result
    }

    /// Forgets refcount blocks that were not used since the last call. Whether any are left.
    pub(crate) fn clean(&self) -> bool {
        // Whoever has `slow` is just using what it has loaded.
        let Some(_slow) = self.slow.try_lock() else { return true };
        lock(&self.state).blocks.clean()
    }

    /// First cluster and number of clusters a range touches.
    pub(super) fn touched(&self, offset: u64, bytes: u64) -> (u64, u64) {
        let bits = self.geo.cluster_bits();
        let first = offset >> bits;
        let end = offset.saturating_add(bytes).div_ceil(self.geo.cluster_size());
        (first, end.saturating_sub(first).max(1))
    }
}
