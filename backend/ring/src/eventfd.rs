//! Kick and call eventfds as a front end passes them: checked to be eventfds, made non-blocking. Sessions make them,
//! iothreads use them; a hostile descriptor must neither block nor end anybody.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::{Errno, FdFlags, ReadWriteFlags};

#[cfg(test)]
mod tests;

/// Why a descriptor cannot serve as kick or call.
#[derive(Debug)]
#[non_exhaustive]
pub enum EventFdError {
    /// It is a pipe, a socket, a file, ..., and writing to it could block or end the process.
    NotAnEventFd,
    /// The kernel would not say or change what it is.
    Io(io::Error),
}

impl fmt::Display for EventFdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnEventFd => write!(f, "descriptor is not an eventfd"),
            Self::Io(e) => write!(f, "cannot use eventfd: {e}"),
        }
    }
}

impl std::error::Error for EventFdError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotAnEventFd => None,
            Self::Io(e) => Some(e),
        }
    }
}

impl From<Errno> for EventFdError {
    fn from(e: Errno) -> Self {
        Self::Io(e.into())
    }
}

/// Checks that `fd` is an eventfd, and sets O_NONBLOCK and FD_CLOEXEC.
fn checked(fd: OwnedFd) -> Result<OwnedFd, EventFdError> {
    if !is_eventfd(&fd)? {
        return Err(EventFdError::NotAnEventFd);
    }
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// What the kernel's own description says; without /proc (a sandbox), what the descriptor does.
fn is_eventfd(fd: &OwnedFd) -> Result<bool, EventFdError> {
    // Anonymous inodes have no type; this sorts out everything a path or a socket call makes.
    if rustix::fs::fstat(fd)?.st_mode & libc::S_IFMT != 0 {
        return Ok(false);
    }
    match File::open(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())) {
        Ok(file) => {
            let mut text = String::new();
            // Longer than any description we want to see, shorter than what an epoll with many entries makes.
            file.take(4096).read_to_string(&mut text).map_err(EventFdError::Io)?;
            Ok(text.lines().any(|line| line.starts_with("eventfd-count:")))
        }
        Err(_) => Ok(takes_nothing(fd)),
    }
}

/// Whether an anonymous inode accepts that nothing is added to its counter, which only an eventfd does: of the others
/// with a write operation, timerfd and fanotify refuse eight zero bytes. A counter at its maximum does not block it.
fn takes_nothing(fd: &OwnedFd) -> bool {
    rustix::io::write(fd, &0_u64.to_ne_bytes()) == Ok(8)
}

/// The call eventfd: tells the driver that the used ring has grown.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// Takes the descriptor of SET_VRING_CALL.
    ///
    /// # Errors
    /// [`EventFdError`] when it is no eventfd.
    pub fn new(fd: OwnedFd) -> Result<Self, EventFdError> {
        checked(fd).map(Self)
    }

    /// Adds one to the counter. A counter at its maximum is a signal already, and does not block, unless the front end has
    /// taken O_NONBLOCK, which belongs to both sides, off again: then until there is room ([`Notifier::make_room`]).
    ///
    /// # Errors
    /// What the kernel says; nothing a retry would mend.
    pub fn signal(&self) -> io::Result<()> {
        loop {
            return match rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }
}

impl Notifier {
    /// Empties a counter that is at its maximum, and ends the wait of whoever adds to it. Never blocks. For a front end that
    /// has gone: it misses no interrupt, since a ring that starts again interrupts once.
    pub fn make_room(&self) {
        let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
        let full = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0);
        if full {
            let mut count = [0_u8; 8];
            // NOWAIT: also when somebody else was faster. An offset of all ones is "none".
            let buffer = &mut [io::IoSliceMut::new(&mut count)];
            let _ = rustix::io::preadv2(&self.0, buffer, u64::MAX, ReadWriteFlags::NOWAIT);
        }
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kick eventfd: the driver tells that the available ring has grown. To be polled for by its borrowed descriptor.
#[derive(Debug)]
pub struct Kick(OwnedFd);

impl Kick {
    /// Takes the descriptor of SET_VRING_KICK.
    ///
    /// # Errors
    /// [`EventFdError`] when it is no eventfd.
    pub fn new(fd: OwnedFd) -> Result<Self, EventFdError> {
        checked(fd).map(Self)
    }

    /// Resets the counter with one read; `true` if there was a kick. Never blocks. Do it before looking at the ring,
    /// or a kick in between is lost. An edge-triggered poll (io_uring's multishot) does not need it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn drain(&self) -> io::Result<bool> {
        let mut count = [0_u8; 8];
        loop {
            return match rustix::io::read(&self.0, &mut count) {
                Ok(_) => Ok(true),
                Err(Errno::AGAIN) => Ok(false),
                Err(Errno::INTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Kick> for OwnedFd {
    fn from(kick: Kick) -> OwnedFd {
        kick.0
    }
}
