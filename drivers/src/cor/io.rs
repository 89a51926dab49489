//! Requests on a copy-on-read node. All but reads are the child's.
//!
//! Called by views and by the graph's asynchronous path. A read goes the fast way where the child has the data itself
//! (`Map::Own`); elsewhere it is driven here, cluster by cluster.
//!
//! **No write gets lost.** A cluster is copied while the child keeps everybody else from writing it
//! ([`NodeIo::exclusive`]), and whether it is still to be copied is asked once more when that holds. Only clusters that begin
//! where the next image of the chain has something are copied: the child may give space to others without being asked.

use std::sync::Arc;

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverInfo, DriverKind, Errno, Limits, Map, Node, NodeId,
    NodeIo, Op, Perm, Result, Roles, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;

use super::CopyOnRead;
use crate::filter::{self, FILE};

/// What is copied in one go at most, unless a cluster is larger, bytes.
const PIECE: u64 = 1 << 20;
/// Largest cluster that is copied as a whole, bytes: qcow2 has none larger.
const MAX_CLUSTER: u64 = 2 << 20;
/// Granularity of copying where the child has no clusters, bytes.
const DEFAULT_CLUSTER: u64 = 64 << 10;

/// The image a filter shows, or the node itself.
fn image(io: NodeIo) -> Option<NodeIo> {
    let mut io = io;
    while io.node().ok()?.kind() == DriverKind::Filter {
        io = io.below()?;
    }
    Some(io)
}

/// Whether `io` decides the first part of a range itself, and how much; in doubt it does not.
async fn has(io: &NodeIo, offset: u64, len: u64) -> (bool, u64) {
    match io.is_allocated(offset, len).await {
        Ok((has, known)) if known > 0 => (has, known.min(len)),
        _ => (false, len),
    }
}

impl CopyOnRead {
    /// The node below `bottom`, where copying ends; `None` where nothing is below it.
    fn base(&self, bottom: &str, below: &NodeIo) -> Result<Option<NodeId>> {
        let mut io = below.clone();
        while io.node()?.name() != bottom {
            match io.below() {
                Some(next) => io = next,
                // `bottom` is the child itself: nothing is copied.
                None => return Ok(Some(below.node()?.id())),
            }
        }
        io.below().map(|base| base.node().map(|n| n.id())).transpose()
    }

    /// Whether the first part of a range, which the child does not have, is to be copied, and how much of it.
    async fn wants(&self, below: &NodeIo, offset: u64, len: u64) -> Result<(bool, u64)> {
        let size = below.size();
        if offset >= size {
            return Ok((false, len));
        }
        let len = len.min(size - offset);
        let Some(bottom) = &self.bottom else { return Ok((true, len)) };
        let base = self.base(bottom, below)?;
        if base.is_some_and(|base| below.node().is_ok_and(|n| n.id() == base)) {
            return Ok((false, len));
        }
        Ok(match below.is_allocated_above(base, offset, len).await {
            Ok((there, known)) if known > 0 => (there, known.min(len)),
            // Reading says what is wrong.
            _ => (true, len),
        })
    }

    async fn copy_and_read(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let child = io.child(FILE);
        let Some(below) = image(child.clone()).and_then(|top| top.below()).and_then(image) else {
            return child.read(offset, bufs).await;
        };
        let len = bufs.len() as u64;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (there, mut part) = has(&child, at, len - done).await;
            let mut copy = false;
            if !there {
                (copy, part) = self.wants(&below, at, part).await?;
            }
            let bufs = bufs.slice(done as usize, part as usize);
            if copy {
                self.copy(&child, at, &bufs).await?;
            } else {
                child.read(at, &bufs).await?;
            }
            done += part;
        }
        Ok(())
    }

    /// Copies the clusters around a range, as far as they are still to be copied, and reads the range.
    async fn copy(&self, child: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let cluster = self.child.cluster_size().map_or(DEFAULT_CLUSTER, u64::from).clamp(1, MAX_CLUSTER);
        let end = offset + bufs.len() as u64;
        let stop = end.next_multiple_of(cluster).min(child.size().max(end));
        let mut at = offset - offset % cluster;
        let alone = match child.exclusive(at, stop - at).await {
            // Inactive: the image is another process's, which would not expect writes.
            Err(e) if e.errno() == Errno::EPERM => return child.read(offset, bufs).await,
            alone => alone?,
        };
        while at < stop {
            let (there, known) = has(child, at, stop - at).await;
            let known = if there { known } else { known.min(PIECE.max(cluster)) };
            // What the reader has asked for of it, and where that is.
            let (from, to) = (at.max(offset), (at + known).min(end));
            let wanted = to.saturating_sub(from) as usize;
            if there {
                if wanted > 0 {
                    child.read(from, &bufs.slice((from - offset) as usize, wanted)).await?;
                }
            } else {
                let limits = child.limits();
                let align = limits.mem_alignment.max(limits.request_alignment).clamp(512, 1 << 16);
                let data = IoVecs::alloc(known as usize, align as usize).map_err(BlockError::from)?;
                child.read(at, &data).await?;
                // As in QEMU a reader hears of it when there is no space for the copy.
                if data.is_zero() {
                    alone.fill_zeroes(at, known).await?;
                } else {
                    alone.fill(at, &data).await?;
                }
                if wanted > 0 {
                    let part = data.slice((from - at) as usize, wanted);
                    bufs.slice((from - offset) as usize, wanted).copy_iov(&part);
                }
            }
            at += known;
        }
        Ok(())
    }
}

impl Driver for CopyOnRead {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        match op {
            Op::Read => Map::Own { child: FILE, offset, len },
            _ => self.child.map(op, offset, len),
        }
    }

    fn size(&self) -> u64 {
        self.child.size()
    }

    fn limits(&self) -> Limits {
        // The child aligns for itself.
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(self.copy_and_read(io, offset, bufs))
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(self.child.write(io, offset, bufs, flags))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(self.child.write_zeroes(io, offset, len, flags))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).discard(offset, len).await })
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).flush().await })
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(filter::block_status(io, offset, len))
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.child.truncate(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        // The child sees to it, by itself or by a flush.
        true
    }

    fn supports_compressed(&self) -> bool {
        self.child.compresses()
    }

    fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        let (used, shared) = default_child_perm(role, perm, shared, true);
        // Reads write, users or not.
        (used | Perm::WRITE_UNCHANGED, shared)
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        self.child.changed(index, child);
    }

    fn info(&self) -> DriverInfo {
        self.child.info()
    }
}
