//! What an L1 table refers to: its L2 tables, and the clusters these refer to.
//!
//! Used by all snapshot operations, on tables as they are on disk. A table shared by two L1 tables counts once for each, and so
//! do its clusters.

use graph::{BlockError, NodeIo, Result};

use crate::qcow2::alloc::FreeKind;
use crate::qcow2::format::{COMPRESSED, MAX_L1_BYTES, OFFSET_MASK, validate_table};
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::open::{read_bytes, words};

/// References given up before they are counted down: a bound on what is remembered.
const BATCH: usize = 65536;

impl Qcow2 {
    /// An L2 table from disk.
    pub(super) async fn read_l2(&self, io: &NodeIo, l1_index: usize, entry: u64) -> Result<Vec<u64>> {
        let (offset, size) = (entry & OFFSET_MASK, self.geo.cluster_size());
        let file = io.child(FILE);
        if !offset.is_multiple_of(size) || offset >= file.size() {
            let text = format!("L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})");
            return Err(self.corrupt(io, text, Some(offset), Some(size)).await);
        }
        read_bytes(&file, offset, size).await.map(|raw| words(&raw))
    }

    /// Words of one entry.
    pub(super) fn l2_step(&self) -> usize {
        if self.geo.extended_l2() { 2 } else { 1 }
    }

    /// The host ranges (offset, bytes) a table refers to, neighbours merged.
    pub(super) fn ranges_of(&self, table: &[u64]) -> Vec<(u64, u64)> {
        let size = self.geo.cluster_size();
        let mut out: Vec<(u64, u64)> = Vec::new();
        for entry in table.iter().step_by(self.l2_step()) {
            if entry & COMPRESSED != 0 {
                // Never merged: two of them may touch one cluster, which then has a reference for each.
                out.push(self.compressed_place(*entry));
                continue;
            }
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            match out.last_mut() {
                Some((start, len))
                    if *start + *len == offset && start.is_multiple_of(size) && len.is_multiple_of(size) =>
                {
                    *len += size;
                }
                _ => out.push((offset, size)),
            }
        }
        out
    }

    /// One more reference to all that an L1 table refers to, in memory; all or nothing, as far as the disk can be read.
    pub(super) async fn add_references(&self, io: &NodeIo, l1: &[u64]) -> Result<()> {
        let file = io.child(FILE);
        for (index, entry) in l1.iter().enumerate().filter(|(_, e)| *e & OFFSET_MASK != 0) {
            let added = async {
                let table = self.read_l2(io, index, *entry).await?;
                let mut ranges = self.ranges_of(&table);
                ranges.push((entry & OFFSET_MASK, self.geo.cluster_size()));
                self.space.add_refs(&file, &ranges).await
            };
            if let Err(e) = added.await {
                if self.commits.check().is_ok() {
                    self.take_back_references(io, l1.get(..index).unwrap_or(&[])).await;
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// Undoes [`Qcow2::add_references`], before anything relied on it. What cannot be read leaks.
    pub(super) async fn take_back_references(&self, io: &NodeIo, l1: &[u64]) {
        for (index, entry) in l1.iter().enumerate().filter(|(_, e)| *e & OFFSET_MASK != 0) {
            let Ok(table) = self.read_l2(io, index, *entry).await else { continue };
            for (offset, bytes) in self.ranges_of(&table) {
                self.space.give_back(offset, bytes);
            }
            self.space.give_back(entry & OFFSET_MASK, self.geo.cluster_size());
        }
    }

    /// One reference less to all that an L1 table refers to. The table is not referred to on disk any more, durably, and no
    /// request is in flight.
    pub(super) async fn drop_references(&self, io: &NodeIo, l1: &[u64], kind: FreeKind) -> Result<()> {
        let mut pieces = 0;
        for (index, entry) in l1.iter().enumerate().filter(|(_, e)| *e & OFFSET_MASK != 0) {
            let table = self.read_l2(io, index, *entry).await?;
            let ranges = self.ranges_of(&table);
            pieces += ranges.len() + 1;
            for (offset, bytes) in ranges {
                self.space.free_later(offset, bytes, kind);
            }
            self.space.free_later(entry & OFFSET_MASK, self.geo.cluster_size(), kind);
            if pieces >= BATCH {
                pieces = 0;
                self.count_down_now(io).await?;
            }
        }
        self.count_down_now(io).await
    }

    /// Everything that was given up is counted down, in memory and on disk.
    async fn count_down_now(&self, io: &NodeIo) -> Result<()> {
        let freed = self.space.take_pending();
        self.space.unlinked(freed);
        self.space.settle(&io.child(FILE)).await?;
        self.write_counts_durably(io).await
    }

    /// An L1 table from disk.
    pub(super) async fn read_l1(&self, io: &NodeIo, offset: u64, entries: u32) -> Result<Vec<u64>> {
        if entries == 0 {
            return Ok(Vec::new());
        }
        let place = ("l1_table_offset", 0);
        validate_table(&self.geo, place, "Snapshot L1 table", offset, u64::from(entries), 8, MAX_L1_BYTES)?;
        let raw = read_bytes(&io.child(FILE), offset, u64::from(entries) * 8).await;
        raw.map(|raw| words(&raw)).map_err(|e: BlockError| e.context("Could not read L1 table"))
    }
}
