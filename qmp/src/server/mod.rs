//! All sessions of a process: which request runs when, who gets the answer, who hears of events.
//!
//! Driven by [`crate::adapter`] (or by tests): feed sessions, call [`Server::poll`], write their output. Requests of one
//! session run in order. Across sessions one command runs at a time, as in QEMU, so that a handler that waits does not
//! find the graph changed by another; commands registered as concurrent (queries) run beside it. A command whose client
//! goes away runs to its end; what that client had queued behind it is dropped.
//!
//! Must not touch descriptors.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use serde_json::Value;

use crate::command::{CommandTable, HandlerFuture};
use crate::error::QmpError;
use crate::event::Events;
use crate::session::{Phase, Request, Session, SessionOptions};

/// Sessions at once in one process.
pub const MAX_SESSIONS: usize = 32;

/// Names a session; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u32);

/// A command being executed.
struct Running {
    id: Option<Value>,
    name: String,
    exclusive: bool,
    future: HandlerFuture,
}

struct Slot {
    session: Session,
    running: Option<Running>,
}

/// The server.
pub struct Server<S> {
    table: Rc<CommandTable<S>>,
    state: S,
    events: Events,
    slots: BTreeMap<SessionId, Slot>,
    /// Commands whose client is gone.
    orphans: Vec<Running>,
    next_id: u32,
    /// A command that runs alone is being executed.
    busy: bool,
    /// No further command is begun.
    ending: bool,
    /// The session that ran such a command last: the others come first.
    last: SessionId,
}

impl<S> std::fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("sessions", &self.slots.len())
            .field("busy", &self.busy)
            .finish_non_exhaustive()
    }
}

impl<S: Clone + 'static> Server<S> {
    /// A server without sessions.
    pub fn new(table: Rc<CommandTable<S>>, state: S, events: Events) -> Self {
        Server {
            table,
            state,
            events,
            slots: BTreeMap::new(),
            orphans: Vec::new(),
            next_id: 0,
            busy: false,
            ending: false,
            last: SessionId(0),
        }
    }

    /// The commands.
    pub fn table(&self) -> &Rc<CommandTable<S>> {
        &self.table
    }

    /// Begins a session; `None` when there are [`MAX_SESSIONS`].
    pub fn connect(&mut self, options: SessionOptions) -> Option<SessionId> {
        if self.slots.len() >= MAX_SESSIONS {
            return None;
        }
        // Four thousand million sessions later ids may come round to one that lives on.
        while self.slots.contains_key(&SessionId(self.next_id)) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = SessionId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        let session = Session::new(options, self.table.greeting());
        self.slots.insert(id, Slot { session, running: None });
        Some(id)
    }

    /// A session.
    pub fn session(&mut self, id: SessionId) -> Option<&mut Session> {
        self.slots.get_mut(&id).map(|slot| &mut slot.session)
    }

    /// All sessions.
    pub fn sessions(&self) -> Vec<SessionId> {
        self.slots.keys().copied().collect()
    }

    /// Whether the session has nothing to do, nothing to say and nothing to hear any more.
    pub fn is_finished(&self, id: SessionId) -> bool {
        self.slots.get(&id).is_none_or(|slot| {
            slot.session.is_closed() || (slot.session.is_finished() && slot.running.is_none())
        })
    }

    /// Ends a session. A command of it that is being executed runs to its end.
    pub fn disconnect(&mut self, id: SessionId) {
        if let Some(slot) = self.slots.remove(&id) {
            self.orphans.extend(slot.running);
        }
    }

    /// The process is ending: what has begun runs to its end, nothing further is begun. Requests that wait get no answer.
    pub fn stop_starting(&mut self) {
        self.ending = true;
    }

    /// Whether a command is being executed.
    pub fn is_busy(&self) -> bool {
        !self.orphans.is_empty() || self.slots.values().any(|slot| slot.running.is_some())
    }

    /// When [`Server::poll`] has something to do next although nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.events.deadline()
    }

    /// Does whatever can be done now: starts requests, polls those that run, delivers events. The waker is called when there
    /// is more.
    pub fn poll(&mut self, cx: &mut Context<'_>) {
        self.poll_at(cx, Instant::now());
    }

    /// [`Server::poll`] at a time.
    pub fn poll_at(&mut self, cx: &mut Context<'_>, now: Instant) {
        self.events.set_waker(cx.waker());
        loop {
            let mut progress = self.run(cx, now);
            progress |= self.start();
            progress |= self.deliver(now);
            if !progress {
                return;
            }
        }
    }

    /// Polls what runs.
    fn run(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut progress = false;
        let ids: Vec<SessionId> = self.slots.keys().copied().collect();
        for id in ids {
            let Some(running) = self.slots.get_mut(&id).and_then(|slot| slot.running.as_mut()) else {
                continue;
            };
            let Poll::Ready(result) = step(running, cx) else { continue };
            progress = true;
            // As in QEMU, what a command caused is told before its answer.
            self.deliver(now);
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if let Some(running) = slot.running.take() {
                self.busy &= !running.exclusive;
                slot.session.respond(running.id, result);
            }
        }
        let busy = &mut self.busy;
        self.orphans.retain_mut(|running| {
            let done = step(running, cx).is_ready();
            progress |= done;
            if done {
                *busy &= !running.exclusive;
            }
            !done
        });
        progress
    }

    /// Starts what may start.
    fn start(&mut self) -> bool {
        if self.ending {
            return false;
        }
        let mut progress = false;
        let mut order: Vec<SessionId> = self.slots.keys().copied().collect();
        let first = order.iter().position(|id| *id > self.last).unwrap_or(0);
        order.rotate_left(first);
        for id in order {
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if slot.running.is_some() {
                continue;
            }
            let Some(name) = slot.session.next_name() else { continue };
            let exclusive = !self.table.is_concurrent(name);
            if exclusive && self.busy {
                continue;
            }
            let Some(request) = slot.session.take_request() else { continue };
            progress = true;
            let Request { id: request_id, name, arguments } = request;
            let negotiation = name == "qmp_capabilities";
            let called = match slot.session.phase() {
                Phase::Negotiating if !negotiation => Err(QmpError::expecting_negotiation()),
                Phase::Running if negotiation => Err(QmpError::negotiation_complete()),
                _ => self.table.call(self.state.clone(), &name, arguments),
            };
            match called {
                Err(error) => slot.session.respond(request_id, Err(error)),
                Ok(future) if negotiation => {
                    // Ready at once; a session must not see a command between this and its answer.
                    let mut running = Running { id: request_id, name, exclusive: false, future };
                    let result = match step(&mut running, &mut Context::from_waker(std::task::Waker::noop()))
                    {
                        Poll::Ready(result) => result,
                        Poll::Pending => Err(QmpError::generic("The negotiation did not end")),
                    };
                    if result.is_ok() {
                        slot.session.set_running();
                    }
                    slot.session.respond(running.id, result);
                }
                Ok(future) => {
                    if exclusive {
                        self.busy = true;
                        self.last = id;
                    }
                    slot.running = Some(Running { id: request_id, name, exclusive, future });
                }
            }
        }
        progress
    }

    /// Hands events to the sessions.
    fn deliver(&mut self, now: Instant) -> bool {
        let events = self.events.take(now);
        for event in &events {
            if !self.table.has_event(event.name) {
                // The schema would be a lie.
                log::error!("event {} was not announced and is not delivered", event.name);
                continue;
            }
            for slot in self.slots.values_mut() {
                slot.session.event(&event.message);
            }
        }
        !events.is_empty()
    }
}

/// Polls a command. One that panics fails; it must not take the process, and with it the guests' disks, along.
fn step(running: &mut Running, cx: &mut Context<'_>) -> Poll<Result<Value, QmpError>> {
    let future = &mut running.future;
    match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll,
        Err(_) => {
            log::error!("command {} panicked", running.name);
            Poll::Ready(Err(QmpError::generic(format!("Internal error in {}; see the log", running.name))))
        }
    }
}
