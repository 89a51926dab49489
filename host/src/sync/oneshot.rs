//! One value from one thread to a future on another.
//!
//! Used for every answer that crosses threads. It must not lose the wake-up between a poll and a send.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::iothread::Gone;
use crate::primitive::{Mutex, lock};

struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
    sender_gone: bool,
    receiver_gone: bool,
}

/// The sending half; dropping it unused answers [`Gone`].
pub struct Sender<T>(Arc<Mutex<State<T>>>);
/// The receiving half: a future of the value.
pub struct Receiver<T>(Arc<Mutex<State<T>>>);

/// A connected pair.
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let s =
        Arc::new(Mutex::new(State { value: None, waker: None, sender_gone: false, receiver_gone: false }));
    (Sender(Arc::clone(&s)), Receiver(s))
}

impl<T> Sender<T> {
    /// Delivers; gives the value back when nobody waits any more.
    pub fn send(self, value: T) -> Result<(), T> {
        let waker = {
            let mut s = lock(&self.0);
            if s.receiver_gone {
                return Err(value);
            }
            s.value = Some(value);
            s.waker.take()
        };
        // Outside of the lock: a waker runs foreign code.
        if let Some(w) = waker {
            w.wake();
        }
        Ok(())
    }

    /// True if the receiver was dropped.
    pub fn is_closed(&self) -> bool {
        lock(&self.0).receiver_gone
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut s = lock(&self.0);
            s.sender_gone = true;
            s.waker.take()
        };
        if let Some(w) = waker {
            w.wake();
        }
    }
}

impl<T> Receiver<T> {
    /// The value, if it has arrived.
    pub fn try_recv(&mut self) -> Option<T> {
        lock(&self.0).value.take()
    }
}

impl<T> Future for Receiver<T> {
    type Output = Result<T, Gone>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut s = lock(&self.0);
        if let Some(v) = s.value.take() {
            return Poll::Ready(Ok(v));
        }
        if s.sender_gone {
            return Poll::Ready(Err(Gone));
        }
        match &mut s.waker {
            Some(w) => w.clone_from(cx.waker()),
            w => *w = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let (value, waker) = {
            let mut s = lock(&self.0);
            s.receiver_gone = true;
            (s.value.take(), s.waker.take())
        };
        drop((value, waker));
    }
}
