//! A mutex whose waiters are futures, handed over in the order of asking.
//!
//! Used by drivers for metadata shared between iothreads. Holding it over a suspension point is what it is for.

use std::cell::UnsafeCell;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context, Poll};

use super::event::{Wait, WaitQueue};
use crate::primitive::{Mutex as Plain, lock};

/// See the module's page.
pub struct Mutex<T> {
    /// True while a guard exists or the lock is on its way to the waiter that was notified.
    taken: Plain<bool>,
    queue: WaitQueue,
    value: UnsafeCell<T>,
}

// SAFETY: `taken` admits one guard at a time, whichever thread asks, so that the value is only ever reached by one thread;
// it moves between threads with the guard, hence T: Send.
unsafe impl<T: Send> Sync for Mutex<T> {}
// SAFETY: owning the mutex is owning the value.
unsafe impl<T: Send> Send for Mutex<T> {}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Mutex { taken: Plain::new(false), queue: WaitQueue::new(), value: UnsafeCell::new(value) }
    }

    /// Locks, waiting for its turn.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        let turn = {
            let mut taken = lock(&self.taken);
            if !*taken {
                *taken = true;
                return MutexGuard { mutex: self };
            }
            // Under the lock: an unlock cannot slip in between the test and the entry into the queue.
            Turn { mutex: self, wait: self.queue.wait(), used: false }
        };
        turn.await
    }

    fn unlock(&self) {
        let next = {
            let mut taken = lock(&self.taken);
            let next = self.queue.release_one();
            // Handed over: the lock stays taken, so that nobody overtakes the one who waits longest.
            *taken = next.is_some();
            next
        };
        if let Some(Some(w)) = next {
            w.wake();
        }
    }

    /// Locks if nobody holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let mut taken = lock(&self.taken);
        if *taken {
            return None;
        }
        *taken = true;
        Some(MutexGuard { mutex: self })
    }

    /// The value; no lock is needed for a mutable reference.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

/// A place in the queue. Notified means: owns the lock.
struct Turn<'a, T> {
    mutex: &'a Mutex<T>,
    wait: Wait<'a>,
    used: bool,
}

impl<'a, T> Future for Turn<'a, T> {
    type Output = MutexGuard<'a, T>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match Pin::new(&mut self.wait).poll(cx) {
            Poll::Ready(()) => {
                self.used = true;
                Poll::Ready(MutexGuard { mutex: self.mutex })
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        if !self.used && self.wait.take_notified() {
            self.mutex.unlock();
        }
    }
}

/// Access to the value of a locked [`Mutex`].
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
}

// SAFETY: sharing a guard shares nothing but `&T`.
unsafe impl<T: Sync> Sync for MutexGuard<'_, T> {}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard is the only one (`taken`), and it is borrowed for as long as the reference lives.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and the guard is borrowed mutably.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.mutex.unlock();
    }
}
