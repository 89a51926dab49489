//! Changing the size of the disk.
//!
//! Called by the graph inside a drained section. Growing: a larger L1 table, zeroes over what would show through, space set
//! aside; then the size. Shrinking: what lies beyond is given up, then the size. At every point of a crash the image has
//! the old size or the new one.

use graph::{BlockError, DebugEvent, NodeIo, Prealloc, Result, Truncate, WriteFlags};
use host::IoVecs;

use super::zero::Clear;
use crate::qcow2::alloc::{FreeKind, Kind as Meta};
use crate::qcow2::format::{MAX_L1_BYTES, OFFSET_MASK};
use crate::qcow2::node::{FILE, Qcow2};

impl Qcow2 {
    /// See the module's words.
    pub(super) async fn resize(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        self.commits.check()?;
        if !size.is_multiple_of(512) {
            return Err(BlockError::invalid("The new size must be a multiple of 512"));
        }
        if !self.geo.v3() && self.header().snapshot_count != 0 {
            return Err(BlockError::unsupported("Can't resize a v2 image which has snapshots"));
        }
        let old = self.size();
        if size < old && how.prealloc != Prealloc::Off {
            return Err(BlockError::invalid("Preallocation can't be used for shrinking an image"));
        }
        if size < old {
            self.shrink(io, old, size).await?;
        } else if size > old {
            self.grow_l1(io, size).await?;
            // Requests of our own reach past the old end from here on.
            self.set_size(size);
            if let Err(e) = self.grow(io, old, size, how).await {
                self.set_size(old);
                return Err(e);
            }
        }
        if self.settings.data_file_raw
            || (self.data_file.is_some() && size > old && how.prealloc == Prealloc::Off)
        {
            let below = Truncate { exact: how.exact && self.settings.data_file_raw, ..Truncate::default() };
            if let Err(e) = io.child(self.data).truncate(size, below).await {
                self.set_size(old);
                return Err(e.context("Failed to resize the external data file"));
            }
        }
        if size == old {
            return Ok(());
        }
        let switched = async {
            self.commits.flush(self, io).await?;
            self.header.switch_size(&io.child(FILE), size).await
        };
        match switched.await {
            Ok(()) => self.set_size(size),
            Err(e) => {
                self.set_size(old);
                return Err(e.context("Failed to update the image size"));
            }
        }
        Ok(())
    }

    async fn grow(&self, io: &NodeIo, old: u64, size: u64, how: Truncate) -> Result<()> {
        // The rest of the last cluster, which nobody has looked after so far.
        let border = old.next_multiple_of(self.geo.cluster_size()).min(size);
        self.write_zeroes_over(io, old, border).await?;
        let shown = self.backing_size().unwrap_or(0);
        if shown > border && border < size {
            let end = size.min(shown.next_multiple_of(self.geo.cluster_size()));
            if self.geo.v3() {
                self.clear(io, border, end, Clear::Zero).await?;
            } else {
                self.write_zeroes_over(io, border, end).await?;
            }
        }
        if how.prealloc != Prealloc::Off {
            self.preallocate(io, old, size, how.prealloc, false).await?;
        }
        Ok(())
    }

    /// Writes zeroes where the tables do not say that there are some.
    async fn write_zeroes_over(&self, io: &NodeIo, from: u64, to: u64) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        let mut at = from;
        while at < to {
            let len = (to - at).min(PIECE);
            if !self.is_zero(io, at, at + len).await? {
                let zeroes = IoVecs::alloc(len as usize, 4096).map_err(BlockError::from)?;
                self.write_range(io, at, &zeroes).await?;
            }
            at += len;
        }
        Ok(())
    }

    /// Makes the L1 table long enough for a disk of `size` bytes.
    pub(crate) async fn grow_l1(&self, io: &NodeIo, size: u64) -> Result<()> {
        let wanted = self.geo.l1_entries_for(size);
        let old_len = self.tables.l1_len();
        if wanted <= u64::from(old_len) {
            return Ok(());
        }
        if wanted > MAX_L1_BYTES / 8 {
            return Err(BlockError::new(graph::Errno::EFBIG, "Failed to grow the L1 table: File too large"));
        }
        // On disk is what is in memory, so that copying is enough.
        self.commits.flush(self, io).await?;
        let clusters = self.geo.clusters(wanted * 8);
        let file = io.child(FILE);
        file.debug_event(DebugEvent::L1GrowAllocTable);
        let extent = self.space.alloc_in(&file, clusters, true).await?;
        let bytes = clusters << self.geo.cluster_bits();
        let written = async {
            let mut raw: Vec<u8> = self.tables.l1_entries().iter().flat_map(|e| e.to_be_bytes()).collect();
            raw.resize(bytes as usize, 0);
            file.debug_event(DebugEvent::L1GrowWriteTable);
            file.write(extent.offset, &IoVecs::from_vec(raw), WriteFlags::empty()).await?;
            // Its refcounts and its content, before the header names it.
            self.commits.settle(self, io).await?;
            file.debug_event(DebugEvent::L1GrowActivateTable);
            self.header.switch_l1(&file, None, extent.offset, wanted as u32).await
        };
        if let Err(e) = written.await {
            if self.commits.check().is_ok() {
                self.space.give_back(extent.offset, bytes);
            }
            return Err(e.context("Failed to grow the L1 table"));
        }
        let old_offset = self.tables.l1_offset();
        let old_bytes = u64::from(old_len) * 8;
        self.tables.l1_moved(extent.offset, wanted as u32);
        self.space.add_metadata(Meta::ActiveL1, extent.offset, bytes);
        if old_bytes != 0 {
            self.space.remove_metadata(old_offset, old_bytes);
            self.space.free_later(old_offset, old_bytes, FreeKind::Other);
        }
        Ok(())
    }

    async fn shrink(&self, io: &NodeIo, old: u64, size: u64) -> Result<()> {
        let from = size.next_multiple_of(self.geo.cluster_size());
        if from < old {
            self.clear(io, from, old, Clear::Forget).await?;
        }
        self.commits.flush(self, io).await?;
        // Tables that are empty now.
        io.child(FILE).debug_event(DebugEvent::L1ShrinkFreeL2Clusters);
        let first = self.geo.l1_entries_for(size);
        for index in first..u64::from(self.tables.l1_len()) {
            let table = self.tables.l1(index) & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            self.tables.set_l1(index, 0);
            self.space.remove_metadata(table, self.geo.cluster_size());
            self.space.free_later(table, self.geo.cluster_size(), FreeKind::Other);
        }
        self.tables.forget();
        Ok(())
    }
}
