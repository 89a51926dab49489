//! Where everything of a new image lies, and what its tables say. Pure.
//!
//! Used by `create`: sizes first, then the bytes of any part of it, so that a large preallocated image needs no memory.

use graph::{BlockError, Errno, Result};

use super::crypto_ext;
use crate::qcow2::format::{COPIED, Geometry, Header, MAX_REFTABLE_BYTES, ZERO, refcount};

/// A run of clusters: (first, how many).
type Run = (u64, u64);

/// See the module's page. In this order, nothing in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    reftable: Run,
    blocks: Run,
    l1: Run,
    l1_entries: u64,
    crypto: Run,
    l2: Run,
    data: Run,
    /// Data clusters of the disk, here or in the data file.
    mapped: u64,
}

impl Layout {
    /// For an image of this shape; `crypto` bytes of encryption header; all of the disk mapped if `prealloc`.
    pub(super) fn new(header: &Header, crypto: u64, prealloc: bool) -> Result<Layout> {
        let geo = header.geometry();
        let l1_entries = geo.l1_entries_for(header.size);
        let mapped = if prealloc { geo.clusters(header.size) } else { 0 };
        let l1 = geo.clusters(l1_entries * 8);
        let l2 = if prealloc { l1_entries } else { 0 };
        let data = if geo.data_file() { 0 } else { mapped };
        let crypto = geo.clusters(crypto);
        let (mut table, mut blocks) = (1, 1);
        loop {
            let total = 1 + table + blocks + l1 + crypto + l2 + data;
            let needed_blocks = total.div_ceil(geo.refblock_entries());
            let needed_table = needed_blocks.div_ceil(geo.reftable_entries_per_cluster());
            if needed_table * geo.cluster_size() > MAX_REFTABLE_BYTES
                || total > i64::MAX as u64 >> geo.cluster_bits()
            {
                let words =
                    "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
                return Err(BlockError::new(Errno::EFBIG, words));
            }
            if needed_table <= table && needed_blocks <= blocks {
                break;
            }
            // Both only grow, so that this ends.
            (table, blocks) = (needed_table.max(table), needed_blocks.max(blocks));
        }
        let mut next = 1;
        let mut run = |clusters| {
            let first = next;
            next += clusters;
            (first, clusters)
        };
        Ok(Layout {
            reftable: run(table),
            blocks: run(blocks),
            l1: run(l1),
            l1_entries,
            crypto: run(crypto),
            l2: run(l2),
            data: run(data),
            mapped,
        })
    }

    /// Writes the places into the header.
    pub(super) fn describe(&self, header: &mut Header, crypto: u64) {
        let bits = header.geometry().cluster_bits();
        header.reftable_offset = self.reftable.0 << bits;
        header.reftable_clusters = self.reftable.1 as u32;
        header.l1_offset = if self.l1_entries == 0 { 0 } else { self.l1.0 << bits };
        header.l1_size = self.l1_entries as u32;
        if crypto != 0 {
            header.crypto = Some(crypto_ext(self.crypto.0 << bits, crypto));
        }
    }

    /// End of everything that is not data, bytes.
    pub(super) fn metadata_bytes(&self, geo: Geometry) -> u64 {
        self.data.0 << geo.cluster_bits()
    }

    /// End of the image, bytes.
    pub(super) fn end(&self, geo: Geometry) -> u64 {
        self.clusters() << geo.cluster_bits()
    }

    fn clusters(&self) -> u64 {
        self.data.0 + self.data.1
    }

    /// The bytes of the tables from `at` on, which is behind the header; `to` holds zeroes. `hide`: mapped clusters are marked
    /// as zeroes.
    pub(super) fn fill(&self, header: &Header, at: u64, to: &mut [u8], hide: bool) {
        let geo = header.geometry();
        let bits = geo.cluster_bits();
        let size = geo.cluster_size();
        // The part of a run of clusters that lies in the range: from there, to there, where in it that is.
        let len = to.len() as u64;
        let part = move |(first, clusters): Run| {
            let (from, end) = (first << bits, (first + clusters) << bits);
            let (start, stop) = (from.max(at), end.min(at + len));
            (start < stop).then(|| (start - from, stop - from, (start - at) as usize))
        };
        let words = |to: &mut [u8], run: Run, limit: u64, word: &dyn Fn(u64) -> u64| {
            let Some((from, end, target)) = part(run) else { return };
            let target = to.get_mut(target..target + (end - from) as usize).unwrap_or_default();
            for (place, i) in target.chunks_exact_mut(8).zip(from / 8..) {
                if i < limit {
                    place.copy_from_slice(&word(i).to_be_bytes());
                }
            }
        };
        words(to, self.reftable, self.blocks.1, &|i| (self.blocks.0 + i) << bits);
        if self.l2.1 != 0 {
            words(to, self.l1, self.l1_entries, &|i| ((self.l2.0 + i) << bits) | COPIED);
            // Without a data file the data lies behind everything else, with one it lies where the guest sees it.
            let first = if geo.data_file() { 0 } else { self.data.0 };
            let per_entry = geo.l2_entry_size() / 8;
            let extended = geo.extended_l2();
            words(to, self.l2, self.mapped * per_entry, &|i| match (extended, i % per_entry) {
                // The bitmap: no subcluster is allocated yet; a backing file shows, or zeroes.
                (true, 1) => 0,
                _ => {
                    let flags = if hide && !extended { COPIED | ZERO } else { COPIED };
                    ((first + i / per_entry) << bits) | flags
                }
            });
        }
        // Every cluster once.
        let order = geo.refcount_order();
        let Some((from, end, target)) = part(self.blocks) else { return };
        let mut position = from;
        while position < end {
            let block = position / size;
            let stop = end.min((block + 1) * size);
            let begin = target + (position - from) as usize;
            let piece = to.get_mut(begin..begin + (stop - position) as usize).unwrap_or_default();
            let first = (block << geo.refblock_bits()) + (((position - block * size) * 8) >> order);
            let counts = (piece.len() as u64 * 8) >> order;
            for i in 0..counts.min(self.clusters().saturating_sub(first)) {
                refcount::set(piece, order, i as usize, 1);
            }
            position = stop;
        }
    }
}
