//! Options of `null-co` and `null-aio`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a null node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NullOptions {
    /// Size of the node in bytes, rounded up to a multiple of 512; 0 to 2^63 - 512, default: 1 GiB (1073741824).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub size: Option<i64>,
    /// How long every request takes, in nanoseconds; 0 to 10^10 (ten seconds), default: 0, which completes requests at
    /// once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000_000_000_i64))]
    pub latency_ns: Option<i64>,
    /// Whether reads return zeroes; default: false, which leaves the buffer as it is. Without it the reader gets back
    /// what its memory held before: turn it on wherever the data is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_zeroes: Option<bool>,
}
