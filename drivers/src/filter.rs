//! What filters have in common: what they remember of the child they show, and how they pass requests on.
//!
//! Used by the filters among the drivers. No driver itself; must not know any.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use graph::{
    BlockStatus, DriverInfo, Errno, Location, Map, Node, NodeIo, Op, Result, Truncate, WriteFlags, ZeroFlags,
};
use host::IoVecs;

/// Index of the child a filter shows.
pub(crate) const FILE: usize = 0;

/// The child as of the last we heard.
pub(crate) struct Shown {
    /// Bytes. Release by who changes it (`changed`, own writes and truncates) pairs with Acquire by who asks.
    size: AtomicU64,
    /// Bytes; 0: unknown.
    cluster_size: AtomicU32,
    compresses: AtomicBool,
}

impl Shown {
    pub(crate) fn new(child: &Node) -> Shown {
        let shown = Shown { size: 0.into(), cluster_size: 0.into(), compresses: false.into() };
        shown.look_at(child);
        shown
    }

    /// A child of that size, which has no clusters.
    #[cfg(test)]
    pub(crate) fn of_size(size: u64) -> Shown {
        Shown { size: size.into(), cluster_size: 0.into(), compresses: false.into() }
    }

    fn look_at(&self, child: &Node) {
        let info = child.driver().info();
        self.cluster_size.store(info.cluster_size.unwrap_or(0), Relaxed);
        self.compresses.store(child.driver().supports_compressed(), Relaxed);
        self.size.store(child.size(), Release);
    }

    /// `Driver::child_changed` of a filter.
    pub(crate) fn changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        match child {
            _ if index != FILE => {}
            Some((_, node)) => self.look_at(node),
            None => self.size.store(0, Release),
        }
    }

    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// `None` where the child has no clusters.
    pub(crate) fn cluster_size(&self) -> Option<u32> {
        Some(self.cluster_size.load(Relaxed)).filter(|size| *size != 0)
    }

    pub(crate) fn compresses(&self) -> bool {
        self.compresses.load(Relaxed)
    }

    /// `Driver::map` of a filter that has nothing to do with the request.
    #[inline]
    pub(crate) fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        // Growing changes our size as well.
        if op.modifies() && offset.saturating_add(len) > self.size() {
            return Map::Drive;
        }
        Map::Child { child: FILE, offset, len }
    }

    /// `Driver::info` of a filter.
    pub(crate) fn info(&self) -> DriverInfo {
        DriverInfo { supports_fua: true, cluster_size: self.cluster_size(), ..DriverInfo::default() }
    }

    /// After a write through the filter that ended there.
    fn note_end(&self, io: &NodeIo, end: u64) {
        if end > self.size() {
            self.size.fetch_max(io.child(FILE).size(), AcqRel);
        }
    }

    pub(crate) async fn write(
        &self,
        io: &NodeIo,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
    ) -> Result<()> {
        io.child(FILE).write(offset, bufs, flags).await?;
        self.note_end(io, offset.saturating_add(bufs.len() as u64));
        Ok(())
    }

    pub(crate) async fn write_zeroes(
        &self,
        io: &NodeIo,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        io.child(FILE).write_zeroes(offset, len, flags).await?;
        self.note_end(io, offset.saturating_add(len));
        Ok(())
    }

    pub(crate) async fn truncate(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        let child = io.child(FILE);
        let result = child.truncate(size, how).await;
        // Also after a failure: half of it may have happened.
        self.size.store(child.size(), Release);
        result
    }
}

/// `Driver::block_status` of a filter: what holds for the child holds for it, and its bytes are the child's.
pub(crate) async fn block_status(io: &NodeIo, offset: u64, len: u64) -> Result<BlockStatus> {
    let child = io.child(FILE);
    let mut status = child.block_status(offset, len).await?;
    if status.len == 0 {
        // The child is gone or has shrunk under us.
        return Err(Errno::EIO.into());
    }
    status.location = status.location.map(|_| Location::Child { child: FILE, offset });
    Ok(status)
}
