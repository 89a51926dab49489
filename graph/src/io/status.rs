//! What is known about ranges, and changing the size: the rarely used entry points.
//!
//! Called by jobs, by drivers for their children and by the control side.

use super::NodeIo;
use super::read::widen;
use crate::driver::{BlockStatus, Location, StatusFlags, Truncate};
use crate::error::{Errno, Result};

impl NodeIo {
    /// What is known about the first part of a range. Past the end the answer is `ZERO | EOF` for all of it.
    ///
    /// # Errors
    /// What the driver says; `EIO` for a range past 2^63.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let _stay = self.stay();
        let node = self.view_node()?;
        if !crate::view::in_bounds(offset, len, i64::MAX as u64) {
            return Err(Errno::EIO.into());
        }
        let size = node.node().size();
        if offset >= size || len == 0 {
            let flags = StatusFlags::ZERO | StatusFlags::EOF;
            return Ok(BlockStatus { flags, len, location: None });
        }
        let len = len.min(size - offset);
        let align = u64::from(node.limits().request_alignment);
        let (start, end) = widen(offset, len, align);
        let mut status = node.node().driver().block_status(self, start, end - start).await?;
        let skip = offset - start;
        if status.len <= skip {
            // A driver that answers with less than its own alignment has no answer for us.
            return Err(Errno::EIO.into());
        }
        status.len = (status.len - skip).min(len);
        status.location = status.location.map(|l| match l {
            Location::Child { child, offset } => Location::Child { child, offset: offset + skip },
            Location::File { offset } => Location::File { offset: offset + skip },
        });
        status.flags.set(StatusFlags::EOF, offset + status.len >= size);
        Ok(status)
    }

    /// Changes the size, bytes. The caller has drained the node and holds RESIZE.
    ///
    /// # Errors
    /// `EPERM` on a read-only node, what the driver says.
    pub async fn truncate(&self, size: u64, how: Truncate) -> Result<()> {
        let _stay = self.stay();
        let node = self.view_node()?;
        if node.node().options().read_only {
            return Err(Errno::EPERM.into());
        }
        if size > i64::MAX as u64 {
            return Err(Errno::EFBIG.into());
        }
        // What grows changes the last block and everything after it.
        let old = node.node().size();
        let from = old.min(size);
        let _token = self.track(node, from, (i64::MAX as u64) - from, true).await;
        node.node().driver().truncate(self, size, how).await
    }
}
