//! Wait queues and events.
//!
//! Used by drivers, throttle groups and drain. A notification is never lost between a check and the wait if the waiter
//! creates its [`Wait`] before it checks.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::primitive::{Mutex, lock};

struct Waiter {
    id: u64,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Queue {
    waiters: VecDeque<Waiter>,
    next: u64,
}

/// Futures that wait for somebody to call, oldest first.
pub struct WaitQueue(Mutex<Queue>);

impl Default for WaitQueue {
    fn default() -> Self {
        Self::new()
    }
}

impl WaitQueue {
    /// An empty queue.
    pub fn new() -> Self {
        WaitQueue(Mutex::new(Queue::default()))
    }

    /// Enters the queue at once; the future ends when this entry is notified.
    pub fn wait(&self) -> Wait<'_> {
        let mut q = lock(&self.0);
        let id = q.next;
        q.next += 1;
        q.waiters.push_back(Waiter { id, waker: None });
        Wait { queue: self, id, done: false }
    }

    /// Releases the oldest waiter. Returns false if there was none.
    pub fn notify_one(&self) -> bool {
        match self.release_one() {
            Some(waker) => {
                if let Some(w) = waker {
                    w.wake();
                }
                true
            }
            None => false,
        }
    }

    /// As [`WaitQueue::notify_one`], but leaves the waking (if it was polled yet) to the caller.
    pub(super) fn release_one(&self) -> Option<Option<Waker>> {
        lock(&self.0).waiters.pop_front().map(|w| w.waker)
    }

    /// Releases everybody who waits now.
    pub fn notify_all(&self) {
        let all = std::mem::take(&mut lock(&self.0).waiters);
        for w in all.into_iter().filter_map(|w| w.waker) {
            w.wake();
        }
    }

    /// Number of waiters.
    pub fn len(&self) -> usize {
        lock(&self.0).waiters.len()
    }

    /// True if nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// See [`WaitQueue::wait`]. Dropped after it was notified by `notify_one` and before it noticed, it passes the
/// notification on.
pub struct Wait<'a> {
    queue: &'a WaitQueue,
    id: u64,
    done: bool,
}

impl Wait<'_> {
    /// True if it was notified; then the notification is the caller's, and dropping `self` passes nothing on.
    pub(super) fn take_notified(&mut self) -> bool {
        if !self.done {
            let id = self.id;
            self.done = lock(&self.queue.0).waiters.binary_search_by(|w| w.id.cmp(&id)).is_err();
        }
        self.done
    }
}

impl Future for Wait<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let id = self.id;
        let mut q = lock(&self.queue.0);
        // Ids ascend, so that the entry is found by bisection.
        if let Ok(i) = q.waiters.binary_search_by(|w| w.id.cmp(&id)) {
            if let Some(w) = q.waiters.get_mut(i) {
                match &mut w.waker {
                    Some(old) => old.clone_from(cx.waker()),
                    w => *w = Some(cx.waker().clone()),
                }
            }
            return Poll::Pending;
        }
        drop(q);
        self.done = true;
        Poll::Ready(())
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut q = lock(&self.queue.0);
        let id = self.id;
        match q.waiters.binary_search_by(|w| w.id.cmp(&id)) {
            Ok(i) => {
                q.waiters.remove(i);
            }
            Err(_) => {
                drop(q);
                self.queue.notify_one();
            }
        }
    }
}

/// A flag that can be waited for; stays set until it is cleared.
pub struct Event {
    set: Mutex<bool>,
    queue: WaitQueue,
}

impl Default for Event {
    fn default() -> Self {
        Self::new()
    }
}

impl Event {
    /// An event that is not set.
    pub fn new() -> Self {
        Event { set: Mutex::new(false), queue: WaitQueue::new() }
    }

    /// Sets it and releases everybody who waits.
    pub fn set(&self) {
        *lock(&self.set) = true;
        self.queue.notify_all();
    }

    /// Clears it.
    pub fn clear(&self) {
        *lock(&self.set) = false;
    }

    /// True if set.
    pub fn is_set(&self) -> bool {
        *lock(&self.set)
    }

    /// Ends once the event is, or has meanwhile been, set.
    pub async fn wait(&self) {
        let w = self.queue.wait();
        if self.is_set() {
            return;
        }
        w.await;
    }
}
