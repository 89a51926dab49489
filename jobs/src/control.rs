//! What a piece of work on iothreads and its owner on the main thread share: progress, rate, pausing, cancelling.
//!
//! Made by the owner, asked by the work before each step. Any thread. Nothing here waits with a lock held.

use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;

use graph::{Errno, Result};
use host::sync::WaitQueue;

/// Called with (done, total) whenever either changed; from any thread, so it must be quick.
pub type Watch = Box<dyn Fn(u64, u64) + Send + Sync>;

#[derive(Default)]
struct Gate {
    /// How many want it to rest.
    pauses: u32,
    /// Pieces of work on iothreads.
    active: u32,
}

/// See the module's words. Shared as an [`Arc`].
#[derive(Default)]
pub struct Control {
    done: AtomicU64,
    total: AtomicU64,
    rate: AtomicU64,
    cancelled: AtomicBool,
    gate: Mutex<Gate>,
    /// Told when anything in `gate` or `cancelled` changed.
    changed: WaitQueue,
    watch: OnceLock<Watch>,
}

/// One piece of work that is under way on an iothread; what drains wait for.
#[must_use = "the work counts as ended when this is dropped"]
pub struct Active(Arc<Control>);

impl Drop for Active {
    fn drop(&mut self) {
        let idle = {
            let mut gate = self.0.gate();
            gate.active = gate.active.saturating_sub(1);
            gate.active == 0
        };
        if idle {
            self.0.changed.notify_all();
        }
    }
}

impl Control {
    /// No progress, no limit, running.
    pub fn new() -> Arc<Control> {
        Arc::default()
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names who hears of progress. Only the first call counts.
    pub fn watch(&self, watch: Watch) {
        let _ = self.watch.set(watch);
    }

    fn tell(&self) {
        if let Some(watch) = self.watch.get() {
            let (done, total) = self.progress();
            watch(done, total);
        }
    }

    /// (done, total), in units of the work: bytes where it copies.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }

    /// Sets how much there is to do.
    pub fn set_total(&self, total: u64) {
        self.total.store(total, Relaxed);
        self.tell();
    }

    /// Adds to what is done.
    pub fn advance(&self, by: u64) {
        self.done.fetch_add(by, Relaxed);
        self.tell();
    }

    /// Sets done and total together.
    pub fn set_progress(&self, done: u64, total: u64) {
        self.total.store(total, Relaxed);
        self.done.store(done, Relaxed);
        self.tell();
    }

    /// Bytes per second, 0 for no limit.
    pub fn rate(&self) -> u64 {
        self.rate.load(Relaxed)
    }

    /// Limits the rate to so many bytes per second; 0: no limit. Holds from the next request on.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Relaxed);
        self.changed.notify_all();
    }

    /// Asks the work to end; it does so with `ECANCELED` after the requests it has in flight.
    pub fn cancel(&self) {
        self.cancelled.store(true, SeqCst);
        self.changed.notify_all();
    }

    /// Whether it was asked to end.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(SeqCst)
    }

    /// One more who wants the work to rest. It counts; takes effect at once for whatever has not begun.
    pub fn pause(&self) {
        self.gate().pauses += 1;
        self.changed.notify_all();
    }

    /// One less.
    pub fn resume(&self) {
        {
            let mut gate = self.gate();
            debug_assert!(gate.pauses > 0, "resumed more often than paused");
            gate.pauses = gate.pauses.saturating_sub(1);
        }
        self.changed.notify_all();
    }

    /// Whether somebody wants it to rest.
    pub fn pausing(&self) -> bool {
        self.gate().pauses > 0
    }

    /// Whether the work should come to an end, for now or for good.
    pub fn stopping(&self) -> bool {
        self.cancelled() || self.pausing()
    }

    /// Begins a piece of work unless it should rest.
    pub fn try_enter(self: &Arc<Self>) -> Option<Active> {
        let mut gate = self.gate();
        if gate.pauses > 0 {
            return None;
        }
        gate.active += 1;
        Some(Active(Arc::clone(self)))
    }

    /// Begins a piece of work as soon as nobody wants it to rest.
    ///
    /// # Errors
    /// `ECANCELED`.
    pub async fn enter(self: &Arc<Self>) -> Result<Active> {
        loop {
            let changed = self.changed.wait();
            if self.cancelled() {
                return Err(Errno::ECANCELED.into());
            }
            if let Some(active) = self.try_enter() {
                return Ok(active);
            }
            changed.await;
        }
    }

    /// Whether a piece of work is under way.
    pub fn is_active(&self) -> bool {
        self.gate().active > 0
    }

    /// Wakes everybody who waits for a change: something else about the work has changed.
    pub fn poke(&self) {
        self.changed.notify_all();
    }

    /// Ends when the next thing about this changes; create it before looking.
    pub fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.changed.wait()
    }

    /// Ends when no piece of work is under way.
    pub async fn idle(&self) {
        loop {
            let changed = self.changed.wait();
            if self.gate().active == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Ends when the next thing about this changes, or when `timer` ends.
    pub async fn changed_or(&self, timer: impl Future<Output = ()>) {
        let mut changed = pin!(self.changed.wait());
        if self.stopping() {
            return;
        }
        let mut timer = pin!(timer);
        poll_fn(|cx| {
            if changed.as_mut().poll(cx).is_ready() || timer.as_mut().poll(cx).is_ready() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, total) = self.progress();
        write!(f, "Control({done}/{total}, cancelled: {}, pausing: {})", self.cancelled(), self.pausing())
    }
}
