//! Sources of requests (virtqueues) and the fast path of their operations.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use super::local::Local;
use crate::file::File;
use crate::reactor::{Kind, NUMBER_MASK, Op, Token};

/// Completions handed out between two `end_batch`.
pub(crate) const BATCH: usize = 32;

/// A stream of requests that lives on one iothread. All calls come from that thread's loop.
///
/// A source is *armed* when its notifications are on, which it is while the thread sleeps; the loop disarms it when it has
/// work and then calls `poll` on every turn. A source that held work back until one of its fast operations ends is polled
/// after that; one that waits for anything else calls [`Local::kick`] when the time has come.
pub trait Source {
    /// Takes new work and starts it; true if there was any.
    fn poll(&self) -> bool;
    /// A fast operation ended: `res` is a count of bytes or minus an errno.
    fn complete(&self, slot: u32, res: i32);
    /// Called after completions were delivered (at most 32 of them), after `poll` found work, and after tasks ran. Publish
    /// what has completed and notify; must be cheap when nothing has.
    fn end_batch(&self);
    /// True if `poll` would find something. Reads memory only: called while busy polling.
    fn has_work(&self) -> bool;
    /// Turns notifications on; true means that work arrived before that took effect.
    fn arm(&self) -> bool;
    /// Turns notifications off.
    fn disarm(&self);
}

/// Names a source on its iothread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceId(pub(crate) u32);

/// One raw operation of the fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FastOp {
    /// Read into the iovecs.
    Readv,
    /// Write from the iovecs; `dsync`: durable before it completes (`RWF_DSYNC`).
    Writev {
        /// See above.
        dsync: bool,
    },
    /// fdatasync; iovecs and offset are ignored.
    Fsync,
}

/// A source and what the loop knows about it.
#[derive(Default)]
pub(crate) struct Entry {
    pub(crate) source: Option<Rc<dyn Source>>,
    /// Notifications are on: it is polled only when kicked.
    pub(crate) armed: bool,
    /// Must be polled in this turn.
    pub(crate) kicked: bool,
    /// Removed, kept for the completions of what is in flight.
    pub(crate) closing: bool,
    pub(crate) inflight: u32,
    kick: Option<OwnedFd>,
    kick_generation: u32,
}

impl Entry {
    #[inline]
    pub(crate) fn live(&self) -> Option<&Rc<dyn Source>> {
        if self.closing { None } else { self.source.as_ref() }
    }

    /// A kick of an earlier descriptor is none.
    pub(crate) fn kicked_by(&mut self, generation: u32) {
        if self.kick.is_some() && self.kick_generation == generation {
            self.kicked = true;
        }
    }
}

impl Local {
    /// Adds a source. It is polled once in the next turn, whether or not it was kicked: work may have arrived before.
    pub fn add_source(&self, s: Rc<dyn Source>) -> SourceId {
        let mut all = self.inner().sources.borrow_mut();
        let free = all.iter().position(|e| e.source.is_none());
        let i = free.unwrap_or_else(|| {
            all.push(Entry::default());
            all.len() - 1
        });
        if let Some(e) = all.get_mut(i) {
            e.source = Some(s);
            e.armed = true;
            e.kicked = true;
            e.closing = false;
            e.inflight = 0;
        }
        // Ids fit the token's 24 bits: each source holds at least one descriptor, of which there are fewer.
        SourceId(i as u32 & NUMBER_MASK)
    }

    /// Removes a source: it is not polled any more. Completions of what is in flight are still delivered to it.
    pub fn remove_source(&self, id: SourceId) {
        self.set_kick(id, None);
        let gone = {
            let mut all = self.inner().sources.borrow_mut();
            match all.get_mut(id.0 as usize) {
                Some(e) if e.inflight == 0 => e.source.take(),
                Some(e) => {
                    e.closing = true;
                    None
                }
                None => None,
            }
        };
        // Foreign code runs in the destructor: after the borrow.
        drop(gone);
    }

    /// Sets the descriptor that announces work (an eventfd, which the caller has made sure of), or takes it away. It is
    /// watched, never read. When this returns, the old one is closed and not looked at any more.
    ///
    /// The source is polled once after a new descriptor was set: a kick may have come before.
    pub fn set_kick(&self, id: SourceId, fd: Option<OwnedFd>) {
        let old = {
            let mut all = self.inner().sources.borrow_mut();
            let Some(e) = all.get_mut(id.0 as usize).filter(|e| e.source.is_some()) else { return };
            let old = e.kick.take().map(|k| (k, e.kick_generation));
            e.kick_generation = e.kick_generation.wrapping_add(1);
            if fd.is_some() {
                e.kicked = true;
            }
            if let Some(f) = &fd {
                let token = Token::new(Kind::Kick, id.0, e.kick_generation);
                self.inner().reactor.borrow_mut().poll(f.as_raw_fd(), token);
            }
            e.kick = fd;
            old
        };
        if let Some((fd, generation)) = old {
            self.inner().reactor.borrow_mut().unpoll(Token::new(Kind::Kick, id.0, generation));
            drop(fd);
        }
    }

    /// Has the source polled in the next turn, as if it had been kicked.
    pub fn kick(&self, id: SourceId) {
        if let Some(e) = self.inner().sources.borrow_mut().get_mut(id.0 as usize) {
            e.kicked = true;
        }
    }

    /// Fast path: one raw operation, no future, no allocation. `Some(result)` when it was done on the spot; `None` when it
    /// is under way, and its result goes to `complete(slot, result)` of the source. Never fails for lack of room.
    ///
    /// The result is raw: reads and writes may be short, addresses are not bounced. Whoever cannot use a result as it is
    /// repeats the request through [`Local::read`] or [`Local::write`], which handle all that.
    ///
    /// # Safety
    /// `iov[..n]` and the memory it describes stay valid and unmoved until the result is known, `f` stays open until then
    /// (the caller keeps an `Arc`), and for `None` the source is not removed before.
    #[inline]
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn submit_fast(
        &self,
        s: SourceId,
        slot: u32,
        f: &Arc<File>,
        op: FastOp,
        iov: *const libc::iovec,
        n: u32,
        off: u64,
    ) -> Option<i32> {
        let op = match op {
            FastOp::Readv => Op::Readv { iov, n, off },
            FastOp::Writev { dsync } => Op::Writev { iov, n, off, dsync },
            FastOp::Fsync => Op::Sync,
        };
        // SAFETY: the caller's contract.
        if let Some(r) = unsafe { self.try_inline(f, &op) } {
            return Some(r);
        }
        if let Some(e) = self.inner().sources.borrow_mut().get_mut(s.0 as usize) {
            e.inflight += 1;
        }
        // SAFETY: the caller's contract.
        unsafe { self.start(f, op, Token::new(Kind::Fast, s.0, slot)) };
        None
    }

    /// Counts requests taken from rings, for the statistics.
    #[inline]
    pub fn note_requests(&self, n: u64) {
        self.inner().counters.requests.add(n);
    }

    /// Delivers the result of a fast operation.
    pub(crate) fn complete_fast(&self, token: Token, res: i32) {
        let (source, last) = {
            let mut all = self.inner().sources.borrow_mut();
            let Some(e) = all.get_mut(token.number() as usize) else { return };
            e.inflight = e.inflight.saturating_sub(1);
            if e.closing && e.inflight == 0 {
                e.closing = false;
                (e.source.take(), true)
            } else {
                // It may have held work back for want of a slot: look again, also if it is armed.
                e.kicked = true;
                (e.source.clone(), false)
            }
        };
        if let Some(s) = source {
            s.complete(token.slot(), res);
            if last {
                s.end_batch();
            }
        }
    }
}
