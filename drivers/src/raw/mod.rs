//! `raw`: shows a part of its child, or all of it, as it is.
//!
//! What says "this image has no format". With an offset or a size it shows a window. Called by the graph; must not reach
//! anything but its child.

use std::sync::atomic::AtomicU64;

use graph::{CreateDef, DriverDef, DriverKind};

mod create;
mod io;
mod open;
mod options;
mod reopen;
#[cfg(test)]
mod tests;

use options::RawOptions;

/// Index of the only child.
const FILE: usize = 0;

/// `raw`.
pub(crate) const RAW: DriverDef = DriverDef {
    name: "raw",
    kind: DriverKind::Format,
    schema: || schemars::schema_for!(RawOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: Some(CreateDef {
        schema: || schemars::schema_for!(create::RawCreateOptions),
        create: |cx, value| Box::pin(create::create(cx, value)),
    }),
};

/// The part of the child that is shown.
struct Window {
    /// Where it begins in the child, bytes.
    offset: u64,
    /// How long it is; `None`: to the child's end.
    size: Option<u64>,
}

/// A raw node.
struct Raw {
    window: Window,
    /// Size of the child as of the last we heard (`child_changed`, own writes), bytes.
    file_size: AtomicU64,
}
