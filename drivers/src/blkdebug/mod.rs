//! `blkdebug`: fails requests on purpose, and has limits on purpose, to test what is above it.
//!
//! Rules say which requests fail once which point was passed by the node above (`DebugEvent`) and in which state; other
//! rules change the state. What it fails never reaches the child.
//!
//! **Which way requests take.** A node without rules forwards what it is asked (`map`) and costs nothing. As long as there
//! are rules it answers "drive": the whole request then takes the asynchronous path from the top, where formats tell their
//! points (`read_aio`, `write_aio` and so on) just before they reach down to here.
//!
//! | file | subject |
//! |---|---|
//! | `options.rs`, `open.rs`, `reopen.rs` | opening and reopening |
//! | `config.rs` | the configuration file |
//! | `rules.rs` | rules, state, and which request fails |
//! | `io.rs` | requests |
//!
//! Called by the graph; must not reach anything but its child.

use graph::{DriverDef, DriverKind, Limits, Perm};

use crate::child_size::ChildSize;

mod config;
mod io;
mod open;
mod options;
mod reopen;
mod rules;
#[cfg(test)]
mod tests;

use options::BlkdebugOptions;
use rules::Rules;

/// Index of the only child.
const IMAGE: usize = 0;

/// `blkdebug`.
pub(crate) const BLKDEBUG: DriverDef = DriverDef {
    name: "blkdebug",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(BlkdebugOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A blkdebug node.
struct Blkdebug {
    rules: Rules,
    limits: Limits,
    /// Taken on the child besides what users mean for it.
    take: Perm,
    /// Not shared on the child, whatever users share.
    unshare: Perm,
    size: ChildSize,
}
