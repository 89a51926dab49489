//! `blklogwrites`: passes everything on and writes down, in a second node, what changed and in which order, in the format of
//! Linux's dm-log-writes, so that its replay tools can bring a disk to any point in between.
//!
//! | file | subject |
//! |---|---|
//! | `format.rs` | superblock and entries on disk |
//! | `open.rs`, `options.rs` | opening; finding the end of a log that goes on |
//! | `log.rs` | the log: places for entries, the superblock |
//! | `io.rs` | requests |
//!
//! The order of the log is an order that explains the disk: changes that overlap are carried out one after the other, and
//! logged in that order; a flush has its place before what was not completed when it began.
//!
//! Called by the graph; must not reach anything but its children.

use std::sync::Arc;

use graph::{DriverDef, DriverKind};
use host::sync::Ranges;

use crate::child_size::ChildSize;

mod format;
mod io;
mod log;
mod open;
mod options;
#[cfg(test)]
mod tests;

use log::Log;
use options::BlklogwritesOptions;

/// Index of the child with the data.
const FILE: usize = 0;
/// Index of the child with the log.
const LOG: usize = 1;
/// Longest piece of a write with an entry of its own, bytes.
const PIECE: usize = 1 << 20;

/// `blklogwrites`.
pub(crate) const BLKLOGWRITES: DriverDef = DriverDef {
    name: "blklogwrites",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(BlklogwritesOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A blklogwrites node, as the graph has it.
struct BlklogwritesNode(Arc<Blklogwrites>);

/// A blklogwrites node, as its requests have it: those that change something go on when nobody waits for them.
struct Blklogwrites {
    log: Log,
    size: ChildSize,
    read_only: bool,
    /// Changes under way.
    ranges: Ranges,
}
