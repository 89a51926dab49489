//! Drain: stopping the requests above a node, waiting for those in flight, resuming.
//!
//! Main thread only. Every root has a [`SourceGate`]: a count of drains that want it quiet and a state. The first drain
//! starts `RequestSource::quiesce`; every drain waits until it has ended; the last one to leave resumes the source with
//! the view of that moment. What happens in between (a client that goes, a session that resets, another drain) changes
//! nothing about it: the count is held by guards, and guards are the only way to it.
//!
//! *No deadlock*: a drain takes all its counts at once, without waiting, and waits afterwards; a source that goes quiet does so
//! without asking for anything a drain holds (`quiesce` completes requests, it does not change the graph). Waiting for
//! several sources has no order, since each is polled on its own.
//!
//! *Dropping* the future of a drain gives its counts back like a finished one; a source may therefore be resumed before its
//! `quiesce` future has ended, and that future is dropped then.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};

#[cfg(loom)]
use loom::sync::Mutex;
#[cfg(not(loom))]
use std::sync::Mutex;

use crate::driver::{BoxFut, Driver};
use crate::node::Node;
use crate::view::View;

/// Where requests come from: an export, a job. Main thread; its iothreads hear of it by messages.
pub trait RequestSource {
    /// Stops taking requests on every iothread; resolves when none is in flight and the old view is no longer in use.
    /// Takes effect when called, not when first polled. An error says that the source has died with nothing in flight;
    /// it is logged and counts as quiet.
    fn quiesce(&self) -> BoxFut<'_, ()>;

    /// Goes on with this view. Also called when a `quiesce` is given up half way.
    fn resume(&self, view: Arc<View>);

    /// The root has another size now, bytes. Called in the drained section.
    fn resized(&self, size: u64);
}

/// A source that never has requests in flight: for users that only hold a node.
#[derive(Debug, Default)]
pub struct NoSource;

impl RequestSource for NoSource {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn resume(&self, _view: Arc<View>) {}
    fn resized(&self, _size: u64) {}
}

/// Wakes everybody who waits for one source.
#[derive(Default)]
struct Fan(Mutex<Vec<Waker>>);

impl Fan {
    fn add(&self, waker: &Waker) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !list.iter().any(|w| w.will_wake(waker)) {
            list.push(waker.clone());
        }
    }
}

impl Wake for Fan {
    fn wake(self: Arc<Self>) {
        let list = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        list.into_iter().for_each(Waker::wake);
    }
}

type Quiescing = Pin<Box<dyn Future<Output = ()>>>;

enum State {
    Running,
    Quiescing(Option<Quiescing>),
    Quiet,
}

/// The gate of one source. See the head of the file.
pub(crate) struct SourceGate {
    source: Rc<dyn RequestSource>,
    depth: Cell<usize>,
    state: RefCell<State>,
    fan: Arc<Fan>,
    /// What the source gets at the next resume; absent while its root is being attached or after it has gone.
    view: RefCell<Option<Arc<View>>>,
    /// What it got at the last one. Not held: a source that has no use for it lets it go.
    running: RefCell<Weak<View>>,
}

impl SourceGate {
    pub(crate) fn new(source: Rc<dyn RequestSource>) -> SourceGate {
        SourceGate {
            source,
            depth: Cell::new(0),
            state: RefCell::new(State::Running),
            fan: Arc::default(),
            view: RefCell::new(None),
            running: RefCell::default(),
        }
    }

    pub(crate) fn source(&self) -> &Rc<dyn RequestSource> {
        &self.source
    }

    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.view.borrow().clone()
    }

    /// Sets the view; the source hears of it at its next resume.
    pub(crate) fn set_view(&self, view: Option<Arc<View>>) {
        let old = self.view.replace(view);
        drop(old);
    }

    /// What the source serves requests with, if it does: not while it is quiet.
    pub(crate) fn running(&self) -> Option<Arc<View>> {
        if self.is_quiet() { None } else { self.running.borrow().upgrade() }
    }

    /// Lets the source go on with the view of now.
    pub(crate) fn start(&self) {
        // Not borrowed across the call: the source may ask the graph things.
        if let Some(view) = self.view() {
            *self.running.borrow_mut() = Arc::downgrade(&view);
            self.source.resume(view);
        }
    }

    pub(crate) fn depth(&self) -> usize {
        self.depth.get()
    }

    pub(crate) fn is_quiet(&self) -> bool {
        matches!(*self.state.borrow(), State::Quiet)
    }

    /// One more drain wants it quiet.
    fn enter(&self) {
        self.depth.set(self.depth.get() + 1);
        if self.depth.get() > 1 {
            return;
        }
        let source = Rc::clone(&self.source);
        // `quiesce` borrows the source, the future below owns it: it starts the call at once by a first poll.
        let future: Quiescing = Box::pin(async move {
            if let Err(e) = source.quiesce().await {
                log::warn!("a request source ended while it was being drained: {e}");
            }
        });
        *self.state.borrow_mut() = State::Quiescing(Some(future));
        // Nobody waits yet; whoever does polls again and is told then.
        let _ = self.poll_quiet(&mut Context::from_waker(Waker::noop()));
    }

    /// A root that joins while drains are on: its source has not been started, it is quiet already.
    pub(crate) fn enter_quiet(&self) {
        self.depth.set(self.depth.get() + 1);
        if self.depth.get() == 1 {
            *self.state.borrow_mut() = State::Quiet;
        }
    }

    fn poll_quiet(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut future = match &mut *self.state.borrow_mut() {
            State::Running | State::Quiet => return Poll::Ready(()),
            State::Quiescing(future) => {
                // Before the poll, so that a wake in between reaches us.
                self.fan.add(cx.waker());
                match future.take() {
                    Some(future) => future,
                    // Being polled further up this very stack: that one wakes us.
                    None => return Poll::Pending,
                }
            }
        };
        let waker = Waker::from(Arc::clone(&self.fan));
        let poll = future.as_mut().poll(&mut Context::from_waker(&waker));
        let mut state = self.state.borrow_mut();
        match (&*state, poll) {
            (State::Quiescing(None), Poll::Pending) => {
                *state = State::Quiescing(Some(future));
                return Poll::Pending;
            }
            // Left and entered again while it was being polled: another quiesce is on now.
            (State::Quiescing(Some(_)), _) => {
                drop(state);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            (State::Quiescing(None), Poll::Ready(())) => *state = State::Quiet,
            // Left and resumed while it was being polled.
            (State::Running | State::Quiet, _) => {}
        }
        drop(state);
        // The others that wait were registered with wakers of their own.
        Arc::clone(&self.fan).wake();
        Poll::Ready(())
    }

    /// One drain less; the last one resumes.
    fn leave(&self) {
        let depth = self.depth.get();
        debug_assert!(depth > 0, "a drain left twice");
        self.depth.set(depth.saturating_sub(1));
        if depth != 1 {
            return;
        }
        let old = self.state.replace(State::Running);
        drop(old);
        self.start();
    }
}

/// Names of a root that a drain holds quiet, shared between a guard and the graph's list of running drains.
pub(crate) struct DrainState {
    /// The node that is drained.
    pub(crate) targets: RefCell<Vec<crate::ids::NodeId>>,
    held: RefCell<Vec<Rc<crate::edge::RootInfo>>>,
}

impl DrainState {
    pub(crate) fn holds(&self, root: &Rc<crate::edge::RootInfo>) -> bool {
        self.held.borrow().iter().any(|r| Rc::ptr_eq(r, root))
    }

    /// Adds a root that came to lie above the target while it was quiet.
    pub(crate) fn adopt(&self, root: &Rc<crate::edge::RootInfo>) {
        root.gate.enter_quiet();
        self.held.borrow_mut().push(Rc::clone(root));
    }
}

/// As long as it lives, no request runs above the drained node. Resumes when dropped.
#[must_use = "requests resume when the guard is dropped"]
pub struct DrainGuard {
    state: Rc<DrainState>,
    /// Drivers that were told of it (`Driver::drain_begin`). What comes into the graph later has no request held back.
    told: Vec<Arc<dyn Driver>>,
    /// The graph's list of running drains, to leave it.
    list: std::rc::Weak<RefCell<Vec<Rc<DrainState>>>>,
}

impl DrainGuard {
    /// Takes all counts at once and enters the list of running drains.
    pub(crate) fn start(
        targets: Vec<crate::ids::NodeId>,
        roots: Vec<Rc<crate::edge::RootInfo>>,
        nodes: Vec<Arc<Node>>,
        list: &Rc<RefCell<Vec<Rc<DrainState>>>>,
    ) -> DrainGuard {
        let state = Rc::new(DrainState { targets: RefCell::new(targets), held: RefCell::new(Vec::new()) });
        list.borrow_mut().push(Rc::clone(&state));
        let mut guard = DrainGuard { state, told: Vec::new(), list: Rc::downgrade(list) };
        for root in roots {
            // Counted first: should `quiesce` panic, the guard still leaves what it entered.
            guard.state.held.borrow_mut().push(Rc::clone(&root));
            root.gate.enter();
        }
        // After the sources: what is let go now is not followed by more of it.
        for node in nodes {
            let driver = node.driver();
            driver.drain_begin();
            guard.told.push(driver);
        }
        guard
    }

    /// Resolves when every source is quiet.
    pub(crate) async fn quiet(&self) {
        poll_fn(|cx| {
            // By index: polling may let a source attach roots, which joins this list.
            let mut pending = false;
            let mut at = 0;
            loop {
                let root = self.state.held.borrow().get(at).cloned();
                let Some(root) = root else { break };
                pending |= root.gate.poll_quiet(cx).is_pending();
                at += 1;
            }
            if pending { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// How many sources it holds quiet.
    pub fn sources(&self) -> usize {
        self.state.held.borrow().len()
    }
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        if let Some(list) = self.list.upgrade() {
            list.borrow_mut().retain(|d| !Rc::ptr_eq(d, &self.state));
        }
        self.told.drain(..).for_each(|d| d.drain_end());
        let held = std::mem::take(&mut *self.state.held.borrow_mut());
        held.iter().for_each(|r| r.gate.leave());
    }
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;
