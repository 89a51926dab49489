//! Telling the service manager: sd_notify(3) without libsystemd.
//!
//! `main.rs` makes one [`Notifier`] at start-up and speaks through it at ready, at shutdown and when the state worth
//! showing in `systemctl status` changes. Must not be used on the path of requests: it blocks for up to
//! [`SEND_TIMEOUT`] when the manager does not read.
//!
//! The protocol: one datagram of `KEY=VALUE` lines to the unix socket in `NOTIFY_SOCKET`, an absolute path or, with
//! a leading `@`, a name in the abstract name space. Without the variable every call does nothing.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Longest wait for the service manager to take a message.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest status text sent, in bytes.
const MAX_STATUS: usize = 1024;

/// The way to the service manager, if there is one.
#[derive(Debug)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// Reads `NOTIFY_SOCKET`.
    ///
    /// # Errors
    ///
    /// As [`Notifier::new`].
    pub fn from_env() -> io::Result<Self> {
        Self::new(std::env::var_os("NOTIFY_SOCKET").as_deref())
    }

    /// Makes a notifier for the value of `NOTIFY_SOCKET`; `None` or empty: nobody listens.
    ///
    /// # Errors
    ///
    /// The value is neither an absolute path nor an abstract name, is too long for a socket address, or no socket
    /// can be made. Start-up may go on without.
    pub fn new(value: Option<&OsStr>) -> io::Result<Self> {
        let Some(value) = value.filter(|v| !v.is_empty()) else {
            return Ok(Self { manager: None });
        };
        let address = match value.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(value)?,
            _ => {
                let text = "NOTIFY_SOCKET is neither an absolute path nor starts with '@'";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self { manager: Some((socket, address)) })
    }

    /// Start-up is complete. Carries the process id, which differs from the started one after `--daemonize`.
    ///
    /// # Errors
    ///
    /// The manager's socket is gone or full.
    pub fn ready(&self, status: &str) -> io::Result<()> {
        self.send(&format!("READY=1\nMAINPID={}\nSTATUS={}\n", std::process::id(), one_line(status)))
    }

    /// Shutdown has begun.
    ///
    /// # Errors
    ///
    /// As [`Notifier::ready`].
    pub fn stopping(&self, status: &str) -> io::Result<()> {
        self.send(&format!("STOPPING=1\nSTATUS={}\n", one_line(status)))
    }

    fn send(&self, message: &str) -> io::Result<()> {
        let Some((socket, address)) = &self.manager else { return Ok(()) };
        socket.send_to_addr(message.as_bytes(), address).map(|_| ())
    }
}

/// A status must not smuggle in a second assignment.
fn one_line(status: &str) -> String {
    let mut text: String = status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.truncate(text.floor_char_boundary(MAX_STATUS));
    text
}

#[cfg(test)]
mod tests;
