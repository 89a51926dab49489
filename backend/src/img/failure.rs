//! How a command fails: one line for stderr and an exit status.
//!
//! Built by every command; printed by [`super::main`] alone.

use std::fmt;

use graph::BlockError;
use qmp::QmpError;

/// Status of a failure, unless a command has others.
pub const FAILED: u8 = 1;

/// Result of a command: its exit status.
pub type Outcome = Result<u8, Failure>;

/// Why a command ended without its work done.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong and what to do; empty when everything has been said already.
    pub message: String,
    /// The exit status.
    pub status: u8,
}

impl Failure {
    /// A failure with the usual status.
    pub fn new(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), status: FAILED }
    }

    /// The same failure with another status.
    #[must_use]
    pub fn with_status(mut self, status: u8) -> Failure {
        self.status = status;
        self
    }

    /// The same failure with words in front.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Failure {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl From<BlockError> for Failure {
    fn from(e: BlockError) -> Failure {
        Failure::new(e)
    }
}

impl From<QmpError> for Failure {
    fn from(e: QmpError) -> Failure {
        Failure::new(e.desc)
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Failure {
        // Reached by writing to stdout alone.
        Failure::new(format!("cannot write: {e}"))
    }
}
