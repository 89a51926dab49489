//! The end of a check beside requests: drained, everything written, what is left to judge is judged.
//!
//! Called once, by the last piece. Only here is anything said of what changes.

use graph::{CheckFix, NodeIo, Result};

use super::blocks::places;
use super::cells::Cell;
use super::{BUDGET, Checker, Online};
use crate::qcow2::check::references::Walk;
use crate::qcow2::check::{Limits, NodeStorage};
use crate::qcow2::format::entry::REFTABLE_RESERVED;
use crate::qcow2::format::{L1Entry, OFFSET_MASK, refcount};
use crate::qcow2::node::Qcow2;

impl Online {
    pub(super) async fn end(
        &mut self,
        node: &Qcow2,
        io: &NodeIo,
        checker: &mut Checker<'_, NodeStorage>,
    ) -> Result<()> {
        if node.commits.writes() {
            node.commits.settle(node, io).await?;
        }
        checker.clusters = checker.clusters.max(checker.file_clusters());
        if let Some(at) = node.header.differs(checker.storage).await? {
            checker.report.corruptions += 1;
            checker.say(format!("ERROR the header on disk is not the one in use, at offset {at:#x}"));
        }
        let table = self.structures(node, checker).await?;
        self.odd_tables(node, checker, table).await?;
        checker.check_blocks(CheckFix::NONE).await?;
        let highest = self.compare_rest(node, checker).await?;
        checker.fix_snapshots().await?;
        checker.report.image_end_offset = (highest + 1) * node.geo.cluster_size();
        Ok(())
    }

    /// Refcount table and blocks are counted as they are now; the table on disk.
    async fn structures(&self, node: &Qcow2, checker: &mut Checker<'_, NodeStorage>) -> Result<Vec<u64>> {
        let memory = node.space.structures();
        let disk = checker.words_at(memory.offset, memory.table.len() * 8).await?;
        for (i, (&there, &here)) in disk.iter().zip(&memory.table).enumerate() {
            if there & !REFTABLE_RESERVED != here {
                checker.report.corruptions += 1;
                checker.say(format!(
                    "ERROR refcount table entry {i} is {there:x} on disk and {here:x} in memory"
                ));
            }
        }
        let now = places(node);
        if let Some(census) = node.tables.watch().census().as_mut() {
            // Counted by `check_blocks` from here on; what is where it was has not changed by that.
            let mut touched = census.blocks.take().unwrap_or_default();
            for (offset, bytes) in &self.verified.structures {
                census.range(*offset, *bytes, false);
            }
            let bits = node.geo.cluster_bits();
            for (offset, bytes) in now.symmetric_difference(&self.verified.structures) {
                let (first, last) = (offset >> bits, (offset + bytes.max(&1) - 1) >> bits);
                touched.extend((first..=last).map(|cluster| node.geo.reftable_index(cluster)));
            }
            census.blocks = Some(touched);
        }
        checker.refer(memory.offset, memory.bytes)?;
        checker.blocks.replace(disk.clone());
        Ok(disk)
    }

    /// L1, and tables in which something was odd: memory against the disk, and the disk by itself.
    async fn odd_tables(
        &self,
        node: &Qcow2,
        checker: &mut Checker<'_, NodeStorage>,
        reftable: Vec<u64>,
    ) -> Result<()> {
        let memory = node.tables.l1_entries();
        let disk = checker.words_at(node.tables.l1_offset(), memory.len() * 8).await?;
        for (i, (&there, &here)) in disk.iter().zip(&memory).enumerate() {
            if there != here {
                checker.report.corruptions += 1;
                checker.say(format!("ERROR L1 entry {i} is {there:x} on disk and {here:x} in memory"));
            }
        }
        // Counts for itself alone: what these tables refer to was counted by the walk.
        let limits = Limits { counters: BUDGET };
        let header = checker.header.clone();
        let storage = checker.storage;
        let mut again = Checker::with(storage, header, disk.clone(), reftable, CheckFix::NONE, limits);
        again.walked_file = checker.walked_file;
        for &index in &self.odd {
            let entry = L1Entry(disk.get(index as usize).copied().unwrap_or(0));
            again.counts.clear();
            again.walk_l1_entry(entry, Walk { active: true, fix: CheckFix::NONE }).await?;
            let table = entry.0 & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            if node.geo.data_file() || !entry.copied() {
                again.l2_flags(table, false).await?;
            }
            compare_table(node, &mut again, index, entry).await?;
        }
        checker.report.corruptions += again.report.corruptions;
        checker.report.check_errors += again.report.check_errors;
        for line in again.report.messages {
            checker.say(line);
        }
        Ok(())
    }

    /// The refcount blocks that are not done; the highest cluster in use.
    async fn compare_rest(&self, node: &Qcow2, checker: &mut Checker<'_, NodeStorage>) -> Result<u64> {
        let geo = node.geo;
        let mut highest = 0;
        let blocks = checker.clusters.div_ceil(geo.refblock_entries());
        for block in 0..blocks {
            if let Some(last) = self.verified.blocks.get(&block)
                && !self.verified.is_touched(node, block)
            {
                highest = highest.max(last.unwrap_or(0));
                continue;
            }
            let first = block << geo.refblock_bits();
            let end = (first + geo.refblock_entries()).min(checker.clusters);
            let cell = |cluster| {
                let mut census = node.tables.watch().census();
                census.as_mut().map_or(Cell { refs: 0, sole: 0, shared: 0 }, |c| c.cells.get(cluster))
            };
            let uncounted =
                node.tables.watch().census().as_ref().is_some_and(|c| c.cells.untouched(first, end - first));
            if !checker.blocks.covers(first) && uncounted && checker.counts.untouched(first, end - first) {
                continue;
            }
            let memory = node.space.loaded_block(block);
            for cluster in first..end {
                let cell = cell(cluster);
                let counted = cell.refs + checker.counts.get(cluster);
                let disk = match checker.refcount(cluster).await {
                    Ok(disk) => disk,
                    Err(e) => {
                        checker.say(format!("Can't get refcount for cluster {cluster}: {}", e.errno()));
                        checker.report.check_errors += 1;
                        continue;
                    }
                };
                if disk > 0 || counted > 0 {
                    highest = cluster;
                }
                if disk != counted {
                    checker.mismatch(cluster, disk, counted, CheckFix::NONE).await?;
                } else if let Some(memory) = &memory {
                    let here =
                        refcount::get(memory, geo.refcount_order(), geo.refblock_index(cluster) as usize);
                    if here != disk {
                        checker.report.corruptions += 1;
                        checker.say(format!(
                            "ERROR cluster {cluster} refcount={disk} on disk and {here} in memory"
                        ));
                    }
                }
                let wrong = if disk == 1 { cell.shared } else { cell.sole };
                if wrong != 0 {
                    checker.flag(node, cluster, disk, wrong);
                }
            }
        }
        Ok(highest)
    }
}

impl Checker<'_, NodeStorage> {
    /// COPIED is not what the refcount demands.
    fn flag(&mut self, node: &Qcow2, cluster: u64, refcount: u64, wrong: u32) {
        self.report.corruptions += u64::from(wrong);
        let offset = cluster << node.geo.cluster_bits();
        let l1 = node.tables.l1_entries().iter().position(|e| e & OFFSET_MASK == offset);
        self.say(match l1 {
            Some(i) => format!(
                "ERROR OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={:x} refcount={refcount}",
                node.tables.l1(i as u64)
            ),
            None => format!("ERROR OFLAG_COPIED data cluster: offset={offset:x} refcount={refcount}"),
        });
    }
}

/// What memory has of a table against what the disk has.
async fn compare_table(
    node: &Qcow2,
    checker: &mut Checker<'_, NodeStorage>,
    index: u64,
    l1: L1Entry,
) -> Result<()> {
    let (tables, bytes) = (&node.tables, node.tables.slice_bytes());
    for i in 0..tables.slices_per_table() {
        let slice = index * tables.slices_per_table() + i;
        let Some(memory) = tables.cached_words(slice) else { continue };
        let mut disk = checker.words_at(l1.offset() + i * bytes as u64, bytes).await?;
        if !l1.copied() && !node.geo.data_file() {
            crate::qcow2::table::strip_copied(&mut disk, (node.geo.l2_entry_size() / 8) as usize);
        }
        for (at, (there, here)) in disk.iter().zip(&memory).enumerate().filter(|(_, (a, b))| a != b) {
            checker.report.corruptions += 1;
            let place = l1.offset() + i * bytes as u64 + at as u64 * 8;
            checker.say(format!("ERROR L2 table at {place:#x} is {there:x} on disk and {here:x} in memory"));
        }
    }
    Ok(())
}
