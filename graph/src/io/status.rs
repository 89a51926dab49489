//! What is known about ranges, and changing the size: the rarely used entry points.
//!
//! Called by jobs, by drivers for their children and by the control side.

use super::NodeIo;
use super::read::widen;
use crate::driver::{BlockStatus, DriverKind, Location, StatusFlags, Truncate};
use crate::error::{Errno, Result};
use crate::ids::NodeId;
use crate::perm::Perm;

/// Answer of [`NodeIo::status_above`].
#[derive(Clone)]
pub struct ChainStatus {
    /// What holds; a location is one of `node`'s. `EOF` is about the end of the node that was asked.
    pub status: BlockStatus,
    /// How far below the node that was asked the one lies that decides; 0 is itself.
    pub depth: u32,
    /// The node that decides; `None` where none does.
    pub node: Option<NodeIo>,
}

/// `EOF` as the top means it: what lies below may be shorter or longer.
fn end_at(mut found: ChainStatus, offset: u64, top_size: u64) -> ChainStatus {
    found.status.flags.set(StatusFlags::EOF, offset.saturating_add(found.status.len) >= top_size);
    found
}

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
        let size = node.driver().size();
        if offset >= size || len == 0 {
            let flags = StatusFlags::ZERO | StatusFlags::EOF;
            return Ok(BlockStatus { flags, len, location: None });
        }
        let len = len.min(size - offset);
        let align = u64::from(node.limits().request_alignment);
        let (start, end) = widen(offset, len, align);
        let mut status = node.driver().block_status(self, start, end - start).await?;
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

    /// The node that shows through where this one has nothing of its own: a filter's child, an image's backing file.
    pub fn below(&self) -> Option<NodeIo> {
        let node = self.view_node().ok()?;
        let child = match node.node().kind() {
            DriverKind::Filter => 0,
            _ => node.driver().backing_child()?,
        };
        self.has_child(child).then(|| self.child(child))
    }

    /// What is known about the first part of a range in the chain from this node down to, and without, `base` (`None`: to
    /// the end of the chain), as QEMU's `bdrv_block_status_above`: which node decides it, and how.
    ///
    /// Where none of them does, the flags lack `ALLOCATED`. A node that is shorter than one above it counts as having zeroes
    /// past its end.
    ///
    /// # Errors
    /// What the drivers say; `EINVAL` where `base` is not below this node.
    pub async fn status_above(&self, base: Option<NodeId>, offset: u64, len: u64) -> Result<ChainStatus> {
        let _stay = self.stay();
        let top_size = self.size();
        let mut io = self.clone();
        let mut len = len;
        let mut depth = 0;
        loop {
            let id = io.node()?.id();
            if base == Some(id) {
                let status = BlockStatus { flags: StatusFlags::empty(), len, location: None };
                return Ok(ChainStatus { status, depth, node: None });
            }
            // Past its end, and not at the top: the one above has been asked and has nothing, so it is this one that decides.
            if depth > 0 && offset >= io.size() {
                let flags = StatusFlags::ZERO | StatusFlags::ALLOCATED;
                let status = BlockStatus { flags, len, location: None };
                return Ok(end_at(ChainStatus { status, depth, node: Some(io) }, offset, top_size));
            }
            let status = io.block_status(offset, len).await?;
            if status.flags.contains(StatusFlags::ALLOCATED) || status.len == 0 {
                return Ok(end_at(ChainStatus { status, depth, node: Some(io) }, offset, top_size));
            }
            len = len.min(status.len);
            match io.below() {
                Some(below) => io = below,
                None if base.is_some() => return Err(Errno::EINVAL.into()),
                None => {
                    // Nobody has anything: zeroes, which nobody decides.
                    let flags = status.flags | StatusFlags::ZERO;
                    let status = BlockStatus { flags, len, location: None };
                    return Ok(end_at(ChainStatus { status, depth, node: None }, offset, top_size));
                }
            }
            depth += 1;
        }
    }

    /// Whether this node or one below it, down to and without `base`, decides the first part of a range, and for how long
    /// the answer holds.
    ///
    /// # Errors
    /// As [`NodeIo::status_above`].
    pub async fn is_allocated_above(
        &self,
        base: Option<NodeId>,
        offset: u64,
        len: u64,
    ) -> Result<(bool, u64)> {
        let found = self.status_above(base, offset, len).await?;
        Ok((found.status.flags.contains(StatusFlags::ALLOCATED), found.status.len))
    }

    /// Whether this node itself, and nothing below it, decides the first part of a range, and for how long the answer
    /// holds.
    ///
    /// # Errors
    /// What the driver says.
    pub async fn is_allocated(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let status = self.block_status(offset, len).await?;
        Ok((status.flags.contains(StatusFlags::ALLOCATED), status.len))
    }

    /// Changes the size, bytes. The caller has drained the node and holds RESIZE.
    ///
    /// # Errors
    /// `EPERM` on a read-only node and without RESIZE, what the driver says.
    pub async fn truncate(&self, size: u64, how: Truncate) -> Result<()> {
        let _stay = self.stay();
        let node = self.view_node()?;
        if !node.handle().contains(Perm::RESIZE) {
            return Err(Errno::EPERM.into());
        }
        if size > i64::MAX as u64 {
            return Err(Errno::EFBIG.into());
        }
        // What grows changes the last block and everything after it.
        let old = node.driver().size();
        let from = old.min(size);
        let _token = self.track(node, from, (i64::MAX as u64) - from, true).await;
        node.driver().truncate(self, size, how).await
    }
}
