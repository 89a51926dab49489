//! Every interleaving of small drain programs: tasks are polled only when woken, sources end their requests at any point,
//! tasks may be dropped at any point.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::*;
use crate::control::testing::view;
use crate::edge::RootInfo;

/// A source whose requests end when the scheduler says so.
#[derive(Default)]
struct Fake {
    stopping: Cell<bool>,
    in_flight: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// Which round of quiescing a future belongs to.
    round: Cell<u32>,
}

impl RequestSource for Fake {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        assert!(!self.stopping.replace(true), "quiesced twice");
        // A running source always has something in flight: the hard case.
        self.in_flight.set(true);
        self.round.set(self.round.get() + 1);
        let round = self.round.get();
        Box::pin(poll_fn(move |cx| {
            assert_eq!(round, self.round.get(), "a future of an earlier round is polled");
            if self.in_flight.get() {
                *self.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            } else {
                Poll::Ready(Ok(()))
            }
        }))
    }
    fn resume(&self, _view: Arc<View>) {
        assert!(self.stopping.replace(false), "resumed while it ran");
    }
    fn resized(&self, _size: u64) {}
}

impl Fake {
    fn quiet(&self) -> bool {
        self.stopping.get() && !self.in_flight.get()
    }
}

struct Flag(AtomicBool);
impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

struct Task {
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    woken: Arc<Flag>,
}

/// Yields once.
async fn pause() {
    let mut first = true;
    poll_fn(|cx| {
        if std::mem::take(&mut first) {
            cx.waker().wake_by_ref();
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
}

/// Runs one schedule; `choose(n)` picks one of n moves. Returns when nothing is left to do.
fn run_schedule(programs: &[&[usize]], sources: usize, drops: usize, choose: &mut dyn FnMut(usize) -> usize) {
    let view = view();
    let fakes: Vec<Rc<Fake>> = (0..sources).map(|_| Rc::default()).collect();
    let roots: Vec<Rc<RootInfo>> = fakes
        .iter()
        .map(|fake| {
            let gate = SourceGate::new(fake.clone());
            gate.set_view(Some(Arc::clone(&view)));
            Rc::new(RootInfo {
                description: String::new(),
                granularity: 1,
                gate,
                stay_at_node: false,
                opening: false,
                shared: std::cell::Cell::new(crate::Perm::ALL),
                ways_out: crate::WaysOut::default(),
            })
        })
        .collect();
    let list = Rc::new(RefCell::new(Vec::new()));
    let mut tasks: Vec<Task> = programs
        .iter()
        .map(|set| {
            let roots: Vec<_> = set.iter().map(|i| Rc::clone(&roots[*i])).collect();
            let fakes: Vec<_> = set.iter().map(|i| Rc::clone(&fakes[*i])).collect();
            let list = Rc::clone(&list);
            let future = async move {
                let guard = DrainGuard::start(Vec::new(), roots, Vec::new(), &list);
                guard.quiet().await;
                assert!(fakes.iter().all(|f| f.quiet()), "not quiet after the drain");
                pause().await;
                assert!(fakes.iter().all(|f| f.quiet()), "somebody resumed it under us");
            };
            Task { future: Some(Box::pin(future)), woken: Arc::new(Flag(AtomicBool::new(true))) }
        })
        .collect();
    let mut drops = drops;
    loop {
        let runnable: Vec<usize> = (0..tasks.len())
            .filter(|t| tasks[*t].future.is_some() && tasks[*t].woken.0.load(SeqCst))
            .collect();
        let busy: Vec<usize> =
            (0..sources).filter(|s| fakes[*s].stopping.get() && fakes[*s].in_flight.get()).collect();
        let live: Vec<usize> = if drops > 0 {
            (0..tasks.len()).filter(|t| tasks[*t].future.is_some()).collect()
        } else {
            vec![]
        };
        let moves = runnable.len() + busy.len();
        if moves == 0 {
            break;
        }
        let pick = choose(moves + live.len());
        if let Some(t) = runnable.get(pick) {
            let task = &mut tasks[*t];
            task.woken.0.store(false, SeqCst);
            let waker = Waker::from(Arc::clone(&task.woken));
            let future = task.future.as_mut().unwrap();
            if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                task.future = None;
            }
        } else if let Some(s) = busy.get(pick - runnable.len()) {
            fakes[*s].in_flight.set(false);
            let waker = fakes[*s].waker.borrow_mut().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        } else {
            tasks[live[pick - moves]].future = None;
            drops -= 1;
        }
    }
    assert!(tasks.iter().all(|t| t.future.is_none()), "a drain waits for ever");
    assert!(fakes.iter().all(|f| !f.stopping.get()), "a source was not resumed");
    assert!(roots.iter().all(|r| r.gate.depth() == 0) && list.borrow().is_empty());
}

/// All schedules, depth first; returns how many.
fn explore(programs: &[&[usize]], sources: usize, drops: usize) -> usize {
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut count = 0;
    loop {
        let mut at = 0;
        run_schedule(programs, sources, drops, &mut |n| {
            if at == path.len() {
                path.push((0, n));
            }
            assert_eq!(path[at].1, n, "not deterministic");
            at += 1;
            path[at - 1].0
        });
        count += 1;
        while let Some((choice, of)) = path.pop() {
            if choice + 1 < of {
                path.push((choice + 1, of));
                break;
            }
        }
        if path.is_empty() {
            return count;
        }
    }
}

#[test]
fn overlapping_drains_in_every_order() {
    assert!(explore(&[&[0], &[0]], 1, 0) > 20);
    assert!(explore(&[&[0, 1], &[1, 0]], 2, 0) > 100);
    assert!(explore(&[&[0], &[0, 1], &[1]], 2, 0) > 1000);
}

#[test]
fn drains_given_up_at_every_point() {
    assert!(explore(&[&[0], &[0]], 1, 2) > 100);
    assert!(explore(&[&[0, 1], &[1]], 2, 1) > 1000);
    assert!(explore(&[&[0], &[0], &[0]], 1, 1) > 1000);
}
