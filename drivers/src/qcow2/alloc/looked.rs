//! What a check that goes on beside requests sees of the refcounts.
//!
//! Called by `check/online/`. Copies what it needs; changes nothing.

use super::{Space, lock};

/// Where the refcount table is, and what it says.
pub(crate) struct Structures {
    /// Entries, without their reserved bits.
    pub(crate) table: Vec<u64>,
    /// Bytes from the start of the file.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) bytes: u64,
}

impl Space {
    /// From now on, or no longer, it is noted which refcount blocks change.
    pub(crate) fn watch_counts(&self, on: bool) {
        lock(&self.state).blocks.watch(on);
    }

    /// See there.
    pub(crate) fn structures(&self) -> Structures {
        let state = lock(&self.state);
        let bytes = state.reftable_clusters << self.geo.cluster_bits();
        Structures { table: state.reftable.clone(), offset: state.reftable_offset, bytes }
    }

    /// A check looks at a refcount block from here on: where it is, and whether the disk has all of it. `None`: there is none.
    pub(crate) fn look_at_block(&self, index: u64) -> Option<(u64, bool)> {
        let mut state = lock(&self.state);
        let written = state.blocks.look(index);
        let offset = state.reftable.get(usize::try_from(index).ok()?).copied()?;
        (offset != 0).then_some((offset, written))
    }

    /// Whether a block, which [`Space::look_at_block`] said the disk had all of, is still what was read of it since.
    pub(crate) fn is_block_as_read(&self, index: u64, disk: &[u8]) -> bool {
        let state = lock(&self.state);
        !state.blocks.is_touched(index) && state.blocks.bytes(index).is_none_or(|bytes| bytes == disk)
    }

    /// Whether a block changed since a check looked at it.
    pub(crate) fn is_block_touched(&self, index: u64) -> bool {
        lock(&self.state).blocks.is_touched(index)
    }

    /// A refcount block as it is in memory, where it is loaded.
    pub(crate) fn loaded_block(&self, index: u64) -> Option<Vec<u8>> {
        lock(&self.state).blocks.bytes(index).map(<[u8]>::to_vec)
    }
}
