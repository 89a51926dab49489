//! The refcounts on disk: looked up and changed through a small cache of refcount blocks.
//!
//! Used by comparison, COPIED flags and the snapshot table's repair. Never allocates a block: what has none has refcount 0.

use graph::{BlockError, CheckFix, Errno};

use super::{Checker, Storage};
use crate::qcow2::format::entry::hex;
use crate::qcow2::format::{Geometry, RtEntry, refcount};

/// Blocks kept in memory.
const CACHED: usize = 8;

struct Block {
    offset: u64,
    bytes: Vec<u8>,
    dirty: bool,
}

/// The refcount table and some of its blocks, the one used last at the end.
pub(super) struct Blocks {
    geo: Geometry,
    pub(super) table: Vec<u64>,
    cached: Vec<Block>,
    /// QEMU tells of an unaligned block once.
    told: bool,
}

impl Blocks {
    pub(super) fn new(geo: Geometry, table: Vec<u64>) -> Blocks {
        Blocks { geo, table, cached: Vec::new(), told: false }
    }

    /// Another table; what was cached belongs to the old one.
    pub(super) fn replace(&mut self, table: Vec<u64>) {
        self.table = table;
        self.cached.clear();
    }

    /// Whether a cluster has a refcount block at all.
    pub(super) fn covers(&self, cluster: u64) -> bool {
        self.entry(cluster).offset() != 0
    }

    /// The refcount where that is known without reading or changing anything.
    #[inline]
    pub(super) fn known(&self, cluster: u64) -> Option<u64> {
        let offset = self.entry(cluster).offset();
        let block = self.cached.last().filter(|b| b.offset == offset && offset != 0)?;
        Some(refcount::get(
            &block.bytes,
            self.geo.refcount_order(),
            self.geo.refblock_index(cluster) as usize,
        ))
    }

    fn entry(&self, cluster: u64) -> RtEntry {
        let index = usize::try_from(self.geo.reftable_index(cluster)).unwrap_or(usize::MAX);
        RtEntry(self.table.get(index).copied().unwrap_or(0))
    }
}

impl<S: Storage> Checker<'_, S> {
    /// The refcount on disk.
    pub(super) async fn refcount(&mut self, cluster: u64) -> Result<u64, BlockError> {
        if let Some(n) = self.blocks.known(cluster) {
            return Ok(n);
        }
        let index = self.geo.refblock_index(cluster) as usize;
        let order = self.geo.refcount_order();
        match self.block(cluster).await? {
            Some(block) => Ok(refcount::get(&block.bytes, order, index)),
            None => Ok(0),
        }
    }

    /// Changes a refcount in its block; the block is written by [`Checker::write_blocks`] or when it leaves the cache.
    pub(super) async fn set_refcount(&mut self, cluster: u64, value: u64) -> Result<(), BlockError> {
        let index = self.geo.refblock_index(cluster) as usize;
        let order = self.geo.refcount_order();
        let Some(block) = self.block(cluster).await? else { return Err(Errno::EINVAL.into()) };
        if !refcount::set(&mut block.bytes, order, index, value) {
            return Err(Errno::EINVAL.into());
        }
        block.dirty = true;
        Ok(())
    }

    async fn block(&mut self, cluster: u64) -> Result<Option<&mut Block>, BlockError> {
        let offset = self.blocks.entry(cluster).offset();
        if offset == 0 {
            return Ok(None);
        }
        if self.geo.in_cluster(offset) != 0 || offset > i64::MAX as u64 - self.geo.cluster_size() {
            if !self.blocks.told {
                self.blocks.told = true;
                let index = hex(self.geo.reftable_index(cluster));
                self.say(format!(
                    "qcow2: Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {index}); further non-fatal corruption events will be suppressed"
                ));
            }
            return Err(Errno::EIO.into());
        }
        if let Some(i) = self.blocks.cached.iter().position(|b| b.offset == offset) {
            let hit = self.blocks.cached.remove(i);
            self.blocks.cached.push(hit);
        } else {
            if self.blocks.cached.len() >= CACHED {
                let old = self.blocks.cached.remove(0);
                self.write_block(&old).await?;
            }
            let mut bytes = vec![0; self.geo.cluster_size() as usize];
            self.storage.read(offset, &mut bytes).await?;
            self.blocks.cached.push(Block { offset, bytes, dirty: false });
        }
        Ok(self.blocks.cached.last_mut())
    }

    async fn write_block(&mut self, block: &Block) -> Result<(), BlockError> {
        if block.dirty { self.write(block.offset, &block.bytes).await } else { Ok(()) }
    }

    /// Writes what was changed.
    pub(super) async fn write_blocks(&mut self) -> Result<(), BlockError> {
        for block in std::mem::take(&mut self.blocks.cached) {
            self.write_block(&block).await?;
        }
        Ok(())
    }

    /// Counts the refcount blocks and judges the table's entries.
    pub(super) async fn check_blocks(&mut self, fix: CheckFix) -> Result<(), BlockError> {
        for i in 0..self.blocks.table.len() {
            let entry = RtEntry(self.blocks.table.get(i).copied().unwrap_or(0));
            let offset = entry.offset();
            let cluster = offset >> self.geo.cluster_bits();
            if entry.reserved() {
                self.say(format!("ERROR refcount table entry {i} has reserved bits set"));
                self.report.corruptions += 1;
                self.rebuild = true;
            } else if self.geo.in_cluster(offset) != 0 {
                self.say(format!(
                    "ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted"
                ));
                self.report.corruptions += 1;
                self.rebuild = true;
            } else if cluster >= self.clusters {
                // QEMU would make the file reach there, whatever its length: it cannot hold a count that is right.
                self.say(format!("ERROR refcount block {i} is outside image"));
                self.report.corruptions += 1;
                self.rebuild |= fix.errors;
            } else if offset != 0 {
                self.refer(offset, self.geo.cluster_size())?;
                let n = self.counts.get(cluster);
                if n != 1 {
                    self.say(format!("ERROR refcount block {i} refcount={n}"));
                    self.report.corruptions += 1;
                    self.rebuild = true;
                }
            }
        }
        Ok(())
    }
}
