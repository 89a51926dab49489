//! A throttle group: the limits that its members, which may serve several disks on several iothreads, keep together.
//!
//! Made by the process (`object-add`), used by throttle nodes on any iothread. Requests wait in queues of their member and
//! direction; members take turns. Of all who wait in one direction, the one whose turn is next (the *head*) keeps a timer on
//! its own iothread; when it rings, the head lets through whoever may go, and wakes the next head to set a timer. So there
//! is one timer per direction, and nobody runs without need.
//!
//! Lock order: `state` is a leaf, held for a few instructions; wakers are called after it is released.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use graph::Result;
use host::Local;
use host::iothread::Sleep;

use super::bucket::{Buckets, Direction};
use super::limits::{Limits, ThrottleLimits};

/// Longest sleep at a time, ns: an hour.
const MAX_SLEEP: u64 = 3_600_000_000_000;

/// A request that waits.
struct Waiter {
    number: u64,
    bytes: u64,
    waker: Option<Waker>,
    /// It is the head, knows it, and has set its timer by the limits as they are.
    armed: bool,
}

/// A member's part of the state.
struct Desk {
    number: u64,
    /// What the member's node looks at on the hot path.
    limited: Arc<AtomicBool>,
    /// Nobody is held up: a drain waits for the member's requests.
    drained: bool,
    /// By direction.
    waiting: [VecDeque<Waiter>; 2],
}

#[derive(Default)]
struct State {
    buckets: Buckets,
    desks: Vec<Desk>,
    /// By direction: whose turn it is, as an index of `desks` from which on somebody who waits is looked for.
    turn: [usize; 2],
    /// The direction that goes first next time.
    first: usize,
    /// Numbers of members and waiters.
    next: u64,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn desk(&mut self, member: u64) -> Option<&mut Desk> {
        self.desks.iter_mut().find(|d| d.number == member)
    }

    /// The desk whose turn it is.
    fn head_desk(&self, direction: Direction) -> Option<usize> {
        let count = self.desks.len();
        let start = self.turn[direction as usize];
        let mut order = (0..count).map(|i| (start + i) % count);
        order.find(|at| self.desks.get(*at).is_some_and(|d| !d.waiting[direction as usize].is_empty()))
    }

    fn head(&mut self, direction: Direction) -> Option<&mut Waiter> {
        let at = self.head_desk(direction)?;
        self.desks.get_mut(at)?.waiting[direction as usize].front_mut()
    }

    /// Lets through the head of a direction if there is nothing to wait for.
    fn release(&mut self, direction: Direction) -> Option<Option<Waker>> {
        let at = self.head_desk(direction)?;
        if self.buckets.wait(direction) > 0 {
            return None;
        }
        let waiter = self.desks.get_mut(at)?.waiting[direction as usize].pop_front()?;
        self.turn[direction as usize] = (at + 1) % self.desks.len().max(1);
        self.buckets.account(direction, waiter.bytes);
        Some(waiter.waker)
    }

    /// Lets through whoever may go, the directions in turns, and adds heads that have timers to set.
    fn dispatch(&mut self, wake: &mut Vec<Waker>) {
        let mut direction = Direction::BOTH[self.first];
        let mut refused = 0;
        while refused < 2 {
            match self.release(direction) {
                Some(waker) => {
                    wake.extend(waker);
                    refused = 0;
                    self.first = direction.other() as usize;
                }
                None => refused += 1,
            }
            direction = direction.other();
        }
        for direction in Direction::BOTH {
            let head = self.head(direction).filter(|w| !w.armed);
            wake.extend(head.and_then(|w| w.waker.take()));
        }
    }

    /// Lets through everybody who waits at a desk.
    fn empty(&mut self, member: u64, wake: &mut Vec<Waker>) {
        for direction in Direction::BOTH {
            let Some(desk) = self.desk(member) else { return };
            let all = std::mem::take(&mut desk.waiting[direction as usize]);
            for waiter in all {
                self.buckets.account(direction, waiter.bytes);
                wake.extend(waiter.waker);
            }
        }
        self.dispatch(wake);
    }

    fn waiter(&mut self, number: u64, direction: Direction) -> Option<&mut Waiter> {
        let mut all = self.desks.iter_mut().flat_map(|d| &mut d.waiting[direction as usize]);
        all.find(|w| w.number == number)
    }
}

/// Limits that several nodes keep together; an object of the process.
#[derive(Default)]
pub struct ThrottleGroup {
    state: Mutex<State>,
}

impl ThrottleGroup {
    /// A group with these limits.
    ///
    /// # Errors
    /// A value is out of range, or the limits cannot be together.
    pub fn new(limits: &ThrottleLimits) -> Result<ThrottleGroup> {
        let buckets = Buckets::new(Limits::default().with(limits)?);
        Ok(ThrottleGroup { state: Mutex::new(State { buckets, ..State::default() }) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, then wakes whom the change concerns.
    fn change<T>(&self, change: impl FnOnce(&mut State, &mut Vec<Waker>) -> T) -> T {
        let mut wake = Vec::new();
        let result = change(&mut self.state(), &mut wake);
        wake.into_iter().for_each(Waker::wake);
        result
    }

    /// The limits as they are.
    pub fn limits(&self) -> Limits {
        *self.state().buckets.limits()
    }

    /// Changes the limits that are told; the others stay. What was let through before does not count any more; those who
    /// wait are looked at anew.
    ///
    /// # Errors
    /// As [`ThrottleGroup::new`]; nothing has changed then.
    pub fn set_limits(&self, told: &ThrottleLimits) -> Result<()> {
        self.change(|state, wake| {
            let limits = state.buckets.limits().with(told)?;
            state.buckets = Buckets::new(limits);
            let any = limits.any();
            // Only a hint to the nodes: whoever sees the old value a moment longer goes by the old limits.
            state.desks.iter().for_each(|d| d.limited.store(any, Relaxed));
            state.desks.iter_mut().flat_map(|d| d.waiting.iter_mut().flatten()).for_each(|w| w.armed = false);
            state.dispatch(wake);
            Ok(())
        })
    }

    /// A new member. `limited` is kept as long as it is one: whether requests have to ask at all.
    pub(super) fn join(self: &Arc<Self>, limited: &Arc<AtomicBool>, drained: bool) -> Member {
        let mut state = self.state();
        let number = state.number();
        limited.store(state.buckets.limits().any(), Relaxed);
        state.desks.push(Desk {
            number,
            limited: Arc::clone(limited),
            drained,
            waiting: [VecDeque::new(), VecDeque::new()],
        });
        drop(state);
        Member { group: Arc::clone(self), number }
    }
}

impl std::fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ThrottleGroup({})", self.limits().tell())
    }
}

/// A node's place in a group; leaves it when dropped. The node has no request in it then.
pub(super) struct Member {
    group: Arc<ThrottleGroup>,
    number: u64,
}

impl Member {
    /// The group.
    pub(super) fn group(&self) -> &Arc<ThrottleGroup> {
        &self.group
    }

    /// From now on nobody is held up here, or it is over with that.
    pub(super) fn set_drained(&self, drained: bool) {
        self.group.change(|state, wake| {
            if let Some(desk) = state.desk(self.number) {
                desk.drained = drained;
            }
            if drained {
                state.empty(self.number, wake);
            }
        });
    }

    /// Ends when a request of so many bytes may go.
    pub(super) async fn admit(&self, local: &Local, direction: Direction, bytes: u64) {
        let number = {
            let state = &mut *self.group.state();
            state.buckets.advance(local.now());
            // Whoever comes goes behind those who wait, whatever their member.
            let free = state.head_desk(direction).is_none() && state.buckets.wait(direction) == 0;
            let number = state.number();
            let desk = match state.desk(self.number) {
                Some(desk) if !free && !desk.drained => desk,
                _ => {
                    state.buckets.account(direction, bytes);
                    return;
                }
            };
            desk.waiting[direction as usize].push_back(Waiter { number, bytes, waker: None, armed: false });
            number
        };
        let turn = Turn { group: &self.group, number, direction, local, timer: None };
        turn.await;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.change(|state, wake| {
            state.empty(self.number, wake);
            if let Some(at) = state.desks.iter().position(|d| d.number == self.number) {
                state.desks.remove(at);
                for turn in &mut state.turn {
                    // The others keep their order.
                    *turn = if *turn > at { *turn - 1 } else { *turn };
                }
            }
        });
    }
}

/// A place in a queue; gone from there means let through.
struct Turn<'a> {
    group: &'a ThrottleGroup,
    number: u64,
    direction: Direction,
    local: &'a Local,
    timer: Option<Sleep>,
}

impl Turn<'_> {
    /// `None`: let through. Otherwise how long to sleep, for the head.
    fn look(&self, waker: &Waker) -> Option<Option<u64>> {
        let now = self.local.now();
        self.group.change(|state, wake| {
            // Not to be woken by what we do ourselves.
            state.waiter(self.number, self.direction)?.waker = None;
            state.buckets.advance(now);
            state.dispatch(wake);
            let wait = state.buckets.wait(self.direction);
            let is_head = state.head(self.direction).is_some_and(|w| w.number == self.number);
            let own = state.waiter(self.number, self.direction)?;
            own.waker = Some(waker.clone());
            own.armed = is_head;
            Some(is_head.then_some(wait))
        })
    }
}

impl Future for Turn<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.timer = None;
        loop {
            let Some(sleep) = self.look(cx.waker()) else { return Poll::Ready(()) };
            // Without a timer: somebody else is the head, and wakes us when that is over.
            let Some(wait) = sleep else { return Poll::Pending };
            let mut timer = self.local.sleep(wait.clamp(1, MAX_SLEEP));
            if Pin::new(&mut timer).poll(cx).is_pending() {
                self.timer = Some(timer);
                return Poll::Pending;
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.group.change(|state, wake| {
            let mut found = false;
            for desk in &mut state.desks {
                let queue = &mut desk.waiting[self.direction as usize];
                let before = queue.len();
                queue.retain(|w| w.number != self.number);
                found |= queue.len() != before;
            }
            // Given up half way: perhaps it was the head.
            if found {
                state.dispatch(wake);
            }
        });
    }
}
