//! Reopening nodes: see the head of the module above.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
