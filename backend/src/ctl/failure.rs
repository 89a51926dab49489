//! How `ringblk ctl` fails: one line on stderr, or an object on stdout with `--json`, and an exit status.
//!
//! Built by everything here; told by [`super::main`] and by the prompt.

use std::io::Write as _;

use serde_json::json;

use crate::process::logging;

/// The daemon refused the command.
const REFUSED: u8 = 1;
/// The arguments make no sense; nothing was sent.
pub const USAGE: u8 = 2;
/// There is nobody to talk to (any more).
const LOST: u8 = 3;

/// Result of a command.
pub type Outcome = Result<(), Failure>;

/// Why a command ended without its work done.
#[derive(Debug)]
pub enum Failure {
    /// The daemon's answer was an error.
    Refused {
        /// Its class.
        class: String,
        /// Its words.
        desc: String,
    },
    /// Wrong arguments.
    Usage(String),
    /// No connection, or it broke, or what came is not QMP.
    Lost(String),
    /// Our own output went nowhere.
    Output(std::io::Error),
}

impl Failure {
    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Refused { .. } => REFUSED,
            Failure::Usage(_) => USAGE,
            Failure::Lost(_) => LOST,
            // A reader who has seen enough is no failure of ours.
            Failure::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe => 0,
            Failure::Output(_) => REFUSED,
        }
    }

    /// Says it.
    pub fn tell(&self, json: bool) {
        let (class, text) = match self {
            Failure::Refused { class, desc } => (class.as_str(), desc.clone()),
            Failure::Usage(text) => ("Usage", text.clone()),
            Failure::Lost(text) => ("Connection", text.clone()),
            Failure::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return,
            Failure::Output(e) => ("Output", format!("cannot write: {e}")),
        };
        // Nothing to be done when nobody can read it.
        if json {
            let _ = writeln!(std::io::stdout(), "{}", json!({"error": {"class": class, "desc": text}}));
            return;
        }
        let mut line = String::new();
        let _ = logging::escape(&text.trim_end().replace('\n', ". "), &mut line);
        let _ = writeln!(std::io::stderr(), "ringblk ctl: {line}");
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Failure {
        Failure::Output(e)
    }
}
