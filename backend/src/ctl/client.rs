//! The connection to a control channel: greeting, negotiation, one command at a time, events on the side.
//!
//! Blocking, one thread; the prompt takes it apart into a writer and a reader of its own. What comes is bounded and not
//! trusted to make sense.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::failure::Failure;

/// Longest message, bytes: a schema has some hundred KiB.
const MAX_MESSAGE: usize = 64 << 20;
/// How long a daemon may take to greet.
const GREETING: Duration = Duration::from_secs(10);
/// Most events that are kept while nobody asks for them.
const MAX_EVENTS: usize = 10_000;

fn lost(what: impl std::fmt::Display) -> Failure {
    Failure::Lost(what.to_string())
}

/// Messages as they come, one each line.
pub struct Messages {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Bytes of the buffer that hold no end of line.
    seen: usize,
}

impl Messages {
    /// The next message.
    ///
    /// # Errors
    /// The connection ended, or it is not JSON.
    pub fn next(&mut self) -> Result<Value, Failure> {
        loop {
            let end = self.buffer.iter().skip(self.seen).position(|b| *b == b'\n').map(|at| at + self.seen);
            if let Some(end) = end {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                self.seen = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|e| {
                    lost(format!("what the other side says is not JSON: {e}: is it a QMP socket?"))
                });
            }
            self.seen = self.buffer.len();
            if self.seen > MAX_MESSAGE {
                return Err(lost(format!("a message of more than {MAX_MESSAGE} bytes")));
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(lost("the daemon closed the connection")),
                Ok(n) => self.buffer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(lost(format!(
                        "no greeting within {} seconds: is it a QMP socket, and does nobody else use it?",
                        GREETING.as_secs()
                    )));
                }
                Err(e) => return Err(lost(format!("the connection broke: {e}"))),
            }
        }
    }
}

/// A connection that has been negotiated.
pub struct Client {
    stream: UnixStream,
    messages: Messages,
    events: VecDeque<Value>,
    next_id: u64,
    /// Name and version of the other side, as it says.
    version: String,
}

/// What the greeting says of the other side.
fn version(greeting: &Value) -> String {
    let version = greeting.pointer("/QMP/version");
    let number = |name: &str| {
        let n = version.and_then(|v| v.pointer(&format!("/qemu/{name}"))).and_then(Value::as_u64);
        n.unwrap_or(0)
    };
    let package = version.and_then(|v| v.get("package")).and_then(Value::as_str).unwrap_or("").trim();
    let numbers = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
    if package.is_empty() { format!("QMP {numbers}") } else { format!("{package}, QMP {numbers}") }
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody listens, or what answers is no QMP.
    pub fn connect(path: &Path) -> Result<Client, Failure> {
        let shown = path.display();
        let stream = UnixStream::connect(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                lost(format!("there is no socket '{shown}': is the daemon running?"))
            }
            std::io::ErrorKind::ConnectionRefused => {
                lost(format!("nobody listens on '{shown}': its daemon has ended"))
            }
            _ => lost(format!("cannot connect to '{shown}': {e}")),
        })?;
        let broken = |e: std::io::Error| lost(format!("the connection broke: {e}"));
        stream.set_read_timeout(Some(GREETING)).map_err(broken)?;
        let reader = stream.try_clone().map_err(broken)?;
        let messages = Messages { stream: reader, buffer: Vec::new(), seen: 0 };
        let mut client =
            Client { stream, messages, events: VecDeque::new(), next_id: 1, version: String::new() };
        let greeting = client.messages.next()?;
        if greeting.get("QMP").is_none() {
            return Err(lost(format!("'{shown}' does not greet as QMP does")));
        }
        client.version = version(&greeting);
        client.stream.set_read_timeout(None).map_err(broken)?;
        client.execute("qmp_capabilities", None)?;
        Ok(client)
    }

    /// Name and version of the other side.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Sends a command; returns the id its answer will carry.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, name: &str, arguments: Option<Value>) -> Result<u64, Failure> {
        let id = self.next_id;
        self.next_id += 1;
        let mut message = json!({"execute": name, "id": id});
        if let (Some(arguments), Some(message)) = (arguments, message.as_object_mut()) {
            message.insert("arguments".to_owned(), arguments);
        }
        let line = format!("{message}\n");
        self.stream.write_all(line.as_bytes()).map_err(|e| lost(format!("the connection broke: {e}")))?;
        Ok(id)
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// What the daemon answers; the connection broke.
    pub fn execute(&mut self, name: &str, arguments: Option<Value>) -> Result<Value, Failure> {
        let id = self.send(name, arguments)?;
        loop {
            let message = self.messages.next()?;
            if message.get("event").is_some() {
                if self.events.len() < MAX_EVENTS {
                    self.events.push_back(message);
                }
            } else if let Some(answer) = answer(message, id) {
                return answer;
            }
        }
    }

    /// What has happened while commands ran.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    /// What reads from this connection, for a thread of its own; afterwards only [`Client::send`] may be used.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn reader(&self) -> Result<Messages, Failure> {
        let stream = self.stream.try_clone().map_err(|e| lost(format!("the connection broke: {e}")))?;
        Ok(Messages { stream, buffer: self.messages.buffer.clone(), seen: 0 })
    }
}

/// The answer to the command with this id; `None` for another one's. An error without an id is about what we sent.
pub fn answer(mut message: Value, id: u64) -> Option<Result<Value, Failure>> {
    let about = message.get("id");
    if about.is_some_and(|a| a.as_u64() != Some(id)) {
        return None;
    }
    if let Some(error) = message.get("error") {
        let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or("").to_owned();
        return Some(Err(Failure::Refused { class: text("class"), desc: text("desc") }));
    }
    let value = message.get_mut("return").map(Value::take);
    Some(value.ok_or_else(|| lost("an answer that is neither a result nor an error")))
}
