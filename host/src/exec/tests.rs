//! Tests of the executor; with `--cfg loom` of wakes from other threads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::*;

struct Inbox(crate::primitive::Mutex<Vec<Arc<TaskHandle>>>);

impl RemoteWake for Inbox {
    fn wake_remote(&self, t: Arc<TaskHandle>) {
        crate::primitive::lock(&self.0).push(t);
    }
}

fn executor() -> (Executor, Arc<Inbox>) {
    let inbox = Arc::new(Inbox(crate::primitive::Mutex::new(vec![])));
    (Executor::new(inbox.clone()), inbox)
}

fn deliver(e: &Executor, i: &Inbox) -> usize {
    let all = std::mem::take(&mut *crate::primitive::lock(&i.0));
    all.iter().for_each(|t| e.wake(t));
    all.len()
}

#[cfg(not(loom))]
mod plain {
    use super::*;

    #[test]
    fn tasks_take_turns_in_order() {
        let (e, _i) = executor();
        let log = Rc::new(RefCell::new(vec![]));
        for t in 0..3 {
            let log = Rc::clone(&log);
            e.spawn(async move {
                for round in 0..2 {
                    log.borrow_mut().push((round, t));
                    let mut first = true;
                    std::future::poll_fn(|cx| {
                        cx.waker().wake_by_ref();
                        // Twice: it is queued once.
                        cx.waker().wake_by_ref();
                        if std::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(()) }
                    })
                    .await;
                }
            });
        }
        assert_eq!(e.run_ready(), 3);
        assert_eq!(e.run_ready(), 3);
        while e.run_ready() > 0 {}
        assert!(e.is_idle());
        assert_eq!(*log.borrow(), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
    }

    #[test]
    fn a_panic_ends_one_task_and_no_other() {
        let (e, _i) = executor();
        let done = Rc::new(Cell::new(false));
        let d = Rc::clone(&done);
        e.spawn(async { panic!("as intended") });
        e.spawn(async move { d.set(true) });
        e.run_ready();
        assert!(done.get());
        assert!(e.is_idle());
        assert_eq!(e.panics(), 1);
    }

    #[test]
    fn a_wake_from_another_thread_is_one_message() {
        let (e, i) = executor();
        let slot = Rc::new(RefCell::new(None));
        let polls = Rc::new(Cell::new(0));
        let (s, p) = (Rc::clone(&slot), Rc::clone(&polls));
        e.spawn(std::future::poll_fn(move |cx| {
            *s.borrow_mut() = Some(cx.waker().clone());
            p.set(p.get() + 1);
            Poll::Pending
        }));
        e.run_ready();
        for round in 0..2 {
            let w: Waker = slot.borrow().clone().unwrap();
            std::thread::spawn(move || {
                w.wake_by_ref();
                w.wake_by_ref();
            })
            .join()
            .unwrap();
            assert_eq!(deliver(&e, &i), 1, "round {round}");
            assert_eq!(e.run_ready(), 1);
        }
        assert_eq!(polls.get(), 3);
    }

    #[test]
    fn a_stale_wake_of_a_reused_place_does_no_harm() {
        let (e, _i) = executor();
        let slot = Rc::new(RefCell::new(None));
        let s = Rc::clone(&slot);
        e.spawn(std::future::poll_fn(move |cx| {
            *s.borrow_mut() = Some(cx.waker().clone());
            Poll::Ready(())
        }));
        e.run_ready();
        slot.borrow().clone().unwrap().wake();
        assert_eq!(e.run_ready(), 1);
        e.spawn(std::future::pending());
        e.run_ready();
        slot.borrow().clone().unwrap().wake();
        e.run_ready();
        assert_eq!(e.live(), 1);
        e.clear();
        assert!(e.is_idle());
        // The waker may outlive the executor.
        drop(e);
        slot.borrow().clone().unwrap().wake();
    }

    #[test]
    fn the_main_executor_says_when_it_must_run() {
        let m = MainExecutor::new().unwrap();
        let readable = || {
            let mut p = [rustix::event::PollFd::from_borrowed_fd(m.fd(), rustix::event::PollFlags::IN)];
            let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            rustix::event::poll(&mut p, Some(&zero)).unwrap() > 0
        };
        assert!(!readable());
        let seen = Rc::new(Cell::new(0));
        let s = Rc::clone(&seen);
        let (tx, rx) = crate::sync::oneshot::channel::<u32>();
        m.spawn_local(async move { s.set(rx.await.unwrap()) });
        assert!(readable(), "a new task");
        m.run();
        assert!(!readable());
        std::thread::spawn(move || tx.send(5).unwrap()).join().unwrap();
        assert!(readable(), "a wake from another thread");
        m.run();
        assert_eq!(seen.get(), 5);
        assert!(!readable());
        let (tx, rx) = crate::sync::oneshot::channel::<u32>();
        let s = Rc::clone(&seen);
        m.spawn_local(async move { s.set(rx.await.unwrap()) });
        m.run();
        tx.send(6).unwrap();
        assert!(readable(), "a wake on the same thread, outside of run");
        m.run();
        assert_eq!(seen.get(), 6);
        let ran = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (r, remote) = (Arc::clone(&ran), m.remote());
        std::thread::spawn(move || remote.post(move || r.store(true, std::sync::atomic::Ordering::Relaxed)))
            .join()
            .unwrap();
        assert!(readable());
        m.run();
        assert!(ran.load(std::sync::atomic::Ordering::Relaxed));
        // One that never stops leaves the descriptor readable instead of holding the loop.
        m.spawn_local(std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::Pending
        }));
        m.run();
        assert!(readable());
        assert_eq!(m.block_on(crate::pool::run(|| 9)), 9);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p ringblk-host --lib --release loom_`.
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicBool, Ordering};

    /// A wake that follows a change of state is never swallowed by one that is under way.
    #[test]
    fn loom_the_last_wake_is_followed_by_a_poll() {
        loom::model(|| {
            let (e, i) = executor();
            let flag = Arc::new(AtomicBool::new(false));
            let slot = Rc::new(RefCell::new(None));
            let seen = Rc::new(Cell::new(false));
            let (f, s, d) = (Arc::clone(&flag), Rc::clone(&slot), Rc::clone(&seen));
            e.spawn(std::future::poll_fn(move |cx| {
                *s.borrow_mut() = Some(cx.waker().clone());
                d.set(f.load(Ordering::Acquire));
                Poll::Pending
            }));
            e.run_ready();
            let w: Waker = slot.borrow().clone().unwrap();
            let t = loom::thread::spawn(move || {
                w.wake_by_ref();
                flag.store(true, Ordering::Release);
                w.wake_by_ref();
            });
            deliver(&e, &i);
            e.run_ready();
            t.join().unwrap();
            deliver(&e, &i);
            e.run_ready();
            assert!(seen.get());
            e.clear();
            slot.borrow_mut().take();
        });
    }
}
