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

use data::Setting;
use host::Engine;
use host::sim::{Event, Faults};
use rng::Rng;

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

/// Runs the suite: on iothreads of every engine the kernel has, and on the simulated host.
///
/// # Errors
/// The first thing that is not as it must be, with the part, the engine and the seed.
pub fn run(case: &DriverCase) -> Check {
    run_on_iothreads(case)?;
    run_simulated(case)
}

/// The part of [`run`] with real iothreads.
///
/// # Errors
/// As there.
pub fn run_on_iothreads(case: &DriverCase) -> Check {
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

/// Operations that are late, reordered, short and interrupted. Not refused for the moment (`EAGAIN`): the simulation bounds
/// refusals in a row for the disk, not for one operation, so that with many in flight one may meet more than the host bears.
fn rough() -> Faults {
    Faults { eagain: 0, ..Faults::rough() }
}

/// One operation in thirty fails, each time for another reason.
fn failing(seed: u64) -> Faults {
    /// `EIO`, `ENOSPC`, `EOPNOTSUPP`.
    const REASONS: [i32; 3] = [5, 28, 95];
    let mut rng = Rng::new(seed ^ 0xfa11);
    let fail = move |_: &Event| rng.one_in(30).then(|| REASONS[rng.below(3) as usize]);
    Faults { fail: Some(Box::new(fail)), ..rough() }
}

/// The part of [`run`] on the simulated host: once with operations that are late, short and interrupted, where
/// everything must come out right all the same; once with errors, where nothing may change but what failed.
///
/// # Errors
/// As [`run`].
pub fn run_simulated(case: &DriverCase) -> Check {
    for seed in seeds() {
        for (part, check) in data::PARTS {
            let simulate = |what: &str, faults: Faults, errors: bool| {
                session::simulated_part(case, Setting::new(case, seed, errors), faults, *check).map_err(|e| {
                    format!("{}: {part}: {e} (simulated, {what}, RINGBLK_SEED={seed})", case.name)
                })
            };
            simulate("rough", rough(), false)?;
            simulate("failing", failing(seed), true)?;
        }
    }
    Ok(())
}
