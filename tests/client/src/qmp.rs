//! A QMP client over a unix socket.
//!
//! Used by integration tests against ringblk and QEMU's daemons. It speaks the protocol of
//! docs/interop/qmp-spec.rst: greeting, capabilities, commands with ids, events kept in order. It knows no command.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::connection::{Connection, DEFAULT_LIMIT};
use crate::error::{Error, Result};

/// Longest line accepted, in bytes: a schema is some 300 KiB.
const MAX_LINE: usize = 16 << 20;

/// A connected control client.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Value>,
    greeting: Value,
    limit: Duration,
    next_id: u64,
}

impl Client {
    /// Connects, trying again while nobody listens, reads the greeting and negotiates no capabilities.
    ///
    /// # Errors
    /// `Timeout`, `Protocol` when the greeting is none, `Qmp`.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut client = Self::connect_raw(socket)?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Connects and reads the greeting; still in negotiation mode.
    ///
    /// # Errors
    /// `Timeout`, `Protocol`.
    pub fn connect_raw(socket: &Path) -> Result<Self> {
        let connection = Connection::connect(socket, DEFAULT_LIMIT)?;
        let stream = connection.stream().try_clone().map_err(Error::io("cloning the socket"))?;
        let mut client = Self {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
            limit: DEFAULT_LIMIT,
            next_id: 1,
        };
        let greeting = client.receive(client.limit)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol(format!("no greeting: {greeting}")));
        }
        client.greeting = greeting;
        Ok(client)
    }

    /// The greeting.
    #[must_use]
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Replaces the limit on each wait.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Runs a command and returns `return`.
    ///
    /// # Errors
    /// `Qmp` with class and description when the command fails, `Timeout`, `Closed`, `Protocol`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let id = self.start(command, arguments)?;
        self.finish(command, id)
    }

    /// Sends a command without waiting; `finish` with the returned id waits.
    ///
    /// # Errors
    /// `Io`, `Timeout` when the other side does not read.
    pub fn start(&mut self, command: &str, arguments: Value) -> Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        self.send_raw(json!({"execute": command, "arguments": arguments, "id": id}).to_string().as_bytes())?;
        Ok(id)
    }

    /// Waits for the reply to `id`; events that arrive before are kept.
    ///
    /// # Errors
    /// As `execute`.
    pub fn finish(&mut self, command: &str, id: u64) -> Result<Value> {
        let deadline = Instant::now() + self.limit;
        loop {
            let value = self.receive(deadline.saturating_duration_since(Instant::now()))?;
            if value.get("event").is_some() {
                self.events.push_back(value);
                continue;
            }
            // QEMU greets a client that comes while its monitor is being set up twice.
            if value.get("QMP").is_some() {
                continue;
            }
            if value.get("id") != Some(&json!(id)) {
                return Err(Error::Protocol(format!("reply to another command than {command}: {value}")));
            }
            return reply(command, value);
        }
    }

    /// Sends bytes as they are and a line end.
    ///
    /// # Errors
    /// `Io`.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.set_write_timeout(Some(self.limit)).map_err(Error::io("setting a limit"))?;
        self.stream.write_all(bytes).map_err(Error::io("sending a command"))?;
        self.stream.write_all(b"\n").map_err(Error::io("sending a command"))
    }

    /// The next message, reply or event, as it came.
    ///
    /// # Errors
    /// `Timeout`, `Closed`, `Protocol` when the line is not JSON.
    pub fn receive(&mut self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| {
                    Error::Protocol(format!("{error} in {:?}", String::from_utf8_lossy(&line)))
                });
            }
            if self.buffer.len() > MAX_LINE {
                return Err(Error::Protocol(format!("a line of more than {MAX_LINE} bytes")));
            }
            let timeout = || Error::Timeout { waiting_for: "QMP message".into(), limit };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timeout());
            }
            self.stream.set_read_timeout(Some(left)).map_err(Error::io("setting a limit"))?;
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::Closed { doing: "receiving from QMP".into() }),
                Ok(n) => self.buffer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Err(timeout()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("receiving from QMP")(error)),
            }
        }
    }

    /// Waits for an event of this name, keeping others; returns the whole event.
    ///
    /// # Errors
    /// `Timeout` naming the event, `Protocol` when a reply nobody waits for comes.
    pub fn wait_event(&mut self, name: &str) -> Result<Value> {
        self.wait_event_where(name, |_| true)
    }

    /// Waits for an event of this name whose `data` satisfy `accept`, keeping others.
    ///
    /// # Errors
    /// As `wait_event`.
    pub fn wait_event_where(&mut self, name: &str, accept: impl Fn(&Value) -> bool) -> Result<Value> {
        let matches = |event: &Value| {
            event.get("event").and_then(Value::as_str) == Some(name)
                && accept(event.get("data").unwrap_or(&Value::Null))
        };
        if let Some(at) = self.events.iter().position(matches) {
            return Ok(self.events.remove(at).unwrap_or_default());
        }
        let deadline = Instant::now() + self.limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let value = self.receive(left).map_err(|error| match error {
                Error::Timeout { .. } => {
                    Error::Timeout { waiting_for: format!("event {name}"), limit: self.limit }
                }
                other => other,
            })?;
            if value.get("event").is_none() {
                return Err(Error::Protocol(format!("a reply nobody waits for: {value}")));
            }
            if matches(&value) {
                return Ok(value);
            }
            self.events.push_back(value);
        }
    }

    /// Events received so far and not yet taken.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }
}

fn reply(command: &str, mut value: Value) -> Result<Value> {
    if let Some(done) = value.get_mut("return") {
        return Ok(done.take());
    }
    let field = |name: &str| {
        value.get("error").and_then(|error| error.get(name)).and_then(Value::as_str).map(str::to_owned)
    };
    match (field("class"), field("desc")) {
        (Some(class), Some(desc)) => Err(Error::Qmp { command: command.into(), class, desc }),
        _ => Err(Error::Protocol(format!("neither return nor error: {value}"))),
    }
}
