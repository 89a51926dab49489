//! The conformance suite: what every block driver must do, checked the same way for each.
//!
//! A driver's tests describe how to make and open an image ([`DriverCase`]) and call [`run`]; the suite opens the node in
//! a graph of its own and drives it as exports and jobs do, through `View::resolve` *and* through `NodeIo`, against a model
//! of the bytes. It must not know any driver, and must not use anything an export could not use.
//!
//! | part | what it holds the driver to | runs on |
//! |---|---|---|
//! | [`data`] | ranges, zeroes, discards, ends, block status, random mixes, overlap-free concurrency | iothreads with io_uring, iothreads with worker threads, the simulated host |
//! | [`control`] | reopening, read-only, permissions, resizing, statistics, drain under load, dropped requests, two iothreads | iothreads |
//!
//! Everything random comes from a seed, which each message shows; `RINGBLK_SEED=n` replays one.

#![forbid(unsafe_code)]

pub mod case;
pub mod control;
pub mod data;
pub mod model;
pub mod request;
pub mod rng;
pub mod session;
mod sources;

pub use case::{Content, Discarded, DriverCase};

use host::Engine;

/// What a check says: nothing, or what went wrong.
pub type Check = Result<(), String>;

/// Ends a check with a message unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($holds:expr, $($words:tt)+) => {
        if !$holds {
            return Err(format!($($words)+));
        }
    };
}

/// Seeds of a run: the one of `RINGBLK_SEED`, or two.
pub fn seeds() -> Vec<u64> {
    match std::env::var("RINGBLK_SEED").ok().and_then(|s| s.parse().ok()) {
        Some(seed) => vec![seed],
        None => vec![1, 2],
    }
}

/// Runs the suite on iothreads of every engine the kernel has.
///
/// # Errors
/// The first thing that is not as it must be, with the part, the engine and the seed.
pub fn run(case: &DriverCase) -> Check {
    for engine in [Engine::IoUring, Engine::Threads] {
        if engine == Engine::IoUring && !session::has_io_uring() {
            continue;
        }
        for seed in seeds() {
            let context = |part: &str, e: String| {
                format!("{}: {part}: {e} (engine {engine:?}, RINGBLK_SEED={seed})", case.name)
            };
            for (part, check) in data::PARTS {
                session::data_part(case, engine, seed, *check).map_err(|e| context(part, e))?;
            }
            for (part, check) in control::PARTS {
                check(case, engine, seed).map_err(|e| context(part, e))?;
            }
        }
    }
    Ok(())
}
