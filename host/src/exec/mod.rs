//! The executor: futures of one thread, polled in the order in which they became runnable.
//!
//! An iothread's `Local` owns one, the main thread's [`MainExecutor`] another. A wake on the executor's own thread is a push
//! to a plain queue; a wake from elsewhere goes through a [`RemoteWake`] (the mailbox of that thread). A future that panics
//! is dropped and logged, the others go on. It must not know about I/O or time.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use crate::primitive::atomic::{AtomicBool, Ordering};

mod join;
mod main;
pub use join::join_all;
pub use main::{MainExecutor, MainRemote, block_on};

#[cfg(test)]
mod tests;

/// Carries a wake to the thread of an executor. It must end in [`Executor::wake`] on that thread.
pub trait RemoteWake: Send + Sync {
    /// Delivers `task`; may drop it when the thread is gone.
    fn wake_remote(&self, task: Arc<TaskHandle>);
}

/// What a waker points to: a place in one executor. It outlives the task; waking a place that is empty or taken by
/// another task is harmless (futures must bear spurious polls).
pub struct TaskHandle {
    executor: u64,
    slot: u32,
    remote: Arc<dyn RemoteWake>,
    /// Set while a delivery is under way, so that a storm of wakes is one message.
    underway: AtomicBool,
}

impl TaskHandle {
    fn deliver(this: &Arc<Self>) {
        // Pairs with the store in `Executor::wake`: who finds it false sees everything before that, and sends anew.
        if !this.underway.swap(true, Ordering::AcqRel) {
            this.remote.wake_remote(Arc::clone(this));
        }
    }
}

impl Wake for TaskHandle {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let here = HERE.try_with(|all| {
            let all = all.try_borrow().ok()?;
            all.iter().find(|q| q.executor == self.executor).map(|q| q.push(self.slot))
        });
        if !matches!(here, Ok(Some(()))) {
            TaskHandle::deliver(self);
        }
    }
}

thread_local! {
    /// The executors of this thread: one, but for tests.
    static HERE: RefCell<Vec<Rc<ReadyQueue>>> = const { RefCell::new(Vec::new()) };
}

struct ReadyQueue {
    executor: u64,
    queue: RefCell<VecDeque<u32>>,
    /// Per slot: already in `queue`.
    queued: RefCell<Vec<bool>>,
    /// Called when the queue stops being empty outside of `run_ready`.
    on_ready: Option<Box<dyn Fn()>>,
    running: Cell<bool>,
}

impl ReadyQueue {
    fn push(&self, slot: u32) {
        {
            let mut queued = self.queued.borrow_mut();
            match queued.get_mut(slot as usize) {
                Some(q) if !*q => *q = true,
                _ => return,
            }
        }
        let first = {
            let mut q = self.queue.borrow_mut();
            q.push_back(slot);
            q.len() == 1
        };
        if first
            && !self.running.get()
            && let Some(f) = &self.on_ready
        {
            f();
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    /// Absent while the slot is free, and while the task is being polled.
    task: Option<Task>,
    live: bool,
    waker: Option<Waker>,
}

struct Slab {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// See the module's page. Cheap to clone; all clones are the same executor. `!Send`.
#[derive(Clone)]
pub struct Executor {
    inner: Rc<Inner>,
}

struct Inner {
    ready: Rc<ReadyQueue>,
    tasks: RefCell<Slab>,
    live: Cell<usize>,
    panics: Cell<usize>,
    remote: Arc<dyn RemoteWake>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let id = self.ready.executor;
        let _ = HERE.try_with(|all| {
            if let Ok(mut all) = all.try_borrow_mut() {
                all.retain(|q| q.executor != id);
            }
        });
    }
}

impl Executor {
    /// An executor of the calling thread. `remote` carries wakes from other threads back to it.
    pub fn new(remote: Arc<dyn RemoteWake>) -> Self {
        Self::with_hook(remote, None)
    }

    /// As [`Executor::new`]; `on_ready` runs when something becomes runnable while `run_ready` is not on the stack.
    pub(crate) fn with_hook(remote: Arc<dyn RemoteWake>, on_ready: Option<Box<dyn Fn()>>) -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let ready = Rc::new(ReadyQueue {
            executor: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            queue: RefCell::new(VecDeque::new()),
            queued: RefCell::new(Vec::new()),
            on_ready,
            running: Cell::new(false),
        });
        let _ = HERE.try_with(|all| all.borrow_mut().push(Rc::clone(&ready)));
        Executor {
            inner: Rc::new(Inner {
                ready,
                tasks: RefCell::new(Slab { slots: Vec::new(), free: Vec::new() }),
                live: Cell::new(0),
                panics: Cell::new(0),
                remote,
            }),
        }
    }

    /// Adds a task; it is polled for the first time by the next [`Executor::run_ready`].
    pub fn spawn(&self, f: impl Future<Output = ()> + 'static) {
        self.spawn_boxed(Box::pin(f));
    }

    fn spawn_boxed(&self, task: Task) {
        let slot = {
            let mut s = self.inner.tasks.borrow_mut();
            match s.free.pop() {
                Some(i) => {
                    let slot = &mut s.slots[i as usize];
                    slot.task = Some(task);
                    slot.live = true;
                    i
                }
                None => {
                    let i = s.slots.len() as u32;
                    let handle = Arc::new(TaskHandle {
                        executor: self.inner.ready.executor,
                        slot: i,
                        remote: Arc::clone(&self.inner.remote),
                        underway: AtomicBool::new(false),
                    });
                    // The handle stays with the slot: a task costs no allocation for its waker.
                    s.slots.push(Slot { task: Some(task), live: true, waker: Some(Waker::from(handle)) });
                    self.inner.ready.queued.borrow_mut().push(false);
                    i
                }
            }
        };
        self.inner.live.set(self.inner.live.get() + 1);
        self.inner.ready.push(slot);
    }

    /// Takes a wake that came from another thread. A handle of another executor is ignored.
    pub fn wake(&self, task: &TaskHandle) {
        // Before the push: a wake that comes after this line brings a message of its own.
        task.underway.store(false, Ordering::Release);
        if task.executor == self.inner.ready.executor {
            self.inner.ready.push(task.slot);
        }
    }

    /// Polls every task that is runnable now, once, in order; those that become runnable meanwhile wait for the next
    /// call. Returns how many were polled.
    pub fn run_ready(&self) -> usize {
        let n = self.inner.ready.queue.borrow().len();
        if n == 0 {
            return 0;
        }
        let outer = self.inner.ready.running.replace(true);
        for _ in 0..n {
            let Some(slot) = self.inner.ready.queue.borrow_mut().pop_front() else { break };
            self.poll_slot(slot);
        }
        self.inner.ready.running.set(outer);
        n
    }

    fn poll_slot(&self, i: u32) {
        if let Some(q) = self.inner.ready.queued.borrow_mut().get_mut(i as usize) {
            *q = false;
        }
        let (mut task, waker) = {
            let mut s = self.inner.tasks.borrow_mut();
            let Some(slot) = s.slots.get_mut(i as usize) else { return };
            match (slot.task.take(), slot.waker.take()) {
                (Some(t), Some(w)) => (t, w),
                (t, w) => {
                    // Free, or a stale wake: nothing to poll.
                    slot.task = t;
                    slot.waker = w;
                    return;
                }
            }
        };
        let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(&waker))));
        let done = match polled {
            Ok(Poll::Pending) => false,
            Ok(Poll::Ready(())) => true,
            Err(p) => {
                log::error!("a task panicked and is dropped: {}", panic_text(p.as_ref()));
                self.inner.panics.set(self.inner.panics.get() + 1);
                true
            }
        };
        if done {
            // Dropping runs foreign code, which may spawn or wake: no borrow may be held.
            if catch_unwind(AssertUnwindSafe(move || drop(task))).is_err() {
                log::error!("a task panicked while it was dropped");
            }
            let mut s = self.inner.tasks.borrow_mut();
            if let Some(slot) = s.slots.get_mut(i as usize) {
                slot.live = false;
                slot.waker = Some(waker);
            }
            s.free.push(i);
            self.inner.live.set(self.inner.live.get() - 1);
        } else {
            let mut s = self.inner.tasks.borrow_mut();
            if let Some(slot) = s.slots.get_mut(i as usize) {
                slot.task = Some(task);
                slot.waker = Some(waker);
            }
        }
    }

    /// True if something can be polled now.
    #[inline]
    pub fn has_ready(&self) -> bool {
        !self.inner.ready.queue.borrow().is_empty()
    }

    /// True if no task lives, runnable or not.
    pub fn is_idle(&self) -> bool {
        self.inner.live.get() == 0
    }

    /// Number of tasks that have not ended.
    pub fn live(&self) -> usize {
        self.inner.live.get()
    }

    /// Tasks that ended by a panic.
    pub fn panics(&self) -> usize {
        self.inner.panics.get()
    }

    /// Drops every task. Tasks that their destructors spawn are dropped as well.
    pub fn clear(&self) {
        loop {
            let victims: Vec<Task> = {
                let mut s = self.inner.tasks.borrow_mut();
                let mut out = Vec::new();
                let Slab { slots, free } = &mut *s;
                for (i, slot) in slots.iter_mut().enumerate() {
                    if slot.live
                        && let Some(t) = slot.task.take()
                    {
                        slot.live = false;
                        free.push(i as u32);
                        out.push(t);
                    }
                }
                out
            };
            if victims.is_empty() {
                return;
            }
            self.inner.live.set(self.inner.live.get().saturating_sub(victims.len()));
            for v in victims {
                if catch_unwind(AssertUnwindSafe(move || drop(v))).is_err() {
                    log::error!("a task panicked while it was dropped");
                }
            }
        }
    }
}

/// The words of a panic, as far as it has any.
pub(crate) fn panic_text(p: &(dyn Any + Send)) -> &str {
    p.downcast_ref::<&str>()
        .copied()
        .or_else(|| p.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("?")
}
