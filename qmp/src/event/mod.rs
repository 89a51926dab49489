//! Events: what the process tells its clients unasked.
//!
//! Whoever has news calls [`Events::emit`] on the main thread; the server takes what is due and hands it to the
//! negotiated sessions. Other threads send a message to the main thread first. Must not know sessions.
//!
//! An event may come once per interval and key, as in QEMU: the first goes out at once, of those that follow within the
//! interval only the last, at its end. The loop asks [`Events::deadline`] when that is.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Most events that wait for the server to fetch them; more are dropped and counted.
pub const MAX_QUEUED: usize = 4096;
/// Most keys whose rate is watched at once; an event of a further key shares one entry per event name.
pub const MAX_KEYS: usize = 1024;

/// A kind of event. The struct is its data and its schema.
pub trait Event: Serialize + JsonSchema {
    /// Name on the wire.
    const NAME: &'static str;
    /// When it is sent, for the reference.
    const DOC: &'static str;
    /// At most one per interval and key; zero: no limit.
    const INTERVAL: Duration = Duration::ZERO;

    /// What the limit is counted by.
    fn key(&self) -> String {
        String::new()
    }
}

/// An event on its way to the sessions.
#[derive(Clone, Debug, PartialEq)]
pub struct Emitted {
    /// Name on the wire.
    pub name: &'static str,
    /// The whole message.
    pub message: Value,
}

#[derive(Debug)]
struct Limited {
    until: Instant,
    interval: Duration,
    pending: Option<Emitted>,
}

#[derive(Debug, Default)]
struct Hub {
    queue: VecDeque<Emitted>,
    limited: BTreeMap<(&'static str, String), Limited>,
    dropped: u64,
    waker: Option<Waker>,
}

/// The events of a process; clones are the same hub.
#[derive(Clone, Debug, Default)]
pub struct Events {
    hub: Rc<RefCell<Hub>>,
}

impl Events {
    /// A hub without events.
    pub fn new() -> Self {
        Events::default()
    }

    /// Sends an event now.
    pub fn emit<E: Event>(&self, event: &E) {
        self.emit_at(event, Instant::now(), SystemTime::now());
    }

    /// Sends an event at a time; `wall` becomes its timestamp.
    pub fn emit_at<E: Event>(&self, event: &E, now: Instant, wall: SystemTime) {
        let data = match serde_json::to_value(event) {
            Ok(data) => data,
            Err(e) => {
                log::error!("event {}: {e}", E::NAME);
                return;
            }
        };
        let emitted = Emitted { name: E::NAME, message: message(E::NAME, data, wall) };
        let mut hub = self.hub.borrow_mut();
        if !E::INTERVAL.is_zero() {
            let mut key = (E::NAME, event.key());
            if hub.limited.len() >= MAX_KEYS && !hub.limited.contains_key(&key) {
                key = (E::NAME, String::new());
            }
            if let Some(limited) = hub.limited.get_mut(&key).filter(|l| l.until > now) {
                limited.pending = Some(emitted);
                hub.wake();
                return;
            }
            let limited = Limited { until: now + E::INTERVAL, interval: E::INTERVAL, pending: None };
            hub.limited.insert(key, limited);
        }
        hub.push(emitted);
    }

    /// Takes what is to be delivered now, the events whose interval has ended among them.
    pub fn take(&self, now: Instant) -> Vec<Emitted> {
        let mut hub = self.hub.borrow_mut();
        let hub = &mut *hub;
        let mut due = Vec::new();
        hub.limited.retain(|_, limited| {
            if limited.until > now {
                return true;
            }
            match limited.pending.take() {
                Some(event) => {
                    due.push(event);
                    limited.until = now + limited.interval;
                    true
                }
                None => false,
            }
        });
        let mut out: Vec<Emitted> = hub.queue.drain(..).collect();
        out.append(&mut due);
        out
    }

    /// When [`Events::take`] has something to do next although nobody emits anything.
    pub fn deadline(&self) -> Option<Instant> {
        self.hub.borrow().limited.values().filter(|l| l.pending.is_some()).map(|l| l.until).min()
    }

    /// Whom to wake when an event is emitted.
    pub(crate) fn set_waker(&self, waker: &Waker) {
        let mut hub = self.hub.borrow_mut();
        match &mut hub.waker {
            Some(old) => old.clone_from(waker),
            None => hub.waker = Some(waker.clone()),
        }
    }

    /// How many events were lost because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.hub.borrow().dropped
    }
}

impl Hub {
    fn push(&mut self, event: Emitted) {
        if self.queue.len() >= MAX_QUEUED {
            self.dropped += 1;
            return;
        }
        self.queue.push_back(event);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}

fn message(name: &str, data: Value, wall: SystemTime) -> Value {
    let since = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut message = Map::new();
    message.insert(
        "timestamp".to_owned(),
        json!({"seconds": since.as_secs(), "microseconds": since.subsec_micros()}),
    );
    message.insert("event".to_owned(), json!(name));
    // An event without data has no such member.
    if data.as_object().is_some_and(|d| !d.is_empty()) {
        message.insert("data".to_owned(), data);
    }
    Value::Object(message)
}

/// `BLOCK_EXPORT_DELETED`: an export is gone and its id free.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct BlockExportDeleted {
    /// The export's id.
    pub id: String,
}

impl Event for BlockExportDeleted {
    const NAME: &'static str = "BLOCK_EXPORT_DELETED";
    const DOC: &'static str = "Sent when an export has been removed and its id can be used again.";
}

/// The sort of request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IoOperationType {
    /// Reading.
    Read,
    /// Writing, and everything else that changes the disk.
    Write,
}

/// What was done about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BlockErrorAction {
    /// Taken as success.
    Ignore,
    /// Passed to the guest.
    Report,
    /// Held back until somebody acts.
    Stop,
}

/// `BLOCK_IMAGE_CORRUPTED`: an image was found damaged.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockImageCorrupted {
    /// Kept for QEMU's clients: empty.
    pub device: String,
    /// The node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// What is wrong, for people; may change.
    pub msg: String,
    /// Where in the image it was found, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    /// How much of the image it is about, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
    /// If true the image is marked as corrupt and takes no requests any more until it is repaired.
    pub fatal: bool,
}

impl Event for BlockImageCorrupted {
    const NAME: &'static str = "BLOCK_IMAGE_CORRUPTED";
    const DOC: &'static str = "Sent when an image contradicts itself.";
}

/// What a request to a quorum did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum QuorumOpType {
    /// Read.
    Read,
    /// Wrote, zeroed or discarded.
    Write,
    /// Flushed.
    Flush,
}

/// `QUORUM_FAILURE`: too few children of a quorum agree.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct QuorumFailure {
    /// The node.
    pub reference: String,
    /// First sector of 512 bytes of the request.
    pub sector_num: i64,
    /// How many sectors it has.
    pub sectors_count: i64,
}

impl Event for QuorumFailure {
    const NAME: &'static str = "QUORUM_FAILURE";
    const DOC: &'static str = "Sent when the children of a quorum that agree are fewer than its vote threshold; at most once a second.";
    const INTERVAL: Duration = Duration::from_secs(1);

    fn key(&self) -> String {
        self.reference.clone()
    }
}

/// `QUORUM_REPORT_BAD`: a child of a quorum failed or differs from the majority.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct QuorumReportBad {
    /// What the request did.
    #[serde(rename = "type")]
    pub kind: QuorumOpType,
    /// The child's error; absent where it was its data that differed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The child.
    pub node_name: String,
    /// First sector of 512 bytes of the request.
    pub sector_num: i64,
    /// How many sectors it has.
    pub sectors_count: i64,
}

impl Event for QuorumReportBad {
    const NAME: &'static str = "QUORUM_REPORT_BAD";
    const DOC: &'static str = "Sent when a child of a quorum failed or disagreed; at most once a second for each child and kind of request.";
    const INTERVAL: Duration = Duration::from_secs(1);

    fn key(&self) -> String {
        format!("{:?} {}", self.kind, self.node_name)
    }
}

/// `BLOCK_IO_ERROR`: a request of a guest failed.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// Path of the device: the export's id here.
    pub qom_path: String,
    /// Kept for QEMU's clients: the export's id.
    pub device: String,
    /// The node that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// What was to be done.
    pub operation: IoOperationType,
    /// What was done about it.
    pub action: BlockErrorAction,
    /// Whether the host ran out of space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nospace: Option<bool>,
    /// The error for people; may change.
    pub reason: String,
}

impl Event for BlockIoError {
    const NAME: &'static str = "BLOCK_IO_ERROR";
    const DOC: &'static str =
        "Sent when a request of a guest failed; at most once a second per device, the last one then.";
    const INTERVAL: Duration = Duration::from_secs(1);

    fn key(&self) -> String {
        self.qom_path.clone()
    }
}
