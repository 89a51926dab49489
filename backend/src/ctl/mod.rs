//! `ringblk ctl`: the control channel for people and scripts: any command, the picture of the graph, a live table.
//!
//! Called by `main.rs` when the first argument is `ctl`; the daemon knows nothing of it, and nothing of it is touched
//! while a daemon starts. It talks to a control socket and to nothing else, and it takes what it can do from what the
//! other side says of itself: it works with qemu-storage-daemon and QEMU as well.
//!
//! | file | subject |
//! |---|---|
//! | `cli` | the arguments |
//! | `client` | the connection |
//! | `schema` | what the other side understands: typing and completing arguments |
//! | `words` | a command line of words, and quoting |
//! | `prompt` | reading commands from a terminal, with completion and events |
//! | `output`, `failure` | text and JSON, exit status |
//! | `graph` | the picture of the graph |
//! | `top` | the live table |

mod cli;
mod client;
mod failure;
mod graph;
mod output;
mod prompt;
mod schema;
mod top;
mod words;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use serde_json::Value;

use cli::{Cli, Command};
use client::Client;
use failure::{Failure, Outcome, USAGE};
use schema::Schema;

/// Names the socket when `--socket` does not.
const SOCKET_VARIABLE: &str = "RINGBLK_SOCKET";

/// Runs what the arguments after `ctl` ask for.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args = std::iter::once(OsString::from("ringblk ctl")).chain(args);
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // Help goes to stdout and is no failure; nothing to be done when it cannot be written.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { USAGE } else { 0 });
        }
    };
    let json = cli.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.tell(json);
            ExitCode::from(failure.status())
        }
    }
}

fn run(cli: Cli) -> Outcome {
    if let Some(Command::Completion(args)) = &cli.command {
        let mut script = Vec::new();
        clap_complete::generate(args.shell, &mut Cli::command(), "ringblk-ctl", &mut script);
        return output::bytes(&script);
    }
    let variable = std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
    let socket = cli.socket.or(variable).ok_or_else(|| {
        Failure::Usage(format!(
            "which daemon? Give --socket PATH of its control channel, or set {SOCKET_VARIABLE}"
        ))
    })?;
    let mut client = Client::connect(&socket)?;
    match cli.command {
        None => prompt::run(client, cli.json),
        Some(Command::Graph(args)) => graph::run(&mut client, &args, cli.json),
        Some(Command::Top(args)) => top::run(&mut client, &args, cli.json),
        Some(Command::Qmp(words)) => {
            let words: Result<Vec<String>, _> = words.into_iter().map(OsString::into_string).collect();
            let words = words.map_err(|w| Failure::Usage(format!("{} is not UTF-8", w.display())))?;
            let (name, arguments) = words.split_first().ok_or_else(|| Failure::Usage(String::new()))?;
            let value = execute(&mut client, None, name, arguments)?;
            output::value(&value, cli.json)
        }
        // Done above.
        Some(Command::Completion(_)) => Ok(()),
    }
}

/// Runs one command given as words. Where its arguments need no types the other side need not be asked for its schema.
fn execute(
    client: &mut Client,
    schema: Option<&Schema>,
    name: &str,
    arguments: &[String],
) -> Result<Value, Failure> {
    let arguments = match words::parse(arguments)? {
        words::Arguments::None => None,
        words::Arguments::Json(value) => Some(value),
        words::Arguments::Words(tree) => {
            let asked;
            let schema = match schema {
                Some(schema) => schema,
                None => {
                    asked = Schema::ask(client)?;
                    &asked
                }
            };
            Some(schema.arguments(name, tree).map_err(Failure::Usage)?)
        }
    };
    client.execute(name, arguments)
}
