//! Limits the process sets for itself.
//!
//! Called once by `main.rs`, before descriptors are opened in numbers. Assumes nothing about cores or memory.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most descriptors asked for. Far above any use (a disk needs two per queue and one per file), and low enough that
/// the kernel's table for them stays small.
pub const MAX_DESCRIPTORS: u64 = 1 << 20;

/// What [`raise_nofile`] found and left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// The soft limit before.
    pub before: u64,
    /// The soft limit now.
    pub now: u64,
}

/// Raises the soft limit of open descriptors to the hard one, at most to [`MAX_DESCRIPTORS`]; never lowers it.
/// The usual soft limit of 1024 is for programs that use select(2), which nothing here does.
///
/// # Errors
///
/// The kernel refuses, as a sandbox may. Start-up may go on with the limit as it is.
pub fn raise_nofile() -> io::Result<Descriptors> {
    let limit = getrlimit(Resource::Nofile);
    let (before, now) = wanted(limit);
    if now > before {
        setrlimit(Resource::Nofile, Rlimit { current: Some(now), maximum: limit.maximum })?;
    }
    Ok(Descriptors { before, now })
}

/// Soft limit as it is and as it should be; `None` is "no limit".
fn wanted(limit: Rlimit) -> (u64, u64) {
    let before = limit.current.unwrap_or(u64::MAX);
    let goal = limit.maximum.unwrap_or(u64::MAX).min(MAX_DESCRIPTORS);
    (before, goal.max(before))
}

#[cfg(test)]
mod tests;
