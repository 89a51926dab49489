//! Tests of the mailbox; with `--cfg loom` all interleavings of its handshake.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use super::*;

#[cfg(not(loom))]
mod plain {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Count(Arc<AtomicUsize>);
    impl Notify for Count {
        fn notify(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn only_a_sleeper_is_woken_and_only_once() {
        let rings = Arc::new(AtomicUsize::new(0));
        let m = Mailbox::new(Box::new(Count(Arc::clone(&rings))));
        m.send(1).unwrap();
        assert_eq!(rings.load(Ordering::Relaxed), 0);
        assert!(!m.prepare_sleep(), "there is mail");
        let mut v = vec![];
        m.drain(&mut v);
        assert!(m.prepare_sleep());
        m.send(2).unwrap();
        m.send(3).unwrap();
        assert_eq!(rings.load(Ordering::Relaxed), 1);
        m.awake();
        assert!(m.has_mail(), "waking does not hide mail");
        v.clear();
        m.drain(&mut v);
        assert_eq!(v, [2, 3]);
        assert!(!m.has_mail());
    }

    #[test]
    fn a_closed_mailbox_gives_back() {
        let m = Mailbox::new(Box::new(Count(Arc::default())));
        m.send(1).unwrap();
        assert_eq!(m.close(), [1]);
        assert_eq!(m.send(2), Err(2));
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p ringblk-host --lib --release loom_`.
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::sync::{Condvar, Mutex};

    /// An eventfd as far as it matters: sticky.
    #[derive(Default)]
    struct Eventfd {
        set: Mutex<bool>,
        cond: Condvar,
    }

    struct Bell(Arc<Eventfd>);
    impl Notify for Bell {
        fn notify(&self) {
            *self.0.set.lock().unwrap() = true;
            self.0.cond.notify_one();
        }
    }

    fn sleep(e: &Eventfd) {
        let mut g = e.set.lock().unwrap();
        while !*g {
            g = e.cond.wait(g).unwrap();
        }
        *g = false;
    }

    #[test]
    fn loom_nothing_is_lost_and_nobody_oversleeps() {
        loom::model(|| {
            let e = Arc::new(Eventfd::default());
            let m = Arc::new(Mailbox::new(Box::new(Bell(Arc::clone(&e)))));
            let senders: Vec<_> = (0..2u32)
                .map(|i| {
                    let m = Arc::clone(&m);
                    loom::thread::spawn(move || m.send(i).unwrap())
                })
                .collect();
            // A lost wake-up is a deadlock, which loom reports.
            let (mut got, mut v) = (vec![], vec![]);
            while got.len() < 2 {
                if m.has_mail() {
                    m.drain(&mut v);
                    got.append(&mut v);
                } else if m.prepare_sleep() {
                    sleep(&e);
                    m.awake();
                }
            }
            got.sort();
            assert_eq!(got, [0, 1]);
            for s in senders {
                s.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_a_message_is_read_or_given_back_when_the_mailbox_closes() {
        loom::model(|| {
            let m = Arc::new(Mailbox::new(Box::new(Bell(Arc::default()))));
            let m2 = Arc::clone(&m);
            let back = Arc::new(AtomicBool::new(false));
            let b2 = Arc::clone(&back);
            let s = loom::thread::spawn(move || {
                if m2.send(1).is_err() {
                    b2.store(true, Ordering::Release);
                }
            });
            let left = m.close();
            s.join().unwrap();
            assert!(left.is_empty() == back.load(Ordering::Acquire));
        });
    }
}
