//! Tests of the timer queue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
