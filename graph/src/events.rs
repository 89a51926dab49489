//! News from nodes for whoever operates the process: an image was found damaged, children of a quorum disagree.
//!
//! Drivers tell them on any thread ([`NodeEvents`]); the process says once where they go ([`Graph::set_event_sink`]) and
//! brings them to its control channel. Must not wait: the sink only hands over.
//!
//! [`Graph::set_event_sink`]: crate::Graph::set_event_sink

use std::sync::{Arc, OnceLock};

/// One piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GraphEvent {
    /// An image contradicts itself: `BLOCK_IMAGE_CORRUPTED`.
    ImageCorrupted {
        /// The node.
        node_name: String,
        /// What is wrong, for people.
        msg: String,
        /// Where in the image, bytes.
        offset: Option<u64>,
        /// How much of it, bytes.
        size: Option<u64>,
        /// The image takes no writes any more.
        fatal: bool,
    },
    /// Too few children of a quorum agree: `QUORUM_FAILURE`.
    QuorumFailure {
        /// The node: QEMU names the device, or the node without one.
        reference: String,
        /// First sector of 512 bytes of the request.
        sector_num: u64,
        /// How many.
        sectors_count: u64,
    },
    /// A child of a quorum failed or said something else than the majority: `QUORUM_REPORT_BAD`.
    QuorumReportBad {
        /// What the request did.
        op: QuorumOp,
        /// The child's error; absent where it was its data that differed.
        error: Option<String>,
        /// The child.
        node_name: String,
        /// First sector of 512 bytes of the request.
        sector_num: u64,
        /// How many.
        sectors_count: u64,
    },
}

/// What a request to a quorum did; QEMU's `QuorumOpType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuorumOp {
    /// Read.
    Read,
    /// Wrote, zeroed or discarded.
    Write,
    /// Flushed.
    Flush,
}

/// Takes news on any thread.
pub type EventSink = Box<dyn Fn(GraphEvent) + Send + Sync>;

/// Where the news of all nodes of a graph go; empty until the process names a place.
#[derive(Default)]
pub(crate) struct EventHub {
    sink: OnceLock<EventSink>,
}

impl EventHub {
    /// Sets the place; later calls change nothing.
    pub(crate) fn set(&self, sink: EventSink) {
        if self.sink.set(sink).is_err() {
            log::error!("the graph's events go somewhere already");
        }
    }

    fn tell(&self, event: GraphEvent) {
        match self.sink.get() {
            Some(sink) => sink(event),
            None => log::warn!("{event:?}"),
        }
    }
}

/// Where one node tells its news; usable from any thread.
pub struct NodeEvents {
    node_name: String,
    hub: Arc<EventHub>,
}

impl NodeEvents {
    pub(crate) fn new(node_name: String, hub: Arc<EventHub>) -> NodeEvents {
        NodeEvents { node_name, hub }
    }

    /// The image contradicts itself at `offset` for `size` bytes. `fatal`: the node takes no writes any more.
    pub fn image_corrupted(&self, msg: &str, offset: Option<u64>, size: Option<u64>, fatal: bool) {
        let node_name = self.node_name.clone();
        self.hub.tell(GraphEvent::ImageCorrupted { node_name, msg: msg.to_owned(), offset, size, fatal });
    }

    /// Too few children agree on this range, bytes.
    pub fn quorum_failure(&self, offset: u64, len: u64) {
        let (sector_num, sectors_count) = sectors(offset, len);
        let reference = self.node_name.clone();
        self.hub.tell(GraphEvent::QuorumFailure { reference, sector_num, sectors_count });
    }

    /// The child `node_name` failed (`error`) or differs on this range, bytes.
    pub fn quorum_report_bad(
        &self,
        op: QuorumOp,
        error: Option<String>,
        node_name: &str,
        offset: u64,
        len: u64,
    ) {
        let (sector_num, sectors_count) = sectors(offset, len);
        let node_name = node_name.to_owned();
        self.hub.tell(GraphEvent::QuorumReportBad { op, error, node_name, sector_num, sectors_count });
    }
}

/// A range in whole sectors of 512 bytes.
fn sectors(offset: u64, len: u64) -> (u64, u64) {
    let first = offset / 512;
    (first, offset.saturating_add(len).div_ceil(512) - first)
}

impl std::fmt::Debug for NodeEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeEvents({})", self.node_name)
    }
}
