//! `preallocate`: keeps space set aside behind the end of a file that grows by writes, so that the file system has to be
//! asked once for many of them.
//!
//! Called by the graph. Must not reach anything but its child. Users see the end of the data; what lies behind it in the
//! child reads as zeroes and is cut off when the node closes, or when the graph around it changes
//! ([`graph::Driver::give_back`]).
//!
//! As long as something is set aside, the node holds WRITE and RESIZE of its child and shares neither: nobody else may put
//! data where it would be cut off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use graph::{DriverDef, DriverKind};
use host::sync::Mutex;

mod io;
mod open;
mod options;
#[cfg(test)]
mod tests;

use options::{PreallocateOptions, Steps};

/// `preallocate`.
pub(crate) const PREALLOCATE: DriverDef = DriverDef {
    name: "preallocate",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(PreallocateOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// What only whoever makes the file longer or shorter looks at.
struct Growth {
    /// The end of everything that is, or is being, written or set aside in the child, bytes; not below the end of the data.
    file_end: u64,
    /// The child has shown that it cannot set space aside: it is not asked again.
    unable: bool,
}

/// A preallocate node.
struct Preallocate {
    /// What `reopen` exchanges; a leaf.
    steps: Arc<std::sync::Mutex<Steps>>,
    /// The end of the data: the node's size, bytes. Set with Release by who changes it, which pairs with Acquire by who
    /// asks. Grows only under `growth`.
    data_end: AtomicU64,
    /// From here to the end of what is set aside everything is zero, bytes; not above `data_end`. Orderings as there.
    zero_start: AtomicU64,
    /// Whether space is set aside in the child.
    set_aside: AtomicBool,
    growth: Mutex<Growth>,
}
