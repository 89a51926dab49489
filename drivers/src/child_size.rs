//! The size of the child a filter takes its own size from, as of the last we heard.
//!
//! Used by filters; no driver. Growing goes through the filter, which looks again then; everything else is told by
//! `Driver::child_changed`.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use graph::{Node, NodeIo, Op};

/// See above. Readers (Acquire) pair with the stores here (Release): a size is seen after what made it so.
pub(crate) struct ChildSize(AtomicU64);

impl ChildSize {
    /// As it is, bytes.
    pub(crate) fn new(size: u64) -> ChildSize {
        ChildSize(size.into())
    }

    /// Bytes.
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Acquire)
    }

    /// Whether a request makes the child larger, so that it must pass through [`ChildSize::note`].
    #[inline]
    pub(crate) fn grows(&self, op: Op, offset: u64, len: u64) -> bool {
        op.modifies() && offset.saturating_add(len) > self.get()
    }

    /// After a change up to `end` that succeeded.
    pub(crate) fn note(&self, child: &NodeIo, end: u64) {
        if end > self.get() {
            self.0.fetch_max(child.size(), AcqRel);
        }
    }

    /// After a change of size.
    pub(crate) fn look(&self, child: &NodeIo) {
        self.0.store(child.size(), Release);
    }

    /// The graph says so.
    pub(crate) fn told(&self, child: Option<&Arc<Node>>) {
        self.0.store(child.map_or(0, |node| node.size()), Release);
    }
}
