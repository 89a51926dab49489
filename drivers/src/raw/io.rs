//! Requests on a raw node: the child's, at another offset.
//!
//! Called by views and by the graph's asynchronous path. Never looks at data.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use graph::{
    BlockError, BlockStatus, BoxFut, DebugEvent, Driver, DriverInfo, Errno, Limits, Location, Map, Node,
    NodeIo, Op, Perm, Reopen, ReopenContext, Result, Roles, StatusFlags, Truncate, WriteFlags, ZeroFlags,
    default_child_perm,
};
use host::IoVecs;
use serde_json::Value;

use super::{FILE, Raw};

impl Raw {
    /// Where a range lies in the child.
    #[inline]
    fn at(&self, offset: u64, len: u64) -> std::result::Result<u64, Errno> {
        // Only a writer who holds RESIZE comes past the end, and a window of fixed size has no room there.
        if let Some(size) = self.window.size
            && (len > size || offset > size - len)
        {
            return Err(Errno::ENOSPC);
        }
        let at = offset.checked_add(self.window.offset).ok_or(Errno::EFBIG)?;
        at.checked_add(len).filter(|end| *end <= i64::MAX as u64).ok_or(Errno::EFBIG)?;
        Ok(at)
    }

    /// After a successful write or change of size through this node.
    fn note_child(&self, io: &NodeIo, at: u64, len: u64) {
        if at + len > self.file_size.load(Acquire) {
            self.file_size.fetch_max(io.child(FILE).size(), AcqRel);
        }
    }

    async fn truncate_file(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        if self.window.size.is_some() {
            return Err(BlockError::unsupported("Cannot resize fixed-size raw disks"));
        }
        let file_size = size
            .checked_add(self.window.offset)
            .filter(|s| *s <= i64::MAX as u64)
            .ok_or_else(|| BlockError::invalid("Disk size too large for the chosen offset"))?;
        let child = io.child(FILE);
        let result = child.truncate(file_size, how).await;
        // Also after a failure: half of it may have happened.
        self.file_size.store(child.size(), Release);
        result
    }
}

impl Driver for Raw {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        if op == Op::Flush {
            return Map::Child { child: FILE, offset: 0, len };
        }
        match self.at(offset, len) {
            // Growing changes our size as well.
            Ok(at) if op.modifies() && at + len > self.file_size.load(Acquire) => Map::Drive,
            Ok(at) => Map::Child { child: FILE, offset: at, len },
            Err(errno) => Map::Error(errno),
        }
    }

    fn size(&self) -> u64 {
        self.window.visible(self.file_size.load(Acquire))
    }

    fn limits(&self) -> Limits {
        // The child aligns for itself.
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let at = self.at(offset, bufs.len() as u64)?;
            let child = io.child(FILE);
            child.debug_event(DebugEvent::ReadAio);
            child.read(at, bufs).await
        })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let len = bufs.len() as u64;
            let at = self.at(offset, len)?;
            let child = io.child(FILE);
            child.debug_event(DebugEvent::WriteAio);
            child.write(at, bufs, flags).await?;
            self.note_child(io, at, len);
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let at = self.at(offset, len)?;
            io.child(FILE).write_zeroes(at, len, flags).await?;
            self.note_child(io, at, len);
            Ok(())
        })
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).discard(self.at(offset, len)?, len).await })
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).flush().await })
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(async move {
            let at = self.at(offset, len)?;
            let below = io.child(FILE).block_status(at, len).await?;
            let flags = (below.flags & (StatusFlags::DATA | StatusFlags::ZERO))
                | StatusFlags::ALLOCATED
                | StatusFlags::OFFSET_VALID;
            Ok(BlockStatus {
                flags,
                len: below.len,
                location: Some(Location::Child { child: FILE, offset: at }),
            })
        })
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.truncate_file(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        // The child sees to it, by itself or by a flush.
        true
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if index == FILE {
            self.file_size.store(child.map_or(0, |(_, node)| node.size()), Release);
        }
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["file"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(super::reopen::reopen(cx, own))
    }

    fn child_perm(&self, _child: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        let writes = Perm::WRITE | Perm::RESIZE;
        // The default for data adds WRITE and RESIZE for formats that allocate. There is nothing to allocate here: the
        // child is written only when the node is.
        let (mut used, shared_below) = default_child_perm(role, perm, shared, perm.writes());
        used.remove(writes);
        (used | (perm & writes), shared_below)
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { supports_fua: true, ..DriverInfo::default() }
    }
}
