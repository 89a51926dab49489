//! The main thread's executor: runs inside an event loop that it does not own, which polls [`MainExecutor::fd`].
//!
//! Created and run by the process's main thread. Other threads reach it through [`MainRemote`]. It must not block.

use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use super::{Executor, RemoteWake, TaskHandle, panic_text};
use crate::mailbox::{EventFdBell, Mailbox, eventfd};

/// Rounds that one [`MainExecutor::run`] makes before it lets the event loop look at its descriptors.
const ROUNDS: usize = 16;

enum Message {
    Wake(Arc<TaskHandle>),
    Run(Box<dyn FnOnce() + Send>),
}

impl RemoteWake for Mailbox<Message> {
    fn wake_remote(&self, task: Arc<TaskHandle>) {
        let _ = self.send(Message::Wake(task));
    }
}

/// An executor whose eventfd is readable whenever something can run. `!Send`; cheap to clone.
#[derive(Clone)]
pub struct MainExecutor {
    exec: Executor,
    mailbox: Arc<Mailbox<Message>>,
    fd: Arc<OwnedFd>,
    running: std::rc::Rc<std::cell::Cell<bool>>,
}

/// Reaches a [`MainExecutor`] from any thread.
#[derive(Clone)]
pub struct MainRemote(Arc<Mailbox<Message>>);

impl MainRemote {
    /// Runs `f` on the main thread, after everything posted before. Dropped silently if that executor is gone.
    pub fn post(&self, f: impl FnOnce() + Send + 'static) {
        let _ = self.0.send(Message::Run(Box::new(f)));
    }
}

impl MainExecutor {
    /// An executor of the calling thread. Fails when no eventfd can be had.
    pub fn new() -> std::io::Result<Self> {
        let fd = Arc::new(eventfd()?);
        let mailbox = Arc::new(Mailbox::new(Box::new(EventFdBell::new(Arc::clone(&fd)))));
        // Between two runs the receiver counts as asleep: whoever sends rings.
        mailbox.prepare_sleep();
        let bell = EventFdBell::new(Arc::clone(&fd));
        let remote: Arc<dyn RemoteWake> = mailbox.clone();
        let running = std::rc::Rc::new(std::cell::Cell::new(false));
        let busy = std::rc::Rc::clone(&running);
        // Inside of `run` the queue is looked at anyway.
        let hook = move || {
            if !busy.get() {
                crate::mailbox::Notify::notify(&bell);
            }
        };
        let exec = Executor::with_hook(remote, Some(Box::new(hook)));
        Ok(MainExecutor { exec, mailbox, fd, running })
    }

    /// Readable when [`MainExecutor::run`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A handle for other threads.
    pub fn remote(&self) -> MainRemote {
        MainRemote(Arc::clone(&self.mailbox))
    }

    /// Adds a task; the eventfd becomes readable.
    pub fn spawn_local(&self, f: impl Future<Output = ()> + 'static) {
        self.exec.spawn(f);
    }

    /// Number of tasks that have not ended.
    pub fn live(&self) -> usize {
        self.exec.live()
    }

    /// Drops every task that has not ended.
    pub fn clear(&self) {
        self.exec.clear();
    }

    /// Polls what can run. When tasks keep each other busy it returns after a while with the eventfd still readable.
    pub fn run(&self) {
        let outer = self.running.replace(true);
        self.rounds();
        self.running.set(outer);
    }

    fn rounds(&self) {
        let mut counter = [0u8; 8];
        // EAGAIN: run() without a reason, which is allowed.
        let _ = rustix::io::read(&*self.fd, &mut counter);
        self.mailbox.awake();
        let mut mail = Vec::new();
        for _ in 0..ROUNDS {
            if self.mailbox.has_mail() {
                self.mailbox.drain(&mut mail);
                for m in mail.drain(..) {
                    match m {
                        Message::Wake(t) => self.exec.wake(&t),
                        Message::Run(f) => {
                            if let Err(p) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)) {
                                log::error!("a posted call panicked: {}", panic_text(p.as_ref()));
                            }
                        }
                    }
                }
            }
            let polled = self.exec.run_ready();
            if polled == 0 && !self.exec.has_ready() && self.mailbox.prepare_sleep() {
                return;
            }
        }
        // Not done: leave the eventfd readable. The mailbox stays awake, its mail is read by the run to come.
        let _ = rustix::io::write(&*self.fd, &1u64.to_ne_bytes());
    }

    /// Runs until `f` is done, sleeping on the eventfd in between. For start-up, tools and tests; not inside `run`.
    pub fn block_on<F: Future + 'static>(&self, f: F) -> F::Output {
        let out = std::rc::Rc::new(std::cell::RefCell::new(None));
        let slot = std::rc::Rc::clone(&out);
        self.spawn_local(async move {
            let r = f.await;
            *slot.borrow_mut() = Some(r);
        });
        loop {
            self.run();
            if let Some(r) = out.borrow_mut().take() {
                return r;
            }
            let mut fds = [rustix::event::PollFd::new(&*self.fd, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, None);
        }
    }
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks the calling thread on one future. For threads without an executor (vhost-user connections).
pub fn block_on<F: Future>(f: F) -> F::Output {
    let mut f = pin!(f);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(r) = f.as_mut().poll(&mut cx) {
            return r;
        }
        std::thread::park();
    }
}
