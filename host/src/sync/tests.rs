//! Tests of the waiting primitives; with `--cfg loom` of the oneshot and the mutex between threads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::iothread::Gone;

fn poll<F: Future + Unpin>(f: &mut F) -> Poll<F::Output> {
    Pin::new(f).poll(&mut Context::from_waker(Waker::noop()))
}

#[cfg(not(loom))]
mod plain {
    use super::*;
    use crate::exec::block_on;

    #[test]
    fn oneshot_ends() {
        let (tx, mut rx) = oneshot::channel();
        assert!(poll(&mut rx).is_pending());
        tx.send(1).unwrap();
        assert_eq!(poll(&mut rx), Poll::Ready(Ok(1)));
        let (tx, mut rx) = oneshot::channel::<u8>();
        drop(tx);
        assert_eq!(poll(&mut rx), Poll::Ready(Err(Gone)));
        let (tx, rx) = oneshot::channel();
        drop(rx);
        assert!(tx.is_closed());
        assert_eq!(tx.send(2), Err(2));
    }

    #[test]
    fn ranges_wait_for_earlier_ones_that_overlap() {
        let ranges = Ranges::new();
        let first = block_on(ranges.share(0, 10));
        // Shared with shared, exclusive beside: at once.
        let second = block_on(ranges.share(5, 15));
        drop(block_on(ranges.take(15, 20)));
        let mut writer = Box::pin(ranges.take(9, 12));
        assert!(poll(&mut writer).is_pending());
        // Nobody overtakes: this one waits for the writer that waits.
        let mut reader = Box::pin(ranges.share(11, 12));
        assert!(poll(&mut reader).is_pending());
        drop(first);
        assert!(poll(&mut writer).is_pending());
        drop(second);
        let Poll::Ready(held) = poll(&mut writer) else { panic!("the writer waits for nobody") };
        assert!(poll(&mut reader).is_pending());
        drop(held);
        assert!(poll(&mut reader).is_ready());
        // Given up while it waited: others need not wait for it.
        let held = block_on(ranges.take(0, 1));
        let mut given_up = Box::pin(ranges.take(0, 100));
        assert!(poll(&mut given_up).is_pending());
        drop(given_up);
        drop(block_on(ranges.take(50, 60)));
        drop(held);
    }

    #[test]
    fn ranges_wake_those_they_kept_waiting() {
        let ranges = Arc::new(Ranges::new());
        let held = block_on(ranges.take(0, 10));
        let other = Arc::clone(&ranges);
        let thread = std::thread::spawn(move || block_on(async { drop(other.share(3, 4).await) }));
        drop(held);
        thread.join().unwrap();
    }

    #[test]
    fn the_mutex_is_handed_over_in_order() {
        let m = Mutex::new(0);
        let g = m.try_lock().unwrap();
        let mut a = Box::pin(m.lock());
        let mut b = Box::pin(m.lock());
        assert!(poll(&mut a).is_pending());
        assert!(poll(&mut b).is_pending());
        drop(g);
        assert!(m.try_lock().is_none(), "nobody overtakes");
        assert!(poll(&mut b).is_pending());
        let Poll::Ready(g) = poll(&mut a) else { panic!("its turn") };
        drop(g);
        // Notified and dropped before it noticed: the next one gets it.
        let mut c = Box::pin(m.lock());
        assert!(poll(&mut c).is_pending());
        drop(b);
        let Poll::Ready(g) = poll(&mut c) else { panic!("passed on") };
        drop(g);
        assert!(m.try_lock().is_some());
    }

    #[test]
    fn a_waiter_that_leaves_passes_the_notification_on() {
        let q = WaitQueue::new();
        let (mut a, mut b) = (q.wait(), q.wait());
        assert!(poll(&mut a).is_pending());
        assert!(q.notify_one());
        drop(a);
        assert!(poll(&mut b).is_ready());
        let mut c = q.wait();
        let d = q.wait();
        drop(d);
        assert_eq!(q.len(), 1);
        q.notify_all();
        assert!(poll(&mut c).is_ready());
        assert!(!q.notify_one());
    }

    #[test]
    fn an_event_stays_set() {
        let e = Event::new();
        let mut w = Box::pin(e.wait());
        assert!(poll(&mut w).is_pending());
        e.set();
        assert!(poll(&mut w).is_ready());
        block_on(e.wait());
        e.clear();
        assert!(!e.is_set());
        assert!(poll(&mut Box::pin(e.wait())).is_pending());
    }

    #[test]
    fn the_mutex_excludes_between_threads() {
        let m = Arc::new(Mutex::new(0u64));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let m = Arc::clone(&m);
                std::thread::spawn(move || {
                    for _ in 0..2000 {
                        block_on(async {
                            let mut g = m.lock().await;
                            let v = *g;
                            std::hint::black_box(&v);
                            *g = v + 1;
                        });
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*block_on(m.lock()), 8000);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p ringblk-host --lib --release loom_`.
#[cfg(loom)]
mod model {
    use super::*;

    #[test]
    fn loom_oneshot_delivers_or_says_gone() {
        loom::model(|| {
            let (tx, rx) = oneshot::channel();
            let t = loom::thread::spawn(move || tx.send(7).unwrap());
            assert_eq!(loom::future::block_on(rx), Ok(7));
            t.join().unwrap();
        });
        loom::model(|| {
            let (tx, rx) = oneshot::channel::<u8>();
            let t = loom::thread::spawn(move || drop(tx));
            assert_eq!(loom::future::block_on(rx), Err(Gone));
            t.join().unwrap();
        });
    }

    #[test]
    fn loom_mutex_wakes_its_waiter() {
        loom::model(|| {
            let m = Arc::new(Mutex::new(0));
            let m2 = Arc::clone(&m);
            let t = loom::thread::spawn(move || loom::future::block_on(async { *m2.lock().await += 1 }));
            loom::future::block_on(async { *m.lock().await += 1 });
            t.join().unwrap();
            assert_eq!(*m.try_lock().unwrap(), 2);
        });
    }
}
