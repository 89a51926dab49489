//! A range that nobody else writes for a while: for reading what shows through a node and writing it into the node.
//!
//! Called by drivers for their children (`copy-on-read`). Writes that take the fast path are not held back: they go only to
//! space that the node has already, or to ranges that nothing shows through (see `Driver::map`), and neither may be filled.

use host::IoVecs;

use super::NodeIo;
use crate::driver::{Op, WriteFlags, ZeroFlags};
use crate::error::{Errno, Result};
use crate::io::tracked::Token;
use crate::view::ViewNode;

/// As long as it lives, writes of others to the range wait.
#[must_use = "others go on when it is dropped"]
pub struct Exclusive<'a> {
    io: &'a NodeIo,
    node: &'a ViewNode,
    start: u64,
    end: u64,
    _token: Token<'a>,
}

impl NodeIo {
    /// Waits for the writes that touch a range, and holds back those that come.
    ///
    /// # Errors
    /// `EPERM` on a read-only node, `EIO` for a range past 2^63.
    pub async fn exclusive(&self, offset: u64, len: u64) -> Result<Exclusive<'_>> {
        let node = self.view_node()?;
        if node.refuses(Op::Write) {
            return Err(Errno::EPERM.into());
        }
        self.check_range(node, offset, len)?;
        let token = self.track(node, offset, len, true).await;
        Ok(Exclusive { io: self, node, start: offset, end: offset + len, _token: token })
    }
}

impl Exclusive<'_> {
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let inside = offset >= self.start
            && len <= self.end - self.start
            && offset - self.start <= self.end - self.start - len;
        if inside { Ok(()) } else { Err(Errno::EINVAL.into()) }
    }

    /// Writes what can be read there already.
    ///
    /// # Errors
    /// What the driver says; `EINVAL` outside of the range.
    pub async fn fill(&self, offset: u64, bufs: &IoVecs) -> Result<()> {
        self.check(offset, bufs.len() as u64)?;
        self.io.write_tracked(self.node, offset, bufs, WriteFlags::UNCHANGED).await
    }

    /// The same for what reads as zeroes.
    ///
    /// # Errors
    /// As [`Exclusive::fill`].
    pub async fn fill_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        self.io.zero_tracked(self.node, offset, len, ZeroFlags::empty()).await
    }
}
