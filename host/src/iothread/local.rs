//! `Local`: what code on an iothread may do. Shared by the loop, the sources and the futures of one thread; never leaves it.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use super::inline::FileState;
use super::ops::Ops;
use super::source::Entry;
use super::{Counters, Inbox, Message};
use crate::clock::Clock;
use crate::exec::{Executor, RemoteWake};
use crate::file::{Descriptor, File, FileUser};
use crate::pool;
use crate::reactor::{self, Kind, Op, Reactor, Shipped, Token};
use crate::timer::Timers;

/// Handle usable only on its iothread (`!Send`); cheap to clone.
#[derive(Clone)]
pub struct Local(Rc<Inner>);

pub(crate) struct Inner {
    pub(crate) exec: Executor,
    pub(crate) reactor: RefCell<Box<dyn Reactor>>,
    pub(crate) ops: RefCell<Ops>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) sources: RefCell<Vec<Entry>>,
    files: RefCell<Vec<FileState>>,
    clock: Clock,
    coarse: Cell<u64>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) inbox: Arc<Inbox>,
    /// Calls on the worker pool that somebody awaits.
    blocking: Cell<usize>,
    id: usize,
    is_virtual: bool,
    /// Nothing is tried inline.
    ring_only: Cell<bool>,
    /// Operations started in this turn, and in the last one that started any.
    turn_ops: Cell<u32>,
    last_ops: Cell<u32>,
    /// Held as long as the ring may look at it.
    bell: RefCell<Option<Arc<OwnedFd>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Only after a panic in the loop: closing a ring does not wait for what it has in flight, so that the memory of
        // those operations may never be given back.
        let ops = self.ops.get_mut();
        if ops.pending() > 0 {
            std::mem::forget(std::mem::take(ops));
        }
    }
}

impl Local {
    pub(crate) fn new(
        reactor: Box<dyn Reactor>,
        clock: Clock,
        inbox: Arc<Inbox>,
        counters: Arc<Counters>,
        id: usize,
    ) -> Local {
        let remote: Arc<dyn RemoteWake> = inbox.clone();
        let is_virtual = reactor.is_virtual();
        Local(Rc::new(Inner {
            exec: Executor::new(remote),
            reactor: RefCell::new(reactor),
            ops: RefCell::default(),
            timers: RefCell::default(),
            sources: RefCell::default(),
            files: RefCell::default(),
            coarse: Cell::new(clock.now()),
            clock,
            counters,
            inbox,
            blocking: Cell::new(0),
            id,
            is_virtual,
            ring_only: Cell::new(is_virtual),
            turn_ops: Cell::new(0),
            last_ops: Cell::new(0),
            bell: RefCell::new(None),
        }))
    }

    #[inline]
    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    pub(crate) fn watch_bell(&self, bell: &Arc<OwnedFd>) {
        self.0.reactor.borrow_mut().poll(bell.as_raw_fd(), Token::new(Kind::Bell, 0, 0));
        *self.0.bell.borrow_mut() = Some(Arc::clone(bell));
    }

    /// Starts a task. It is polled within this turn or the next; it is dropped, unfinished, when the thread stops. A panic in
    /// it is logged and ends only this task.
    pub fn spawn(&self, f: impl Future<Output = ()> + 'static) {
        self.0.exec.spawn(f);
    }

    /// Nanoseconds of a monotonic clock (a virtual one in simulations).
    pub fn now(&self) -> u64 {
        self.refresh_clock()
    }

    /// The time as last read on this thread, in this turn or after the last sleep: free of charge.
    #[inline]
    pub fn coarse_now(&self) -> u64 {
        self.0.coarse.get()
    }

    pub(crate) fn refresh_clock(&self) -> u64 {
        let now = self.0.clock.now();
        self.0.coarse.set(now);
        now
    }

    /// The [`super::IoThread::id`] of this thread.
    pub fn thread_id(&self) -> usize {
        self.0.id
    }

    /// Ends `ns` nanoseconds from now, not earlier.
    pub fn sleep(&self, ns: u64) -> Sleep {
        self.sleep_until(self.now().saturating_add(ns))
    }

    /// Ends when [`Local::now`] has reached `deadline`.
    pub fn sleep_until(&self, deadline: u64) -> Sleep {
        let key = self.0.timers.borrow_mut().insert(deadline);
        Sleep { local: self.clone(), key }
    }

    /// Lets every other runnable task and every source have a turn.
    pub fn yield_now(&self) -> YieldNow {
        YieldNow(false)
    }

    /// Runs `f` on the worker pool. Dropping the future does not stop it.
    pub fn blocking<R, F>(&self, f: F) -> impl Future<Output = R> + use<R, F>
    where
        R: Send + 'static,
        F: FnOnce() -> R + Send + 'static,
    {
        let local = self.clone();
        async move {
            if local.0.is_virtual {
                // Deterministic: at once, seen a turn later.
                let r = f();
                local.yield_now().await;
                return r;
            }
            let _count = Blocking::new(local);
            pool::run(f).await
        }
    }

    pub(crate) fn is_virtual(&self) -> bool {
        self.0.is_virtual
    }

    /// Has the kernel keep these pages (address, length in bytes) at hand for operations on O_DIRECT files of this thread,
    /// until [`Local::unpin_memory`] with the same `id`; several users of an `id` are counted. Spares each operation the
    /// search for its pages. The pages are pinned: they cannot be given back to the host meanwhile.
    ///
    /// Errors: `ENOMEM` over `RLIMIT_MEMLOCK`, `ENOSPC` beyond 1024 pieces of 1 GiB, `EOPNOTSUPP` for memory that cannot be
    /// pinned. Nothing is pinned then.
    ///
    /// # Safety
    /// The ranges stay mapped to the same memory until then.
    pub unsafe fn pin_memory(&self, id: u64, ranges: &[(usize, usize)]) -> std::io::Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.0.reactor.borrow_mut().pin(id, ranges) }
    }

    /// Ends one use of an `id`. Operations under way go on.
    pub fn unpin_memory(&self, id: u64) {
        self.0.reactor.borrow_mut().unpin(id);
    }

    /// Whether operations may be done on this thread itself where that costs least, as they are by default. With `false` all
    /// of them go to the ring: for threads with a few long transfers, which the kernel then does beside each other.
    pub fn set_inline(&self, on: bool) {
        self.0.ring_only.set(!on || self.0.is_virtual);
    }

    /// True if no operation and no awaited pool call is under way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.0.ops.borrow().pending() == 0
            && self.0.blocking.get() == 0
            && self.0.sources.borrow().iter().all(|e| e.inflight == 0)
    }

    /// Starts an operation whose completion carries `token`.
    ///
    /// # Safety
    /// `op`'s memory stays valid and in place until the completion, and so does `f`.
    #[inline]
    pub(crate) unsafe fn start(&self, f: &Arc<File>, op: Op, token: Token) {
        self.note_op();
        // SAFETY: the caller's contract.
        let taken = unsafe { self.0.reactor.borrow_mut().submit(f, op, token) };
        if !taken {
            // SAFETY: the caller's contract.
            unsafe { self.ship(f, op, token) };
        }
    }

    /// Has a worker thread do it.
    ///
    /// # Safety
    /// As [`Local::start`].
    #[cold]
    pub(crate) unsafe fn ship(&self, f: &Arc<File>, op: Op, token: Token) {
        // SAFETY: the caller's contract; the loop does not end before the completion (`is_quiet`).
        let shipped = unsafe { Shipped::new(Arc::clone(f), op) };
        let inbox = Arc::clone(&self.0.inbox);
        pool::IO.submit(Box::new(move || {
            let res = shipped.run();
            let _ = inbox.send(Message::Done(token, res));
        }));
    }

    /// Does the operation here and now if that is the better way.
    ///
    /// # Safety
    /// `op`'s memory is valid during the call.
    #[inline]
    pub(crate) unsafe fn try_inline(&self, f: &Arc<File>, op: &Op) -> Option<i32> {
        let mut files = self.0.files.borrow_mut();
        let state = match files.get_mut(f.id() as usize) {
            Some(s) if s.known => s,
            _ => {
                self.meet(f, &mut files);
                files.get_mut(f.id() as usize)?
            }
        };
        if self.0.ring_only.get() || f.engine() == crate::Engine::Threads {
            return None;
        }
        let how = state.plan(f, op, self.0.turn_ops.get().max(self.0.last_ops.get()))?;
        // SAFETY: the caller's contract; `f` is open.
        match unsafe { reactor::inline(f.raw_fd(), op, how) } {
            Some(r) => {
                state.hit();
                self.note_op();
                self.0.counters.inline_ops.add(1);
                Some(r)
            }
            None => {
                state.miss();
                None
            }
        }
    }

    #[inline]
    fn note_op(&self) {
        self.0.turn_ops.set(self.0.turn_ops.get().saturating_add(1));
    }

    /// A turn begins: what the last one started says how full the next will be. `stale`: read the clock.
    #[inline]
    pub(crate) fn begin_turn(&self, stale: bool) -> u64 {
        let n = self.0.turn_ops.replace(0);
        if n > 0 {
            // Turns that start nothing (only completions arrived) say nothing.
            self.0.last_ops.set(n);
            self.0.counters.ops.add(u64::from(n));
        }
        if stale { self.refresh_clock() } else { self.coarse_now() }
    }

    /// First use of a file on this thread.
    #[cold]
    fn meet(&self, f: &Arc<File>, files: &mut Vec<FileState>) {
        let i = f.id() as usize;
        if files.len() <= i {
            files.resize_with(i + 1, FileState::default);
        }
        if let Some(s) = files.get_mut(i) {
            *s = FileState::default();
            s.known = true;
        }
        let weak: Weak<Inbox> = Arc::downgrade(&self.0.inbox);
        f.add_user(weak as Weak<dyn FileUser>);
    }

    /// The file is gone.
    pub(crate) fn forget_file(&self, fd: &Descriptor) {
        self.0.reactor.borrow_mut().forget(fd);
        if let Some(s) = self.0.files.borrow_mut().get_mut(fd.id() as usize) {
            *s = FileState::default();
        }
    }
}

/// Counts a call on the pool, so that the thread does not stop under it.
struct Blocking(Local);

impl Blocking {
    fn new(local: Local) -> Blocking {
        local.0.blocking.set(local.0.blocking.get() + 1);
        Blocking(local)
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        self.0.0.blocking.set(self.0.0.blocking.get().saturating_sub(1));
    }
}

/// See [`Local::sleep`].
pub struct Sleep {
    local: Local,
    key: (u64, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.local.0.timers.borrow_mut().register(self.key, cx.waker()) {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.local.0.timers.borrow_mut().remove(self.key);
    }
}

/// See [`Local::yield_now`].
pub struct YieldNow(bool);

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
