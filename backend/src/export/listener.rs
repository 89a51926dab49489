//! The socket of an export: a path, an inherited listening descriptor, or an inherited connection.
//!
//! Made by `export::add`, polled by the event loop. A path stays bound for the export's life and is removed with it.
//! Must not take over a socket that somebody serves.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use qmp::QmpError;
use rustix::net::sockopt;

use super::options::SocketAddress;

/// Longest path of a socket, bytes: `sun_path` has 108 with its terminator (unix(7)).
pub const MAX_PATH: usize = 107;

/// See the module's words.
#[derive(Debug)]
pub enum Listener {
    /// Accepts any number of front ends, one after the other.
    Listening {
        /// Non-blocking.
        socket: UnixListener,
        /// What to remove at the end: path, device and inode, so that somebody else's socket is left alone.
        path: Option<(PathBuf, u64, u64)>,
    },
    /// One front end that was connected before we started.
    Connected(Option<UnixStream>),
}

fn fail(path: &Path, e: impl std::fmt::Display) -> QmpError {
    QmpError::generic(format!("Failed to listen on '{}': {e}", path.display()))
}

impl Listener {
    /// Opens the socket that `address` names; `inherited` finds descriptors by number or name.
    ///
    /// # Errors
    /// The path is too long, in use by a live process, no socket, or cannot be bound; the descriptor is not there, or no
    /// unix stream socket.
    pub fn open(address: &SocketAddress, inherited: &dyn Fn(&str) -> Option<OwnedFd>) -> Result<Listener, QmpError> {
        match address {
            SocketAddress::Unix { path } => Self::bind(Path::new(path)),
            SocketAddress::Fd { str } => {
                let fd = inherited(str).ok_or_else(|| {
                    QmpError::generic(format!(
                        "Parameter 'addr.str' names no inherited descriptor: '{str}' is neither the number of an open \
                         one nor in LISTEN_FDNAMES"
                    ))
                })?;
                Self::from_fd(fd).map_err(|e| QmpError::generic(format!("Descriptor '{str}': {e}")))
            }
        }
    }

    fn from_fd(fd: OwnedFd) -> Result<Listener, String> {
        let domain = sockopt::socket_domain(&fd).map_err(|e| format!("not a socket ({e})"))?;
        let kind = sockopt::socket_type(&fd).map_err(|e| format!("not a socket ({e})"))?;
        if domain != rustix::net::AddressFamily::UNIX || kind != rustix::net::SocketType::STREAM {
            return Err("not a unix stream socket".into());
        }
        match sockopt::socket_acceptconn(&fd) {
            Ok(true) => {
                let socket = UnixListener::from(fd);
                socket.set_nonblocking(true).map_err(|e| e.to_string())?;
                Ok(Listener::Listening { socket, path: None })
            }
            _ => Ok(Listener::Connected(Some(UnixStream::from(fd)))),
        }
    }

    fn bind(path: &Path) -> Result<Listener, QmpError> {
        let len = path.as_os_str().len();
        if len == 0 || len > MAX_PATH {
            return Err(fail(path, format_args!("the path has {len} bytes, a unix socket takes 1 to {MAX_PATH}")));
        }
        match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(fail(path, e)),
            Ok(m) if !m.file_type().is_socket() => {
                return Err(fail(path, "the path exists and is not a socket"));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(|e| fail(path, e))?;
                }
                Ok(_) => return Err(fail(path, "Address already in use by a live process")),
                Err(e) => return Err(fail(path, format_args!("Address already in use ({e})"))),
            },
        }
        let socket = UnixListener::bind(path).map_err(|e| fail(path, e))?;
        socket.set_nonblocking(true).map_err(|e| fail(path, e))?;
        let path = std::fs::symlink_metadata(path).ok().map(|m| (path.to_owned(), m.dev(), m.ino()));
        Ok(Listener::Listening { socket, path })
    }

    /// The descriptor to wait on; `None` for a connection that came ready made.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Listener::Listening { socket, .. } => Some(socket.as_fd()),
            Listener::Connected(_) => None,
        }
    }

    /// The next front end, if one is there.
    pub fn accept(&mut self) -> Option<UnixStream> {
        match self {
            Listener::Listening { socket, .. } => match socket.accept() {
                Ok((s, _)) => Some(s),
                Err(e) => {
                    // Gone before we looked, or out of descriptors: the listener stays, the next attempt may do better.
                    if e.kind() != std::io::ErrorKind::WouldBlock {
                        log::warn!("cannot accept a front end: {e}");
                    }
                    None
                }
            },
            Listener::Connected(s) => s.take(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Listening { path: Some((path, dev, ino)), .. } = self
            && let Ok(m) = std::fs::symlink_metadata(&*path)
            && (m.dev(), m.ino()) == (*dev, *ino)
        {
            // Nothing to be done about a failure: a stale socket is replaced by whoever comes next.
            let _ = std::fs::remove_file(path);
        }
    }
}
