//! How a driver presents itself to the suite.
//!
//! Filled in by the driver's tests. Says what the node promises, so that nothing is skipped silently: what is not promised
//! is a field here.

use std::path::Path;

use graph::Registry;
use serde_json::Value;

/// What becomes of written data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It is kept.
    Kept,
    /// It vanishes; reads return zeroes.
    Zeroes,
    /// It vanishes; reads leave the buffer as it is.
    Untouched,
}

/// What a discarded range reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// What it held before: discards are ignored.
    Kept,
    /// Zeroes.
    Zeroes,
    /// Anything.
    Anything,
}

/// Makes an image in a directory.
pub type Create = Box<dyn Fn(&Path) -> Result<(), String>>;
/// The options of the node over the image in a directory.
pub type Options = Box<dyn Fn(&Path) -> Value>;

/// Makes what the options name besides images: objects.
pub type SetUp = Box<dyn Fn(&graph::Graph)>;

/// A driver with one set of options.
pub struct DriverCase {
    /// What messages call it.
    pub name: String,
    /// The drivers it needs.
    pub registry: Registry,
    /// Size of a fresh node, bytes; at least 1 MiB and a multiple of 512.
    pub size: u64,
    /// Makes the image: it reads as zeroes.
    pub create: Create,
    /// Options for `blockdev-add`, without `node-name` and `read-only`, for an image that `create` made in a directory.
    /// They must open the image again, too.
    pub options: Options,
    /// What becomes of written data.
    pub content: Content,
    /// What a discarded range reads as.
    pub discarded: Discarded,
    /// Whether `block_resize` works.
    pub resizable: bool,
    /// Whether what a resize adds reads as zeroes; as anything otherwise.
    pub grows_zeroed: bool,
    /// How much around a write that is torn in the middle may read as anything, bytes; 1 for nodes that keep bytes as they
    /// are, a sector for those that encrypt it as a whole.
    pub torn_unit: u64,
    /// Secrets its options name: id and bytes.
    pub secrets: Vec<(String, Vec<u8>)>,
    /// Called for each new graph before the node is opened.
    pub set_up: SetUp,
    /// Whether a read-only node may be asked for and refuses writers.
    pub read_only: bool,
}

impl DriverCase {
    /// A case that keeps data and ignores discards, cannot be resized and may be read-only.
    pub fn new(
        name: impl Into<String>,
        registry: Registry,
        size: u64,
        create: impl Fn(&Path) -> Result<(), String> + 'static,
        options: impl Fn(&Path) -> Value + 'static,
    ) -> DriverCase {
        DriverCase {
            name: name.into(),
            registry,
            size,
            create: Box::new(create),
            options: Box::new(options),
            content: Content::Kept,
            discarded: Discarded::Kept,
            resizable: false,
            grows_zeroed: true,
            torn_unit: 1,
            secrets: Vec::new(),
            set_up: Box::new(|_| {}),
            read_only: true,
        }
    }
}
