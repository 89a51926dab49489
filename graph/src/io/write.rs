//! Writes and flushes: zero detection, read-modify-write, splitting, FUA, remembered flush failures.
//!
//! Called by `NodeIo`. Whatever changes data passes `Tracker::begin` once, for the whole request.

use host::IoVecs;

use super::read::{bounce, widen};
use super::{MAX_BOUNCE, NodeIo};
use crate::driver::{DriverKind, Op, WriteFlags, ZeroFlags};
use crate::error::{Errno, Result};
use crate::io::tracked::Token;
use crate::options::DetectZeroes;
use crate::perm::Perm;
use crate::view::ViewNode;

impl NodeIo {
    pub(super) async fn write_unaccounted(
        &self,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
    ) -> Result<()> {
        let node = self.view_node()?;
        let len = bufs.len() as u64;
        let unchanged =
            flags.contains(WriteFlags::UNCHANGED) && node.handle().contains(Perm::WRITE_UNCHANGED);
        if node.refuses(Op::Write) && !unchanged {
            return Err(Errno::EPERM.into());
        }
        self.check_range(node, offset, len)?;
        self.check_growth(node, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        if flags.contains(WriteFlags::COMPRESSED) {
            return self.write_compressed(node, offset, bufs, flags).await;
        }
        let align = u64::from(node.limits().request_alignment);
        let misaligned = !(offset | len).is_multiple_of(align);
        let serialising = misaligned || flags.contains(WriteFlags::SERIALISING);
        let _token = self.track(node, offset, len, serialising).await;
        let detect = node.options().detect_zeroes;
        if detect != DetectZeroes::Off && bufs.is_zero() {
            let mut zero = ZeroFlags::NO_FALLBACK;
            zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
            zero.set(ZeroFlags::MAY_UNMAP, detect == DetectZeroes::Unmap);
            match self.zero_tracked(node, offset, len, zero).await {
                // Part of it may be zeroed already; the data below says the same.
                Err(e) if e.errno() == Errno::ENOTSUP => {}
                result => return result,
            }
        }
        self.write_tracked(node, offset, bufs, flags).await
    }

    /// One compressed cluster, as a whole: cut up or padded it would be something else.
    async fn write_compressed(
        &self,
        node: &ViewNode,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
    ) -> Result<()> {
        let driver = node.driver();
        if !driver.supports_compressed() {
            return Err(Errno::ENOTSUP.into());
        }
        let serialising = flags.contains(WriteFlags::SERIALISING);
        let _token = self.track(node, offset, bufs.len() as u64, serialising).await;
        let flush_after = flags.contains(WriteFlags::FUA) && !driver.supports_fua();
        let flags = if flush_after { flags - WriteFlags::FUA } else { flags } - WriteFlags::SERIALISING;
        driver.write(self, offset, bufs, flags).await?;
        if flush_after { self.flush_unaccounted().await } else { Ok(()) }
    }

    /// Enters the tracker with the blocks a write touches. Nodes that take any byte have no blocks to share; only an
    /// explicit wish to serialise is tracked there.
    pub(super) async fn track<'a>(
        &self,
        node: &'a ViewNode,
        offset: u64,
        len: u64,
        serialising: bool,
    ) -> Token<'a> {
        let align = u64::from(node.limits().request_alignment);
        let (start, end) = widen(offset, len, align);
        node.node().tracker().begin(start, end, serialising).await
    }

    /// Writes a range of any alignment; the caller has tracked it.
    pub(super) async fn write_tracked(
        &self,
        node: &ViewNode,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
    ) -> Result<()> {
        let flush_after = flags.contains(WriteFlags::FUA) && !node.driver().supports_fua();
        let flags = if flush_after { flags - WriteFlags::FUA } else { flags } - WriteFlags::SERIALISING;
        let align = u64::from(node.limits().request_alignment);
        if (offset | bufs.len() as u64).is_multiple_of(align) {
            self.write_aligned(node, offset, bufs, flags).await?;
        } else {
            self.write_padded(node, offset, bufs, flags, align).await?;
        }
        if flush_after { self.flush_unaccounted().await } else { Ok(()) }
    }

    /// Read-modify-write, in pieces that end on block borders.
    async fn write_padded(
        &self,
        node: &ViewNode,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
        align: u64,
    ) -> Result<()> {
        let len = bufs.len() as u64;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let piece = (len - done).min(MAX_BOUNCE.max(align) - at % align);
            let (start, end) = widen(at, piece, align);
            let buffer = bounce(node, end - start)?;
            if at != start {
                self.read_aligned(node, start, &buffer.slice(0, align as usize)).await?;
            }
            let last = end - align;
            // The first block may be the last one as well, and has been read then.
            if at + piece != end && (last != start || at == start) {
                self.read_aligned(node, last, &buffer.slice((last - start) as usize, align as usize)).await?;
            }
            let data = bufs.slice(done as usize, piece as usize);
            buffer.slice((at - start) as usize, piece as usize).copy_iov(&data);
            self.write_aligned(node, start, &buffer, flags).await?;
            done += piece;
        }
        Ok(())
    }

    /// Writes an aligned range in pieces the driver takes.
    async fn write_aligned(
        &self,
        node: &ViewNode,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
    ) -> Result<()> {
        let max = node.limits().max_transfer;
        let len = bufs.len() as u64;
        if max == 0 || len <= max {
            return node.driver().write(self, offset, bufs, flags).await;
        }
        let mut done = 0;
        while done < len {
            let piece = max.min(len - done);
            let part = bufs.slice(done as usize, piece as usize);
            node.driver().write(self, offset + done, &part, flags).await?;
            done += piece;
        }
        Ok(())
    }

    pub(super) async fn flush_unaccounted(&self) -> Result<()> {
        let node = self.view_node()?;
        if node.ignores(Op::Flush) {
            return Ok(());
        }
        if let Some(errno) = node.node().flush_error() {
            return Err(errno.into());
        }
        let result = node.driver().flush(self).await;
        if let Err(e) = &result
            && node.node().kind() == DriverKind::Protocol
        {
            node.node().note_flush_error(e.errno());
        }
        result
    }
}
