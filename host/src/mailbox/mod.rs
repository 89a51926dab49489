//! Messages to a thread that may be asleep in a system call.
//!
//! Many senders, one receiver. A sender takes a short lock and, only if the receiver has said that it sleeps, wakes it.
//! The whole handshake lives in one atomic byte, so that no ordering between two variables has to be argued.
//! Used by iothreads and by the main thread's executor. It must not block on anything but its own short lock.

use crate::primitive::atomic::{AtomicU8, Ordering};
use crate::primitive::{Mutex, lock};

#[cfg(test)]
mod tests;

/// Nothing to read, the receiver is awake.
const EMPTY: u8 = 0;
/// There may be something to read.
const MAIL: u8 = 1;
/// Nothing to read, the receiver sleeps or is about to.
const ASLEEP: u8 = 2;

/// A queue that was longer than this gives its memory back once it is read.
const KEEP_CAPACITY: usize = 256;

/// Ends the sleep of a receiver.
pub trait Notify: Send + Sync {
    /// Called at most once per sleep, from any thread.
    fn notify(&self);
}

/// See the module's page.
pub struct Mailbox<T> {
    state: AtomicU8,
    queue: Mutex<Queue<T>>,
    bell: Box<dyn Notify>,
}

struct Queue<T> {
    items: Vec<T>,
    closed: bool,
}

impl<T> Mailbox<T> {
    /// An open, empty mailbox whose receiver is awake.
    pub fn new(bell: Box<dyn Notify>) -> Self {
        Mailbox {
            state: AtomicU8::new(EMPTY),
            queue: Mutex::new(Queue { items: Vec::new(), closed: false }),
            bell,
        }
    }

    /// Appends `item` and wakes the receiver if it sleeps. Gives the item back when the mailbox is closed.
    pub fn send(&self, item: T) -> Result<(), T> {
        {
            let mut q = lock(&self.queue);
            if q.closed {
                return Err(item);
            }
            q.items.push(item);
        }
        // Replaces ASLEEP as well: exactly one sender sees it and rings. Pairs with the receiver's exchanges in
        // `drain`, `prepare_sleep` and `awake`: one of the two sides sees the other's.
        if self.state.swap(MAIL, Ordering::AcqRel) == ASLEEP {
            self.bell.notify();
        }
        Ok(())
    }

    /// True if [`Mailbox::drain`] may find something. Reads memory only, for busy polling.
    #[inline]
    pub fn has_mail(&self) -> bool {
        self.state.load(Ordering::Relaxed) == MAIL
    }

    /// Moves everything into `into`, which must be empty, in the order of sending. Receiver only.
    pub fn drain(&self, into: &mut Vec<T>) {
        // The state first: a message that comes after it sets MAIL again, at worst for nothing.
        self.state.swap(EMPTY, Ordering::AcqRel);
        let mut q = lock(&self.queue);
        std::mem::swap(&mut q.items, into);
        if q.items.capacity() > KEEP_CAPACITY {
            q.items = Vec::new();
        }
    }

    /// Announces sleep. False if there is mail: then the receiver must not sleep. Receiver only.
    pub fn prepare_sleep(&self) -> bool {
        self.state.compare_exchange(EMPTY, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Takes the announcement back, after waking for whatever reason. Receiver only.
    pub fn awake(&self) {
        // Fails when a sender has left mail meanwhile, which must stay announced.
        let _ = self.state.compare_exchange(ASLEEP, EMPTY, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Refuses everything from now on and returns what was never read.
    pub fn close(&self) -> Vec<T> {
        let mut q = lock(&self.queue);
        q.closed = true;
        std::mem::take(&mut q.items)
    }
}

/// An eventfd as a bell.
pub struct EventFdBell(std::sync::Arc<std::os::fd::OwnedFd>);

impl EventFdBell {
    /// A bell over a non-blocking eventfd.
    pub fn new(fd: std::sync::Arc<std::os::fd::OwnedFd>) -> Self {
        EventFdBell(fd)
    }
}

impl Notify for EventFdBell {
    fn notify(&self) {
        // EAGAIN means that the counter is full, so that it is readable already; nothing else can happen to an eventfd.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

/// A non-blocking eventfd, closed on exec.
pub(crate) fn eventfd() -> std::io::Result<std::os::fd::OwnedFd> {
    use rustix::event::EventfdFlags;
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}
