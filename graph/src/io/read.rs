//! Reads: bounds, padding to the alignment, splitting.
//!
//! Called by `NodeIo::read` and, for the blocks around a misaligned write, by `io::write`.

use host::IoVecs;

use super::{MAX_BOUNCE, NodeIo};
use crate::error::{BlockError, Result};
use crate::view::ViewNode;

/// The aligned range around `offset..offset + len`.
pub(super) fn widen(offset: u64, len: u64, align: u64) -> (u64, u64) {
    let start = offset - offset % align;
    let end = (offset + len).next_multiple_of(align);
    (start, end)
}

/// A buffer of the graph's own, in the node's memory alignment.
pub(super) fn bounce(node: &ViewNode, len: u64) -> Result<IoVecs> {
    let limits = node.limits();
    let align = limits.mem_alignment.max(limits.request_alignment).clamp(512, 1 << 16) as usize;
    IoVecs::alloc(len as usize, align).map_err(BlockError::from)
}

impl NodeIo {
    pub(super) async fn read_unaccounted(&self, offset: u64, bufs: &IoVecs) -> Result<()> {
        let node = self.view_node()?;
        let len = bufs.len() as u64;
        self.check_range(node, offset, len)?;
        // A parent may ask past the end; what is not there reads as zeroes.
        let size = node.driver().size();
        let inside = size.saturating_sub(offset).min(len);
        if inside < len {
            bufs.slice(inside as usize, (len - inside) as usize).fill(0);
        }
        if inside == 0 {
            return Ok(());
        }
        let align = u64::from(node.limits().request_alignment);
        if offset.is_multiple_of(align) && inside.is_multiple_of(align) {
            if inside == len {
                return self.read_aligned(node, offset, bufs).await;
            }
            return self.read_aligned(node, offset, &bufs.slice(0, inside as usize)).await;
        }
        let mut done = 0;
        while done < inside {
            let at = offset + done;
            // Pieces end on block borders, so that no block is read twice.
            let piece = (inside - done).min(MAX_BOUNCE.max(align) - at % align);
            let (start, end) = widen(at, piece, align);
            let buffer = bounce(node, end - start)?;
            self.read_aligned(node, start, &buffer).await?;
            let data = buffer.slice((at - start) as usize, piece as usize);
            bufs.slice(done as usize, piece as usize).copy_iov(&data);
            done += piece;
        }
        Ok(())
    }

    /// Reads an aligned range in pieces the driver takes.
    pub(super) async fn read_aligned(&self, node: &ViewNode, offset: u64, bufs: &IoVecs) -> Result<()> {
        let max = node.limits().max_transfer;
        let len = bufs.len() as u64;
        if max == 0 || len <= max {
            return node.driver().read(self, offset, bufs).await;
        }
        let mut done = 0;
        while done < len {
            let piece = max.min(len - done);
            let part = bufs.slice(done as usize, piece as usize);
            node.driver().read(self, offset + done, &part).await?;
            done += piece;
        }
        Ok(())
    }
}
