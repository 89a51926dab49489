//! What the scenarios share: a daemon with exports and a control channel, images, patterns, and the count of what the
//! daemon holds.
//!
//! Called by the integration tests under `tests/`. The daemon is a child process, the binary that `RINGBLK` names or
//! the one of this workspace's target folder. Everything here panics with the daemon's own words when a step fails: it
//! is test code, and must not be linked into anything else.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod bare;
pub mod hostile;
pub mod image;
pub mod neighbour;
pub mod rig;
pub mod rng;
pub mod surgeon;

pub use bare::Bare;
pub use image::{pattern, read_at};
pub use neighbour::Neighbour;
pub use rig::{Holdings, Rig, Wanted};
pub use rng::Rng;
