//! Options of `compress`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a compress node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CompressOptions {
    /// The node that gets every write as a compressed one: a format that can compress (qcow2), perhaps below other filters.
    /// Writes below its cluster size read and write the whole cluster.
    pub file: BlockdevRef,
}
