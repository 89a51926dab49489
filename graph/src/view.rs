//! What an iothread knows of the graph: an immutable snapshot of everything below one root, and the question it
//! answers for every request ([`View::resolve`], the hot path).
//!
//! Built by the main thread, exchanged only inside a drained section (`RequestSource::resume`). Holds its nodes alive; a
//! source gives its old view back when it takes the new one. Must not lock, allocate or count references in `resolve`.

use std::rc::Rc;
use std::sync::Arc;

use host::{File, Local};

use crate::driver::{Driver, Limits, Map, Op};
use crate::error::Errno;
use crate::io::NodeIo;
use crate::node::Node;
use crate::options::{DetectZeroes, DiscardOption, NodeOptions};
use crate::perm::Perm;
use crate::stats::ShardSet;

/// Longest way [`View::resolve`] follows; a longer one is driven.
pub const MAX_HOPS: usize = 64;

/// Most nodes a path remembers.
pub const PATH_NODES: usize = 8;

/// No child in this slot.
const NO_CHILD: u32 = u32::MAX;

/// The nodes a resolved request passed, as indexes into the view: for statistics. On a way of more than [`PATH_NODES`]
/// nodes the first seven and the last one are remembered; what lies between is not counted for that request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    len: u8,
    nodes: [u16; PATH_NODES],
}

impl Path {
    /// The path of a request that is accounted at the root alone.
    pub const ROOT: Path = Path { len: 1, nodes: [0; PATH_NODES] };

    /// Notes the node at `hop`; the length is set once at the end, which keeps it out of memory on the way.
    #[inline]
    fn note(&mut self, hop: usize, index: usize) {
        self.nodes[hop.min(PATH_NODES - 1)] = index as u16;
    }

    #[inline]
    fn ended(mut self, hop: usize) -> Path {
        self.len = hop.min(PATH_NODES - 1) as u8 + 1;
        self
    }

    /// Indexes into the view, the root first.
    #[inline]
    pub fn nodes(&self) -> &[u16] {
        self.nodes.get(..usize::from(self.len)).unwrap_or(&[])
    }
}

/// Where a whole request goes.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// One operation on a host file at this offset.
    File {
        /// The file.
        file: &'a Arc<File>,
        /// Bytes.
        offset: u64,
    },
    /// The range reads as zeroes.
    Zero,
    /// Nothing to do; a read leaves the buffer as it is.
    Done,
    /// Run it through [`NodeIo`].
    Drive,
    /// It fails.
    Error(Errno),
}

impl std::fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::File { offset, .. } => write!(f, "File at {offset}"),
            Target::Zero => f.write_str("Zero"),
            Target::Done => f.write_str("Done"),
            Target::Drive => f.write_str("Drive"),
            Target::Error(errno) => write!(f, "Error({errno})"),
        }
    }
}

/// Answer of [`View::resolve`].
#[derive(Clone, Copy, Debug)]
pub struct Resolved<'a> {
    /// Where the request goes.
    pub target: Target<'a>,
    /// Which nodes it passed; of no use with [`Target::Drive`], which accounts for itself.
    pub path: Path,
}

/// A node as one view sees it *through one handle*: what a user of the handle may do is part of it, so that whoever
/// reaches the node this way cannot do more. A node that is reached by edges with different permissions is there once for
/// each. What `resolve` reads comes first, in one cache line.
#[repr(C, align(64))]
pub struct ViewNode {
    driver: Arc<dyn Driver>,
    /// `request_alignment - 1`.
    align_mask: u64,
    /// Longest transfer, `u64::MAX` for none.
    max_transfer: u64,
    /// Kinds that are not simply offered to the driver.
    gate: u8,
    /// The first two children: nearly every way goes through them.
    first: [u32; 2],
    // Up to here: the hot part.
    refuse: u8,
    ignore: u8,
    /// What the edges (or the root) that lead here hold, as far as it changes anything.
    handle: Perm,
    limits: Limits,
    options: NodeOptions,
    children: Box<[u32]>,
    node: Arc<Node>,
}

impl ViewNode {
    /// `may_misalign`: some user sends this node requests below its alignment (see `io::tracked`). `handle`: what whoever
    /// comes this way holds on the node.
    pub(crate) fn new(node: Arc<Node>, children: Box<[u32]>, may_misalign: bool, handle: Perm) -> ViewNode {
        let options = node.options();
        let driver = node.driver();
        let limits = driver.limits().sane();
        let modifying = Op::Write.bit() | Op::WriteZeroes.bit() | Op::Discard.bit();
        // The permission costs requests nothing: it is one more reason for a bit that they look at anyway.
        let handle = if options.refuses_writes() { Perm::NONE } else { handle & Perm::MODIFIES };
        let refuse = if handle.contains(Perm::WRITE) { 0 } else { modifying };
        let mut ignore = 0;
        if options.discard == DiscardOption::Ignore {
            ignore |= Op::Discard.bit();
        }
        if options.no_flush {
            ignore |= Op::Flush.bit();
        }
        let mut drive = 0;
        if options.detect_zeroes != DetectZeroes::Off {
            drive |= Op::Write.bit();
        }
        // Marked where the change ends, in `io`.
        if may_misalign || node.bitmaps().recording() {
            drive |= modifying;
        }
        // Long or misaligned zeroing and discarding is cut up by rules of its own in `io`.
        if limits.max_write_zeroes != 0 || limits.write_zeroes_alignment > limits.request_alignment {
            drive |= Op::WriteZeroes.bit();
        }
        if limits.max_discard != 0 || limits.discard_alignment > limits.request_alignment {
            drive |= Op::Discard.bit();
        }
        let child = |i: usize| children.get(i).copied().unwrap_or(NO_CHILD);
        ViewNode {
            driver,
            gate: refuse | ignore | drive,
            align_mask: u64::from(limits.request_alignment) - 1,
            max_transfer: if limits.max_transfer == 0 { u64::MAX } else { limits.max_transfer },
            first: [child(0), child(1)],
            refuse,
            ignore,
            handle,
            limits,
            options,
            children,
            node,
        }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its driver, as long as this view is in use.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Its driver's limits, made sane.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The view index of a child.
    #[inline]
    pub fn child(&self, child: usize) -> Option<usize> {
        let index = match child {
            0 | 1 => self.first[child],
            _ => self.children.get(child).copied().unwrap_or(NO_CHILD),
        };
        (index != NO_CHILD).then_some(index as usize)
    }

    /// The options the node runs with as long as this view is in use.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// Child slots, empty ones included.
    pub fn child_slots(&self) -> usize {
        self.children.len()
    }

    /// How a user of this handle may change the node: not at all if it is read-only. Reading is open to everyone.
    pub fn handle(&self) -> Perm {
        self.handle
    }

    pub(crate) fn refuses(&self, op: Op) -> bool {
        self.refuse & op.bit() != 0
    }

    pub(crate) fn ignores(&self, op: Op) -> bool {
        self.ignore & op.bit() != 0
    }
}

/// Snapshot of everything reachable from one root.
pub struct View {
    nodes: Box<[ViewNode]>,
    limits: Limits,
}

impl View {
    /// `nodes[0]` is the root; every child comes after all its parents.
    pub(crate) fn new(nodes: Box<[ViewNode]>) -> View {
        // Children first, so that every node's limits are complete when its parents ask.
        let mut all: Vec<Limits> = nodes.iter().map(|n| n.limits).collect();
        for at in (0..nodes.len()).rev() {
            for slot in 0..nodes[at].child_slots() {
                if let Some(child) = nodes[at].child(slot).filter(|c| *c > at) {
                    all[at] = all[at].above(all[child]);
                }
            }
        }
        let limits = all.first().copied().unwrap_or_default();
        View { nodes, limits }
    }

    /// The root node.
    pub fn root(&self) -> &Arc<Node> {
        &self.nodes[0].node
    }

    /// All nodes, the root first.
    pub fn nodes(&self) -> &[ViewNode] {
        &self.nodes
    }

    /// Size of the root as of now, bytes.
    pub fn size(&self) -> u64 {
        self.nodes[0].driver.size()
    }

    /// Whether the root refuses writes: because of the node, or because its user does not hold the permission.
    pub fn read_only(&self) -> bool {
        self.nodes[0].refuses(Op::Write)
    }

    /// Limits of the root together with everything below. A source that uses the fast path looks after
    /// `mem_alignment` and `max_iov` itself, since `resolve` does not see the buffers.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Follows `map` down to a file (reads, writes, flushes), zero or done for the *whole* range. Allocates nothing, takes no lock, counts no
    /// reference. A range outside the root is `EIO`. `len` may be 0 for [`Op::Flush`] alone.
    #[inline]
    pub fn resolve(&self, op: Op, offset: u64, len: u64) -> Resolved<'_> {
        let mut path = Path::ROOT;
        let Some(mut node) = self.nodes.first() else {
            return Resolved { target: Target::Error(Errno::EIO), path };
        };
        if op != Op::Flush && !in_bounds(offset, len, node.driver.size()) {
            return Resolved { target: Target::Error(Errno::EIO), path };
        }
        let mut offset = offset;
        for hop in 0..MAX_HOPS {
            if node.gate & op.bit() != 0 {
                return Resolved { target: gated(node, op), path: path.ended(hop) };
            }
            if (offset | len) & node.align_mask != 0 || len > node.max_transfer {
                break;
            }
            if op == Op::Flush
                && let Some(errno) = node.node.flush_error()
            {
                return Resolved { target: Target::Error(errno), path: path.ended(hop) };
            }
            let target = match node.driver.map(op, offset, len) {
                Map::Child { child, offset: at, len: part } if part >= len => {
                    let Some(index) = node.child(child) else { break };
                    let Some(next) = self.nodes.get(index) else { break };
                    path.note(hop + 1, index);
                    node = next;
                    offset = at;
                    continue;
                }
                // Zeroing and discarding a file is not one read or write.
                Map::File { .. } if matches!(op, Op::WriteZeroes | Op::Discard) => break,
                Map::File { file, offset, len: part } if part >= len => Target::File { file, offset },
                Map::Zero { len: part } if part >= len && op == Op::Read => Target::Zero,
                Map::Done { len: part } if part >= len => Target::Done,
                Map::Error(errno) => Target::Error(errno),
                _ => break,
            };
            return Resolved { target, path: path.ended(hop) };
        }
        Resolved { target: Target::Drive, path }
    }

    /// Remembers a flush that failed on the fast path at the end of `path`: every further flush through that node fails.
    pub fn note_flush_error(&self, path: &Path, errno: Errno) {
        let last = path.nodes().last().and_then(|i| self.nodes.get(usize::from(*i)));
        if let Some(node) = last {
            node.node.note_flush_error(errno);
        }
    }

    /// The root for the asynchronous path on the calling iothread, with statistics shards of its own. A source makes one
    /// per view and clones it for its requests.
    pub fn io(self: &Arc<Self>, local: &Local) -> NodeIo {
        NodeIo::root(Arc::clone(self), local.clone())
    }

    pub(crate) fn shards(&self) -> Rc<ShardSet> {
        Rc::new(ShardSet::new(self.nodes.iter().map(|n| Arc::clone(&n.node))))
    }
}

/// Whether a range lies in `0..size`.
#[inline]
pub(crate) fn in_bounds(offset: u64, len: u64, size: u64) -> bool {
    len <= size && offset <= size - len
}

/// The rare answers kept off the hot path.
#[cold]
fn gated(node: &ViewNode, op: Op) -> Target<'static> {
    if node.refuses(op) {
        Target::Error(Errno::EPERM)
    } else if node.ignores(op) {
        Target::Done
    } else {
        Target::Drive
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
