//! Operations that a future waits for: a slab that owns their memory, whatever becomes of the future.
//!
//! Dropping the future while the kernel works detaches the operation: the slab keeps the buffers until the completion.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use libc::iovec;

use super::local::Local;
use crate::buf::IoVecs;
use crate::file::File;
use crate::reactor::{Kind, NUMBER_MASK, Token};

/// What keeps the memory of an operation in place.
#[derive(Default)]
pub(crate) struct Keep {
    pub(crate) _bufs: Option<IoVecs>,
    /// The iovecs, when they are not the list's own.
    pub(crate) iov: Vec<iovec>,
    pub(crate) _file: Option<Arc<File>>,
}

enum State {
    Free,
    Pending { waker: Option<Waker>, detached: bool },
    Done(i32),
}

struct Place {
    generation: u32,
    state: State,
    keep: Keep,
}

/// See the module's page.
#[derive(Default)]
pub(crate) struct Ops {
    places: Vec<Place>,
    free: Vec<u32>,
    pending: usize,
}

impl Ops {
    /// A place for an operation. Never moves `keep.iov`'s memory, only its handle.
    pub(crate) fn insert(&mut self, keep: Keep) -> Token {
        self.pending += 1;
        let state = State::Pending { waker: None, detached: false };
        let (i, generation) =
            match self.free.pop().and_then(|i| self.places.get_mut(i as usize).map(|p| (i, p))) {
                Some((i, p)) => {
                    p.generation = (p.generation + 1) & NUMBER_MASK;
                    p.state = state;
                    p.keep = keep;
                    (i, p.generation)
                }
                None => {
                    self.places.push(Place { generation: 0, state, keep });
                    ((self.places.len() - 1) as u32, 0)
                }
            };
        Token::new(Kind::Awaited, generation, i)
    }

    fn place(&mut self, t: Token) -> Option<&mut Place> {
        self.places.get_mut(t.slot() as usize).filter(|p| p.generation == t.number())
    }

    fn release(&mut self, t: Token) -> Keep {
        match self.place(t) {
            Some(p) => {
                p.state = State::Free;
                let keep = std::mem::take(&mut p.keep);
                self.free.push(t.slot());
                keep
            }
            None => Keep::default(),
        }
    }

    /// Takes a result. Returns what must be woken and dropped outside of the borrow.
    pub(crate) fn complete(&mut self, t: Token, res: i32) -> (Option<Waker>, Keep) {
        let Some(p) = self.place(t) else { return (None, Keep::default()) };
        match std::mem::replace(&mut p.state, State::Done(res)) {
            State::Pending { waker, detached } => {
                self.pending -= 1;
                if detached { (None, self.release(t)) } else { (waker, Keep::default()) }
            }
            other => {
                p.state = other;
                (None, Keep::default())
            }
        }
    }

    /// Operations that the kernel (or a worker thread) still has.
    pub(crate) fn pending(&self) -> usize {
        self.pending
    }
}

/// The future of one operation: its raw result, and its iovec memory back for the next one.
pub(crate) struct OpFuture {
    local: Local,
    token: Token,
    finished: bool,
}

impl OpFuture {
    pub(crate) fn new(local: Local, token: Token) -> OpFuture {
        OpFuture { local, token, finished: false }
    }
}

impl Future for OpFuture {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let token = self.token;
        let (res, keep) = {
            let mut ops = self.local.inner().ops.borrow_mut();
            let res = match ops.place(token).map(|p| &mut p.state) {
                Some(State::Done(res)) => *res,
                Some(State::Pending { waker, .. }) => {
                    match waker {
                        Some(w) => w.clone_from(cx.waker()),
                        w => *w = Some(cx.waker().clone()),
                    }
                    return Poll::Pending;
                }
                // Polled after it was done: answered once already.
                Some(State::Free) | None => return Poll::Pending,
            };
            (res, ops.release(token))
        };
        self.finished = true;
        drop(keep);
        Poll::Ready(res)
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let token = self.token;
        let keep = {
            let mut ops = self.local.inner().ops.borrow_mut();
            match ops.place(token).map(|p| &mut p.state) {
                Some(State::Pending { waker, detached }) => {
                    *waker = None;
                    *detached = true;
                    Keep::default()
                }
                Some(State::Done(_)) => ops.release(token),
                _ => Keep::default(),
            }
        };
        drop(keep);
    }
}
