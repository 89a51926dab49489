//! The fallback reactor: epoll for descriptors. It does no I/O itself (`submit` says so), the loop ships operations to the
//! worker pool and their completions come back through the mailbox.
//!
//! Used when io_uring is refused, or asked for with `aio=threads`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use epoll::{ControlOptions, Event, Events};

use super::{Op, Reactor, Token, Wait};
use crate::file::{Descriptor, File};

/// Events fetched at once.
const BATCH: usize = 64;

/// See the module's page.
pub(crate) struct Threads {
    epoll: OwnedFd,
    polls: Vec<(Token, RawFd)>,
    ready: Vec<Token>,
    enters: u64,
}

impl Threads {
    /// Fails when no epoll descriptor can be had.
    pub(crate) fn new() -> io::Result<Threads> {
        let fd = epoll::create(true)?;
        // SAFETY: fresh, and ours.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Threads { epoll, polls: Vec::new(), ready: Vec::new(), enters: 0 })
    }
}

impl Reactor for Threads {
    unsafe fn submit(&mut self, _: &Arc<File>, _: Op, _: Token) -> bool {
        false
    }

    fn poll(&mut self, fd: RawFd, token: Token) {
        // Edge-triggered: the eventfds are never read, each write is a new edge.
        let ev = Event::new(Events::EPOLLIN | Events::EPOLLET, token.0);
        match epoll::ctl(self.epoll.as_raw_fd(), ControlOptions::EPOLL_CTL_ADD, fd, ev) {
            Ok(()) => self.polls.push((token, fd)),
            Err(e) => log::error!("cannot watch a descriptor: {e}"),
        }
    }

    fn unpoll(&mut self, token: Token) {
        if let Some(i) = self.polls.iter().position(|(t, _)| *t == token) {
            let (_, fd) = self.polls.swap_remove(i);
            let ev = Event::new(Events::empty(), 0);
            let _ = epoll::ctl(self.epoll.as_raw_fd(), ControlOptions::EPOLL_CTL_DEL, fd, ev);
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        if !self.ready.is_empty() {
            return Ok(());
        }
        // Milliseconds, rounded up: late is correct, early would spin.
        let ms = match wait {
            Wait::No => 0,
            Wait::For(ns) => i32::try_from(ns.div_ceil(1_000_000)).unwrap_or(i32::MAX),
            Wait::Forever => -1,
        };
        self.enters += 1;
        let mut events = [Event { events: 0, data: 0 }; BATCH];
        match epoll::wait(self.epoll.as_raw_fd(), ms, &mut events) {
            Ok(n) => {
                self.ready.extend(events.iter().take(n).map(|e| Token(e.data)));
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>, max: usize) {
        let n = self.ready.len().min(max);
        out.extend(self.ready.drain(..n).map(|t| (t, 1)));
    }

    fn has_events(&mut self) -> bool {
        !self.ready.is_empty()
    }

    fn forget(&mut self, _: &Descriptor) {}

    fn enters(&self) -> u64 {
        self.enters
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}
