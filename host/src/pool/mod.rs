//! Threads for calls that block: opens, ioctls, compression, and all I/O where io_uring is refused.
//!
//! Used through [`run`] by the main thread and by `Local::blocking`. The pool is bounded, its threads end after a short
//! idle time, and an idle process has none. A job must not wait for another job.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::exec::panic_text;
use crate::sync::oneshot;

#[cfg(test)]
mod tests;

/// How long a thread without work stays.
const LINGER: Duration = Duration::from_millis(200);
/// Virtual size of a worker's stack; only what is used is resident.
const STACK: usize = 512 * 1024;
/// Threads of the shared pool. QEMU allows 64 per event loop.
const CONTROL_THREADS: usize = 16;
/// Threads that do I/O in place of io_uring, for the whole process.
const IO_THREADS: usize = 32;

type Job = Box<dyn FnOnce() + Send>;

/// A bounded set of threads that comes and goes with the work.
pub struct Pool {
    state: Mutex<State>,
    work: Condvar,
    name: &'static str,
    max: usize,
}

struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// For control work. A disk that hangs cannot fill it: reads and writes have a pool of their own.
static CONTROL: Pool = Pool::new("pool", CONTROL_THREADS);
/// For reads, writes and flushes in place of io_uring.
pub(crate) static IO: Pool = Pool::new("pool-io", IO_THREADS);

/// Runs `f` on a worker thread. Starts at once; dropping the future does not stop it. If `f` panics, so does whoever
/// awaits the result.
pub fn run<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> impl Future<Output = R> + Send {
    let (tx, rx) = oneshot::channel();
    CONTROL.submit(Box::new(move || {
        let _ = tx.send(catch_unwind(AssertUnwindSafe(f)));
    }));
    async move {
        match rx.await {
            Ok(Ok(r)) => r,
            Ok(Err(p)) => resume_unwind(p),
            // The sender lives in the job, and a job that was submitted runs.
            Err(crate::iothread::Gone) => std::future::pending().await,
        }
    }
}

impl Pool {
    const fn new(name: &'static str, max: usize) -> Self {
        Pool {
            state: Mutex::new(State { queue: VecDeque::new(), threads: 0, idle: 0 }),
            work: Condvar::new(),
            name,
            max,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a job; starts a thread when none is free and the bound allows.
    pub(crate) fn submit(&'static self, job: Job) {
        let mut s = self.lock();
        s.queue.push_back(job);
        if s.idle >= s.queue.len() {
            drop(s);
            self.work.notify_one();
            return;
        }
        if s.threads >= self.max {
            return;
        }
        s.threads += 1;
        drop(s);
        if let Err(e) = crate::iothread::spawn_quiet(self.name, STACK, move || self.work_loop()) {
            let mut s = self.lock();
            s.threads -= 1;
            if s.threads > 0 {
                // The others get to it.
                return;
            }
            // No thread at all: better late here than never.
            log::warn!("cannot start a worker thread ({e}); the calling thread does the work");
            while let Some(job) = s.queue.pop_front() {
                drop(s);
                run_job(job);
                s = self.lock();
            }
        }
    }

    fn work_loop(&self) {
        let mut s = self.lock();
        loop {
            if let Some(job) = s.queue.pop_front() {
                drop(s);
                run_job(job);
                s = self.lock();
                continue;
            }
            s.idle += 1;
            let (guard, timeout) = match self.work.wait_timeout(s, LINGER) {
                Ok(r) => r,
                Err(poisoned) => poisoned.into_inner(),
            };
            s = guard;
            s.idle -= 1;
            if timeout.timed_out() && s.queue.is_empty() {
                s.threads -= 1;
                return;
            }
        }
    }

    /// Threads that live now.
    #[cfg(test)]
    pub(crate) fn threads(&self) -> usize {
        self.lock().threads
    }
}

fn run_job(job: Job) {
    if let Err(p) = catch_unwind(AssertUnwindSafe(job)) {
        log::error!("a job of the worker pool panicked: {}", panic_text(p.as_ref()));
    }
}
