//! Requests on a blklogwrites node: done on the child, then written down.
//!
//! Called by views and by the graph's asynchronous path. Reads are mapped; whatever changes data comes by here. A change that
//! failed is not logged: what it left is old, new, or a part of each, as after a crash.

use std::sync::Arc;

use graph::{
    BlockStatus, BoxFut, Driver, DriverInfo, Limits, Location, Map, Node, NodeIo, Op, Perm, Result, Roles,
    StatusFlags, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;

use super::format::{DISCARD, Entry, FLUSH, FUA};
use super::log::{ALIGN, Payload};
use super::{Blklogwrites, BlklogwritesNode, FILE, LOG, PIECE};
use crate::to_the_end::to_the_end;

impl Blklogwrites {
    /// The entry for a range, whose ends the graph has aligned.
    fn entry(&self, offset: u64, len: u64, flags: u64) -> Entry {
        let size = u64::from(self.log.sector_size());
        Entry { sector: offset / size, sectors: len / size, flags }
    }

    /// Logs what has been done.
    async fn done(&self, log: &NodeIo, entry: Entry, payload: Payload) -> Result<()> {
        let place = self.log.reserve(entry)?;
        self.log.fill(log, place, entry, payload).await
    }

    async fn write_and_log(&self, io: &NodeIo, offset: u64, bufs: &IoVecs, flags: WriteFlags) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + bufs.len() as u64).await;
        let (file, log) = (io.child(FILE), io.child(LOG));
        self.log.start(&log).await?;
        let step = PIECE.max(self.log.sector_size() as usize);
        for start in (0..bufs.len()).step_by(step) {
            let part = bufs.slice(start, step);
            // One copy for both: what a guest changes meanwhile must not make them differ.
            let data = IoVecs::alloc(part.len(), ALIGN)?;
            data.copy_iov(&part);
            let (at, len) = (offset + start as u64, part.len() as u64);
            file.write(at, &data, flags).await?;
            self.size.note(&file, at + len);
            let fua = if flags.contains(WriteFlags::FUA) { FUA } else { 0 };
            self.done(&log, self.entry(at, len, fua), Payload::Data(data)).await?;
        }
        Ok(())
    }

    async fn zero_and_log(&self, io: &NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + len).await;
        let (file, log) = (io.child(FILE), io.child(LOG));
        self.log.start(&log).await?;
        file.write_zeroes(offset, len, flags).await?;
        self.size.note(&file, offset + len);
        let fua = if flags.contains(ZeroFlags::FUA) { FUA } else { 0 };
        self.done(&log, self.entry(offset, len, fua), Payload::Zeroes(len)).await
    }

    async fn discard_and_log(&self, io: &NodeIo, offset: u64, len: u64) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + len).await;
        let log = io.child(LOG);
        self.log.start(&log).await?;
        io.child(FILE).discard(offset, len).await?;
        self.done(&log, self.entry(offset, len, DISCARD), Payload::None).await
    }

    async fn flush_and_log(&self, io: &NodeIo) -> Result<()> {
        let log = io.child(LOG);
        if !self.log.is_started() {
            // Nothing was changed: a log that was there stays.
            return io.child(FILE).flush().await;
        }
        self.log.start(&log).await?;
        // Its place is before what is not complete now: of that the flush says nothing.
        let entry = Entry { sector: 0, sectors: 0, flags: FLUSH };
        let place = self.log.reserve(entry)?;
        let flushed = io.child(FILE).flush().await;
        // The place must be filled; an entry that writes nothing says nothing.
        let entry = if flushed.is_ok() { entry } else { Entry { flags: 0, ..entry } };
        self.log.fill(&log, place, entry, Payload::None).await?;
        flushed?;
        self.log.publish_up_to(&log, place).await
    }
}

impl Driver for BlklogwritesNode {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        match op {
            Op::Read => Map::Child { child: FILE, offset, len },
            // Nobody writes: nothing to log.
            Op::Flush if self.0.read_only => Map::Child { child: FILE, offset, len },
            Op::Write | Op::WriteZeroes | Op::Discard | Op::Flush => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.0.size.get()
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: self.0.log.sector_size(), ..Limits::default() }
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).read(offset, bufs).await })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        let (node, at, bufs) = (Arc::clone(&self.0), io.clone(), bufs.clone());
        Box::pin(to_the_end(io.local().clone(), async move {
            node.write_and_log(&at, offset, &bufs, flags).await
        }))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        let (node, at) = (Arc::clone(&self.0), io.clone());
        Box::pin(to_the_end(
            io.local().clone(),
            async move { node.zero_and_log(&at, offset, len, flags).await },
        ))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        let (node, at) = (Arc::clone(&self.0), io.clone());
        Box::pin(to_the_end(io.local().clone(), async move { node.discard_and_log(&at, offset, len).await }))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        let (node, at) = (Arc::clone(&self.0), io.clone());
        Box::pin(to_the_end(io.local().clone(), async move {
            if node.read_only { at.child(FILE).flush().await } else { node.flush_and_log(&at).await }
        }))
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(async move {
            let below = io.child(FILE).block_status(offset, len).await?;
            let flags = (below.flags & (StatusFlags::DATA | StatusFlags::ZERO)) | StatusFlags::OFFSET_VALID;
            let location = Some(Location::Child { child: FILE, offset });
            Ok(BlockStatus { flags, len: below.len, location })
        })
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let child = io.child(FILE);
            let result = child.truncate(size, how).await;
            // Also after a failure: half of it may have happened.
            self.0.size.look(&child);
            result
        })
    }

    fn supports_fua(&self) -> bool {
        true
    }

    fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        default_child_perm(role, perm, shared, !self.0.read_only)
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if index == FILE {
            self.0.size.told(child.map(|(_, node)| node));
        }
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { supports_fua: true, ..DriverInfo::default() }
    }

    fn close<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if self.0.read_only || !self.0.log.is_started() {
                return Ok(());
            }
            self.0.log.publish(&io.child(LOG)).await
        })
    }
}
