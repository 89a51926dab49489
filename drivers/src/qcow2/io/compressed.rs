//! Compressed clusters: reading one, writing one.
//!
//! Called by driven requests. Decoding and encoding run on the worker pool. A compressed cluster is never changed in
//! place; its entry is published after its bytes are written.

use std::sync::Arc;

use graph::{BlockError, DebugEvent, Errno, NodeIo, Result, WriteFlags};
use host::IoVecs;

use crate::qcow2::codec;
use crate::qcow2::format::COMPRESSED;
use crate::qcow2::node::{FILE, Qcow2};

impl Qcow2 {
    /// Where the bytes of a compressed cluster are: offset and length ("Compressed Clusters Descriptor").
    pub(crate) fn compressed_place(&self, entry: u64) -> (u64, u64) {
        let geo = self.geo;
        let offset = entry & geo.compressed_offset_mask();
        let sectors = (entry >> geo.csize_shift()) & geo.csize_mask();
        (offset, (sectors + 1) * 512 - (offset & 511))
    }

    /// Reads a part of a compressed cluster.
    pub(super) async fn read_compressed(
        &self,
        io: &NodeIo,
        at: u64,
        entry: u64,
        part: &IoVecs,
    ) -> Result<()> {
        let skip = self.geo.in_cluster(at) as usize;
        let data = match self.decoded.get(entry) {
            Some(data) => data,
            None => {
                let data = self.decode(io, entry).await?;
                self.decoded.put(entry, Arc::clone(&data));
                data
            }
        };
        part.copy_from(0, data.get(skip..).unwrap_or(&[]));
        Ok(())
    }

    async fn decode(&self, io: &NodeIo, entry: u64) -> Result<Arc<[u8]>> {
        let (offset, bytes) = self.compressed_place(entry);
        // At most two clusters. The last sector may lie past the end of the file: zeroes, which decoders skip.
        let buffer = IoVecs::alloc(bytes as usize, 4096).map_err(BlockError::from)?;
        let file = io.child(FILE);
        file.debug_event(DebugEvent::ReadCompressed);
        file.read(offset, &buffer).await?;
        let (raw, kind, size) =
            (buffer.to_vec(), self.header().compression, self.geo.cluster_size() as usize);
        let decoded = io.local().blocking(move || {
            let mut out = vec![0; size];
            codec::decompress(kind, &raw, &mut out).map(|()| Arc::from(out))
        });
        Ok(decoded.await?)
    }

    /// Writes whole clusters compressed; the last one may end with the disk.
    pub(super) async fn write_compressed(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let size = self.geo.cluster_size();
        let len = bufs.len() as u64;
        if self.data_file.is_some() || self.crypt.is_some() {
            return Err(BlockError::errno_only(Errno::ENOTSUP));
        }
        let to_end = offset.checked_add(len) == Some(self.size());
        if !offset.is_multiple_of(size) || !(len.is_multiple_of(size) || to_end) {
            return Err(BlockError::errno_only(Errno::EINVAL));
        }
        let mut done = 0;
        while done < len {
            let part = bufs.slice(done as usize, size as usize);
            let step = part.len() as u64;
            self.write_one_compressed(io, offset + done, part).await?;
            done += step;
        }
        Ok(())
    }

    async fn write_one_compressed(&self, io: &NodeIo, at: u64, part: IoVecs) -> Result<()> {
        let size = self.geo.cluster_size() as usize;
        let mut data = part.to_vec();
        // What lies past the end of the disk is zero.
        data.resize(size, 0);
        let kind = self.header().compression;
        let packed = io.local().blocking(move || codec::compress(kind, &data)).await;
        let Some(packed) = packed else {
            return self.write_range(io, at, &part).await;
        };
        let plan = loop {
            self.commits.check()?;
            if let Some(plan) = self.make_plan(io, at, 1, true).await? {
                break plan;
            }
        };
        let bytes = packed.len() as u64;
        let offset = self.space.alloc_bytes(io, bytes).await?;
        let file = io.child(FILE);
        file.debug_event(DebugEvent::WriteCompressed);
        let written = file.write(offset, &IoVecs::from_vec(packed), WriteFlags::empty()).await;
        if let Err(e) = written {
            self.space.give_back(offset, bytes);
            return Err(e);
        }
        let sectors = ((offset + bytes - 1) >> 9) - (offset >> 9);
        let entry = COMPRESSED | offset | (sectors << self.geo.csize_shift());
        self.decoded.forget(entry);
        file.debug_event(DebugEvent::L2UpdateCompressed);
        plan.publish_entry(entry);
        Ok(())
    }
}
