//! How the memory of a cache is shared out. Pure.
//!
//! Used when a node is opened or reopened.

use graph::{BlockError, Result};

use super::options::Settings;

/// What a block costs besides its bytes, in bytes: its entry in the table, its places in the clock, in the set of dirty
/// blocks and in the filter, generously.
pub(super) const OVERHEAD: u64 = 256;
/// Fewest blocks a cache works with.
const MIN_FRAMES: u64 = 8;
/// Most shards.
pub(super) const SHARDS: usize = 16;
/// Fewest frames of a shard where there are several.
const MIN_SHARE: u64 = 32;

/// What the settings come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// Shards in use, a power of two; at least 1.
    pub(super) shards: usize,
    /// Blocks in memory, for each shard.
    pub(super) frames: usize,
    /// Blocks in the swap node, all shards together.
    pub(super) slots: u32,
}

impl Layout {
    /// The shares, for a swap node of `swap` bytes (0: none).
    ///
    /// # Errors
    /// A size that is not 0 and too small.
    pub(super) fn new(settings: &Settings, swap: u64) -> Result<Layout> {
        let off = Layout { shards: 1, ..Layout::default() };
        if settings.size == 0 {
            return Ok(off);
        }
        let block = settings.block as u64;
        let slots = (swap / block).min(settings.size / 4 / OVERHEAD).min(u32::MAX.into());
        let frames = (settings.size - slots * OVERHEAD) / (block + OVERHEAD);
        if frames < MIN_FRAMES {
            let least = (MIN_FRAMES * (block + OVERHEAD)).next_multiple_of(1024) * 4 / 3;
            return Err(BlockError::invalid(format!(
                "Parameter 'size' expects 0 or at least {least} with blocks of {block} bytes"
            )));
        }
        let mut shards = SHARDS;
        while shards > 1 && frames / (shards as u64) < MIN_SHARE {
            shards /= 2;
        }
        let frames = usize::try_from(frames / shards as u64).unwrap_or(usize::MAX);
        Ok(Layout { shards, frames, slots: slots as u32 })
    }
}
