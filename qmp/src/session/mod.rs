//! One client's session: bytes in, requests out; answers and events in, bytes out. A state machine without a
//! descriptor, a clock or a command; the server decides when requests run.
//!
//! Bounds, per session: 1 MiB of one request ([`crate::json::Limits`]), [`MAX_QUEUED`] requests waiting (then nothing more
//! is read), [`OUTPUT_PAUSE`] bytes of unread answers (then no further request is started), [`EVENT_LIMIT`] bytes of unread
//! output (then events are dropped) and [`MAX_DROPPED`] dropped events (then the session ends).

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::json::{Framer, Limits};

/// Requests that wait in a session, as in QEMU.
pub const MAX_QUEUED: usize = 8;
/// Unread output in bytes above which no further request of the session is started.
pub const OUTPUT_PAUSE: usize = 64 * 1024;
/// Unread output in bytes above which events are dropped.
pub const EVENT_LIMIT: usize = 1024 * 1024;
/// Events a session may lose before it is ended.
pub const MAX_DROPPED: u64 = 1024;

/// A request that is whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Echoed in the response.
    pub id: Option<Value>,
    /// The command.
    pub name: String,
    /// Its arguments, not yet checked.
    pub arguments: Map<String, Value>,
}

/// What came in, in order.
#[derive(Clone, Debug, PartialEq)]
enum Item {
    Request(Request),
    Invalid(Option<Value>, QmpError),
}

/// How far the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Only `qmp_capabilities` is accepted, and no events are sent.
    Negotiating,
    /// Everything but `qmp_capabilities` is.
    Running,
}

/// How a session writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// Messages over several lines, for people (`--monitor pretty=on`).
    pub pretty: bool,
}

/// The session.
#[derive(Debug)]
pub struct Session {
    options: SessionOptions,
    phase: Phase,
    framer: Framer,
    /// Bytes that were read and wait for room in the queue.
    backlog: Vec<u8>,
    queue: VecDeque<Item>,
    output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
    /// The client sends no more.
    ended: bool,
    /// Nothing is read or answered any more.
    closed: bool,
    dropped: u64,
}

impl Session {
    /// A session whose output begins with the greeting.
    pub fn new(options: SessionOptions, greeting: &Value) -> Self {
        let mut session = Session {
            options,
            phase: Phase::Negotiating,
            framer: Framer::new(Limits::default()),
            backlog: Vec::new(),
            queue: VecDeque::new(),
            output: Vec::new(),
            written: 0,
            ended: false,
            closed: false,
            dropped: 0,
        };
        session.write(greeting);
        session
    }

    /// How far the session is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether bytes should be read: there is room for what they may hold. Reading anyway is allowed and costs memory.
    pub fn wants_input(&self) -> bool {
        !self.ended && !self.closed && self.backlog.is_empty() && self.queue.len() < MAX_QUEUED
    }

    /// Bytes from the client.
    pub fn receive(&mut self, bytes: &[u8]) {
        if self.ended || self.closed {
            return;
        }
        if self.backlog.is_empty() {
            let used = self.parse(bytes);
            self.backlog.extend_from_slice(bytes.get(used..).unwrap_or(&[]));
        } else {
            self.backlog.extend_from_slice(bytes);
        }
    }

    /// The client sends no more. What it sent is still answered.
    pub fn receive_end(&mut self) {
        self.ended = true;
    }

    /// The connection is lost or given up: nothing that waits is executed, nothing is sent.
    pub fn close(&mut self) {
        self.closed = true;
        self.queue.clear();
        self.backlog = Vec::new();
        self.output = Vec::new();
        self.written = 0;
    }

    /// Whether [`Session::close`] was called, by the session itself for a client that does not read.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    fn parse(&mut self, bytes: &[u8]) -> usize {
        if self.queue.len() >= MAX_QUEUED {
            return 0;
        }
        let queue = &mut self.queue;
        self.framer.feed(bytes, &mut |message| {
            queue.push_back(match message {
                Ok(value) => request(value),
                Err(desc) => Item::Invalid(None, QmpError::generic(desc)),
            });
            queue.len() < MAX_QUEUED
        })
    }

    /// The name of the next request, if one may be started now. Messages that are no requests are answered on the way.
    pub fn next_name(&mut self) -> Option<&str> {
        loop {
            if self.closed || self.unwritten() >= OUTPUT_PAUSE {
                return None;
            }
            if self.queue.is_empty() && !self.backlog.is_empty() {
                let backlog = std::mem::take(&mut self.backlog);
                let used = self.parse(&backlog);
                self.backlog = backlog.get(used..).unwrap_or(&[]).to_vec();
            }
            match self.queue.front() {
                None => return None,
                Some(Item::Request(_)) => break,
                Some(Item::Invalid(..)) => {
                    if let Some(Item::Invalid(id, error)) = self.queue.pop_front() {
                        self.respond(id, Err(error));
                    }
                }
            }
        }
        match self.queue.front() {
            Some(Item::Request(request)) => Some(&request.name),
            _ => None,
        }
    }

    /// Takes the request [`Session::next_name`] spoke of.
    pub fn take_request(&mut self) -> Option<Request> {
        match self.queue.pop_front() {
            Some(Item::Request(request)) => Some(request),
            Some(other) => {
                self.queue.push_front(other);
                None
            }
            None => None,
        }
    }

    /// The negotiation is over.
    pub fn set_running(&mut self) {
        self.phase = Phase::Running;
    }

    /// Answers a request.
    pub fn respond(&mut self, id: Option<Value>, result: Result<Value, QmpError>) {
        let mut message = Map::new();
        match result {
            Ok(value) => {
                message.insert("return".to_owned(), value);
                message.extend(id.map(|id| ("id".to_owned(), id)));
            }
            Err(error) => {
                message.extend(id.map(|id| ("id".to_owned(), id)));
                message.insert("error".to_owned(), error.to_value());
            }
        }
        self.write(&Value::Object(message));
    }

    /// Sends an event, unless the negotiation is not over or the client does not read.
    pub fn event(&mut self, message: &Value) {
        if self.phase != Phase::Running || self.closed {
            return;
        }
        if self.unwritten() < EVENT_LIMIT {
            self.write(message);
            return;
        }
        if self.dropped == 0 {
            log::warn!("a QMP client does not read: events are being dropped");
        }
        self.dropped += 1;
        if self.dropped >= MAX_DROPPED {
            log::warn!("a QMP client lost {MAX_DROPPED} events and is disconnected");
            self.close();
        }
    }

    /// Events this client did not get because it did not read.
    pub fn dropped_events(&self) -> u64 {
        self.dropped
    }

    fn write(&mut self, message: &Value) {
        if self.closed {
            return;
        }
        let text = if self.options.pretty { format!("{message:#}") } else { message.to_string() };
        self.output.extend_from_slice(text.as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }

    /// Bytes for the client.
    pub fn output(&self) -> &[u8] {
        self.output.get(self.written..).unwrap_or(&[])
    }

    fn unwritten(&self) -> usize {
        self.output.len().saturating_sub(self.written)
    }

    /// The first `count` bytes of [`Session::output`] have been written.
    pub fn consume(&mut self, count: usize) {
        self.written = self.written.saturating_add(count).min(self.output.len());
        if self.written == self.output.len() {
            self.written = 0;
            self.output.clear();
            // What one large answer needed is not kept.
            if self.output.capacity() > 2 * OUTPUT_PAUSE {
                self.output = Vec::new();
            }
        } else if self.written >= EVENT_LIMIT {
            self.output.drain(..self.written);
            self.written = 0;
        }
    }

    /// Whether nothing more can come of this session, given that no request of it is being executed.
    pub fn is_finished(&self) -> bool {
        self.closed
            || (self.ended && self.queue.is_empty() && self.backlog.is_empty() && self.output().is_empty())
    }
}

/// A message's envelope, checked in the order and the words of QEMU.
fn request(value: Value) -> Item {
    let Value::Object(message) = value else {
        return Item::Invalid(None, QmpError::generic("QMP input must be a JSON object"));
    };
    let (mut id, mut name, mut arguments, mut wrong) = (None, None, None, None);
    for (key, value) in message {
        let complaint = match (key.as_str(), value) {
            ("id", value) => {
                id = Some(value);
                None
            }
            ("execute", Value::String(text)) => {
                name = Some(text);
                None
            }
            ("execute", _) => Some("QMP input member 'execute' must be a string".to_owned()),
            ("arguments", Value::Object(map)) => {
                arguments = Some(map);
                None
            }
            ("arguments", _) => Some("QMP input member 'arguments' must be an object".to_owned()),
            // Also `exec-oob`: that capability is not offered.
            _ => Some(format!("QMP input member '{key}' is unexpected")),
        };
        wrong = wrong.or(complaint);
    }
    match (wrong, name) {
        (Some(wrong), _) => Item::Invalid(id, QmpError::generic(wrong)),
        (None, None) => Item::Invalid(id, QmpError::generic("QMP input lacks member 'execute'")),
        (None, Some(name)) => Item::Request(Request { id, name, arguments: arguments.unwrap_or_default() }),
    }
}
