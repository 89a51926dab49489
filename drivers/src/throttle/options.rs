//! Options of `throttle`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a throttle node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ThrottleOptions {
    /// The `throttle-group` object whose limits hold. Nodes that name the same group share its limits, and take turns.
    pub throttle_group: String,
    /// The node whose requests are held back.
    pub file: BlockdevRef,
}

/// What `blockdev-reopen` leaves of them: where `file` leads is the graph's business.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct ReopenOptions {
    pub throttle_group: String,
}
