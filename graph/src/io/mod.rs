//! The asynchronous path: what every driven request goes through before and after a driver.
//!
//! Called by request sources for the root and by drivers for their children, on any iothread. Bounds, read-only,
//! alignment, splitting, zero detection, statistics happen here once, so that no driver repeats them. Must not know any
//! driver, and must not change the graph.

mod read;
mod status;
pub use status::ChainStatus;
pub(crate) mod tracked;
mod write;
mod zero;

use std::rc::Rc;
use std::sync::Arc;

use host::{IoVecs, Local};

use crate::driver::{Limits, Op};
use crate::epoch::{Stay, Stays};
use crate::error::{BlockError, Errno, Result};
use crate::node::Node;
use crate::perm::Perm;
use crate::stats::ShardSet;
use crate::view::{View, ViewNode};

/// Largest buffer the graph allocates for one piece of one request, bytes; longer requests are done in pieces. Small in unit tests, so that they meet the seams.
pub(crate) const MAX_BOUNCE: u64 = if cfg!(test) { 8192 } else { 1 << 20 };

/// No such child.
const NOWHERE: usize = usize::MAX;

struct Shared {
    view: Arc<View>,
    local: Local,
    shards: Rc<ShardSet>,
    /// Counts the requests of this thread, where a node below wants to know of them.
    stays: Option<Stays>,
}

/// A node on one iothread: the generic entry points, and the way to the children. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct NodeIo {
    shared: Rc<Shared>,
    index: usize,
    /// The caller is a user from outside: its requests end where the node ends. A parent may read past the end
    /// (zeroes) and, with RESIZE, write past it.
    bounded: bool,
}

impl NodeIo {
    pub(crate) fn root(view: Arc<View>, local: Local) -> NodeIo {
        let shards = view.shards();
        let mut stays = None;
        for epochs in view.nodes().iter().filter_map(|n| n.node().epochs()) {
            epochs.register(stays.get_or_insert_with(Stays::new));
        }
        NodeIo { shared: Rc::new(Shared { view, local, shards, stays }), index: 0, bounded: true }
    }

    /// The root node as its parent would use it.
    pub(crate) fn into_parent(mut self) -> NodeIo {
        self.bounded = false;
        self
    }

    /// What this thread may do.
    pub fn local(&self) -> &Local {
        &self.shared.local
    }

    /// The view this belongs to.
    pub fn view(&self) -> &Arc<View> {
        &self.shared.view
    }

    /// This thread's statistics shards for the view; the fast path accounts here.
    pub fn shards(&self) -> &Rc<ShardSet> {
        &self.shared.shards
    }

    /// Counts requests for the grace periods of nodes below ([`crate::epoch`]); `None` where no node has any. A source that
    /// calls [`View::resolve`] counts every request from before that call until its operation has ended; requests
    /// through this type are counted by it.
    #[inline]
    pub fn stays(&self) -> Option<&Stays> {
        self.shared.stays.as_ref()
    }

    /// Counts a request until the guard is dropped, for the grace periods of nodes below: for whoever calls
    /// [`View::resolve`] and does the operation itself.
    pub fn stay(&self) -> Option<Stay<'_>> {
        self.stays().map(Stays::stay)
    }

    /// A child by the index `OpenContext::open_child` returned. Where there is none (any more) every request on
    /// the result fails with `ENODEV`.
    pub fn child(&self, child: usize) -> NodeIo {
        let index = self.view_node().ok().and_then(|n| n.child(child)).unwrap_or(NOWHERE);
        NodeIo { shared: Rc::clone(&self.shared), index, bounded: false }
    }

    /// Whether there is a child with this index.
    pub fn has_child(&self, child: usize) -> bool {
        self.view_node().is_ok_and(|n| n.child(child).is_some())
    }

    /// The node.
    ///
    /// # Errors
    /// `ENODEV` for a child that does not exist.
    pub fn node(&self) -> Result<&Arc<Node>> {
        self.view_node().map(ViewNode::node)
    }

    /// Tells this node that its parent passes a point; only `blkdebug` listens.
    pub fn debug_event(&self, event: crate::debug::DebugEvent) {
        if let Ok(node) = self.view_node() {
            node.driver().debug_event(event);
        }
    }

    /// Its size as of now, bytes; 0 for a child that does not exist.
    pub fn size(&self) -> u64 {
        self.view_node().map_or(0, |n| n.driver().size())
    }

    /// The driver's own limits.
    pub fn limits(&self) -> Limits {
        self.view_node().map(|n| *n.limits()).unwrap_or_default()
    }

    fn view_node(&self) -> Result<&ViewNode> {
        self.shared.view.nodes().get(self.index).ok_or_else(|| BlockError::errno_only(Errno::ENODEV))
    }

    /// Checks a range: never past 2^63 - 1; for users from outside never past the end of the node.
    fn check_range(&self, node: &ViewNode, offset: u64, len: u64) -> Result<()> {
        let limit = if self.bounded { node.driver().size() } else { i64::MAX as u64 };
        if crate::view::in_bounds(offset, len, limit) { Ok(()) } else { Err(Errno::EIO.into()) }
    }

    /// Refuses what would move the end of the node to whoever does not hold RESIZE; `offset + len` has been checked. Whole
    /// blocks are written, so the last one counts with its length.
    fn check_growth(&self, node: &ViewNode, offset: u64, len: u64) -> Result<()> {
        if node.handle().contains(Perm::RESIZE) || len == 0 {
            return Ok(());
        }
        let end = (offset + len).next_multiple_of(u64::from(node.limits().request_alignment));
        if end > node.driver().size() { Err(Errno::EPERM.into()) } else { Ok(()) }
    }

    /// Runs a request and notes how it went.
    async fn accounted(&self, op: Op, bytes: u64, request: impl Future<Output = Result<()>>) -> Result<()> {
        let _stay = self.stay();
        let start = self.shared.local.now();
        let result = request.await;
        let now = self.shared.local.now();
        self.shared.shards.tick(now);
        self.shared.shards.account_node(self.index, op, bytes, now.saturating_sub(start), result.is_ok());
        result
    }

    /// Fills `bufs` from `offset`.
    ///
    /// # Errors
    /// `EIO` out of bounds, `ENODEV` without a node, what the driver says.
    pub async fn read(&self, offset: u64, bufs: &IoVecs) -> Result<()> {
        self.accounted(Op::Read, bufs.len() as u64, self.read_unaccounted(offset, bufs)).await
    }

    /// Writes `bufs` at `offset`.
    ///
    /// # Errors
    /// `EPERM` on a read-only node and where this handle does not hold the permission: WRITE, or WRITE_UNCHANGED for
    /// [`WriteFlags::UNCHANGED`](crate::driver::WriteFlags::UNCHANGED), and RESIZE for what moves the end. `EIO` out of
    /// bounds, what the driver says.
    pub async fn write(&self, offset: u64, bufs: &IoVecs, flags: crate::driver::WriteFlags) -> Result<()> {
        let len = bufs.len() as u64;
        let result = self.accounted(Op::Write, len, self.write_unaccounted(offset, bufs, flags)).await;
        if !flags.contains(crate::driver::WriteFlags::UNCHANGED) {
            self.note_change(offset, len);
        }
        if result.is_ok() {
            self.shared.shards.note_write_end(self.index, offset + len);
        }
        result
    }

    /// Makes a range read as zeroes: by the driver where it can, by writing zeroes where it cannot.
    ///
    /// # Errors
    /// As [`NodeIo::write`]; `ENOTSUP` with NO_FALLBACK.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: crate::driver::ZeroFlags) -> Result<()> {
        let result =
            self.accounted(Op::WriteZeroes, len, self.write_zeroes_unaccounted(offset, len, flags)).await;
        self.note_change(offset, len);
        if result.is_ok() {
            self.shared.shards.note_write_end(self.index, offset.saturating_add(len));
        }
        result
    }

    /// Marks what has changed in the node's bitmaps; also after a failure, which may have changed a part.
    fn note_change(&self, offset: u64, len: u64) {
        if let Ok(node) = self.view_node() {
            node.node().bitmaps().note_change(offset, len, node.driver().size());
        }
    }

    /// Gives a range up. Succeeds and does nothing where discards are ignored or unknown.
    ///
    /// # Errors
    /// As [`NodeIo::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let result = self.accounted(Op::Discard, len, self.discard_unaccounted(offset, len)).await;
        self.note_change(offset, len);
        result
    }

    /// Makes everything completed before durable. Once a protocol node has failed to, it keeps failing: what the
    /// kernel dropped is not on disk, whatever the next call says.
    ///
    /// # Errors
    /// What the driver says.
    pub async fn flush(&self) -> Result<()> {
        self.accounted(Op::Flush, 0, self.flush_unaccounted()).await
    }
}

#[cfg(test)]
mod tests;
