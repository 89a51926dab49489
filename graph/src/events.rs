//! News from nodes for whoever operates the process: today that an image was found damaged.
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
}

impl std::fmt::Debug for NodeEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeEvents({})", self.node_name)
    }
}
