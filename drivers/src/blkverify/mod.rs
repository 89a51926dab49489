//! `blkverify`: does everything twice and compares, to find what is wrong with a format driver.
//!
//! `test` is what is under suspicion, `raw` holds what it should. Reads ask both and compare data and success; writes go to
//! both. QEMU ends its process when they differ; here the request fails with `EIO` and the log says where.
//!
//! As in `quorum`, requests that overlap are carried out one after the other and written data is copied once, so that a
//! difference is the fault of a child and not of two requests that met, nor of a guest that changed its memory meanwhile.
//!
//! Called by the graph; must not reach anything but its children.

use std::sync::Arc;

use graph::{DriverDef, DriverKind};
use host::sync::Ranges;

use crate::child_size::ChildSize;

mod io;
mod open;
mod options;
#[cfg(test)]
mod tests;

use options::BlkverifyOptions;

/// Index of the child that is right.
const RAW: usize = 0;
/// Index of the child that is tested.
const TEST: usize = 1;
/// Longest piece of a request, bytes: each needs two buffers.
const PIECE: usize = 1 << 20;

/// `blkverify`.
pub(crate) const BLKVERIFY: DriverDef = DriverDef {
    name: "blkverify",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(BlkverifyOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A blkverify node, as the graph has it.
struct BlkverifyNode(Arc<Blkverify>);

/// A blkverify node, as its requests have it: those that change something go on when nobody waits for them.
struct Blkverify {
    /// What messages of the log call it.
    name: String,
    /// Of `test`, as in QEMU.
    size: ChildSize,
    read_only: bool,
    /// Requests under way: writes alone, reads together.
    ranges: Ranges,
}
