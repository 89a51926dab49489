//! `null-co` and its alias `null-aio`: a disk that forgets everything written to it. For measurements and tests.
//!
//! The two names are one driver: in QEMU they differ in how a request waits, and here there is one way. Called by the
//! graph; must not touch the host.

use graph::{DriverDef, DriverKind};

mod io;
mod open;
mod options;
mod reopen;
#[cfg(test)]
mod tests;

use options::NullOptions;

/// `null-co`.
pub(crate) const NULL_CO: DriverDef = DriverDef {
    name: "null-co",
    kind: DriverKind::Protocol,
    schema: || schemars::schema_for!(NullOptions),
    open: |cx, value| Box::pin(open::open("null-co", cx, value)),
    create: None,
};

/// `null-aio`.
pub(crate) const NULL_AIO: DriverDef = DriverDef {
    name: "null-aio",
    kind: DriverKind::Protocol,
    schema: || schemars::schema_for!(NullOptions),
    open: |cx, value| Box::pin(open::open("null-aio", cx, value)),
    create: None,
};

/// A null node: immutable.
struct Null {
    /// Bytes, a multiple of 512.
    size: u64,
    latency_ns: u64,
    read_zeroes: bool,
    /// What the queries show.
    filename: String,
}
