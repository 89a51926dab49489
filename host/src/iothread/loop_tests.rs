//! Tests of the loop: polling rule, inline rule, stopping, kicks, panics, start-up fallbacks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::adaptive::Adaptive;
use super::*;
use crate::buf::IoVecs;
use crate::file::{File, OpenOptions};
use crate::sim;

fn start(engine: Engine) -> IoThread {
    IoThread::start(IoThreadOptions { name: "test".into(), engine, ..IoThreadOptions::default() }).unwrap()
}

#[test]
fn polling_time_follows_the_rule() {
    let p = PollParams::default();
    let mut a = Adaptive::default();
    assert_eq!(a.current(&p), 0);
    a.update(&p, 10_000);
    assert_eq!(a.current(&p), 4_000);
    a.update(&p, 3_000);
    assert_eq!(a.current(&p), 4_000, "polling was long enough");
    for want in [8_000, 16_000, 32_000, 32_768, 32_768] {
        a.update(&p, 32_768.min(want + 1));
        assert_eq!(a.current(&p), want);
    }
    a.update(&p, 32_769);
    assert_eq!(a.current(&p), 0, "out of reach");
    let slow = PollParams { grow: 3, shrink: 2, ..p };
    a.update(&slow, 5_000);
    a.update(&slow, 5_000);
    assert_eq!(a.current(&slow), 12_000);
    a.update(&slow, 1_000_000);
    assert_eq!(a.current(&slow), 6_000);
    let off = PollParams { max_ns: 0, ..p };
    assert_eq!(a.current(&off), 0);
    a.update(&off, 1);
    assert_eq!(a.current(&p), 0);
    let huge = PollParams { max_ns: u64::MAX, grow: u64::MAX, ..p };
    a.update(&huge, 5_000);
    a.update(&huge, 5_000);
    assert_eq!(a.current(&huge), u64::MAX);
}

#[test]
fn auto_falls_back_and_an_explicit_wish_does_not() {
    let no = || Err(io::Error::from_raw_os_error(libc::EPERM));
    assert_eq!(make_reactor(Engine::Auto, no).unwrap().name(), "threads");
    assert_eq!(make_reactor(Engine::IoUring, no).err().unwrap().raw_os_error(), Some(libc::EPERM));
    let never = || panic!("not asked for");
    assert_eq!(make_reactor(Engine::Threads, never).unwrap().name(), "threads");
    let o = IoThreadOptions::default();
    let r = IoThread::start_with(o, Box::new(|| Err(io::Error::from_raw_os_error(libc::EPERM))));
    assert_eq!(r.err().unwrap().raw_os_error(), Some(libc::EPERM));
}

/// Counts what the loop does to it; has work as often as it is told.
#[derive(Default)]
struct Probe {
    work: Cell<u32>,
    polls: Cell<u32>,
    arms: Cell<u32>,
    armed: Cell<bool>,
    batches: Cell<u32>,
    late_work: Cell<u32>,
    completions: RefCell<Vec<(u32, i32)>>,
    seen: Arc<AtomicU64>,
    explode: Cell<bool>,
}

impl Source for Probe {
    fn poll(&self) -> bool {
        assert!(!self.armed.get(), "polled while armed");
        if self.explode.take() {
            panic!("as intended");
        }
        self.polls.set(self.polls.get() + 1);
        let n = self.work.take();
        self.seen.fetch_add(u64::from(n), Ordering::Relaxed);
        n > 0
    }
    fn complete(&self, slot: u32, res: i32) {
        self.completions.borrow_mut().push((slot, res));
    }
    fn end_batch(&self) {
        self.batches.set(self.batches.get() + 1);
    }
    fn has_work(&self) -> bool {
        self.work.get() > 0
    }
    fn arm(&self) -> bool {
        assert!(!self.armed.replace(true));
        self.arms.set(self.arms.get() + 1);
        self.work.set(self.work.get() + self.late_work.take());
        self.has_work()
    }
    fn disarm(&self) {
        self.armed.set(false);
    }
}

#[test]
fn work_that_slips_in_while_arming_is_not_slept_over() {
    sim::run(1, sim::Faults::default(), |l| async move {
        let p = Rc::new(Probe { late_work: Cell::new(3), ..Probe::default() });
        let id = l.add_source(p.clone());
        l.sleep(1000).await;
        assert_eq!(p.seen.load(Ordering::Relaxed), 3);
        assert!(p.arms.get() >= 2);
        let polls = p.polls.get();
        l.sleep(1000).await;
        assert_eq!(p.polls.get(), polls, "an armed source is left alone");
        l.kick(id);
        p.work.set(1);
        l.yield_now().await;
        l.yield_now().await;
        assert_eq!(p.seen.load(Ordering::Relaxed), 4);
        l.remove_source(id);
        p.work.set(1);
        l.sleep(1000).await;
        assert_eq!(p.seen.load(Ordering::Relaxed), 4, "a removed source is not polled");
    })
    .unwrap();
}

fn file(dir: &tempfile::TempDir) -> Arc<File> {
    let o = OpenOptions { writable: true, create: Some(65536), ..OpenOptions::default() };
    File::open(&dir.path().join("f"), &o).unwrap()
}

#[test]
fn completions_reach_a_source_that_is_being_removed() {
    let d = tempfile::tempdir_in(".").unwrap();
    let f = file(&d);
    sim::run(1, sim::Faults::default(), move |l| async move {
        let p = Rc::new(Probe::default());
        let id = l.add_source(p.clone());
        let mut mem = [0u8; 16];
        let iov: Vec<_> =
            mem.chunks_mut(8).map(|c| libc::iovec { iov_base: c.as_mut_ptr().cast(), iov_len: 8 }).collect();
        for (i, v) in iov.iter().enumerate() {
            // SAFETY: `iov` and `mem` live until both completions were seen.
            let r = unsafe { l.submit_fast(id, i as u32, &f, FastOp::Readv, v, 1, 0) };
            assert_eq!(r, None);
        }
        l.remove_source(id);
        // Its place must not be given away while completions name it.
        let other = Rc::new(Probe::default());
        assert_ne!(l.add_source(other.clone()), id);
        l.sleep(10_000_000).await;
        let mut got = p.completions.borrow().clone();
        got.sort_unstable();
        assert_eq!(got, [(0, 8), (1, 8)]);
        assert!(p.batches.get() > 0);
        assert!(other.completions.borrow().is_empty());
        assert_eq!(Rc::strong_count(&p), 1, "let go after the last one");
        assert_eq!(l.add_source(p.clone()), id);
    })
    .unwrap();
}

#[test]
fn small_turns_read_inline_and_large_ones_use_the_ring() {
    let d = tempfile::tempdir_in(".").unwrap();
    let f = file(&d);
    std::fs::write(f.path(), vec![7u8; 65536]).unwrap();
    let t = start(Engine::Auto);
    if !t.engine().starts_with("io_uring") {
        return;
    }
    let (f2, ops) = (Arc::clone(&f), 100);
    t.call_blocking(move |l| async move {
        for _ in 0..ops {
            l.read(&f2, &IoVecs::from_vec(vec![0; 512]), 0).await.unwrap();
            l.yield_now().await;
        }
    })
    .unwrap();
    let lonely = t.stats();
    assert!(lonely.inline_ops > 90, "{lonely:?}");
    t.call_blocking(move |l| async move {
        for _ in 0..ops {
            let left = Rc::new(Cell::new(8));
            for _ in 0..8 {
                let (l2, f2, left) = (l.clone(), Arc::clone(&f), Rc::clone(&left));
                l.spawn(async move {
                    l2.read(&f2, &IoVecs::from_vec(vec![0; 512]), 0).await.unwrap();
                    left.set(left.get() - 1);
                });
            }
            while left.get() > 0 {
                l.yield_now().await;
            }
        }
    })
    .unwrap();
    let crowd = t.stats();
    assert!(crowd.inline_ops - lonely.inline_ops < 50, "{crowd:?}");
    t.stop();
}

#[test]
fn a_streak_of_misses_pauses_the_attempts() {
    use super::inline::{FIRST_PAUSE, FileState, RING_FROM, STREAK};
    use crate::reactor::{Attempt, Op};
    let d = tempfile::tempdir_in(".").unwrap();
    let f = file(&d);
    let read = Op::Readv { iov: std::ptr::null(), n: 0, off: 0 };
    let mut s = FileState::default();
    for _ in 0..STREAK {
        assert_eq!(s.plan(&f, &read, 0), Some(Attempt::NoWait));
        s.miss();
    }
    for _ in 0..FIRST_PAUSE {
        assert_eq!(s.plan(&f, &read, 0), None);
    }
    assert_eq!(s.plan(&f, &read, 0), Some(Attempt::NoWait));
    s.miss();
    for _ in 0..2 * FIRST_PAUSE {
        assert_eq!(s.plan(&f, &read, 0), None);
    }
    assert_eq!(s.plan(&f, &read, 0), Some(Attempt::NoWait));
    s.hit();
    assert_eq!(s.plan(&f, &read, RING_FROM), None);
    assert_eq!(s.plan(&f, &Op::Sync, 0), None);
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    assert_eq!(s.plan(&file(&shm), &Op::Sync, 99), Some(Attempt::Memory));
}

fn kick(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn a_replaced_kick_descriptor_is_closed_and_the_new_one_works() {
    for engine in [Engine::IoUring, Engine::Threads] {
        let t = start(engine);
        thread_local!(static P: RefCell<Option<(Rc<Probe>, SourceId)>> = const { RefCell::new(None) });
        let seen = Arc::new(AtomicU64::new(0));
        let s2 = Arc::clone(&seen);
        t.call_blocking(move |l| async move {
            let p = Rc::new(Probe { seen: s2, ..Probe::default() });
            let id = l.add_source(p.clone());
            P.set(Some((p, id)));
        })
        .unwrap();
        for round in 1..=20 {
            let fd = eventfd().unwrap();
            let theirs = fd.try_clone().unwrap();
            t.call_blocking(move |l| async move {
                let id = P.with_borrow(|p| p.as_ref().unwrap().1);
                l.set_kick(id, Some(theirs));
            })
            .unwrap();
            t.call_blocking(|_| async { P.with_borrow(|p| p.as_ref().unwrap().0.work.set(1)) }).unwrap();
            kick(&fd);
            while seen.load(Ordering::Relaxed) < round {
                std::thread::yield_now();
            }
            if round % 2 == 0 {
                // The reader of a pipe: once it is closed, and no watch holds on to it, the writer notices.
                let (reader, writer) = rustix::pipe::pipe().unwrap();
                t.call_blocking(move |l| async move {
                    let id = P.with_borrow(|p| p.as_ref().unwrap().1);
                    l.set_kick(id, Some(reader));
                    l.yield_now().await;
                    l.set_kick(id, None);
                })
                .unwrap();
                assert_eq!(rustix::io::write(&writer, &[0]).err(), Some(rustix::io::Errno::PIPE));
            }
        }
        t.call_blocking(|l| async move { l.remove_source(P.take().unwrap().1) }).unwrap();
        t.stop();
    }
}

#[test]
fn stop_waits_for_what_is_in_flight_and_drops_what_only_waits() {
    let d = tempfile::tempdir_in(".").unwrap();
    for engine in [Engine::IoUring, Engine::Threads] {
        let t = start(engine);
        let (written, dropped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        struct Flag(Arc<AtomicBool>);
        impl Drop for Flag {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let f = File::open(
            &d.path().join(format!("{engine:?}")),
            &OpenOptions { writable: true, create: Some(0), ..OpenOptions::default() },
        )
        .unwrap();
        let (w, flag) = (Arc::clone(&written), Flag(Arc::clone(&dropped)));
        let never = t.call(move |_| async move {
            let _flag = flag;
            std::future::pending::<()>().await;
        });
        t.post(move |l| {
            let l2 = l.clone();
            l.spawn(async move {
                l2.write(&f, &IoVecs::from_vec(vec![1; 1 << 20]), 0, true).await.unwrap();
                l2.fdatasync(&f).await.unwrap();
                l2.blocking(|| ()).await;
                w.store(true, Ordering::Relaxed);
            });
        });
        let other = t.clone();
        t.stop();
        assert!(written.load(Ordering::Relaxed), "{engine:?}");
        assert!(dropped.load(Ordering::Relaxed));
        assert_eq!(block_on(never), Err(Gone));
        assert_eq!(other.call_blocking(|_| async {}), Err(Gone));
        other.post(|_| panic!("never runs"));
        other.stop();
    }
}

#[test]
fn dropping_the_last_handle_ends_the_thread() {
    let t = start(Engine::Auto);
    let ended = Arc::new(());
    let weak = Arc::downgrade(&ended);
    drop(t.call(move |_| async move {
        let _held = ended;
        std::future::pending::<()>().await;
    }));
    drop(t.clone());
    assert_eq!(t.call_blocking(|_| async { 1 }), Ok(1));
    drop(t);
    while weak.strong_count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_panic_in_a_callback_costs_nobody_else() {
    let t = start(Engine::Auto);
    t.post(|_| panic!("as intended"));
    assert_eq!(t.call_blocking(|_| async { 1 }), Ok(1));
    assert_eq!(t.call_blocking(|_| async { panic!("as intended") }), Err::<(), _>(Gone));
    let seen = t
        .call_blocking(|l| async move {
            let p = Rc::new(Probe { explode: Cell::new(true), work: Cell::new(2), ..Probe::default() });
            let id = l.add_source(p.clone());
            l.yield_now().await;
            l.yield_now().await;
            l.kick(id);
            l.yield_now().await;
            l.yield_now().await;
            l.remove_source(id);
            p.seen.load(Ordering::Relaxed)
        })
        .unwrap();
    assert_eq!(seen, 2);
    t.stop();
}

#[test]
fn an_idle_thread_sleeps_once() {
    for engine in [Engine::IoUring, Engine::Threads] {
        let t = start(engine);
        t.call_blocking(|l| async move {
            let p = Rc::new(Probe::default());
            l.add_source(p);
        })
        .unwrap();
        // Until it has gone to sleep with the source armed: in interruptible wait, as the kernel says.
        let state = || {
            let s = std::fs::read_to_string(format!("/proc/self/task/{}/stat", t.tid())).unwrap();
            s.rsplit(')').next().unwrap().trim().chars().next().unwrap()
        };
        let mut before = t.stats();
        let mut still = 0;
        while still < 1000 {
            let now = t.stats();
            still = if state() == 'S' && now == before { still + 1 } else { 0 };
            before = now;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(t.stats(), before, "no periodic wake-ups");
        t.stop();
    }
}

#[test]
fn iothreads_get_no_signals_and_small_numbers() {
    let t = start(Engine::Auto);
    let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", t.tid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("SigBlk:")).unwrap().trim();
    assert_ne!(u64::from_str_radix(line, 16).unwrap() & 1 << (libc::SIGTERM - 1), 0);
    assert!(t.id() < 64);
    assert_eq!((t.name(), t.is_current()), ("test", false));
    let t2 = t.clone();
    let nested =
        t.call_blocking(
            move |_| async move { t2.is_current() && t2.call_blocking(|_| async {}) == Err(Gone) },
        );
    assert_eq!(nested, Ok(true), "a call to itself does not hang");
    t.stop();
}
