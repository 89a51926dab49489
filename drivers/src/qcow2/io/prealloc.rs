//! Host clusters set aside for a range of the disk.
//!
//! Called while a disk grows and while one is created; nobody else uses the node.

use graph::{BlockError, NodeIo, Prealloc, Result, Truncate, WriteFlags, ZeroFlags};
use host::IoVecs;

use super::map::{ALL_ALLOCATED, ALL_ZERO};
use crate::qcow2::alloc::Extent;
use crate::qcow2::format::{COMPRESSED, COPIED, ZERO};
use crate::qcow2::node::{FILE, Qcow2};

/// Zeroes are written in pieces of this size, bytes.
const PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Gives every cluster of `from..to` that has none a host cluster, as `mode` says. The range reads as zeroes
    /// afterwards where it did before; with `through` (extended L2 entries only) the backing file goes on to show.
    pub(crate) async fn preallocate(
        &self,
        io: &NodeIo,
        from: u64,
        to: u64,
        mode: Prealloc,
        through: bool,
    ) -> Result<()> {
        if mode == Prealloc::Off || from >= to {
            return Ok(());
        }
        if self.data_file.is_some() {
            let prealloc = if mode == Prealloc::Metadata { Prealloc::Off } else { mode };
            let child = io.child(self.data);
            if child.size() < to {
                child.truncate(to, Truncate { exact: false, prealloc, zero: true }).await?;
            }
        }
        let size = self.geo.cluster_size();
        let mut at = self.geo.start_of_cluster(from);
        while at < to {
            at = self.preallocate_step(io, at, to.next_multiple_of(size), mode, through).await?;
        }
        Ok(())
    }

    async fn preallocate_step(
        &self,
        io: &NodeIo,
        at: u64,
        to: u64,
        mode: Prealloc,
        through: bool,
    ) -> Result<u64> {
        let geo = self.geo;
        if self.tables.wants_commit() {
            self.commits.flush(self, io).await?;
        }
        self.tables.own(self, io, at).await?;
        let first = self.tables.index_of(at);
        let most = geo.clusters(to - at).min((self.tables.slice_entries() - first) as u64);
        let empty = self.tables.with(at, |slice| {
            let has = |i: u64| {
                let (entry, _) = self.tables.entry(slice, first + i as usize);
                entry & COMPRESSED != 0 || self.tables.decoder().host(entry).is_some()
            };
            // (how many to pass by, how many to fill)
            let skip = (0..most).take_while(|i| has(*i)).count() as u64;
            (skip, (skip..most).take_while(|i| !has(*i)).count() as u64)
        });
        let Some((skip, count)) = empty else {
            self.tables.load(self, io, self.tables.slice_of(at)).await?;
            return Ok(at);
        };
        let start = at + (skip << geo.cluster_bits());
        if count == 0 {
            return Ok(start);
        }
        let (host, count) = if self.data_file.is_some() {
            (start, count)
        } else {
            let file = io.child(FILE);
            let extent = self.space.alloc(io, count).await?;
            if let Err(e) = self.fill(&file, extent, mode).await {
                self.space.give_back(extent.offset, extent.clusters << geo.cluster_bits());
                return Err(e);
            }
            (extent.offset, extent.clusters)
        };
        // What is in the host clusters would be deciphered. Version 2 has no entry that says zero.
        let ciphered = self.crypt.is_some();
        if ciphered
            && !geo.v3()
            && let Err(e) = self.write_ciphered_zeroes(io, start, host, count << geo.cluster_bits()).await
        {
            if self.data_file.is_none() {
                self.space.give_back(host, count << geo.cluster_bits());
            }
            return Err(e);
        }
        let done = self.tables.with(start, |slice| {
            for i in 0..count {
                let index = first + (skip + i) as usize;
                let here = start + (i << geo.cluster_bits());
                let hidden = self.backing_size().is_none_or(|size| here >= size);
                let (old, old_bitmap) = self.tables.entry(slice, index);
                let entry = (host + (i << geo.cluster_bits())) | COPIED;
                let (entry, bitmap) = match (geo.extended_l2(), hidden) {
                    (true, _) if through => (entry, old_bitmap),
                    (true, true) if !ciphered => (entry, ALL_ALLOCATED),
                    (true, _) => (entry, ALL_ZERO),
                    (false, true) if ciphered && geo.v3() => (entry | ZERO, 0),
                    (false, true) => (entry, 0),
                    (false, false) => (entry | (old & ZERO), 0),
                };
                self.tables.set_entry(slice, index, entry, bitmap);
            }
        });
        if done.is_none() {
            // Evicted while space was looked for: nothing names it yet.
            if self.data_file.is_none() {
                self.space.give_back(host, count << geo.cluster_bits());
            }
            return Ok(at);
        }
        Ok(start + (count << geo.cluster_bits()))
    }

    async fn write_ciphered_zeroes(&self, io: &NodeIo, at: u64, host: u64, bytes: u64) -> Result<()> {
        let zeroes = IoVecs::alloc(bytes.min(PIECE) as usize, 4096).map_err(BlockError::from)?;
        let mut done = 0;
        while done < bytes {
            let part = zeroes.slice(0, (bytes - done).min(PIECE) as usize);
            self.write_host(io, at + done, host + done, &part).await?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Makes new host clusters read as zeroes, and allocates or writes them if that is wanted.
    async fn fill(&self, file: &NodeIo, extent: Extent, mode: Prealloc) -> Result<()> {
        let bytes = extent.clusters << self.geo.cluster_bits();
        match mode {
            Prealloc::Off => Ok(()),
            Prealloc::Metadata if extent.zero => Ok(()),
            Prealloc::Metadata | Prealloc::Falloc => {
                file.write_zeroes(extent.offset, bytes, ZeroFlags::empty()).await
            }
            Prealloc::Full => {
                let zeroes = IoVecs::alloc(bytes.min(PIECE) as usize, 4096).map_err(BlockError::from)?;
                let mut done = 0;
                while done < bytes {
                    let part = zeroes.slice(0, (bytes - done).min(PIECE) as usize);
                    file.write(extent.offset + done, &part, WriteFlags::empty()).await?;
                    done += part.len() as u64;
                }
                Ok(())
            }
        }
    }
}
