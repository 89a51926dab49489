//! The simulated host: the loop of an iothread on the test's own thread, with a virtual clock and a disk that misbehaves.
//!
//! Operations work on real files (a memfd, a temporary file) but take effect late in virtual time, in an order of the
//! seed's choosing, come out short, are interrupted, or fail. The same seed gives the same run. For tests of this and
//! the other crates; it must never be used by the process itself.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::clock::Clock;
use crate::file::{Descriptor, File};
use crate::iothread::{Counters, Driver, Ended, Inbox, Local, PollParams, SharedPoll};
use crate::mailbox::Notify;
use crate::reactor::{Op, Reactor, Token, Wait, perform};

#[cfg(test)]
mod tests;

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// A read.
    Read,
    /// A write; `dsync`: durable by itself.
    Write {
        /// See above.
        dsync: bool,
    },
    /// fdatasync.
    Sync,
    /// Any change of allocation, with the mode as `fallocate(2)` has it.
    Fallocate {
        /// The `FALLOC_FL_` bits; 0 also for the ioctls of devices.
        mode: i32,
    },
}

/// One operation, as a fault rule or a recorder sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Serial number in the order of starting, from 0.
    pub index: u64,
    /// What it does.
    pub kind: OpKind,
    /// The file.
    pub path: PathBuf,
    /// Begin of the range in bytes.
    pub offset: u64,
    /// Length of the range in bytes.
    pub len: u64,
}

/// A completed operation, in the order of taking effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it was.
    pub event: Event,
    /// Operations that had completed when this one was started: it is ordered after those, and after no others.
    pub started_after: u64,
    /// The result: bytes, or minus an errno.
    pub result: i32,
    /// What a write has written.
    pub data: Vec<u8>,
}

/// A rule: an errno to fail the operation with.
pub type Rule = Box<dyn FnMut(&Event) -> Option<i32>>;

/// How the disk misbehaves. The default only delays and reorders.
pub struct Faults {
    /// Bounds of the virtual time an operation takes, in ns.
    pub latency: RangeInclusive<u64>,
    /// Reads and writes that come out short, of 1000.
    pub short: u32,
    /// Operations that end with `EINTR` and no effect, of 1000.
    pub eintr: u32,
    /// Operations that end with `EAGAIN` and no effect, of 1000; never more than two in a row.
    pub eagain: u32,
    /// Decides over each operation when it is started; it then fails without effect.
    pub fail: Option<Rule>,
    /// Receives every completed operation.
    pub record: Option<Rc<RefCell<Vec<Record>>>>,
}

impl Default for Faults {
    fn default() -> Self {
        Faults { latency: 1_000..=1_000_000, short: 0, eintr: 0, eagain: 0, fail: None, record: None }
    }
}

impl Faults {
    /// Short transfers, interruptions and refusals in plenty, no errors: everything must still come out right.
    pub fn rough() -> Self {
        Faults { short: 200, eintr: 100, eagain: 100, ..Faults::default() }
    }

    /// Fails the `nth` operation (from 0) for which `which` holds.
    pub fn fail_nth(mut self, nth: u64, errno: i32, mut which: impl FnMut(&Event) -> bool + 'static) -> Self {
        let mut before = self.fail.take();
        let mut seen = 0;
        self.fail = Some(Box::new(move |e| {
            if let Some(r) = before.as_mut().and_then(|b| b(e)) {
                return Some(r);
            }
            if !which(e) {
                return None;
            }
            seen += 1;
            (seen == nth + 1).then_some(errno)
        }));
        self
    }
}

/// Why a simulation has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimError {
    /// Nothing is in flight, no timer is set, and the future is not done: it would wait for ever.
    Stalled,
    /// A task other than the main one panicked.
    TaskPanicked,
}

/// Runs a future to its end. A panic in it passes through.
///
/// Errors: see [`SimError`].
pub fn run<R, F, Fut>(seed: u64, faults: Faults, f: F) -> Result<R, SimError>
where
    R: 'static,
    F: FnOnce(Local) -> Fut,
    Fut: Future<Output = R> + 'static,
{
    let clock = Rc::new(Cell::new(1_000_000_000));
    let stalled = Rc::new(Cell::new(false));
    let reactor = SimReactor {
        clock: Rc::clone(&clock),
        stalled: Rc::clone(&stalled),
        rng: Rng(seed),
        faults,
        queue: BTreeMap::new(),
        ready: Vec::new(),
        started: 0,
        completed: 0,
        refusals: 0,
        enters: 0,
    };
    struct Silent;
    impl Notify for Silent {
        fn notify(&self) {}
    }
    let inbox = Arc::new(Inbox::new(Box::new(Silent)));
    let counters = Arc::new(Counters::default());
    let local = Local::new(Box::new(reactor), Clock::Virtual(clock), inbox, counters, 0);
    let out = Rc::new(RefCell::new(None));
    local.spawn(Main { fut: Box::pin(f(local.clone())), out: Rc::clone(&out) });
    let mut driver = Driver::new(local.clone(), Arc::new(SharedPoll::new(PollParams::default())));
    let result = loop {
        let ended = driver.step();
        if let Some(r) = out.borrow_mut().take() {
            break Some(r);
        }
        if stalled.get() || ended == Ended::Stopped {
            break None;
        }
    };
    // The other tasks end here, as when an iothread stops.
    local.inner().exec.clear();
    // What is still in flight gets its end, as the kernel would give it: detached buffers must not be touched later.
    while !stalled.get() && !local.is_quiet() {
        driver.step();
    }
    let panics = local.inner().exec.panics();
    drop(driver);
    match result {
        Some(Err(p)) => resume_unwind(p),
        _ if panics > 0 => Err(SimError::TaskPanicked),
        Some(Ok(r)) => Ok(r),
        None => Err(SimError::Stalled),
    }
}

/// The outcome of the main future.
type Outcome<R> = Rc<RefCell<Option<std::thread::Result<R>>>>;

/// The main future; keeps a panic for the caller.
struct Main<R> {
    fut: Pin<Box<dyn Future<Output = R>>>,
    out: Outcome<R>,
}

impl<R> Future for Main<R> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let r = match catch_unwind(AssertUnwindSafe(|| self.fut.as_mut().poll(cx))) {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(r)) => Ok(r),
            Err(p) => Err(p),
        };
        *self.out.borrow_mut() = Some(r);
        Poll::Ready(())
    }
}

/// splitmix64: small, and the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.next() % n }
    }

    fn per_mille(&mut self, n: u32) -> bool {
        n > 0 && self.below(1000) < u64::from(n)
    }
}

struct InFlight {
    file: Arc<File>,
    op: Op,
    token: Token,
    event: Event,
    started_after: u64,
    /// Decided at the start: a result without effect.
    verdict: Option<i32>,
    /// At most so many bytes.
    cut: Option<usize>,
}

struct SimReactor {
    clock: Rc<Cell<u64>>,
    stalled: Rc<Cell<bool>>,
    rng: Rng,
    faults: Faults,
    /// By completion time, then by serial number.
    queue: BTreeMap<(u64, u64), InFlight>,
    ready: Vec<(Token, i32)>,
    started: u64,
    completed: u64,
    refusals: u32,
    enters: u64,
}

impl SimReactor {
    fn complete_due(&mut self) {
        let now = self.clock.get();
        while let Some(first) = self.queue.first_entry() {
            if first.key().0 > now {
                return;
            }
            let f = first.remove();
            let (result, data) = match f.verdict {
                Some(r) => (r, Vec::new()),
                None => self.execute(&f),
            };
            self.completed += 1;
            if let Some(r) = &self.faults.record {
                r.borrow_mut().push(Record { event: f.event, started_after: f.started_after, result, data });
            }
            self.ready.push((f.token, result));
        }
    }

    fn execute(&self, f: &InFlight) -> (i32, Vec<u8>) {
        let mut op = f.op;
        let mut cut = Vec::new();
        if let (Some(mut left), Op::Readv { iov, n, .. } | Op::Writev { iov, n, .. }) = (f.cut, &mut op) {
            // SAFETY: readable until the completion (contract of `submit`).
            for v in unsafe { std::slice::from_raw_parts(*iov, *n as usize) } {
                let len = v.iov_len.min(left);
                left -= len;
                cut.push(libc::iovec { iov_base: v.iov_base, iov_len: len });
            }
            *iov = cut.as_ptr();
        }
        // SAFETY: the memory is valid until the completion, which comes after this; the Arc keeps the file open.
        let r = unsafe { perform(f.file.raw_fd(), &op, 0) };
        let mut data = Vec::new();
        if let (true, Op::Writev { iov, n, .. }) = (self.faults.record.is_some() && r > 0, op) {
            // SAFETY: as above.
            for v in unsafe { std::slice::from_raw_parts(iov, n as usize) } {
                // SAFETY: as above; bytes are copied at once.
                data.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(v.iov_base.cast::<u8>(), v.iov_len)
                });
            }
            data.truncate(r as usize);
        }
        (r, data)
    }
}

fn describe(op: &Op) -> (OpKind, u64, u64) {
    let total = |iov: *const libc::iovec, n: u32| {
        // SAFETY: readable (contract of `submit`, whose caller this serves).
        unsafe { std::slice::from_raw_parts(iov, n as usize) }.iter().map(|v| v.iov_len as u64).sum()
    };
    match *op {
        Op::Readv { iov, n, off } => (OpKind::Read, off, total(iov, n)),
        Op::Writev { iov, n, off, dsync } => (OpKind::Write { dsync }, off, total(iov, n)),
        Op::Sync => (OpKind::Sync, 0, 0),
        Op::Fallocate { mode, off, len } => (OpKind::Fallocate { mode }, off, len),
        Op::DeviceDiscard { off, len } | Op::DeviceZero { off, len } => {
            (OpKind::Fallocate { mode: 0 }, off, len)
        }
    }
}

impl Reactor for SimReactor {
    unsafe fn submit(&mut self, file: &Arc<File>, op: Op, token: Token) -> bool {
        let (kind, offset, len) = describe(&op);
        let event = Event { index: self.started, kind, path: file.path().to_path_buf(), offset, len };
        self.started += 1;
        let mut verdict = self.faults.fail.as_mut().and_then(|f| f(&event)).map(|e| -e);
        if verdict.is_none() && self.refusals < 2 {
            if self.rng.per_mille(self.faults.eintr) {
                verdict = Some(-libc::EINTR);
            } else if self.rng.per_mille(self.faults.eagain) {
                verdict = Some(-libc::EAGAIN);
            }
        }
        self.refusals = if verdict.is_some() { self.refusals + 1 } else { 0 };
        let cut = (matches!(op, Op::Readv { .. } | Op::Writev { .. })
            && self.rng.per_mille(self.faults.short))
        .then(|| {
            let a = u64::from(file.alignment().offset.max(1));
            // At least one unit: nothing at all would mean the end of the file, or a full disk.
            (1 + self.rng.below(len / a)) * a
        })
        .filter(|c| *c < len)
        .map(|c| c as usize);
        let (low, high) = (*self.faults.latency.start(), *self.faults.latency.end());
        let at = self.clock.get() + low + self.rng.below(high.saturating_sub(low) + 1);
        let started_after = self.completed;
        let f = InFlight { file: Arc::clone(file), op, token, event, started_after, verdict, cut };
        self.queue.insert((at, self.started), f);
        true
    }

    fn poll(&mut self, _: RawFd, _: Token) {}

    fn unpoll(&mut self, _: Token) {}

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.enters += 1;
        self.complete_due();
        if wait == Wait::No || !self.ready.is_empty() {
            return Ok(());
        }
        let next = self.queue.first_key_value().map(|((t, _), _)| *t);
        let deadline = match wait {
            Wait::For(ns) => Some(self.clock.get().saturating_add(ns)),
            _ => None,
        };
        match [next, deadline].into_iter().flatten().min() {
            Some(t) => self.clock.set(t.max(self.clock.get())),
            None => self.stalled.set(true),
        }
        self.complete_due();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>, max: usize) {
        let n = self.ready.len().min(max);
        out.extend(self.ready.drain(..n));
    }

    fn has_events(&mut self) -> bool {
        !self.ready.is_empty()
    }

    fn forget(&mut self, _: &Descriptor) {}

    fn enters(&self) -> u64 {
        self.enters
    }

    fn name(&self) -> &'static str {
        "simulation"
    }

    fn is_virtual(&self) -> bool {
        true
    }
}
