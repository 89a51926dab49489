//! Requests on a file or device.
//!
//! `map` is the hot path: it answers with the file wherever the range surely lies inside. The asynchronous methods do the
//! rest: ends of files, zeroing, discards, and what came in misaligned. Must not call the kernel but through `Local`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverInfo, Errno, Limits, Map, NodeIo, Op, Perm, Reopen,
    ReopenContext, Result, Roles, Truncate, WriteFlags, ZeroFlags,
};
use host::{FallocMode, File, FileKind, IoVecs};
use serde_json::{Value, json};

use super::{FileNode, Wanted};

/// What the kernel moves in one call at most.
const MAX_TRANSFER: u64 = 0x7fff_f000;
/// Pieces of memory in one call (`IOV_MAX`).
const MAX_IOV: u32 = 1024;

/// Whether an error says "there is no such operation here", in any of the numbers file systems and drivers use for that.
fn is_unsupported(e: &io::Error) -> bool {
    /// `ENOSYS` and `ENOTTY`: from kernels and devices without the call.
    const NO_CALL: [i32; 2] = [38, 25];
    let n = e.raw_os_error().unwrap_or(0);
    n == Errno::ENOTSUP.raw() || n == Errno::ENODEV.raw() || NO_CALL.contains(&n)
}

impl FileNode {
    /// Whether all of the range was inside the file when that was last looked at.
    #[inline]
    fn inside(limit: u64, offset: u64, len: u64) -> bool {
        len <= limit && offset <= limit - len
    }

    /// A failed synchronous write tells of *any* page the kernel could not write since the last report, and the kernel
    /// tells only once: the next flush would succeed over lost data. So it counts as a failed flush, as long as data
    /// passes the page cache.
    fn note_sync_failure(io: &NodeIo, file: &File, e: &io::Error) {
        if !file.direct()
            && e.raw_os_error() == Some(Errno::EIO.raw())
            && let Ok(node) = io.node()
        {
            node.note_flush_error(Errno::EIO);
        }
    }

    /// `fallocate` of one sort, unless it is known not to exist here; whether it did it.
    async fn try_fallocate(
        &self,
        io: &NodeIo,
        lack: &AtomicBool,
        mode: FallocMode,
        offset: u64,
        len: u64,
    ) -> Result<bool> {
        if lack.load(Relaxed) {
            return Ok(false);
        }
        match io.local().fallocate(self.writable()?, mode, offset, len).await {
            Ok(()) => Ok(true),
            Err(e) if is_unsupported(&e) => {
                lack.store(true, Relaxed);
                Ok(false)
            }
            // A range this file system cannot do (misaligned); others it may.
            Err(e) if e.raw_os_error() == Some(Errno::EINVAL.raw()) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Zeroes without data; whether it could be done.
    async fn zero(&self, io: &NodeIo, offset: u64, len: u64, unmap: bool) -> Result<bool> {
        let lacks = &self.lacks;
        let keep_size = FallocMode::ZeroRange { keep_size: false };
        match self.current().kind() {
            FileKind::CharDevice => Ok(false),
            FileKind::BlockDevice => {
                if unmap
                    && self.try_fallocate(io, &lacks.punch_hole, FallocMode::PunchHole, offset, len).await?
                {
                    return Ok(true);
                }
                self.try_fallocate(io, &lacks.zero_range, keep_size, offset, len).await
            }
            FileKind::Regular => {
                // A hole does not make a file longer.
                let grows = !Self::inside(self.size.load(Acquire), offset, len);
                if unmap
                    && !grows
                    && self.try_fallocate(io, &lacks.punch_hole, FallocMode::PunchHole, offset, len).await?
                {
                    return Ok(true);
                }
                if self.try_fallocate(io, &lacks.zero_range, keep_size, offset, len).await? {
                    self.note_end(offset + len);
                    return Ok(true);
                }
                // tmpfs has no ZERO_RANGE; a hole that is allocated again comes to the same.
                if lacks.allocate.load(Relaxed)
                    || !self.try_fallocate(io, &lacks.punch_hole, FallocMode::PunchHole, offset, len).await?
                {
                    return Ok(false);
                }
                let done = self
                    .try_fallocate(
                        io,
                        &lacks.allocate,
                        FallocMode::Allocate { keep_size: false },
                        offset,
                        len,
                    )
                    .await?;
                if done {
                    self.note_end(offset + len);
                }
                Ok(done)
            }
        }
    }

    async fn give_up(&self, io: &NodeIo, offset: u64, len: u64) -> Result<()> {
        let file = self.writable()?;
        let (mode, offset, len) = match file.kind() {
            FileKind::Regular => (FallocMode::PunchHole, offset, len),
            FileKind::BlockDevice => {
                let block = u64::from(file.block_sizes().0.max(1));
                let start = offset.next_multiple_of(block);
                let end = offset + len;
                let end = end - end % block;
                if start >= end {
                    // Less than a block: there is nothing a device could give up.
                    return Ok(());
                }
                (FallocMode::Discard, start, end - start)
            }
            FileKind::CharDevice => return Err(Errno::ENOTSUP.into()),
        };
        let result = io.local().fallocate(file, mode, offset, len).await;
        let counters = &self.counters;
        match result {
            Ok(()) => {
                counters.discards.fetch_add(1, Relaxed);
                counters.discarded.fetch_add(len, Relaxed);
                Ok(())
            }
            Err(e) => {
                counters.discards_failed.fetch_add(1, Relaxed);
                Err(if is_unsupported(&e) { Errno::ENOTSUP.into() } else { e.into() })
            }
        }
    }

    async fn sync(&self, io: &NodeIo) -> Result<()> {
        let Ok(file) = self.writable() else {
            // Nobody has written through this node.
            return Ok(());
        };
        io.local().fdatasync(file).await.map_err(BlockError::from)
    }
}

impl Driver for FileNode {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        let file = self.current();
        match op {
            Op::Read => {
                let length = self.length.load(Acquire);
                if offset >= length {
                    return Map::Drive;
                }
                Map::File { file, offset, len: len.min(length - offset) }
            }
            Op::Write | Op::Flush if !file.writable() => match op {
                Op::Flush => Map::Done { len },
                _ => Map::Error(Errno::EPERM),
            },
            Op::Write if Self::inside(self.size.load(Acquire), offset, len) => {
                Map::File { file, offset, len }
            }
            // A failure is remembered by whoever sent it (`Node::note_flush_error`).
            Op::Flush => Map::File { file, offset, len },
            Op::Write | Op::WriteZeroes | Op::Discard => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    fn limits(&self) -> Limits {
        let file = self.current();
        let align = file.alignment();
        let (logical, physical) = file.block_sizes();
        // Discards and zeroing of devices go by whole logical blocks, also when reads and writes pass the page cache.
        let blocks = if file.kind() == FileKind::BlockDevice { logical } else { 0 };
        Limits {
            request_alignment: align.offset,
            mem_alignment: align.mem,
            max_transfer: MAX_TRANSFER,
            max_iov: MAX_IOV,
            discard_alignment: blocks,
            write_zeroes_alignment: blocks,
            logical_block_size: logical,
            physical_block_size: physical,
            ..Limits::default()
        }
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move { io.local().read(self.current(), bufs, offset).await.map_err(BlockError::from) })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let file = self.writable()?;
            let fua = flags.contains(WriteFlags::FUA);
            if let Err(e) = io.local().write(file, bufs, offset, fua).await {
                if fua {
                    Self::note_sync_failure(io, file, &e);
                }
                return Err(e.into());
            }
            self.note_end(offset + bufs.len() as u64);
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let file = self.writable()?;
            if !self.zero(io, offset, len, flags.contains(ZeroFlags::MAY_UNMAP)).await? {
                return Err(Errno::ENOTSUP.into());
            }
            if flags.contains(ZeroFlags::FUA)
                && let Err(e) = io.local().fdatasync(file).await
            {
                Self::note_sync_failure(io, file, &e);
                return Err(e.into());
            }
            Ok(())
        })
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(self.give_up(io, offset, len))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(self.sync(io))
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(self.status(io, offset, len))
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.resize(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        true
    }

    fn child_perm(&self, _child: usize, _role: Roles, _perm: Perm, _shared: Perm) -> (Perm, Perm) {
        // No children, so nothing is ever asked of one.
        (Perm::NONE, Perm::ALL)
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(self.reopen_with(cx, own))
    }

    fn check_perm(&self, perm: Perm, shared: Perm) -> Result<()> {
        self.prepare_perm(perm, shared)
    }

    fn set_perm(&self, perm: Perm, shared: Perm) {
        self.locks.commit(perm, shared);
    }

    fn abort_perm(&self) {
        self.locks.abort();
    }

    fn info(&self) -> DriverInfo {
        let file: &Arc<File> = self.current();
        let c = &self.counters;
        DriverInfo {
            filename: self.filename.clone(),
            // QEMU says 0 for a device: it holds no space of the host's file systems.
            allocated: match self.wanted {
                Wanted::File => file.allocated().ok(),
                Wanted::HostDevice => Some(0),
            },
            // There is one type for all of this family.
            format_specific: Some(json!({"type": "file", "data": {}})),
            driver_stats: Some(json!({
                "driver": self.wanted.name(),
                "discard-nb-ok": c.discards.load(Relaxed),
                "discard-nb-failed": c.discards_failed.load(Relaxed),
                "discard-bytes-ok": c.discarded.load(Relaxed),
            })),
            supports_fua: true,
            ..DriverInfo::default()
        }
    }
}
