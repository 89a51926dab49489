//! Tests of the io_uring reactor.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
