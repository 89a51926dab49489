//! `quorum`: the same data in several children, of which a number has to agree.
//!
//! Writes go to all children; reads ask all of them and take the content most of them have, or (`fifo`) ask one after the
//! other until one answers. Children that fail or say something else are reported; a request fails when fewer than
//! `vote-threshold` of them succeed and agree.
//!
//! Stronger than QEMU's in three ways, each for data that was acknowledged: requests that overlap are carried out one after
//! the other ([`host::sync::Ranges`]), so that children cannot drift apart and a read cannot catch them in between; data is
//! copied once before it is written, so that a guest that changes it meanwhile cannot make children differ; and a `fifo`
//! quorum does not read from a child that has failed a write. A mismatch with `blkverify` is an error, not the end of the
//! process.
//!
//! | file | subject |
//! |---|---|
//! | `options.rs`, `open.rs` | opening |
//! | `members.rs` | the children, as they come and go |
//! | `vote.rs` | counting votes |
//! | `io.rs` | requests |
//!
//! Called by the graph; must not reach anything but its children.

use std::sync::Arc;

use graph::{DriverDef, DriverKind, NodeEvents};
use host::sync::Ranges;

mod io;
mod members;
mod open;
mod options;
#[cfg(test)]
mod tests;
mod vote;

use members::Members;
use options::{QuorumOptions, ReadPattern};

/// Most children.
const MAX_CHILDREN: usize = 64;
/// Memory for the data of one request, bytes: shared out among the children that are asked at the same time.
const BUDGET: usize = 4 << 20;
/// Longest piece of a request, bytes.
const MAX_PIECE: usize = 1 << 20;

/// `quorum`.
pub(crate) const QUORUM: DriverDef = DriverDef {
    name: "quorum",
    // Not a filter: no child speaks for it.
    kind: DriverKind::Format,
    schema: || schemars::schema_for!(QuorumOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A quorum node, as the graph has it.
struct QuorumNode(Arc<Quorum>);

/// A quorum node, as its requests have it: those that change something go on when nobody waits for them.
struct Quorum {
    /// What messages of the log call it.
    name: String,
    /// Bytes: its children's when it was opened. They cannot change it while they are used here.
    size: u64,
    members: Members,
    /// How many must succeed and agree.
    threshold: usize,
    pattern: ReadPattern,
    /// All must agree, and it is the user's wish to hear of it otherwise.
    blkverify: bool,
    /// What was outvoted is written anew.
    rewrite: bool,
    events: Arc<NodeEvents>,
    /// Requests under way: writes alone, reads that compare together.
    ranges: Ranges,
}
