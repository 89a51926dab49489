//! Options of `preallocate`, and their check.
//!
//! Parsed by `open`; the comments are the reference text.

use graph::options::BlockdevRef;
use graph::{BlockError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sizes are whole sectors.
const SECTOR: u64 = 512;
/// What is set aside unless something is said, bytes.
const DEFAULT_SIZE: u64 = 128 << 20;
/// What it is rounded to unless something is said, bytes.
const DEFAULT_ALIGN: u64 = 1 << 20;
/// The most that can be asked for, bytes: far above any file, and sums stay below 2^63.
const MAX_STEP: u64 = 1 << 60;

/// Options of a preallocate node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PreallocateOptions {
    /// The node that grows, usually a file below a format. Space is set aside only for users that may make it longer.
    pub file: BlockdevRef,
    /// The end of the file is kept at a multiple of this, bytes: a multiple of 512 and of the block size of `file`, at most
    /// 2^60. Default: 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub prealloc_align: Option<i64>,
    /// How much is set aside behind the end of the data when that passes the end of the file, bytes, at most 2^60. Default:
    /// 128 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub prealloc_size: Option<i64>,
}

/// What `blockdev-reopen` leaves of them: where `file` leads is the graph's business.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct ReopenOptions {
    #[serde(default)]
    pub prealloc_align: Option<i64>,
    #[serde(default)]
    pub prealloc_size: Option<i64>,
}

/// How the file grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Steps {
    /// Bytes; at least 512.
    pub align: u64,
    /// Bytes.
    pub size: u64,
}

fn bytes(name: &str, value: Option<i64>, default: u64) -> Result<u64> {
    let Some(value) = value else { return Ok(default) };
    u64::try_from(value)
        .ok()
        .filter(|v| *v <= MAX_STEP)
        .ok_or_else(|| BlockError::invalid(format!("Value '{value}' is out of range for parameter '{name}'")))
}

impl Steps {
    /// Checks the options.
    ///
    /// # Errors
    /// In QEMU's words, but for 0, which it divides by.
    pub(super) fn new(align: Option<i64>, size: Option<i64>, child_align: u32) -> Result<Steps> {
        let align = bytes("prealloc-align", align, DEFAULT_ALIGN)?;
        let size = bytes("prealloc-size", size, DEFAULT_SIZE)?;
        let refuse = |what: String| {
            Err(BlockError::invalid(format!("prealloc-align parameter of preallocate filter {what}")))
        };
        if align == 0 {
            return refuse("must not be 0".to_owned());
        }
        if !align.is_multiple_of(SECTOR) {
            return refuse(format!("is not aligned to {SECTOR}"));
        }
        if !align.is_multiple_of(u64::from(child_align.max(1))) {
            return refuse(format!("is not aligned to underlying node request alignment ({child_align})"));
        }
        Ok(Steps { align, size })
    }

    /// What to set aside for a write that ends at `end`, when the file ends at `from`: start and end, bytes. `None` past
    /// 2^63.
    pub(super) fn next(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        let start = from.checked_next_multiple_of(self.align)?;
        let stop = start.max(end).checked_add(self.size)?.checked_next_multiple_of(self.align)?;
        (stop <= i64::MAX as u64 && stop > start).then_some((start, stop))
    }
}
