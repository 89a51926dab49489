//! The seam between the loop of an iothread and the kernel: io_uring, worker threads behind epoll, or a simulation.
//!
//! Owned and called by the loop alone. A reactor delivers completions as (token, result) pairs and never calls out, so that
//! it can be borrowed mutably; it knows neither sources nor futures, only tokens.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::file::{Descriptor, File};

mod perform;
mod pins;
mod threads;
mod uring;

pub(crate) use perform::{Attempt, Op, Shipped, inline, perform};
pub(crate) use threads::Threads;
pub(crate) use uring::Uring;

/// Says what completed: kind (8 bits), number (24), slot or generation (32).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(pub(crate) u64);

/// What a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A fast operation: number = source, slot = its slot.
    Fast,
    /// An awaited operation: number = generation, slot = place in the slab.
    Awaited,
    /// A kick descriptor: number = source, slot = generation.
    Kick,
    /// The mailbox's bell.
    Bell,
    /// Nobody waits for it.
    Ignored,
}

/// Numbers have 24 bits.
pub(crate) const NUMBER_MASK: u32 = (1 << 24) - 1;

impl Token {
    pub(crate) fn new(kind: Kind, number: u32, slot: u32) -> Token {
        Token((kind as u64) << 56 | u64::from(number & NUMBER_MASK) << 32 | u64::from(slot))
    }

    pub(crate) fn kind(self) -> Kind {
        match self.0 >> 56 {
            0 => Kind::Fast,
            1 => Kind::Awaited,
            2 => Kind::Kick,
            3 => Kind::Bell,
            _ => Kind::Ignored,
        }
    }

    pub(crate) fn number(self) -> u32 {
        (self.0 >> 32) as u32 & NUMBER_MASK
    }

    pub(crate) fn slot(self) -> u32 {
        self.0 as u32
    }
}

/// How long [`Reactor::enter`] may wait for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all.
    No,
    /// At most so many nanoseconds.
    For(u64),
    /// Until something happens.
    Forever,
}

/// See the module's page.
pub(crate) trait Reactor {
    /// Starts an operation, at the latest with the next `enter`. Never fails: errors come as completions. `false`: this
    /// reactor does no I/O, the caller must ship it to the worker pool.
    ///
    /// # Safety
    /// The memory that `op` points to stays valid and in place until the completion with `token`, and `file` open at least
    /// until the next `enter`.
    unsafe fn submit(&mut self, file: &Arc<File>, op: Op, token: Token) -> bool;

    /// Delivers a completion with `token` whenever `fd` becomes readable, until `unpoll`. The descriptor stays open until then.
    fn poll(&mut self, fd: RawFd, token: Token);

    /// Ends that. When it returns, the descriptor is not used any more; completions already on their way may still come.
    fn unpoll(&mut self, token: Token);

    /// One system call if there is a reason for one: submits what is queued, lets the kernel finish what it can, and waits.
    fn enter(&mut self, wait: Wait) -> io::Result<()>;

    /// Moves up to `max` completions into `out`.
    fn reap(&mut self, out: &mut Vec<(Token, i32)>, max: usize);

    /// True if `enter` or `reap` have something to do. Reads memory only.
    fn has_events(&mut self) -> bool;

    /// Lets go of a file.
    fn forget(&mut self, fd: &Descriptor);

    /// Has the kernel keep the pages of these ranges (address, length) at hand for operations on O_DIRECT files, under `id`
    /// until `unpin`. Reactors that gain nothing by it do nothing.
    ///
    /// # Safety
    /// The ranges stay mapped, to the same memory, until `unpin` with this `id`.
    unsafe fn pin(&mut self, _id: u64, _ranges: &[(usize, usize)]) -> io::Result<()> {
        Ok(())
    }

    /// Ends it. Operations under way go on with the pages they have.
    fn unpin(&mut self, _id: u64) {}

    /// System calls made by `enter` so far.
    fn enters(&self) -> u64;

    /// For diagnostics.
    fn name(&self) -> &'static str;

    /// True if time is virtual: the loop must not spin, and `enter` moves the clock.
    fn is_virtual(&self) -> bool {
        false
    }
}
