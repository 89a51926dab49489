//! The iothread: an OS thread that runs futures, queues and their I/O; and its handle.
//!
//! Created by the main thread for each `iothread` object; its handle is shared by everybody who sends work to it. Code on
//! the thread uses [`Local`]. The loop is in `run.rs`. Which virtqueue runs where is the backend's business.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use crate::Engine;
use crate::exec::{RemoteWake, TaskHandle, block_on};
use crate::file::{Descriptor, FileUser};
use crate::mailbox::{EventFdBell, Mailbox, eventfd};
use crate::reactor::{Reactor, Threads, Token, Uring};
use crate::sync::oneshot;

mod adaptive;
mod inline;
mod local;
mod ops;
mod run;
mod source;
mod stats;
mod transfer;

pub use local::{Local, Sleep, YieldNow};
pub use source::{FastOp, Source, SourceId};
pub use stats::IoThreadStats;
pub use transfer::FallocMode;

pub(crate) use run::{Driver, Ended};
pub(crate) use stats::Counters;

#[cfg(all(test, not(loom)))]
mod loop_tests;
#[cfg(all(test, not(loom)))]
mod tests;

/// Virtual size of an iothread's stack; only what is used is resident.
const STACK: usize = 1024 * 1024;

/// The thread that should have answered has ended, or dropped the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the thread that was asked has ended")
    }
}

impl std::error::Error for Gone {}

/// Adaptive polling, with the names and the meaning that QEMU's `iothread` object gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollParams {
    /// Longest time in ns spent polling before sleeping; 0 turns polling off.
    pub max_ns: u64,
    /// Factor by which the polling time grows; 0 means 2.
    pub grow: u64,
    /// Divisor by which it shrinks; 0 means back to nothing at once.
    pub shrink: u64,
    /// Kept for the management interface (`aio-max-batch`, 0 = default). One enter per turn takes whatever is queued.
    pub aio_max_batch: u64,
}

impl Default for PollParams {
    fn default() -> Self {
        PollParams { max_ns: 32_768, grow: 0, shrink: 0, aio_max_batch: 0 }
    }
}

/// What an iothread is started with.
#[derive(Clone, Debug, Default)]
pub struct IoThreadOptions {
    /// Name of the thread, seen in `ps` (15 bytes of it).
    pub name: String,
    /// How I/O reaches the kernel.
    pub engine: Engine,
    /// Adaptive polling.
    pub poll: PollParams,
}

/// What other threads send.
pub(crate) enum Message {
    Run(Box<dyn FnOnce(&Local) + Send>),
    Wake(Arc<TaskHandle>),
    /// A worker thread has done an operation.
    Done(Token, i32),
    Forget(Arc<Descriptor>),
    Stop,
}

pub(crate) type Inbox = Mailbox<Message>;

impl RemoteWake for Inbox {
    fn wake_remote(&self, task: Arc<TaskHandle>) {
        let _ = self.send(Message::Wake(task));
    }
}

impl FileUser for Inbox {
    fn forget(&self, fd: Arc<Descriptor>) {
        // A thread that is gone has dropped its ring, and with it the file.
        let _ = self.send(Message::Forget(fd));
    }
}

/// Polling parameters that others may change while the loop runs.
pub(crate) struct SharedPoll {
    max: AtomicU64,
    grow: AtomicU64,
    shrink: AtomicU64,
    batch: AtomicU64,
}

impl SharedPoll {
    pub(crate) fn new(p: PollParams) -> SharedPoll {
        let s = SharedPoll {
            max: AtomicU64::new(0),
            grow: AtomicU64::new(0),
            shrink: AtomicU64::new(0),
            batch: AtomicU64::new(0),
        };
        s.set(p);
        s
    }

    pub(crate) fn get(&self) -> PollParams {
        PollParams {
            max_ns: self.max.load(Ordering::Relaxed),
            grow: self.grow.load(Ordering::Relaxed),
            shrink: self.shrink.load(Ordering::Relaxed),
            aio_max_batch: self.batch.load(Ordering::Relaxed),
        }
    }

    fn set(&self, p: PollParams) {
        // Each is meaningful for itself: a mixture of old and new for one turn harms nobody.
        self.max.store(p.max_ns, Ordering::Relaxed);
        self.grow.store(p.grow, Ordering::Relaxed);
        self.shrink.store(p.shrink, Ordering::Relaxed);
        self.batch.store(p.aio_max_batch, Ordering::Relaxed);
    }
}

struct Shared {
    inbox: Arc<Inbox>,
    counters: Arc<Counters>,
    poll: Arc<SharedPoll>,
    name: String,
    tid: AtomicI32,
    id: usize,
    engine: &'static str,
    join: Mutex<Option<JoinHandle<()>>>,
    stopped: AtomicBool,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The thread ends when nothing is in flight; whoever wants to wait for that uses `stop`.
        if !*self.stopped.get_mut() {
            let _ = self.inbox.send(Message::Stop);
        }
    }
}

/// Handle of an iothread. The thread ends after [`IoThread::stop`], or after the last handle is dropped.
#[derive(Clone)]
pub struct IoThread(Arc<Shared>);

/// What the reactor needs to be built on the thread itself.
type MakeReactor = Box<dyn FnOnce() -> io::Result<Box<dyn Reactor>> + Send>;

/// Builds the reactor that an engine asks for. `Auto` falls back, with one line in the log.
fn make_reactor(
    engine: Engine,
    uring: impl FnOnce() -> io::Result<Box<dyn Reactor>>,
) -> io::Result<Box<dyn Reactor>> {
    match engine {
        Engine::Threads => Ok(Box::new(Threads::new()?)),
        Engine::IoUring => uring(),
        Engine::Auto => uring().or_else(|e| {
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| log::info!("no io_uring here ({e}); worker threads do the I/O"));
            Ok(Box::new(Threads::new()?) as Box<dyn Reactor>)
        }),
    }
}

impl IoThread {
    /// Starts a thread; returns when it runs.
    ///
    /// Errors: no io_uring with [`Engine::IoUring`] (`ENOSYS`, `EPERM`, `ENOMEM`), no thread (`EAGAIN`), no descriptors.
    pub fn start(o: IoThreadOptions) -> io::Result<IoThread> {
        let engine = o.engine;
        IoThread::start_with(
            o,
            Box::new(move || make_reactor(engine, || Ok(Box::new(Uring::new()?) as Box<dyn Reactor>))),
        )
    }

    fn start_with(o: IoThreadOptions, make: MakeReactor) -> io::Result<IoThread> {
        let bell = Arc::new(eventfd()?);
        let inbox = Arc::new(Inbox::new(Box::new(EventFdBell::new(Arc::clone(&bell)))));
        let counters = Arc::new(Counters::default());
        let poll = Arc::new(SharedPoll::new(o.poll));
        let index = Index::take();
        let id = index.0;
        let (tx, rx) = mpsc::sync_channel(1);
        let (inbox2, counters2, poll2) = (Arc::clone(&inbox), Arc::clone(&counters), Arc::clone(&poll));
        let name = if o.name.is_empty() { "iothread" } else { &o.name };
        let join = spawn_quiet(name, STACK, move || {
            let index = index;
            let reactor = match make() {
                Ok(r) => r,
                Err(e) => {
                    let _ = tx.send(Err(e));
                    return;
                }
            };
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            let started = tx.send(Ok((tid, reactor.name()))).is_ok();
            let local = Local::new(reactor, crate::clock::Clock::Real, inbox2, counters2, index.0);
            if started {
                local.watch_bell(&bell);
                Driver::new(local, poll2).run();
            }
            drop(index);
        })?;
        let (tid, engine) = match rx.recv() {
            Ok(Ok(r)) => r,
            Ok(Err(e)) => {
                let _ = join.join();
                return Err(e);
            }
            Err(_) => return Err(io::Error::other("the iothread ended while it started")),
        };
        Ok(IoThread(Arc::new(Shared {
            inbox,
            counters,
            poll,
            name: o.name,
            tid: AtomicI32::new(tid),
            id,
            engine,
            join: Mutex::new(Some(join)),
            stopped: AtomicBool::new(false),
        })))
    }

    /// Runs `f` on the thread, after everything posted before. Dropped unrun if the thread has ended. `f` must not block.
    pub fn post(&self, f: impl FnOnce(&Local) + Send + 'static) {
        let _ = self.0.inbox.send(Message::Run(Box::new(f)));
    }

    /// Runs a future on the thread; starts at once, whether or not the answer is awaited. The answer may be awaited anywhere.
    ///
    /// Errors: [`Gone`] if the thread ended, or the future panicked, before there was an answer.
    pub fn call<R, F, Fut>(&self, f: F) -> impl Future<Output = Result<R, Gone>> + Send + use<R, F, Fut>
    where
        R: Send + 'static,
        F: FnOnce(Local) -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
    {
        let (tx, rx) = oneshot::channel();
        self.post(move |local| {
            let fut = f(local.clone());
            local.spawn(async move {
                let _ = tx.send(fut.await);
            });
        });
        rx
    }

    /// As [`IoThread::call`], blocking the calling thread. On the iothread itself it would wait for itself: there it
    /// answers [`Gone`] at once.
    pub fn call_blocking<R, F, Fut>(&self, f: F) -> Result<R, Gone>
    where
        R: Send + 'static,
        F: FnOnce(Local) -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
    {
        if self.is_current() {
            log::error!("a blocking call from iothread '{}' to itself", self.0.name);
            return Err(Gone);
        }
        block_on(self.call(f))
    }

    /// True on the thread itself.
    pub fn is_current(&self) -> bool {
        rustix::thread::gettid().as_raw_nonzero().get() == self.tid()
    }

    /// The polling parameters.
    pub fn poll_params(&self) -> PollParams {
        self.0.poll.get()
    }

    /// Changes the polling parameters; they hold from the next time the thread has nothing to do.
    pub fn set_poll_params(&self, p: PollParams) {
        self.0.poll.set(p);
    }

    /// The kernel's number of the thread.
    pub fn tid(&self) -> i32 {
        self.0.tid.load(Ordering::Relaxed)
    }

    /// Counters since the start.
    pub fn stats(&self) -> IoThreadStats {
        self.0.counters.snapshot()
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A small number, unique among the living.
    pub fn id(&self) -> usize {
        self.0.id
    }

    /// The engine in use, for humans: `io_uring`, `io_uring (plain)`, `threads`…
    pub fn engine(&self) -> &'static str {
        self.0.engine
    }

    /// Ends the thread: lets everything in flight and everything runnable finish, drops the tasks that still wait for
    /// something else, joins. Later posts are dropped. Not to be called on the thread itself (then it does not wait).
    pub fn stop(self) {
        self.0.stopped.store(true, Ordering::Relaxed);
        let _ = self.0.inbox.send(Message::Stop);
        if self.is_current() {
            return;
        }
        let join = self.0.join.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(j) = join
            && j.join().is_err()
        {
            log::error!("iothread '{}' ended with a panic", self.0.name);
        }
    }
}

/// A small number that is given back on drop.
struct Index(usize);

static INDICES: Mutex<Vec<bool>> = Mutex::new(Vec::new());

impl Index {
    fn take() -> Index {
        let mut all = INDICES.lock().unwrap_or_else(PoisonError::into_inner);
        match all.iter().position(|used| !used) {
            Some(i) => {
                all[i] = true;
                Index(i)
            }
            None => {
                all.push(true);
                Index(all.len() - 1)
            }
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        if let Some(u) = INDICES.lock().unwrap_or_else(PoisonError::into_inner).get_mut(self.0) {
            *u = false;
        }
    }
}

/// Starts a thread that no signal is delivered to: signals are the main thread's.
pub(crate) fn spawn_quiet(
    name: &str,
    stack: usize,
    f: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let mut old = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // A new thread inherits the mask. Blocked before it starts, so that there is no moment without.
    // SAFETY: sigfillset initialises `all`; pthread_sigmask reads it and initialises `old`.
    let masked = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        // Faults stay deliverable: blocked, they would end the process without a word.
        for s in [libc::SIGBUS, libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP] {
            libc::sigdelset(all.as_mut_ptr(), s);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), old.as_mut_ptr()) == 0
    };
    // Linux keeps 15 bytes, std refuses NUL.
    let name: String = name.chars().filter(|c| *c != '\0').collect();
    let r = std::thread::Builder::new().name(name).stack_size(stack).spawn(f);
    if masked {
        // SAFETY: `old` was initialised by the call that succeeded.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, old.as_ptr(), std::ptr::null_mut()) };
    }
    r
}
