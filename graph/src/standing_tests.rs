//! Stopping a source whose queues come and go: by example, and with `--cfg loom` in all interleavings.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[cfg(not(loom))]
#[test]
fn a_queue_starts_as_its_source_stands() {
    let standing = Standing::new();
    assert_eq!(standing.join(), None);
    standing.go(1);
    assert_eq!(standing.join(), Some((false, 1)));
    standing.stop();
    assert_eq!(standing.join(), Some((true, 1)));
    standing.go(2);
    assert_eq!(standing.join(), Some((false, 2)));
    standing.end();
    assert_eq!(standing.join(), None);
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p ringblk-graph --lib --release loom_`.
///
/// Three threads. The main thread drains and resumes through the real gates and guards (`drain`); its source asks the
/// queues through the real mailbox (`host::mailbox`) and waits for real answers (`host::sync::oneshot`), as the device of an
/// export does. The iothread starts, pauses, resumes and stops a queue as `QueueWorker` does; its requests are in flight for
/// at least a turn. The connection's thread starts and stops the queue, waiting for each answer.
#[cfg(loom)]
mod model {
    use std::rc::Rc;

    use host::mailbox::{Mailbox, Notify};
    use host::sync::oneshot;
    use loom::sync::atomic::{AtomicBool, AtomicUsize};
    use loom::sync::{Arc, Condvar, Mutex};

    use super::*;
    use crate::drain::{DrainGuard, RequestSource, SourceGate};
    use crate::driver::BoxFut;
    use crate::edge::{RootInfo, WaysOut};
    use crate::view::View;

    type Views = std::sync::Arc<View>;

    enum Message {
        Start(oneshot::Sender<()>),
        Stop(oneshot::Sender<()>),
        Pause(oneshot::Sender<()>),
        Resume(Views),
        End,
    }

    /// An eventfd as far as it matters: sticky.
    #[derive(Default)]
    struct Bell {
        set: Mutex<bool>,
        rung: Condvar,
    }

    struct Ring(Arc<Bell>);
    impl Notify for Ring {
        fn notify(&self) {
            *self.0.set.lock().unwrap() = true;
            self.0.rung.notify_one();
        }
    }

    /// What all threads share.
    struct Shared {
        standing: Standing<Views>,
        mail: Mailbox<Message>,
        bell: Arc<Bell>,
        /// The main thread says: nothing may run.
        closed: AtomicBool,
        /// The address of the view that may be in use.
        view: AtomicUsize,
    }

    impl Shared {
        fn call(&self, message: impl FnOnce(oneshot::Sender<()>) -> Message) -> oneshot::Receiver<()> {
            let (sender, receiver) = oneshot::channel();
            assert!(self.mail.send(message(sender)).is_ok());
            receiver
        }
    }

    struct Queue {
        quiesced: bool,
        view: Views,
        in_flight: bool,
    }

    /// The iothread. `budget`: requests that come in.
    fn serve(shared: &Shared, mut budget: usize) {
        let mut queue: Option<Queue> = None;
        let mut pausing: Vec<oneshot::Sender<()>> = Vec::new();
        let mut stopping: Option<oneshot::Sender<()>> = None;
        let mut mail = Vec::new();
        let mut ended = false;
        loop {
            mail.clear();
            shared.mail.drain(&mut mail);
            for message in mail.drain(..) {
                match message {
                    Message::Start(answer) => {
                        // As `worker::start`.
                        if let Some((quiesced, view)) = shared.standing.join() {
                            queue = Some(Queue { quiesced, view, in_flight: false });
                        }
                        let _ = answer.send(());
                    }
                    Message::Stop(answer) => stopping = Some(answer),
                    Message::Pause(answer) => {
                        if let Some(queue) = &mut queue {
                            queue.quiesced = true;
                        }
                        pausing.push(answer);
                    }
                    Message::Resume(view) => {
                        if let Some(queue) = &mut queue {
                            queue.view = view;
                            queue.quiesced = false;
                        }
                    }
                    Message::End => ended = true,
                }
            }
            let mut busy = false;
            if let Some(queue) = &mut queue {
                if queue.in_flight {
                    assert!(!shared.closed.load(SeqCst), "in flight in a drained section");
                    queue.in_flight = false;
                } else if !queue.quiesced && stopping.is_none() && budget > 0 {
                    budget -= 1;
                    assert!(!shared.closed.load(SeqCst), "a request in a drained section");
                    let now = std::sync::Arc::as_ptr(&queue.view) as usize;
                    assert_eq!(now, shared.view.load(SeqCst), "a request with a view of before");
                    queue.in_flight = true;
                }
                busy = queue.in_flight || (!queue.quiesced && stopping.is_none() && budget > 0);
            }
            if queue.as_ref().is_none_or(|q| !q.in_flight) {
                pausing.drain(..).for_each(|answer| drop(answer.send(())));
                if let Some(answer) = stopping.take() {
                    queue = None;
                    busy = false;
                    let _ = answer.send(());
                }
            }
            if ended && !busy {
                // Whatever runs at the end runs with the view of the end.
                if let Some(queue) = &queue {
                    assert!(!queue.quiesced, "left paused");
                    let last = std::sync::Arc::as_ptr(&queue.view) as usize;
                    assert_eq!(last, shared.view.load(SeqCst), "left with an old view");
                }
                return;
            }
            if !busy && shared.mail.prepare_sleep() {
                let mut set = shared.bell.set.lock().unwrap();
                while !*set {
                    set = shared.bell.rung.wait(set).unwrap();
                }
                *set = false;
                drop(set);
                shared.mail.awake();
            }
        }
    }

    /// As the device's source of requests.
    struct Source(Arc<Shared>);

    impl RequestSource for Source {
        fn quiesce(&self) -> BoxFut<'_, ()> {
            self.0.standing.stop();
            let answer = self.0.call(Message::Pause);
            Box::pin(async move {
                let _ = answer.await;
                Ok(())
            })
        }
        fn resume(&self, view: Views) {
            self.0.standing.go(view.clone());
            assert!(self.0.mail.send(Message::Resume(view)).is_ok());
        }
        fn resized(&self, _size: u64) {}
    }

    struct Main {
        shared: Arc<Shared>,
        root: Rc<RootInfo>,
        list: Rc<std::cell::RefCell<Vec<Rc<crate::drain::DrainState>>>>,
        /// Kept, so that no two have one address.
        views: std::cell::RefCell<Vec<Views>>,
    }

    impl Main {
        fn drain(&self) -> DrainGuard {
            DrainGuard::start(Vec::new(), vec![Rc::clone(&self.root)], Vec::new(), &self.list)
        }

        /// In a drained section: nothing runs, and the next view takes over.
        fn change(&self) {
            self.shared.closed.store(true, SeqCst);
            let view = std::sync::Arc::new(View::new(Box::default()));
            self.shared.view.store(std::sync::Arc::as_ptr(&view) as usize, SeqCst);
            self.root.gate.set_view(Some(Views::clone(&view)));
            self.views.borrow_mut().push(view);
            self.shared.closed.store(false, SeqCst);
        }
    }

    /// Runs `main` on the main thread beside an iothread and a connection that runs `connection`.
    fn model(
        budget: usize,
        main: impl Fn(&Main) + Send + Sync + 'static,
        connection: impl Fn(&Shared) + Send + Sync + Clone + 'static,
    ) {
        let mut builder = loom::model::Builder::new();
        // LOOM_MAX_PREEMPTIONS asks for more.
        builder.preemption_bound = builder.preemption_bound.or(Some(1));
        builder.check(move || {
            let bell = Arc::new(Bell::default());
            let shared = Arc::new(Shared {
                standing: Standing::new(),
                mail: Mailbox::new(Box::new(Ring(Arc::clone(&bell)))),
                bell,
                closed: AtomicBool::new(false),
                view: AtomicUsize::new(0),
            });
            let gate = SourceGate::new(Rc::new(Source(Arc::clone(&shared))));
            let root = Rc::new(RootInfo {
                description: String::new(),
                granularity: 1,
                gate,
                stay_at_node: false,
                opening: false,
                shared: std::cell::Cell::new(crate::Perm::ALL),
                ways_out: WaysOut::default(),
            });
            let this = Main { shared, root, list: Rc::default(), views: std::cell::RefCell::default() };
            // Attached: the first view.
            this.change();
            this.root.gate.start();
            let shared = Arc::clone(&this.shared);
            let iothread = loom::thread::spawn(move || serve(&shared, budget));
            let (shared, connection) = (Arc::clone(&this.shared), connection.clone());
            let connection = loom::thread::spawn(move || connection(&shared));
            main(&this);
            connection.join().unwrap();
            assert!(this.shared.mail.send(Message::End).is_ok());
            iothread.join().unwrap();
        });
    }

    fn start(shared: &Shared) {
        let _ = loom::future::block_on(shared.call(Message::Start));
    }

    fn stop(shared: &Shared) {
        let _ = loom::future::block_on(shared.call(Message::Stop));
    }

    #[test]
    fn loom_a_drain_beside_a_queue_that_starts() {
        let main = |main: &Main| {
            let guard = main.drain();
            loom::future::block_on(guard.quiet());
            main.change();
            drop(guard);
        };
        model(2, main, start);
    }

    #[test]
    fn loom_a_drain_beside_a_queue_that_comes_and_goes() {
        let main = |main: &Main| {
            let guard = main.drain();
            loom::future::block_on(guard.quiet());
            main.change();
            drop(guard);
        };
        model(1, main, |shared| {
            start(shared);
            stop(shared);
        });
    }

    #[test]
    fn loom_nested_drains() {
        let main = |main: &Main| {
            let outer = main.drain();
            let inner = main.drain();
            loom::future::block_on(inner.quiet());
            // The inner one ends first, and resumes nobody.
            drop(inner);
            loom::future::block_on(outer.quiet());
            main.change();
            drop(outer);
        };
        model(1, main, start);
    }

    #[test]
    fn loom_a_drain_that_is_given_up_and_one_after_it() {
        let main = |main: &Main| {
            // Never waited for: its pause may still be under way when the source is told to go on.
            drop(main.drain());
            let guard = main.drain();
            loom::future::block_on(guard.quiet());
            main.change();
            drop(guard);
        };
        model(1, main, start);
    }
}
