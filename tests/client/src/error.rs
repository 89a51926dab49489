//! What can go wrong on the test side. Called by every module here; it must not hide which side failed.

use std::fmt;
use std::io;
use std::time::Duration;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed step, told so that a test's message alone says what happened.
#[derive(Debug)]
pub enum Error {
    /// A system call on our own side failed.
    Io {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The other side did not do it within the limit.
    Timeout {
        /// What was waited for.
        waiting_for: String,
        /// The limit that passed.
        limit: Duration,
    },
    /// The other side closed the connection.
    Closed {
        /// What was being done when it was noticed.
        doing: String,
    },
    /// The other side broke the protocol.
    Protocol(String),
    /// The backend answered a message with a non-zero status (REPLY_ACK) or an empty reply (configuration).
    Refused {
        /// Number of the vhost-user request.
        request: u32,
        /// The status, 0 where the refusal carries none.
        status: u64,
    },
    /// QMP error reply.
    Qmp {
        /// The command that failed.
        command: String,
        /// `class` of the reply.
        class: String,
        /// `desc` of the reply.
        desc: String,
    },
    /// A block request completed with this status byte (virtio 1.3 §5.2.6: 1 IOERR, 2 UNSUPP).
    Status(u8),
    /// The test asked for something that cannot be done (no memory left, ring full, address outside).
    Usage(String),
}

impl Error {
    /// A closure for `map_err` on system calls.
    pub fn io<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { doing: doing.into(), source: source.into() }
    }

    /// Whether the other side ended the connection, in whichever way the kernel reports it.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { doing, source } => write!(f, "{doing}: {source}"),
            Self::Timeout { waiting_for, limit } => write!(f, "no {waiting_for} within {limit:?}"),
            Self::Closed { doing } => write!(f, "the other side closed the connection ({doing})"),
            Self::Protocol(what) => write!(f, "protocol: {what}"),
            Self::Refused { request, status } => {
                write!(f, "the backend refused message {request} (status {status})")
            }
            Self::Qmp { command, class, desc } => write!(f, "QMP {command}: {class}: {desc}"),
            Self::Status(status) => write!(f, "the request completed with status {status}"),
            Self::Usage(what) => write!(f, "{what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
