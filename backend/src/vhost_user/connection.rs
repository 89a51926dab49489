//! The thread of one vhost-user connection.
//!
//! It blocks in the protocol and does nothing else; the export starts it per accepted socket and is told when it
//! ended. A second look at each message (a peek at the header, before the `vhost` crate consumes it) keeps a copy of
//! the back-end channel's descriptor. Must not touch a ring: the session asks the ring's iothread.

use std::io::{IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::session::Session;
use crate::blk::device::BlkDevice;

/// `VHOST_USER_SET_BACKEND_REQ_FD` (vhost-user protocol, "Front-end message types").
const SET_BACKEND_REQ_FD: u32 = 21;
/// Bytes of a message header: request, flags, size.
const HEADER: usize = 12;
/// Stack of a connection thread in bytes: the protocol's largest message is 4 KiB.
const STACK: usize = 256 << 10;

/// A running connection.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// No further message is handled.
    ending: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Connection {
    /// Serves `socket` on a thread of its own; `ended` is called on that thread after all rings have stopped and the
    /// guest's memory is unmapped.
    ///
    /// # Errors
    /// When the socket cannot be duplicated or the thread cannot be started.
    pub fn start(
        socket: UnixStream,
        device: Arc<BlkDevice>,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        // The protocol layer must block: it spins on a socket that does not.
        socket.set_nonblocking(false)?;
        let ours = socket.try_clone()?;
        let last = socket.try_clone()?;
        let ending = Arc::new(AtomicBool::new(false));
        let told = ending.clone();
        let thread =
            std::thread::Builder::new().name("vhost-user".into()).stack_size(STACK).spawn(move || {
                let served =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| serve(socket, &device, &told)));
                if served.is_err() {
                    log::error!("export '{}': its connection ended by a panic", device.name());
                }
                // An inherited descriptor stays open under its number: closing ours would not end the connection.
                let _ = last.shutdown(Shutdown::Both);
                ended();
            })?;
        Ok(Connection { socket: ours, ending, thread: Some(thread) })
    }

    /// Ends the connection: the thread sees the end of the stream, stops the rings (which waits for what is in
    /// flight), ends the stream for the front end too and calls `ended`. Does not wait.
    ///
    /// In this order: a front end that sees the end takes what is not completed by then for never begun, and hands it
    /// to the next back end a second time.
    pub fn shutdown(&self) {
        // Release: pairs with the Acquire in `serve`, which sees it with the end of the stream at the latest.
        self.ending.store(true, Ordering::Release);
        // One that does not read its replies may have the thread blocked in sending one, which only the end of both
        // directions interrupts. With room in the socket one more reply cannot block.
        let how = if has_room(&self.socket) { Shutdown::Read } else { Shutdown::Both };
        // Fails only when the peer is gone already, which is what is wanted.
        let _ = self.socket.shutdown(how);
    }

    /// Joins the thread; call it after `ended` was called.
    pub fn join(mut self) {
        if let Some(t) = self.thread.take()
            && t.join().is_err()
        {
            log::error!("a connection thread panicked");
        }
    }
}

/// Whether the front end has read most of what was sent (unix(7): writable up to a quarter of the buffer).
fn has_room(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::OUT))
}

fn serve(socket: UnixStream, device: &Arc<BlkDevice>, ending: &AtomicBool) {
    let name = device.name().to_owned();
    let peek_at = match socket.try_clone() {
        Ok(s) => s,
        Err(e) => {
            log::error!("export '{name}': cannot serve a connection: {e}");
            return;
        }
    };
    log::info!("export '{name}': front end connected");
    let session = Arc::new(Mutex::new(Session::new(device.clone())));
    let mut handler = BackendReqHandler::from_stream(socket, session.clone());
    let why = loop {
        match peek(&peek_at) {
            Ok(Some((SET_BACKEND_REQ_FD, Some(fd)))) => {
                device.channel().set(UnixStream::from(fd));
            }
            Ok(Some(_)) => {}
            Ok(None) => break Error::Disconnected,
            Err(e) => break Error::SocketError(e),
        }
        // Acquire: pairs with the Release in `Connection::shutdown`. What the front end had sent ahead is not begun.
        if ending.load(Ordering::Acquire) {
            break Error::Disconnected;
        }
        if let Err(e) = handler.handle_request() {
            break e;
        }
    };
    // The session first: whatever the front end sees next (the closed socket) comes after the last used entry.
    session.lock().unwrap_or_else(std::sync::PoisonError::into_inner).close();
    match why {
        Error::Disconnected | Error::SocketBroken(_) => log::info!("export '{name}': front end disconnected"),
        e => log::warn!("export '{name}': connection closed: {e}"),
    }
}

/// Looks at the next message without consuming it: its request code and, if there is exactly one, a duplicate of its
/// descriptor. `None` at the end of the stream. Linux duplicates the descriptors for each peek.
fn peek(socket: &UnixStream) -> Result<Option<(u32, Option<OwnedFd>)>> {
    let mut header = [0u8; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            other => break other?,
        }
    };
    if got.bytes == 0 {
        return Ok(None);
    }
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if got.bytes < HEADER {
        // A torn header: the protocol layer reads it again and judges it.
        return Ok(Some((0, None)));
    }
    let [a, b, c, d, ..] = header;
    let code = u32::from_ne_bytes([a, b, c, d]);
    let fd = if fds.len() == 1 { fds.pop() } else { None };
    Ok(Some((code, fd)))
}
