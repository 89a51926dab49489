//! ringblk: a vhost-user-blk backend in front of a block graph. This file wires and does nothing else.
//!
//! `ringblk img` and `ringblk ctl` are tools of their own (`img`, `ctl`). Everything else is the daemon, in this order: descriptors, command line,
//! daemon, log, limits, signals, then `daemon::start::run`.

#![forbid(unsafe_code)]

mod blk;
mod ctl;
mod daemon;
mod export;
mod img;
mod process;
mod vhost_user;

use std::io::Write;
use std::process::ExitCode;

use process::cli::{self, Invocation, Plan};
use process::daemonize::{self, Role};
use process::listen_fds::PassedFds;
use process::signals::Signals;
use process::{EXIT_FAILURE, EXIT_OK, limits, logging};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    match args.next() {
        Some(first) if first == "img" => return img::main(args),
        Some(first) if first == "ctl" => return ctl::main(args),
        _ => {}
    }
    // First, before any descriptor is opened that could be taken for an inherited one.
    let passed = PassedFds::from_env();
    let result = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Print(text)) => print(&text),
        Ok(Invocation::Help(topic)) => daemon::help::text(&topic).and_then(|t| print(&t)),
        Ok(Invocation::Run(plan)) => passed.map_err(|e| e.to_string()).and_then(|passed| run(plan, passed)),
        Err(e) => Err(e.to_string()),
    };
    match result {
        Ok(code) => code,
        Err(line) => {
            // One line, whatever it holds; nothing to be done when stderr is closed.
            let _ = writeln!(std::io::stderr(), "ringblk: {line}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn print(text: &str) -> Result<ExitCode, String> {
    std::io::stdout().write_all(text.as_bytes()).map_err(|e| format!("cannot write: {e}"))?;
    Ok(ExitCode::from(EXIT_OK))
}

fn run(plan: Plan, passed: PassedFds) -> Result<ExitCode, String> {
    let ready = match plan.daemonize {
        true => match daemonize::begin(std::env::args_os()).map_err(|e| format!("--daemonize: {e}"))? {
            Role::Launcher(status) => return Ok(ExitCode::from(status)),
            Role::Daemon(ready) => Some(ready),
        },
        false => None,
    };
    let env = |name: &str| std::env::var(name).ok();
    logging::init(env("RINGBLK_LOG").as_deref(), env("JOURNAL_STREAM").as_deref())
        .map_err(|e| e.to_string())?;
    if let Err(e) = limits::raise_nofile() {
        log::warn!("the limit of open descriptors stays as it is: {e}");
    }
    let signals = Signals::install().map_err(|e| format!("signals: {e}"))?;
    let result = daemon::start::run(plan, passed, signals, ready);
    logging::flush();
    result.map(|()| ExitCode::from(EXIT_OK))
}
