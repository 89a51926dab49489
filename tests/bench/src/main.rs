//! `ringblk-bench`: drives vhost-user-blk backends and compares ringblk with qemu-storage-daemon and fio.
//!
//! Started by people and by continuous integration. It prints figures and never judges by exit status how fast
//! something was; it fails only when something did not work. All driving happens on one thread.

#![forbid(unsafe_code)]

mod compare;
mod drive;
mod fio;
mod histogram;
mod host;
mod image;
mod peers;
mod probe;
mod report;
mod selftest;
mod workload;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Errors end the program, so their text is all that matters.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
#[command(name = "ringblk-bench", version, about = "Benchmarks of vhost-user-blk backends")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drive one backend that is already running.
    Drive(drive::Arguments),
    /// Run ringblk, qemu-storage-daemon and fio in turn over a list of workloads.
    Compare(compare::Arguments),
    /// Memory, threads and processor time of a backend that is connected and has nothing to do.
    Idle(probe::IdleArguments),
    /// Time from exec to the first vhost-user reply.
    Start(probe::StartArguments),
    /// Connect, set up, stop, disconnect, many times; what is left behind.
    Connect(probe::ConnectArguments),
    /// How fast the front end itself is, against a device in this process that does nothing.
    Selftest(selftest::Arguments),
}

/// Prints a line; the benchmark has no logger and its output is the result.
pub fn say(line: impl std::fmt::Display) {
    // A closed pipe (`| head`) is no reason to fail.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Drive(arguments) => drive::main(&arguments),
        Command::Compare(arguments) => compare::main(&arguments),
        Command::Idle(arguments) => probe::idle(&arguments),
        Command::Start(arguments) => probe::start(&arguments),
        Command::Connect(arguments) => probe::connect(&arguments),
        Command::Selftest(arguments) => selftest::main(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ringblk-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
