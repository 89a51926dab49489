//! Group commit: at most one runs, at most one comes next, everybody who asks meanwhile joins that one.
//!
//! Used by flushes of all iothreads. The leader runs the work inside its own request, so that nothing outlives a drain.
//! Must not know what the work is.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use graph::{Errno, Result};
use host::sync::WaitQueue;

/// How many failures are remembered for those who have not looked yet.
const FAILURES: usize = 64;

#[derive(Default)]
struct State {
    /// Number of the last one that began.
    begun: u64,
    /// Number of the last one that ended.
    ended: u64,
    running: bool,
    failures: VecDeque<(u64, Errno)>,
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Group {
    state: Mutex<State>,
    /// The same as `State::running`, to be read without the lock.
    running: AtomicBool,
    queue: WaitQueue,
}

/// The leader; also when its future is dropped the next one may begin.
struct Leading<'a> {
    group: &'a Group,
    number: u64,
    result: Option<Errno>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        state.ended = self.number;
        state.running = false;
        self.group.running.store(false, SeqCst);
        if let Some(errno) = self.result {
            state.failures.push_back((self.number, errno));
            if state.failures.len() > FAILURES {
                state.failures.pop_front();
            }
        }
        drop(state);
        self.group.queue.notify_all();
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one runs now.
    pub(super) fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }

    /// Returns after a run that began after this call did: by leading it, or by waiting for it.
    ///
    /// # Errors
    /// That run's. A follower gets its number without the words.
    pub(super) async fn join<F, Fut>(&self, run: F) -> Result<()>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<()>>,
    {
        // Whatever runs now may have taken its copies before our caller's writes.
        let needed = self.lock().begun + 1;
        loop {
            let wait = self.queue.wait();
            let leading = {
                let mut state = self.lock();
                if state.ended >= needed {
                    // One run at a time: the first that ended at or after `needed` is `needed` itself.
                    let failure = state.failures.iter().find(|(n, _)| *n == needed).map(|(_, e)| *e);
                    return failure.map_or(Ok(()), |e| Err(e.into()));
                }
                if state.running {
                    None
                } else {
                    state.running = true;
                    self.running.store(true, SeqCst);
                    state.begun += 1;
                    Some(Leading { group: self, number: state.begun, result: Some(Errno::ECANCELED) })
                }
            };
            if let Some(mut leading) = leading {
                drop(wait);
                let result = run().await;
                leading.result = result.as_ref().err().map(graph::BlockError::errno);
                return result;
            }
            wait.await;
        }
    }
}
