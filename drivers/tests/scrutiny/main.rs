//! Drivers that look at what passes: quorum, blkverify, blkdebug, blklogwrites. Through the conformance suite, against
//! images that were tampered with, and beside QEMU's drivers of the same names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod conforming;
mod debug;
mod logwrites;
mod quorum;
mod table;
mod verify;
