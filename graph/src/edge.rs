//! Edges: who uses a node, as what, with which permissions.
//!
//! Owned by the control side alone. A *root* is an edge whose parent is not a node: an export, a job, a node that is still
//! being opened.

use std::cell::Cell;
use std::rc::Rc;

use crate::drain::SourceGate;
use crate::ids::{EdgeId, NodeId};
use crate::perm::{Perm, PermPair};
use crate::role::Roles;

/// The user at the upper end of an edge.
#[derive(Clone)]
pub(crate) enum Parent {
    Node(NodeId),
    Root(Rc<RootInfo>),
}

/// What is known of a user that is not a node.
pub(crate) struct RootInfo {
    /// As messages name it: "block export 'a'".
    pub(crate) description: String,
    /// The promise of `RootOptions::granularity`.
    pub(crate) granularity: u32,
    /// Stops and resumes its requests.
    pub(crate) gate: SourceGate,
    /// Stays at its node when users are moved to another one.
    pub(crate) stay_at_node: bool,
    /// A node that is being opened holds its children by such roots; they are no users of their own.
    pub(crate) opening: bool,
    /// What it lets others do, wherever it is attached; on a node with force-share its edge shares everything.
    pub(crate) shared: Cell<Perm>,
    /// See [`WaysOut`].
    pub(crate) ways_out: WaysOut,
}

/// What the owner of a root can do about a conflict over permissions, in the imperative and without a full stop, for the end
/// of the message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaysOut {
    /// How it shares what it does not: `use share-rw=on on block export 'a'`. `None`: its end must be waited for.
    pub share: Option<String>,
    /// How it does with less: `use writable=off on block export 'a'`. `None`: it does not.
    pub need_less: Option<String>,
}

/// One edge.
#[derive(Clone)]
pub(crate) struct Edge {
    pub(crate) id: EdgeId,
    pub(crate) parent: Parent,
    pub(crate) child: NodeId,
    /// "file", "backing", "root"...
    pub(crate) name: String,
    pub(crate) roles: Roles,
    /// What it holds. Inside a transaction: what it will hold.
    pub(crate) pair: PermPair,
    /// Who says that it must neither go nor lead elsewhere, as messages name them; one entry for each freeze.
    pub(crate) frozen: Vec<Rc<str>>,
}

/// How a user that is not a node attaches to one (`Graph::attach`).
#[derive(Clone, Debug)]
pub struct RootOptions {
    /// As messages name it: `block export 'a'`.
    pub description: String,
    /// The name of the edge in messages and queries; users are "root" to their node.
    pub name: String,
    /// What the user does.
    pub perm: Perm,
    /// What it lets others do.
    pub shared: Perm,
    /// Promise: offset and length of every request of this user are multiples of this many bytes; at least 1. A
    /// virtio-blk export enforces its block size, NBD promises 1. Nodes whose alignment divides it keep their writes on
    /// the fast path.
    pub granularity: u32,
    /// The user keeps this node when others are moved to a replacement (jobs).
    pub stay_at_node: bool,
    /// What messages advise when this user stands against another one.
    pub ways_out: WaysOut,
}

impl RootOptions {
    /// A user that reads and, if `writable`, writes and shares everything: what an export is.
    pub fn new(description: impl Into<String>, writable: bool) -> RootOptions {
        let write = if writable { Perm::WRITE } else { Perm::NONE };
        RootOptions {
            description: description.into(),
            name: "root".to_owned(),
            perm: Perm::CONSISTENT_READ | write,
            shared: Perm::ALL,
            granularity: 1,
            stay_at_node: false,
            ways_out: WaysOut::default(),
        }
    }
}
