//! Counted references against the refcounts on disk.
//!
//! Lowers counts that are too high (leaks) and raises those that are too low, as far as it may; a count of 0 for a
//! cluster in use is not raised here: its block may be anything, so the structures are built anew.

use graph::{BlockError, CheckFix, Errno};

use super::{Checker, Storage};

impl<S: Storage> Checker<'_, S> {
    /// Answers the highest cluster that is in use either way.
    pub(super) async fn compare(&mut self, fix: CheckFix) -> Result<u64, BlockError> {
        let mut highest = 0;
        let mut freed: Option<(u64, u64)> = None;
        let per_block = self.geo.refblock_entries();
        let mut cluster = 0;
        while cluster < self.clusters {
            // Both known and equal: nearly always.
            if let Some(disk) = self.blocks.known(cluster)
                && disk == self.counts.get(cluster)
            {
                if disk > 0 {
                    highest = cluster;
                }
                cluster += 1;
                continue;
            }
            // Neither counted nor counting: skip what its refcount block would cover.
            let end = (cluster | (per_block - 1)) + 1;
            if !self.blocks.covers(cluster) && self.counts.untouched(cluster, end - cluster) {
                cluster = end;
                continue;
            }
            let (disk, counted) = match self.refcount(cluster).await {
                Ok(disk) => (disk, self.counts.get(cluster)),
                Err(e) => {
                    self.say(format!("Can't get refcount for cluster {cluster}: {}", e.errno()));
                    self.report.check_errors += 1;
                    cluster += 1;
                    continue;
                }
            };
            if disk > 0 || counted > 0 {
                highest = cluster;
            }
            if disk != counted {
                let repaired = self.mismatch(cluster, disk, counted, fix).await?;
                if repaired && counted == 0 {
                    freed = self.discard_run(freed, cluster).await;
                }
            }
            cluster += 1;
        }
        if fix != CheckFix::NONE {
            self.write_blocks().await?;
            if let Some((start, n)) = freed {
                self.discard(start, n).await;
            }
        }
        Ok(highest)
    }

    pub(super) async fn mismatch(
        &mut self,
        cluster: u64,
        disk: u64,
        counted: u64,
        fix: CheckFix,
    ) -> Result<bool, BlockError> {
        let (too_low, may) = match (disk, disk > counted) {
            (0, _) => {
                self.rebuild = true;
                (true, false)
            }
            (_, true) => (false, fix.leaks),
            (_, false) => (true, fix.errors),
        };
        let word = match (may, too_low) {
            (true, _) => "Repairing",
            (false, true) => "ERROR",
            (false, false) => "Leaked",
        };
        self.say(format!("{word} cluster {cluster} refcount={disk} reference={counted}"));
        if may {
            self.set_refcount(cluster, counted).await?;
        }
        let figure = match (may, too_low) {
            (true, true) => &mut self.report.corruptions_fixed,
            (true, false) => &mut self.report.leaks_fixed,
            (false, true) => &mut self.report.corruptions,
            (false, false) => &mut self.report.leaks,
        };
        *figure += 1;
        Ok(may)
    }

    /// Adds a freed cluster to the run to be discarded; a run that ends is discarded. What is freed was referred to by
    /// nobody before, so the order against the refcount's write does not matter.
    async fn discard_run(&mut self, run: Option<(u64, u64)>, cluster: u64) -> Option<(u64, u64)> {
        match run {
            Some((start, n)) if start + n == cluster => Some((start, n + 1)),
            Some((start, n)) => {
                self.discard(start, n).await;
                Some((cluster, 1))
            }
            None => Some((cluster, 1)),
        }
    }

    /// Space saved or not: a failure is not the check's.
    async fn discard(&mut self, cluster: u64, n: u64) {
        let bits = self.geo.cluster_bits();
        let end = (cluster + n) << bits;
        let start = cluster << bits;
        let end = end.min(self.storage.size());
        if start < end {
            match self.storage.discard(start, end - start).await {
                Ok(()) => {}
                Err(e) if e.errno() == Errno::ENOTSUP => {}
                Err(e) => log::debug!("qcow2: discard of freed clusters at {start}: {e}"),
            }
        }
    }
}
