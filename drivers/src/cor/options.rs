//! Options of `copy-on-read`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a copy-on-read node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CopyOnReadOptions {
    /// The node that is read, and that data from its backing files is copied into; it must be writable.
    pub file: BlockdevRef,
    /// The lowest node whose data is copied, no filter, in the backing chain of `file`; what lies below it is only read. As
    /// long as the copy-on-read node lives, the chain down to it cannot change. Default: everything is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bottom: Option<String>,
}
