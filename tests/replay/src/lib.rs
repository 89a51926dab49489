//! Crash states: what a power loss or a killed process may leave of an image, made by the thousand and judged one by one.
//!
//! ```text
//! workload ──► node under test ──► disk (files in memory, every change logged)
//!    │                               │
//!    ▼ history of requests           ▼ log
//!  oracle ◄── judge ◄── states: every legal crash
//! ```
//!
//! | part | |
//! |---|---|
//! | [`disk`], [`image`] | files in memory behind a driver named `file`; operations overtake each other by a seed's choosing |
//! | [`states`] | from the log to the states: prefixes, subsets between barriers, torn sectors, several files |
//! | [`oracle`], [`stamp`] | which content each sector may have, given what was acknowledged and flushed |
//! | [`reference`] | a second opinion on qcow2 images, sharing no code with the driver |
//! | [`judge`] | one state: checks, content, snapshots, then opened, written to, closed, checked again |
//! | [`qemu`] | QEMU's tools as a further judge |
//! | [`workload`], [`scenario`] | what runs, on which sort of image |
//!
//! Called by its own tests alone. Everything random comes from a seed, which each message shows.

#![forbid(unsafe_code)]

pub mod disk;
pub mod image;
pub mod judge;
pub mod oracle;
pub mod qemu;
pub mod reference;
pub mod rig;
pub mod scenario;
pub mod stamp;
pub mod states;
pub mod workload;

/// The words of an error, for results that are read by humans alone.
pub fn words(e: impl std::fmt::Display) -> String {
    e.to_string()
}
