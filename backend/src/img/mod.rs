//! `ringblk img`: qemu-img's commands over the same graph, drivers and jobs that the daemon runs, in one short process.
//!
//! Called by `main.rs` when the first argument is `img`; the daemon knows nothing of it. A command gets a [`Session`] (a
//! daemon without sockets: graph, command table, one iothread), opens images by the options `blockdev-add` takes, and
//! reports on stdout in qemu-img's words. Must not know any format: what a format can do it asks the drivers.
//!
//! | file | subject |
//! |---|---|
//! | `cli` | the arguments |
//! | `session`, `image` | the graph of one command, and an image that is open in it |
//! | `status` | what is known about a range, through the whole backing chain |
//! | `layout` | the options of a new image: `-o`, `-b`, `create` |
//! | `size`, `output`, `progress`, `failure` | sizes, JSON and text, the bar, exit status |
//! | the others | one command each |

mod bitmap;
mod check;
mod cli;
mod compare;
mod convert;
mod create;
mod failure;
mod image;
mod info;
mod layout;
mod map;
mod measure;
mod output;
mod probe;
mod progress;
mod resize;
mod session;
mod size;
mod snapshot;
mod status;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::process::logging::{self, TraceOption};
use cli::{Cli, Command};
use failure::{FAILED, Failure, Outcome};
use session::Session;

/// Runs the command that the arguments after `img` ask for.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let outcome = run(args);
    logging::flush();
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            complain(&failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// One message on stderr; nothing to be done when nobody can read it.
fn complain(message: &str) {
    if !message.is_empty() {
        // One event, one line: what a name in an image or on the command line holds must not forge another.
        let mut line = String::new();
        let _ = logging::escape(&message.trim_end().replace('\n', ". "), &mut line);
        let _ = writeln!(std::io::stderr(), "ringblk img: {line}");
    }
}

fn run(args: impl Iterator<Item = OsString>) -> Outcome {
    let args = std::iter::once(OsString::from("ringblk img")).chain(args);
    let parsed = Cli::command().try_get_matches_from(args);
    let matches = match parsed {
        Ok(matches) => matches,
        Err(e) => return usage(&e),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let env = |name: &str| std::env::var(name).ok();
    // A tool has nothing to say about its own life.
    let level = env("RINGBLK_LOG").unwrap_or_else(|| "warn".to_owned());
    logging::init(Some(&level), env("JOURNAL_STREAM").as_deref()).map_err(Failure::new)?;
    for text in &cli.trace {
        let option = TraceOption::parse(text).map_err(|e| Failure::new(e).context("-T"))?;
        logging::apply(&option).map_err(|e| Failure::new(e).context("-T"))?;
    }
    let session = Session::start()?;
    let work = session.clone();
    let outcome = session.block_on(async move {
        match cli.command {
            Command::Bitmap(args) => {
                let actions = matches.subcommand().map(|(_, m)| bitmap::in_order(m)).unwrap_or_default();
                bitmap::run(work, args, actions).await
            }
            Command::Check(args) => check::run(work, args).await,
            Command::Compare(args) => compare::run(work, args).await,
            Command::Convert(args) => convert::run(work, args).await,
            Command::Create(args) => create::run(work, args).await,
            Command::Info(args) => info::run(work, args).await,
            Command::Map(args) => map::run(work, args).await,
            Command::Measure(args) => measure::run(work, args).await,
            Command::Resize(args) => resize::run(work, args).await,
            Command::Snapshot(args) => snapshot::run(work, args).await,
        }
    });
    session.end();
    outcome
}

/// Help on stdout, or what is wrong with the arguments; qemu-img's status for that is 1.
fn usage(e: &clap::Error) -> Outcome {
    let asked = !e.use_stderr();
    e.print()?;
    Ok(if asked { 0 } else { FAILED })
}

#[cfg(test)]
mod tests;
