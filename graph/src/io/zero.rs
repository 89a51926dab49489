//! Writes of zeroes and discards: cut along the driver's granularity, with a fallback for what it cannot do.
//!
//! Called by `NodeIo` and by the zero detection of writes. A discard is advice: what does not fit is left out.

use host::IoVecs;

use super::read::bounce;
use super::{MAX_BOUNCE, NodeIo};
use crate::driver::{Op, WriteFlags, ZeroFlags};
use crate::error::{Errno, Result};
use crate::options::DiscardOption;
use crate::view::ViewNode;

/// The first piece of `offset..end`: up to the next multiple of `granularity`, or as many whole ones as there are, or
/// what is left; never above `max` (0 = no limit).
fn piece(offset: u64, end: u64, granularity: u64, max: u64) -> u64 {
    let left = end - offset;
    let max = if max == 0 { u64::MAX } else { (max - max % granularity).max(granularity) };
    let into = offset % granularity;
    let len = if into != 0 {
        left.min(granularity - into)
    } else if left >= granularity {
        left - left % granularity
    } else {
        left
    };
    len.min(max)
}

impl NodeIo {
    pub(super) async fn write_zeroes_unaccounted(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        let node = self.view_node()?;
        if node.refuses(Op::WriteZeroes) {
            return Err(Errno::EPERM.into());
        }
        self.check_range(node, offset, len)?;
        self.check_growth(node, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let misaligned = !(offset | len).is_multiple_of(u64::from(node.limits().request_alignment));
        let _token = self.track(node, offset, len, misaligned).await;
        self.zero_tracked(node, offset, len, flags).await
    }

    /// Zeroes a range; the caller has tracked it.
    pub(super) async fn zero_tracked(
        &self,
        node: &ViewNode,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        let limits = *node.limits();
        let driver = node.driver();
        let mut flags = flags;
        if node.options().discard == DiscardOption::Ignore {
            flags.remove(ZeroFlags::MAY_UNMAP);
        }
        let flush_after = flags.contains(ZeroFlags::FUA) && !driver.supports_fua();
        if flush_after {
            flags.remove(ZeroFlags::FUA);
        }
        let align = u64::from(limits.request_alignment);
        let granularity = u64::from(limits.write_zeroes_alignment).max(align);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let mut part = piece(at, end, granularity, limits.max_write_zeroes);
            if !(at | part).is_multiple_of(align) {
                // Down to the block that is only partly covered; the rest of the piece comes next.
                part = piece(at, at + part, align, 0);
            }
            let aligned = (at | part).is_multiple_of(align);
            let result = if aligned {
                driver.write_zeroes(self, at, part, flags - ZeroFlags::NO_FALLBACK).await
            } else {
                Err(Errno::ENOTSUP.into())
            };
            match result {
                Err(e) if e.errno() == Errno::ENOTSUP => {
                    if flags.contains(ZeroFlags::NO_FALLBACK) {
                        return Err(e);
                    }
                    self.write_zero_buffers(node, at, part, flags).await?;
                }
                result => result?,
            }
            at += part;
        }
        if flush_after { self.flush_unaccounted().await } else { Ok(()) }
    }

    async fn write_zero_buffers(
        &self,
        node: &ViewNode,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        let mut write = WriteFlags::empty();
        write.set(WriteFlags::FUA, flags.contains(ZeroFlags::FUA));
        let zeroes: IoVecs = bounce(node, len.min(MAX_BOUNCE))?;
        let mut done = 0;
        while done < len {
            let part = (len - done).min(MAX_BOUNCE);
            self.write_tracked(node, offset + done, &zeroes.slice(0, part as usize), write).await?;
            done += part;
        }
        Ok(())
    }

    pub(super) async fn discard_unaccounted(&self, offset: u64, len: u64) -> Result<()> {
        let node = self.view_node()?;
        if node.refuses(Op::Discard) {
            return Err(Errno::EPERM.into());
        }
        self.check_range(node, offset, len)?;
        if node.ignores(Op::Discard) {
            return Ok(());
        }
        let limits = *node.limits();
        let align = u64::from(limits.request_alignment);
        let start = offset.next_multiple_of(align);
        let end = offset + len;
        let end = end - end % align;
        if start >= end {
            return Ok(());
        }
        let _token = self.track(node, start, end - start, false).await;
        let granularity = u64::from(limits.discard_alignment).max(align);
        let mut at = start;
        while at < end {
            let part = piece(at, end, granularity, limits.max_discard);
            match node.driver().discard(self, at, part).await {
                Err(e) if e.errno() == Errno::ENOTSUP => {}
                result => result?,
            }
            at += part;
        }
        Ok(())
    }
}
