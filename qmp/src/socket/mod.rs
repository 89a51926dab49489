//! The control channel's listening sockets: made at a path, or inherited. Called at start by whoever reads the command
//! line; knows nothing of what is spoken on them.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
};

/// Longest path of a unix socket in bytes: `sun_path` holds 108 with its final NUL (unix(7)).
pub const MAX_PATH: usize = 107;
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 16;

/// A listening unix socket. Dropping it removes its path, if that still is this socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    /// Listens at `path`. A socket there that nobody serves is replaced, one that is served is left alone. `mode` are the
    /// permission bits of the new socket (default: 0o600: whoever can connect can open any file this process can).
    ///
    /// # Errors
    /// A sentence that names the path: too long, in use, something else than a socket, or what the kernel says.
    pub fn bind(path: &Path, mode: Option<u32>) -> io::Result<Listener> {
        let shown = path.display();
        let fail = |kind, text: String| Err(io::Error::new(kind, text));
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            return fail(
                io::ErrorKind::InvalidInput,
                format!(
                    "UNIX socket path '{shown}' is too long: {length} bytes, at most {MAX_PATH} are possible"
                ),
            );
        }
        let context = |e: Errno, what: &str| {
            let e = io::Error::from(e);
            io::Error::new(e.kind(), format!("Failed to {what} UNIX socket '{shown}': {e}"))
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| context(e, "create"))?;
        let address = SocketAddrUnix::new(path).map_err(|e| context(e, "bind"))?;
        if let Err(e) = bind(&fd, &address) {
            if e != Errno::ADDRINUSE {
                return Err(context(e, "bind"));
            }
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return fail(
                    io::ErrorKind::AddrInUse,
                    format!("Failed to bind UNIX socket '{shown}': the path exists and is not a socket"),
                );
            }
            // Only a refused connection proves that nobody listens. It is asked without waiting: where the queue of
            // connections is full, somebody listens, and may never take one.
            let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                .map_err(|e| context(e, "create"))?;
            if rustix::net::connect(&probe, &address) != Err(Errno::CONNREFUSED) {
                return fail(
                    io::ErrorKind::AddrInUse,
                    format!(
                        "Failed to bind UNIX socket '{shown}': Address already in use: another process serves it"
                    ),
                );
            }
            std::fs::remove_file(path)?;
            bind(&fd, &address).map_err(|e| context(e, "bind"))?;
        }
        // Before listen: until then nobody can connect.
        let result = chmod(path, Mode::from_raw_mode(mode.unwrap_or(0o600)))
            .map_err(|e| context(e, "set the permissions of"))
            .and_then(|()| listen(&fd, BACKLOG).map_err(|e| context(e, "listen on")))
            .and_then(|()| std::fs::symlink_metadata(path));
        match result {
            Ok(meta) => {
                let path = std::path::absolute(path)?;
                Ok(Listener { socket: UnixListener::from(fd), path: Some((path, meta.dev(), meta.ino())) })
            }
            Err(e) => {
                // Bound by us a moment ago; nothing else can be there.
                let _ = std::fs::remove_file(path);
                Err(e)
            }
        }
    }

    /// Takes an inherited listening socket.
    ///
    /// # Errors
    /// Not a listening unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Listener> {
        let invalid = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text.to_owned()));
        if sockopt::socket_domain(&fd)? != AddressFamily::UNIX
            || sockopt::socket_type(&fd)? != SocketType::STREAM
        {
            return invalid("the descriptor is not a UNIX stream socket");
        }
        if !sockopt::socket_acceptconn(&fd)? {
            return invalid("the socket is not listening");
        }
        let socket = UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, path: None })
    }

    /// The socket, non-blocking.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Removes the path now, if that still is this socket. Nobody can connect from then on.
    pub fn remove_path(&self) {
        if let Some((path, dev, ino)) = &self.path
            && std::fs::symlink_metadata(path).is_ok_and(|m| m.dev() == *dev && m.ino() == *ino)
        {
            // Nothing to be done about a failure: the next start proves the socket dead and replaces it.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove_path();
    }
}
