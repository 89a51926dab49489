//! A vhost-user socket: frames and descriptors, well formed or not.
//!
//! Used by `frontend` and `channel`, and directly by hostile tests. It knows headers and SCM_RIGHTS, no message's
//! meaning; it must not repair or refuse what a test wants to send.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with,
};

use crate::error::{Error, Result};
use crate::wire::{self, HEADER_SIZE};

/// Limit on a wait that nobody chose otherwise: far above any healthy reply, below a test runner's patience.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(20);

/// Descriptors accepted with one message.
const MAX_FDS: usize = 32;

/// Largest payload accepted from the other side, in bytes: no reply of a block device comes near it.
const MAX_PAYLOAD: usize = 1 << 20;

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Number of the request (or of the request this replies to).
    pub request: u32,
    /// Version, reply and need-reply bits.
    pub flags: u32,
    /// Payload.
    pub payload: Vec<u8>,
    /// Descriptors that came along, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The first u64 of the payload, what most replies consist of.
    ///
    /// # Errors
    /// `Protocol` when the payload is shorter.
    pub fn u64(&self) -> Result<u64> {
        wire::u64_at(&self.payload, 0).ok_or_else(|| {
            Error::Protocol(format!("reply to {} is {} bytes", self.request, self.payload.len()))
        })
    }
}

/// One end of a vhost-user socket.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    limit: Duration,
}

impl Connection {
    /// Wraps a connected socket.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, limit: DEFAULT_LIMIT }
    }

    /// Connects to a listening backend, trying again while nobody listens, for at most `limit`.
    ///
    /// # Errors
    /// `Timeout` when nobody listened in time, `Io` for any other refusal.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            match try_connect(path) {
                Ok(stream) => return Ok(Self::new(stream)),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::NotFound
                            | std::io::ErrorKind::ConnectionRefused
                            | std::io::ErrorKind::WouldBlock
                    ) =>
                {
                    if Instant::now() >= deadline {
                        return Err(Error::Timeout {
                            waiting_for: format!("listener on {}", path.display()),
                            limit,
                        });
                    }
                    // Nobody listens yet, or the backlog is full (WouldBlock): both pass by themselves.
                    // Short, because time to the first reply is measured through this loop.
                    std::thread::sleep(Duration::from_micros(20));
                }
                Err(error) => return Err(Error::io(format!("connecting to {}", path.display()))(error)),
            }
        }
    }

    /// Replaces the limit on each wait.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// The limit on each wait.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// The socket itself, for tests that shut down one direction or fill its buffer.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are, `fds` attached to the first of them.
    ///
    /// # Errors
    /// `Timeout` when the other side does not read, `Io` otherwise (closed connections included).
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        let mut sent = 0;
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Error::Usage(format!("at most {MAX_FDS} descriptors go with a message")));
            }
            let rest = bytes.get(sent..).unwrap_or_default();
            match sendmsg(
                &self.stream,
                &[IoSlice::new(rest)],
                &mut ancillary,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(n) => {
                    sent += n;
                    if sent >= bytes.len() {
                        return Ok(());
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait(self.stream.as_fd(), PollFlags::OUT, deadline)? {
                        return Err(Error::Timeout {
                            waiting_for: "room in the socket".into(),
                            limit: self.limit,
                        });
                    }
                }
                Err(error) => return Err(Error::io("sending a message")(error)),
            }
        }
    }

    /// Sends one message; `flags` is sent as given, so the version bit is the caller's.
    ///
    /// # Errors
    /// As `send_raw`.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = wire::header(request, flags, payload.len() as u32).to_vec();
        bytes.extend_from_slice(payload);
        self.send_raw(&bytes, fds)
    }

    /// Receives one message within the connection's limit.
    ///
    /// # Errors
    /// `Timeout`, `Closed`, `Protocol` for a payload beyond 1 MiB, `Io`.
    pub fn recv(&self) -> Result<Message> {
        self.recv_within(self.limit)
    }

    /// Receives one message within `limit`.
    ///
    /// # Errors
    /// As `recv`.
    pub fn recv_within(&self, limit: Duration) -> Result<Message> {
        let deadline = Instant::now() + limit;
        let mut fds = Vec::new();
        let mut header = [0; HEADER_SIZE];
        self.fill(&mut header, &mut fds, deadline, limit)?;
        let field = |at| wire::u32_at(&header, at).unwrap_or_default();
        let (request, flags, size) = (field(0), field(4), field(8) as usize);
        if size > MAX_PAYLOAD {
            return Err(Error::Protocol(format!("message {request} announces {size} bytes")));
        }
        let mut payload = vec![0; size];
        self.fill(&mut payload, &mut fds, deadline, limit)?;
        Ok(Message { request, flags, payload, fds })
    }

    /// Waits until the other side closes; bytes that arrive before are thrown away.
    ///
    /// # Errors
    /// `Timeout` when it is still open after `limit`.
    pub fn wait_closed(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let mut scrap = [0; 4096];
            match self.fill(&mut scrap[..1], &mut Vec::new(), deadline, limit) {
                Ok(()) => {}
                Err(error) if error.is_closed() => return Ok(()),
                Err(Error::Timeout { .. }) => {
                    return Err(Error::Timeout { waiting_for: "end of the connection".into(), limit });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `buffer`, collecting descriptors on the way.
    fn fill(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
        limit: Duration,
    ) -> Result<()> {
        let mut got = 0;
        while got < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let rest = buffer.get_mut(got..).unwrap_or_default();
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.stream, &mut [IoSliceMut::new(rest)], &mut ancillary, flags) {
                Ok(message) => {
                    for part in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = part {
                            fds.extend(received);
                        }
                    }
                    if message.bytes == 0 {
                        return Err(Error::Closed { doing: "receiving".into() });
                    }
                    got += message.bytes;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait(self.stream.as_fd(), PollFlags::IN, deadline)? {
                        return Err(Error::Timeout { waiting_for: "message from the backend".into(), limit });
                    }
                }
                Err(error) => return Err(Error::io("receiving a message")(error)),
            }
        }
        Ok(())
    }
}

/// Connects without waiting for room in the backlog, which a plain connect would do without limit.
fn try_connect(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Waits for `events` on `fd`; false when `deadline` passed first.
///
/// # Errors
/// `Io` when poll itself fails.
pub fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("poll")(error)),
        }
    }
}
