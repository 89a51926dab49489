//! Tests of the waiting primitives.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
