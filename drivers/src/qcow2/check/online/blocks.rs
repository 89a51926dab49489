//! Refcount blocks against what was counted, while requests go on.
//!
//! Called piece by piece after the walk. A block that agrees with the counts and does not change any more is done, and
//! `end.rs` passes it by. That it agreed at some moment is enough: if neither a count in it nor a reference to one of its
//! clusters has changed since, it still does when everything is at rest.

use std::collections::{BTreeMap, BTreeSet};

use graph::{NodeIo, Result};

use super::{Checker, Online, Phase};
use crate::qcow2::check::NodeStorage;
use crate::qcow2::format::refcount;
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::open::read_bytes;

/// Refcount blocks read in one piece, bytes; at least one block.
const PIECE: u64 = 2 << 20;
/// How often blocks that did not agree are looked at before requests have to wait.
const ROUNDS: u32 = 2;
/// Clusters compared under one lock.
const STRIDE: u64 = 4096;

/// Blocks that need no further look.
#[derive(Default)]
pub(super) struct Verified {
    /// By number, with the last cluster in use of each.
    pub(super) blocks: BTreeMap<u64, Option<u64>>,
    /// Refcount table and blocks, as they were counted: (offset, bytes).
    pub(super) structures: BTreeSet<(u64, u64)>,
}

/// Where the refcount structures are: (offset, bytes).
pub(super) fn places(node: &Qcow2) -> BTreeSet<(u64, u64)> {
    let structures = node.space.structures();
    let cluster = node.geo.cluster_size();
    let blocks = structures.table.iter().filter(|b| **b != 0).map(|b| (*b, cluster));
    blocks.chain([(structures.offset, structures.bytes)]).collect()
}

impl Online {
    pub(super) fn begin_blocks(&mut self, node: &Qcow2) {
        node.space.watch_counts(true);
        let places = places(node);
        if let Some(census) = node.tables.watch().census().as_mut() {
            for (offset, bytes) in &places {
                census.range(*offset, *bytes, true);
            }
            census.blocks = Some(BTreeSet::new());
        }
        self.verified.structures = places;
        self.phase = Phase::Blocks { index: 0, round: 0 };
    }

    /// Some blocks.
    pub(super) async fn blocks(
        &mut self,
        node: &Qcow2,
        io: &NodeIo,
        checker: &mut Checker<'_, NodeStorage>,
    ) -> Result<()> {
        let Phase::Blocks { index, round } = &mut self.phase else { return Ok(()) };
        let cluster = node.geo.cluster_size();
        let count = node.space.structures().table.len() as u64;
        let mut read = 0;
        while *index < count && read < PIECE {
            let block = *index;
            *index += 1;
            if self.verified.blocks.contains_key(&block) && !self.verified.is_touched(node, block) {
                continue;
            }
            self.verified.blocks.remove(&block);
            read += cluster;
            if let Some(last) = look(node, io, checker, block).await? {
                self.verified.blocks.insert(block, last);
            }
            if *round == 0 {
                self.done += cluster;
            }
        }
        if *index >= count {
            *index = 0;
            *round += 1;
            if *round >= ROUNDS {
                self.phase = Phase::End;
            }
        }
        Ok(())
    }
}

impl Verified {
    /// Whether anything about a block changed since it was looked at.
    pub(super) fn is_touched(&self, node: &Qcow2, block: u64) -> bool {
        let census = node.tables.watch().census();
        let touched = census.as_ref().and_then(|c| c.blocks.as_ref()).is_none_or(|b| b.contains(&block));
        touched || node.space.is_block_touched(block)
    }
}

/// Compares a block; the last cluster in use if it agrees. `None`: it does not, or it has changed meanwhile, or there is none.
async fn look(
    node: &Qcow2,
    io: &NodeIo,
    checker: &Checker<'_, NodeStorage>,
    block: u64,
) -> Result<Option<Option<u64>>> {
    let geo = node.geo;
    {
        let mut census = node.tables.watch().census();
        if let Some(blocks) = census.as_mut().and_then(|c| c.blocks.as_mut()) {
            blocks.remove(&block);
        }
    }
    // What waits to be written is judged at the end, on disk.
    let Some((offset, true)) = node.space.look_at_block(block) else { return Ok(None) };
    let file = io.child(FILE);
    if geo.in_cluster(offset) != 0 || offset >= file.size() {
        return Ok(None);
    }
    let counts = read_bytes(&file, offset, geo.cluster_size()).await?;
    if !node.space.is_block_as_read(block, &counts) {
        return Ok(None);
    }
    let mut last = None;
    let first = block << geo.refblock_bits();
    let mut at = 0;
    while at < geo.refblock_entries() {
        let end = (at + STRIDE).min(geo.refblock_entries());
        let mut census = node.tables.watch().census();
        let Some(census) = census.as_mut() else { return Ok(None) };
        for i in at..end {
            let cluster = first + i;
            let count = refcount::get(&counts, geo.refcount_order(), i as usize);
            let cell = census.cells.get(cluster);
            let refs = cell.refs + checker.counts.get(cluster);
            let flags = if count == 1 { cell.shared } else { cell.sole };
            if count != refs || flags != 0 {
                return Ok(None);
            }
            if count != 0 {
                last = Some(cluster);
            }
        }
        at = end;
    }
    Ok(Some(last))
}
