//! Options of `cache`.
//!
//! Parsed by `open` and `reopen`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use graph::{BlockError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::block::{MAX_BLOCK, MIN_BLOCK};

/// Memory of a cache for which no `size` is given, bytes.
const DEFAULT_SIZE: i64 = 64 << 20;
/// Size of a block for which none is given, bytes.
const DEFAULT_BLOCK: i64 = 16 << 10;

/// What the cache does with writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// A write is complete when `file` has taken it.
    #[default]
    Writethrough,
    /// A write is complete when it is in the cache. It reaches `file` when it is flushed, or when its room is needed.
    Writeback,
}

/// What the cache does with reads of what it does not hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheReads {
    /// They bring their blocks into the cache.
    #[default]
    Cache,
    /// They go to `file` as if there were no cache: only writes bring blocks in.
    Bypass,
}

/// Options of a cache node.
///
/// With `mode=writeback` the node behaves like the volatile write cache of a disk: after a crash, writes that no flush
/// followed may be lost, each sector of 512 bytes holds either its old or its new content, and nothing that was flushed is
/// missing. What `swap` holds is never looked at again after a restart.
///
/// While the cache holds anything nobody else may write to `file`; while it may hold what `file` lacks nobody else may
/// read `file` either. `size=0` (also by blockdev-reopen, which writes everything back first) turns the cache off: then
/// it can be taken out of a running graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CacheOptions {
    /// The node whose content is cached.
    pub file: BlockdevRef,
    /// What happens to writes. Default: writethrough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<CacheMode>,
    /// What happens to reads of blocks that are not in the cache. Default: cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<CacheReads>,
    /// Most memory the cache may take, in bytes, with what it needs to keep the blocks in order; besides it, each request
    /// under way may need a buffer of up to 1 MiB. 0: everything goes to `file`. Otherwise at least 8 blocks.
    /// Default: 64 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub size: Option<i64>,
    /// Size of a block in bytes, a power of two from 4096 to 65536. Default: 16384. What is read comes in as whole blocks,
    /// what is written is remembered by sectors of 512 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4096, max = 65536))]
    #[schemars(extend("format" = "size"))]
    pub block_size: Option<i64>,
    /// A node, faster than `file`, that takes the blocks for which there is no memory. Its content is overwritten and is
    /// worth nothing once the cache node is closed; nobody else may use it meanwhile. At most a quarter of `size` is spent
    /// on knowing what is there: 256 bytes for each block. Under a read-only cache node it needs `read-only=off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<BlockdevRef>,
}

/// The options that may change, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) mode: CacheMode,
    pub(super) reads: CacheReads,
    /// Memory, bytes; 0 is off.
    pub(super) size: u64,
    /// Size of a block, bytes.
    pub(super) block: usize,
}

impl Settings {
    /// From what was given, with defaults.
    ///
    /// # Errors
    /// A value out of range.
    pub(super) fn new(
        mode: Option<CacheMode>,
        reads: Option<CacheReads>,
        size: Option<i64>,
        block: Option<i64>,
    ) -> Result<Settings> {
        let size = size.unwrap_or(DEFAULT_SIZE);
        let size = u64::try_from(size).map_err(|_| {
            BlockError::invalid(format!("Value '{size}' is out of range for parameter 'size'"))
        })?;
        let block = block.unwrap_or(DEFAULT_BLOCK);
        let fits = usize::try_from(block)
            .ok()
            .filter(|b| b.is_power_of_two() && (MIN_BLOCK..=MAX_BLOCK).contains(b));
        let block = fits.ok_or_else(|| {
            BlockError::invalid(format!(
                "Parameter 'block-size' expects a power of 2 between {MIN_BLOCK} and {MAX_BLOCK}"
            ))
        })?;
        let settings =
            Settings { mode: mode.unwrap_or_default(), reads: reads.unwrap_or_default(), size, block };
        super::layout::Layout::new(&settings, 0)?;
        Ok(settings)
    }
}
