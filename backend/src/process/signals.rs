//! SIGTERM, SIGINT and SIGHUP as a readable descriptor.
//!
//! `main.rs` installs them once and registers the descriptor with the main loop; when it is readable,
//! [`Signals::take`] says what came. Each of the three asks for an orderly end, as in qemu-storage-daemon, a repeated
//! one changes nothing: what takes long then is I/O that is still in flight, and SIGKILL is always there.
//!
//! A pipe and not signalfd(2): signalfd needs the signals blocked in every thread, and a blocked mask is inherited
//! by all that the process starts. SIGPIPE is ignored by the Rust runtime; writes to a closed socket fail instead.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};

/// A request to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: the service manager's.
    Terminate,
    /// SIGINT: ^C.
    Interrupt,
    /// SIGHUP: the terminal is gone.
    Hangup,
}

impl Signal {
    /// The name a user knows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
            Self::Hangup => "SIGHUP",
        }
    }
}

/// Signals caught and not taken yet. Dropping it stops the reporting; the signals stay caught and do nothing then.
#[derive(Debug)]
pub struct Signals {
    pipe: UnixStream,
    last: Arc<AtomicUsize>,
    registered: Vec<SigId>,
}

impl Signals {
    /// Starts catching.
    ///
    /// # Errors
    ///
    /// Descriptors or memory ran out.
    pub fn install() -> io::Result<Self> {
        let (pipe, write) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let mut signals =
            Self { pipe, last: Arc::new(AtomicUsize::new(0)), registered: Vec::with_capacity(6) };
        for (number, value) in [(SIGTERM, 1), (SIGINT, 2), (SIGHUP, 3)] {
            // Actions of a signal run in the order of their registration: the byte comes after the value it stands for.
            signals.registered.push(flag::register_usize(number, Arc::clone(&signals.last), value)?);
            signals.registered.push(low_level::pipe::register(number, write.try_clone()?)?);
        }
        Ok(signals)
    }

    /// Empties the pipe and returns the last signal that came since the last call.
    pub fn take(&mut self) -> Option<Signal> {
        let mut bytes = [0; 64];
        // Ends with WouldBlock, an empty pipe; the write ends live as long as self.
        while self.pipe.read(&mut bytes).is_ok_and(|n| n > 0) {}
        // Pairs with the handler's store, which comes before its byte: the read above orders the two.
        match self.last.swap(0, Ordering::SeqCst) {
            1 => Some(Signal::Terminate),
            2 => Some(Signal::Interrupt),
            3 => Some(Signal::Hangup),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            low_level::unregister(id);
        }
    }
}

#[cfg(test)]
mod tests;
