//! All refcount structures built anew from the counted references, beside the old ones.
//!
//! For images whose refcount blocks cannot be trusted. New blocks and a new table go into clusters nobody refers to; one
//! write of the header switches to them; then the old ones are leaks and are freed.

use std::collections::BTreeMap;

use graph::{BlockError, CheckFix, CheckReport, Errno};

use super::{Checker, Storage};
use crate::qcow2::format::{MAX_REFTABLE_BYTES, field, refcount};

impl<S: Storage> Checker<'_, S> {
    /// Builds, counts again, and sorts the figures as QEMU does. Answers the highest cluster in use.
    pub(super) async fn rebuild_and_recount(&mut self) -> Result<u64, BlockError> {
        let (corruptions, leaks) = (self.report.corruptions, self.report.leaks);
        self.say("Rebuilding refcount structure".into());
        // What could not be looked up is built anew as well.
        self.report.check_errors = 0;
        self.rebuild_structures().await?;
        self.rebuild = false;
        self.counts.clear();
        self.past_end.clear();
        self.clusters = self.file_clusters();
        self.report.corruptions = 0;
        self.report.leaks = 0;
        self.report.allocated_clusters = 0;
        self.report.fragmented_clusters = 0;
        self.report.compressed_clusters = 0;
        self.count_references(CheckFix::NONE).await?;
        let kept = CheckReport { messages: Vec::new(), ..self.report.clone() };
        // The old structures are leaks now; these are ours, not the image's.
        let highest = self.compare(CheckFix { leaks: self.fix.leaks, errors: false }).await?;
        if self.rebuild {
            self.say("ERROR rebuilt refcount structure is still broken".into());
        }
        let messages = std::mem::take(&mut self.report.messages);
        let new = std::mem::replace(&mut self.report, CheckReport { messages, ..kept });
        self.report.corruptions += new.corruptions;
        if !self.fix.leaks {
            self.report.leaks = new.leaks;
        }
        self.report.corruptions_fixed += corruptions.saturating_sub(self.report.corruptions);
        self.report.leaks_fixed += leaks.saturating_sub(self.report.leaks);
        Ok(highest)
    }

    async fn rebuild_structures(&mut self) -> Result<(), BlockError> {
        let plan = self.plan()?;
        let bits = self.geo.cluster_bits();
        let end = plan.highest.max(self.clusters - 1) + 1;
        if end > super::MAX_CLUSTERS {
            return Err(Errno::EFBIG.into());
        }
        self.storage.grow((plan.highest + 1) << bits).await.inspect_err(|_| self.report.check_errors += 1)?;
        for (&index, &cluster) in &plan.blocks {
            let block = self.new_block(index);
            if let Err(e) = self.write(cluster << bits, &block).await {
                self.say(format!("ERROR writing refblock: {}", e.errno()));
                self.report.check_errors += 1;
                return Err(e);
            }
        }
        let mut words = vec![0u64; (plan.table_clusters << bits) as usize / 8];
        for (&index, &cluster) in &plan.blocks {
            if let Some(word) = words.get_mut(index as usize) {
                *word = cluster << bits;
            }
        }
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.write(plan.table << bits, &bytes).await?;
        self.storage.flush().await?;
        let mut switch = [0u8; 12];
        switch[..8].copy_from_slice(&(plan.table << bits).to_be_bytes());
        switch[8..].copy_from_slice(&(plan.table_clusters as u32).to_be_bytes());
        if let Err(e) = self.write(field::REFTABLE, &switch).await {
            self.say(format!("ERROR setting reftable: {}", e.errno()));
            self.report.check_errors += 1;
            return Err(e);
        }
        self.storage.flush().await?;
        self.header.reftable_offset = plan.table << bits;
        self.header.reftable_clusters = plan.table_clusters as u32;
        self.blocks.replace(words);
        Ok(())
    }

    /// Finds places for all blocks and the table; the places are counted.
    fn plan(&mut self) -> Result<Plan, BlockError> {
        let block_bits = self.geo.refblock_bits();
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let mut last = None;
        for (cluster, _) in self.counts.used() {
            let index = cluster >> block_bits;
            if last != Some(index) {
                blocks.insert(index, 0);
                last = Some(index);
            }
        }
        let mut missing: Vec<u64> = blocks.keys().copied().collect();
        let mut from = 1;
        let mut table = None;
        loop {
            while let Some(index) = missing.pop() {
                let cluster = self.take(&mut from, 1)?;
                blocks.insert(index, cluster);
                let own = cluster >> block_bits;
                if let std::collections::btree_map::Entry::Vacant(e) = blocks.entry(own) {
                    e.insert(0);
                    missing.push(own);
                }
            }
            let top = blocks.last_key_value().map_or(0, |(&index, _)| index);
            let need = self.geo.clusters((top + 1) * 8);
            if need * self.geo.cluster_size() > MAX_REFTABLE_BYTES {
                self.report.check_errors += 1;
                return Err(BlockError::new(Errno::EFBIG, "Reference count table too large"));
            }
            match table {
                Some((at, have)) if need <= have => {
                    let highest = blocks.values().copied().max().unwrap_or(0).max(at + have - 1);
                    return Ok(Plan { blocks, table: at, table_clusters: have, highest });
                }
                old => {
                    if let Some((at, have)) = old {
                        for cluster in at..at + have {
                            self.counts.set(cluster, 0)?;
                        }
                    }
                    let mut anywhere = 1;
                    let at = self.take(&mut anywhere, need)?;
                    for index in at >> block_bits..=(at + need - 1) >> block_bits {
                        if let std::collections::btree_map::Entry::Vacant(e) = blocks.entry(index) {
                            e.insert(0);
                            missing.push(index);
                        }
                    }
                    table = Some((at, need));
                }
            }
        }
    }

    /// `n` contiguous clusters nobody refers to, counted from now on.
    fn take(&mut self, from: &mut u64, n: u64) -> Result<u64, BlockError> {
        let mut at = self.counts.free_run(*from, n);
        while let Some(behind) = self.past_end.behind(at, n) {
            // Something damaged points there: it would get our tables to see.
            at = self.counts.free_run(behind, n);
        }
        if at.saturating_add(n) > super::MAX_CLUSTERS {
            self.report.check_errors += 1;
            return Err(Errno::EFBIG.into());
        }
        for cluster in at..at + n {
            if self.counts.set(cluster, 1).is_err() {
                return Err(self.full());
            }
        }
        *from = at + 1;
        Ok(at)
    }

    fn new_block(&self, index: u64) -> Vec<u8> {
        let mut block = vec![0; self.geo.cluster_size() as usize];
        let n = self.geo.refblock_entries();
        if !self.counts.untouched(index * n, n) {
            for i in 0..n {
                refcount::set(
                    &mut block,
                    self.geo.refcount_order(),
                    i as usize,
                    self.counts.get(index * n + i),
                );
            }
        }
        block
    }
}

/// Where the new structures go.
struct Plan {
    /// Refcount table index to host cluster.
    blocks: BTreeMap<u64, u64>,
    /// First cluster of the table.
    table: u64,
    table_clusters: u64,
    highest: u64,
}
