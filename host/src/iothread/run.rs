//! The loop of an iothread, also driven by simulations.
//!
//! One turn: mail, timers, sources, tasks, one enter, completions. Only when a turn found nothing does the loop poll for a
//! while, arm the sources and sleep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::adaptive::Adaptive;
use super::local::Local;
use super::source::BATCH;
use super::{Message, SharedPoll};
use crate::exec::panic_text;
use crate::reactor::{Kind, Token, Wait};

/// Batches of completions handed out before everybody else has a turn.
const BATCHES: usize = 8;
/// Looks at memory between two looks at the clock while polling.
const SPINS: u32 = 16;

/// Why [`Driver::step`] says it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Asked to stop, and nothing is in flight.
    Stopped,
    /// Go on.
    Not,
}

/// See the module's page.
pub(crate) struct Driver {
    local: Local,
    poll: Arc<SharedPoll>,
    adaptive: Adaptive,
    stopping: bool,
    mail: Vec<Message>,
    /// Completions fetched and not yet delivered, in reverse order. Outlives a panic of their receiver.
    fetched: Vec<(Token, i32)>,
    failures: u32,
    /// Time may have passed unseen (a sleep, a wait in memory, tasks): the next turn reads the clock. At depth 1 the clock
    /// is what a turn costs most.
    stale: bool,
}

impl Drop for Driver {
    fn drop(&mut self) {
        let inner = self.local.inner();
        for m in inner.inbox.close() {
            drop(m);
        }
        inner.exec.clear();
        let sources = std::mem::take(&mut *inner.sources.borrow_mut());
        drop(sources);
    }
}

impl Driver {
    pub(crate) fn new(local: Local, poll: Arc<SharedPoll>) -> Driver {
        Driver {
            local,
            poll,
            adaptive: Adaptive::default(),
            stopping: false,
            mail: Vec::new(),
            fetched: Vec::with_capacity(BATCH),
            failures: 0,
            stale: true,
        }
    }

    /// Until stopped.
    pub(crate) fn run(mut self) {
        while self.step() == Ended::Not {}
    }

    /// One turn, with the sleep after it if there was nothing to do.
    pub(crate) fn step(&mut self) -> Ended {
        // Tasks catch their own panics; what arrives here comes from a source or a posted call. The thread serves others too.
        let step = catch_unwind(AssertUnwindSafe(|| {
            if !self.turn() {
                if self.stopping && self.local.is_quiet() {
                    return Ended::Stopped;
                }
                self.idle();
            }
            Ended::Not
        }));
        step.unwrap_or_else(|p| {
            log::error!("a callback of an iothread panicked: {}", panic_text(p.as_ref()));
            // It may have struck between the announcement of sleep and its end.
            self.local.inner().inbox.awake();
            Ended::Not
        })
    }

    /// True if there was something to do.
    fn turn(&mut self) -> bool {
        let local = self.local.clone();
        let inner = local.inner();
        let now = local.begin_turn(std::mem::replace(&mut self.stale, false));
        let mut progress = false;
        if inner.inbox.has_mail() || !self.mail.is_empty() {
            progress = true;
            self.read_mail();
        }
        progress |= self.fire_timers(now);
        progress |= self.poll_sources();
        if inner.exec.run_ready() > 0 {
            progress = true;
            self.stale = true;
            self.end_batches();
        }
        self.enter(Wait::No);
        if self.deliver() {
            progress = true;
            self.stale = true;
        }
        if progress {
            inner.counters.turns.add(1);
        }
        progress || inner.exec.has_ready()
    }

    fn read_mail(&mut self) {
        if self.mail.is_empty() {
            self.local.inner().inbox.drain(&mut self.mail);
            // Taken from the end, one by one: what a panic leaves behind is read in the next turn.
            self.mail.reverse();
        }
        let mut completions = 0;
        while let Some(m) = self.mail.pop() {
            match m {
                Message::Run(f) => f(&self.local),
                Message::Wake(t) => self.local.inner().exec.wake(&t),
                Message::Done(token, res) => {
                    self.dispatch(token, res);
                    completions += 1;
                    if completions % BATCH == 0 {
                        self.end_batches();
                    }
                }
                Message::Forget(fd) => self.local.forget_file(&fd),
                Message::Stop => self.stopping = true,
            }
        }
        self.end_batches();
    }

    fn fire_timers(&mut self, now: u64) -> bool {
        let timers = &self.local.inner().timers;
        match timers.borrow().next_deadline() {
            Some(d) if d <= now => {}
            _ => return false,
        }
        loop {
            let due = timers.borrow_mut().pop_due(now);
            match due {
                Some(Some(w)) => w.wake(),
                Some(None) => {}
                None => return true,
            }
        }
    }

    fn poll_sources(&mut self) -> bool {
        let sources = &self.local.inner().sources;
        let n = sources.borrow().len();
        let mut any = false;
        for i in 0..n {
            let (s, was_armed) = {
                let mut all = sources.borrow_mut();
                let Some(e) = all.get_mut(i) else { break };
                if e.armed && !e.kicked {
                    continue;
                }
                let Some(s) = e.live() else { continue };
                let s = std::rc::Rc::clone(s);
                e.kicked = false;
                (s, std::mem::replace(&mut e.armed, false))
            };
            if was_armed {
                s.disarm();
            }
            if s.poll() {
                any = true;
                s.end_batch();
            }
        }
        any
    }

    /// Lets every source publish.
    fn end_batches(&self) {
        let sources = &self.local.inner().sources;
        let n = sources.borrow().len();
        for i in 0..n {
            let s = sources.borrow().get(i).and_then(|e| e.source.clone());
            if let Some(s) = s {
                s.end_batch();
            }
        }
    }

    fn enter(&mut self, wait: Wait) {
        let inner = self.local.inner();
        let mut reactor = inner.reactor.borrow_mut();
        let r = reactor.enter(wait);
        inner.counters.enters.set(reactor.enters());
        drop(reactor);
        match r {
            Ok(()) => self.failures = 0,
            Err(e) => {
                // Nothing that should ever happen. Neither flood the log nor the processor.
                if self.failures == 0 {
                    log::error!("the reactor fails: {e}");
                }
                self.failures = self.failures.saturating_add(1);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }

    /// Delivers completions; true if there were any.
    fn deliver(&mut self) -> bool {
        let mut any = false;
        for _ in 0..BATCHES {
            if self.fetched.is_empty() {
                self.local.inner().reactor.borrow_mut().reap(&mut self.fetched, BATCH);
                self.fetched.reverse();
            }
            if self.fetched.is_empty() {
                break;
            }
            any = true;
            let mut fast = false;
            while let Some((token, res)) = self.fetched.pop() {
                fast |= token.kind() == Kind::Fast;
                self.dispatch(token, res);
            }
            if fast {
                self.end_batches();
            }
        }
        any
    }

    #[inline]
    fn dispatch(&self, token: Token, res: i32) {
        match token.kind() {
            Kind::Fast => self.local.complete_fast(token, res),
            Kind::Awaited => {
                let (waker, keep) = self.local.inner().ops.borrow_mut().complete(token, res);
                if let Some(w) = waker {
                    w.wake();
                }
                drop(keep);
            }
            Kind::Kick => {
                if let Some(e) = self.local.inner().sources.borrow_mut().get_mut(token.number() as usize) {
                    e.kicked_by(token.slot());
                }
            }
            // Its mail is found by the flag.
            Kind::Bell | Kind::Ignored => {}
        }
    }

    /// Polls, then sleeps.
    fn idle(&mut self) {
        let local = self.local.clone();
        let inner = local.inner();
        let params = self.poll.get();
        let is_virtual = inner.reactor.borrow().is_virtual();
        // The turn that found nothing has just read it, or one before it that did nothing else.
        let begin = local.coarse_now();
        self.stale = true;
        let budget = if is_virtual { 0 } else { self.adaptive.current(&params) };
        if budget > 0 && self.spin(begin, budget) {
            // Found within the present budget: nothing for the adaptive rule to learn.
            inner.counters.poll_hits.add(1);
            return;
        }
        if self.arm_sources() || !inner.inbox.prepare_sleep() {
            return;
        }
        let wait = match inner.timers.borrow().next_deadline() {
            Some(d) => Wait::For(d.saturating_sub(begin.max(local.coarse_now()))),
            None => Wait::Forever,
        };
        inner.counters.sleeps.add(1);
        self.enter(wait);
        inner.inbox.awake();
        if !is_virtual {
            self.adaptive.update(&params, local.now().saturating_sub(begin));
        }
    }

    /// Looks at memory for `budget` ns; true if something turned up.
    fn spin(&mut self, begin: u64, budget: u64) -> bool {
        let inner = self.local.inner();
        let due = inner.timers.borrow().next_deadline().unwrap_or(u64::MAX);
        loop {
            for _ in 0..SPINS {
                if inner.inbox.has_mail() || inner.reactor.borrow_mut().has_events() || self.peek_sources() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = self.local.now();
            if now >= due {
                return true;
            }
            if now.saturating_sub(begin) >= budget {
                return false;
            }
        }
    }

    /// True if a source has work; it is then polled in the next turn.
    fn peek_sources(&self) -> bool {
        let mut all = self.local.inner().sources.borrow_mut();
        let mut any = false;
        for e in all.iter_mut() {
            if e.live().is_some_and(|s| s.has_work()) {
                e.kicked = true;
                any = true;
            }
        }
        any
    }

    /// Turns notifications on everywhere; true if work slipped in.
    fn arm_sources(&self) -> bool {
        let sources = &self.local.inner().sources;
        let n = sources.borrow().len();
        let mut work = false;
        for i in 0..n {
            let s = {
                let mut all = sources.borrow_mut();
                let Some(e) = all.get_mut(i) else { break };
                match e.live().cloned() {
                    Some(s) if !e.armed => {
                        e.armed = true;
                        s
                    }
                    _ => continue,
                }
            };
            if s.arm() {
                work = true;
                if let Some(e) = sources.borrow_mut().get_mut(i) {
                    e.kicked = true;
                }
            }
        }
        work
    }
}
