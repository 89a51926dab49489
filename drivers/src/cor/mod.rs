//! `copy-on-read`: what is read from below an image is written into it, so that it need not be read from there again.
//!
//! Called by the graph. Must not reach anything but its child, and changes nothing that anyone can see.

use graph::{DriverDef, DriverKind};

mod io;
mod open;
mod options;
#[cfg(test)]
mod tests;

use crate::filter::Shown;
use options::CopyOnReadOptions;

/// `copy-on-read`.
pub(crate) const COPY_ON_READ: DriverDef = DriverDef {
    name: "copy-on-read",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(CopyOnReadOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A copy-on-read node.
struct CopyOnRead {
    child: Shown,
    /// Name of the lowest image that is copied from; `None`: all of them.
    bottom: Option<String>,
}
