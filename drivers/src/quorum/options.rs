//! Options of `quorum`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a quorum node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QuorumOptions {
    /// Compare the two children, of which there must be exactly two with a vote-threshold of 2, and call it an error
    /// (`EIO`, `QUORUM_FAILURE`, a line in the log with the place of the first difference) when they differ; default: false.
    /// QEMU ends its process there. Has no effect with read-pattern=fifo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blkverify: Option<bool>,
    /// The nodes that hold the data, 1 to 64 of the same size. Each request uses at most 4 MiB of memory for all of them
    /// together.
    pub children: Vec<BlockdevRef>,
    /// How many children must succeed for a write or a flush to succeed, and must agree on what a read returns; 1 to the
    /// number of children. More than half of them make sure that there is one answer; where several have enough votes, the
    /// one with most of them is taken, or that of the child that comes first.
    #[schemars(range(min = 1))]
    pub vote_threshold: i64,
    /// Write the content that won a vote to the children that had another one; default: false. Cannot be used with
    /// blkverify=on; has no effect with read-pattern=fifo. Needs children that can be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewrite_corrupted: Option<bool>,
    /// How reads are done; default: quorum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_pattern: Option<ReadPattern>,
}

/// How a quorum reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReadPattern {
    /// Read all children and vote.
    #[default]
    Quorum,
    /// Read the first child, the next one if that fails, and so on. Children that failed a write since they were opened or
    /// added are left out.
    Fifo,
}
