//! Options of `raw`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a raw node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RawOptions {
    /// The node that holds the data.
    pub file: BlockdevRef,
    /// Where in `file` the node begins, in bytes; 0 to the size of `file`, default: 0. Need not be a multiple of
    /// anything, but requests are slow where it is not a multiple of the block size of `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub offset: Option<i64>,
    /// Size of the node in bytes, a multiple of 512; default: up to the end of `file`, wherever that is. A node with a
    /// size given cannot be resized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub size: Option<i64>,
}
