//! Names and numbers of nodes and edges.
//!
//! Numbers are never used twice in the life of a process, so that a stale one finds nothing rather than a stranger.

use crate::error::{BlockError, Errno, Result};

/// Longest node name, bytes.
pub const MAX_NODE_NAME: usize = 31;

/// A node's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u64);

impl NodeId {
    /// The number as the queries show it.
    pub fn raw(self) -> u64 {
        self.0
    }
}

/// An edge's number. The edge of a [`crate::RootOptions`] user is called a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EdgeId(pub(crate) u64);

impl EdgeId {
    /// The number as the queries show it.
    pub fn raw(self) -> u64 {
        self.0
    }
}

/// Whether a user may give a node this name: 1 to 31 of `A-Z a-z 0-9 - . _`, a letter first.
///
/// # Errors
/// `EINVAL` in QEMU's words.
pub fn check_node_name(name: &str) -> Result<()> {
    let mut chars = name.bytes();
    let well_formed = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'));
    if !well_formed {
        return Err(BlockError::new(Errno::EINVAL, format!("Invalid node-name: '{name}'")));
    }
    if name.len() > MAX_NODE_NAME {
        return Err(BlockError::new(Errno::EINVAL, "Node name too long"));
    }
    Ok(())
}
