//! `compress`: lets its child compress everything that is written to it.
//!
//! Called by the graph. Must not reach anything but its child; never compresses itself.

use graph::{DriverDef, DriverKind};

mod io;
mod open;
mod options;
#[cfg(test)]
mod tests;

use crate::filter::Shown;
use options::CompressOptions;

/// `compress`.
pub(crate) const COMPRESS: DriverDef = DriverDef {
    name: "compress",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(CompressOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A compress node.
struct Compress {
    child: Shown,
}
