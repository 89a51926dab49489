//! The arguments of `ringblk ctl`, as clap reads them.
//!
//! Parsed once by [`super::main`]. Connects to nothing.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// Talk to a running daemon over its control channel (QMP).
#[derive(Debug, Parser)]
#[command(
    name = "ringblk ctl",
    bin_name = "ringblk ctl",
    version,
    disable_help_subcommand = true,
    after_help = "Any other COMMAND is one of QMP, with its arguments as key=value (dots reach into objects and lists: \
                  file.driver=file, vqs.0=1) or as one JSON object. Without a COMMAND: a prompt, with completion by TAB, \
                  that also shows events.\n\nExit status: 0 done, 1 the daemon refused, 2 wrong arguments, 3 no daemon, or \
                  the connection broke."
)]
pub struct Cli {
    /// Socket of the control channel (--monitor of the daemon). Default: $RINGBLK_SOCKET.
    #[arg(short = 's', long = "socket", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Write JSON: what a command returned, or {"error": ...}.
    #[arg(long = "json", global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands that are not QMP's.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Draw the running graph.
    Graph(GraphArgs),
    /// Show what nodes, exports and iothreads are doing.
    Top(TopArgs),
    /// Print a script that completes the arguments of this program in a shell.
    Completion(CompletionArgs),
    /// A command of QMP.
    #[command(external_subcommand)]
    Qmp(Vec<OsString>),
}

/// `graph`
#[derive(Debug, Args)]
pub struct GraphArgs {
    /// Write a drawing for graphviz.
    #[arg(long = "dot", conflicts_with_all = ["svg", "watch"])]
    pub dot: bool,
    /// Write a drawing for browsers.
    #[arg(long = "svg", conflicts_with = "watch")]
    pub svg: bool,
    /// Draw again and again, until interrupted.
    #[arg(short = 'w', long = "watch")]
    pub watch: bool,
    /// Time over which rates are measured, seconds; 0: no rates. Default: 0.2, and 1 with --watch.
    #[arg(short = 'i', long = "interval", value_name = "SECONDS", value_parser = seconds)]
    pub interval: Option<f64>,
}

/// `top`
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Measure once, and end.
    #[arg(long = "once")]
    pub once: bool,
    /// Time over which is measured, seconds. Default: 1.
    #[arg(short = 'i', long = "interval", value_name = "SECONDS", value_parser = seconds)]
    pub interval: Option<f64>,
}

/// `completion`
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// The shell. The script serves the name `ringblk-ctl`: alias it to `ringblk ctl`.
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

/// A time that can be slept.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if (0.0..=86400.0).contains(&n) => Ok(n),
        _ => Err("expected seconds, 0 to 86400".to_owned()),
    }
}
