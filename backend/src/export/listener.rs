//! The socket of an export: a path, an inherited listening descriptor, or an inherited connection.
//!
//! Made by `Export::add`, polled by the event loop. A path stays bound for the export's life and is removed with it.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use qmp::QmpError;
use qmp::socket::Listener;

use super::options::SocketAddress;
use crate::process::listen_fds::Socket;

/// Finds an inherited socket by its number or its name.
pub type Inherited<'a> = &'a dyn Fn(&str) -> Result<Socket, String>;

/// See the module's words.
#[derive(Debug)]
pub enum ExportSocket {
    /// Accepts any number of front ends, one after the other.
    Listening(Listener),
    /// One front end that was connected before we started.
    Connected(RefCell<Option<UnixStream>>),
}

impl ExportSocket {
    /// Opens the socket that `address` names.
    ///
    /// # Errors
    /// The path is too long, in use by a live process, no socket, or cannot be bound; the descriptor is not there, or no
    /// unix stream socket.
    pub fn open(address: &SocketAddress, inherited: Inherited<'_>) -> Result<ExportSocket, QmpError> {
        match address {
            SocketAddress::Unix { path } => {
                let path = Path::new(path);
                // What may connect may read and write the disk: the owner decides with the directory's permissions too.
                let listener = Listener::bind(path, None).map_err(|e| QmpError::generic(e.to_string()))?;
                Ok(ExportSocket::Listening(listener))
            }
            SocketAddress::Fd { str } => {
                match inherited(str).map_err(|e| QmpError::generic(format!("Parameter 'addr.str': {e}")))? {
                    Socket::Listening(l) => {
                        let listener = Listener::from_fd(OwnedFd::from(l))
                            .map_err(|e| QmpError::generic(format!("Parameter 'addr.str': {e}")))?;
                        Ok(ExportSocket::Listening(listener))
                    }
                    Socket::Connected(s) => Ok(ExportSocket::Connected(RefCell::new(Some(s)))),
                }
            }
        }
    }

    /// The descriptor to wait on; `None` for a connection that came ready made.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            ExportSocket::Listening(listener) => Some(listener.socket().as_fd()),
            ExportSocket::Connected(_) => None,
        }
    }

    /// The next front end, if one is there.
    ///
    /// # Errors
    /// One waits and cannot be taken: there are no descriptors or no memory left. It keeps waiting.
    pub fn accept(&self) -> std::io::Result<Option<UnixStream>> {
        use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        match self {
            ExportSocket::Listening(listener) => match listener.socket().accept() {
                Ok((s, _)) => Ok(Some(s)),
                // Gone before we looked.
                Err(e) if [WouldBlock, ConnectionAborted, Interrupted].contains(&e.kind()) => Ok(None),
                Err(e) => Err(e),
            },
            ExportSocket::Connected(s) => Ok(s.borrow_mut().take()),
        }
    }

    /// Frees the path now, although the event loop may hold the socket a little longer.
    pub fn remove_path(&self) {
        if let ExportSocket::Listening(listener) = self {
            listener.remove_path();
        }
    }
}
