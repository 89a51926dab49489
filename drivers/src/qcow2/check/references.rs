//! Counting what refers to which host cluster: header, L1 and L2 tables, and everything else that has a place.
//!
//! First half of a check. Repairs only what cannot wait for the comparison: L2 entries that point nowhere sensible, and a
//! refcount block past the end of the file.

use graph::{BlockError, CheckFix, Errno};

use super::{Checker, Storage};
use crate::qcow2::format::entry::{L1_RESERVED, L2_RESERVED, compressed_range};
use crate::qcow2::format::{COMPRESSED, COPIED, L1Entry, MAX_L1_BYTES, OFFSET_MASK, SubBitmap, ZERO, be64};

/// How a table of the guest's mapping is looked at.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    /// The active one: its clusters are counted for the fragmentation figures.
    pub(super) active: bool,
    pub(super) fix: CheckFix,
}

/// What an L2 entry is to the checker; nothing is refused here.
enum Kind {
    Compressed,
    /// Data, or zeroes with a place.
    Placed,
    ZeroPlain,
    Unallocated,
}

impl<S: Storage> Checker<'_, S> {
    /// Counts everything that refers to a host cluster.
    pub(super) async fn count_references(&mut self, fix: CheckFix) -> Result<(), BlockError> {
        let cluster = self.geo.cluster_size();
        // With a data file no cluster of the image is counted for data: there the long way is taken always.
        self.walked_file = if self.header.has_data_file() { 0 } else { self.storage.size() };
        self.refer(0, cluster)?;
        self.walk_active(fix).await?;
        self.walk_snapshots(fix).await?;
        self.refer(self.header.snapshots_offset, self.snapshots_bytes)?;
        if let Some(crypto) = self.header.crypto {
            self.refer(crypto.offset, crypto.length)?;
        }
        self.count_bitmaps().await?;
        self.refer(self.header.reftable_offset, self.header.reftable_bytes())?;
        self.check_blocks(fix).await
    }

    /// One more reference to every cluster of a range.
    pub(super) fn refer(&mut self, offset: u64, size: u64) -> Result<(), BlockError> {
        if size == 0 {
            return Ok(());
        }
        let (cluster, bits) = (self.geo.cluster_size(), self.geo.cluster_bits());
        // The last cluster of a file may be there in part.
        let end = offset.checked_add(size).filter(|&end| end <= i64::MAX as u64);
        let over = end.is_none_or(|end| end >= self.file_len().saturating_add(cluster));
        let Some(end) = end.filter(|_| !over) else {
            self.say(format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {size:#x}"
            ));
            self.report.corruptions += 1;
            self.past_end.add(offset >> bits, offset.saturating_add(size - 1) >> bits);
            return Ok(());
        };
        for k in offset >> bits..=(end - 1) >> bits {
            match self.counts.add(k) {
                Ok(true) => {}
                Ok(false) => {
                    self.say(format!("ERROR: overflow cluster offset={:#x}", k << bits));
                    self.say(
                        "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing".into(),
                    );
                    self.report.corruptions += 1;
                }
                Err(_) => return Err(self.full()),
            }
            self.clusters = self.clusters.max(k + 1);
        }
        Ok(())
    }

    async fn walk_active(&mut self, fix: CheckFix) -> Result<(), BlockError> {
        self.refer(self.header.l1_offset, self.header.l1_bytes())?;
        let walk = Walk { active: true, fix };
        for i in 0..self.l1.len() {
            if let Some(&entry) = self.l1.get(i) {
                self.walk_l1_entry(entry, walk).await?;
            }
        }
        Ok(())
    }

    async fn walk_snapshots(&mut self, fix: CheckFix) -> Result<(), BlockError> {
        self.judge_snapshots();
        for i in 0..self.snapshots.len() {
            for word in self.snapshot_l1(i).await? {
                self.walk_l1_entry(L1Entry(word), Walk { active: false, fix }).await?;
            }
        }
        Ok(())
    }

    /// What can be said of the snapshots together.
    pub(super) fn judge_snapshots(&mut self) {
        if self.header.has_data_file() && !self.snapshots.is_empty() {
            self.say(format!("ERROR {} snapshots in image with data file", self.snapshots.len()));
            self.report.corruptions += 1;
        }
    }

    /// Counts the place of a snapshot's L1 table; its entries, none where it cannot be.
    pub(super) async fn snapshot_l1(&mut self, i: usize) -> Result<Vec<u64>, BlockError> {
        let Some(s) = self.snapshots.get(i) else { return Ok(Vec::new()) };
        let (offset, entries) = (s.l1_offset, s.l1_size);
        let who = format!("{} ({})", String::from_utf8_lossy(&s.id), String::from_utf8_lossy(&s.name));
        if self.geo.in_cluster(offset) != 0 {
            self.say(format!(
                "ERROR snapshot {who} l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted"
            ));
            self.report.corruptions += 1;
            return Ok(Vec::new());
        }
        if u64::from(entries) > MAX_L1_BYTES / 8 {
            self.say(format!(
                "ERROR snapshot {who} l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted"
            ));
            self.report.corruptions += 1;
            return Ok(Vec::new());
        }
        self.refer(offset, u64::from(entries) * 8)?;
        let table = if offset > i64::MAX as u64 - MAX_L1_BYTES {
            Err(Errno::EIO.into())
        } else {
            super::read_words(self.storage, offset, entries as usize).await
        };
        table.inspect_err(|_| {
            self.report.check_errors += 1;
            self.say("ERROR: I/O error in check_refcounts_l1".into());
        })
    }

    pub(super) async fn walk_l1_entry(&mut self, entry: L1Entry, walk: Walk) -> Result<(), BlockError> {
        if entry.0 == 0 {
            return Ok(());
        }
        if entry.0 & L1_RESERVED != 0 {
            self.say(format!("ERROR found L1 entry with reserved bits set: {:x}", entry.0));
            self.report.corruptions += 1;
        }
        let table = entry.offset();
        self.refer(table, self.geo.cluster_size())?;
        if self.geo.in_cluster(table) != 0 {
            self.say(format!("ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"));
            self.report.corruptions += 1;
        }
        self.walk_l2(table, walk).await
    }

    async fn walk_l2(&mut self, table: u64, walk: Walk) -> Result<(), BlockError> {
        let mut bytes = vec![0; self.geo.cluster_size() as usize];
        if let Err(e) = self.storage.read(table, &mut bytes).await {
            self.report.check_errors += 1;
            self.say("ERROR: I/O error in check_refcounts_l2".into());
            return Err(e);
        }
        let size = self.geo.l2_entry_size() as usize;
        let mut expected = 0;
        for i in 0..self.geo.l2_entries() as usize {
            let word = be64(&bytes, i * size).unwrap_or(0);
            let bitmap = if size == 16 { be64(&bytes, i * size + 8).unwrap_or(0) } else { 0 };
            if self.plain(word, bitmap, &mut expected, walk)? {
                continue;
            }
            if word != 0 || bitmap != 0 {
                let at = (table + (i * size) as u64, i as u64);
                self.l2_entry(at, word, SubBitmap(bitmap), &mut expected, walk).await?;
            }
        }
        Ok(())
    }

    /// Counts an ordinary data cluster, nothing wrong with its entry; answers whether it was one.
    #[inline]
    fn plain(&mut self, word: u64, bitmap: u64, expected: &mut u64, walk: Walk) -> Result<bool, BlockError> {
        let offset = word & !COPIED;
        let in_file = offset.saturating_add(self.geo.cluster_size()) <= self.walked_file;
        if offset == 0
            || bitmap != 0
            || offset & !OFFSET_MASK != 0
            || !in_file
            || self.geo.in_cluster(offset) != 0
        {
            return Ok(false);
        }
        let cluster = offset >> self.geo.cluster_bits();
        match self.counts.add(cluster) {
            Ok(true) => {}
            // Said in the long way.
            Ok(false) => return Ok(false),
            Err(_) => return Err(self.full()),
        }
        if walk.active {
            self.report.allocated_clusters += 1;
            if *expected != 0 && offset != *expected {
                self.report.fragmented_clusters += 1;
            }
            *expected = offset + self.geo.cluster_size();
        }
        Ok(true)
    }

    fn kind(&self, word: u64) -> Kind {
        if word & COMPRESSED != 0 {
            return Kind::Compressed;
        }
        let placed = word & OFFSET_MASK != 0;
        if word & ZERO != 0 && !self.geo.extended_l2() {
            return if placed || (self.geo.data_file() && word & COPIED != 0) {
                Kind::Placed
            } else {
                Kind::ZeroPlain
            };
        }
        if placed || (self.geo.data_file() && word & COPIED != 0) { Kind::Placed } else { Kind::Unallocated }
    }

    /// `at` is the entry's place and its index; `expected` where the next cluster lies if it is not a fragment.
    async fn l2_entry(
        &mut self,
        (place, index): (u64, u64),
        mut word: u64,
        bitmap: SubBitmap,
        expected: &mut u64,
        walk: Walk,
    ) -> Result<(), BlockError> {
        let kind = self.kind(word);
        if !matches!(kind, Kind::Compressed) && word & L2_RESERVED != 0 {
            self.say(format!("ERROR found l2 entry with reserved bits set: {word:x}"));
            self.report.corruptions += 1;
        }
        match kind {
            Kind::ZeroPlain => Ok(()),
            Kind::Compressed => {
                if word & COPIED != 0 {
                    let offset = word & self.geo.compressed_offset_mask();
                    self.say(format!(
                        "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
                    ));
                    word &= !COPIED;
                    self.report.corruptions += 1;
                }
                self.compressed(index, word, bitmap, walk)
            }
            Kind::Unallocated => {
                if bitmap.allocated() != 0 {
                    self.report.corruptions += 1;
                    self.say("ERROR: Unallocated cluster has non-zero subcluster allocation map".into());
                }
                Ok(())
            }
            Kind::Placed => self.placed(place, word, bitmap, expected, walk).await,
        }
    }

    fn compressed(&mut self, index: u64, word: u64, bitmap: SubBitmap, walk: Walk) -> Result<(), BlockError> {
        if self.header.has_data_file() {
            self.say(format!("ERROR compressed cluster {index} with data file, entry={word:#x}"));
            self.report.corruptions += 1;
            return Ok(());
        }
        if bitmap.0 != 0 {
            self.say(format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={word:#x}"
            ));
            self.report.corruptions += 1;
            return Ok(());
        }
        let (offset, len) = compressed_range(word, self.geo);
        self.refer(offset, len)?;
        if walk.active {
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            self.report.fragmented_clusters += 1;
        }
        Ok(())
    }

    async fn placed(
        &mut self,
        place: u64,
        word: u64,
        bitmap: SubBitmap,
        expected: &mut u64,
        walk: Walk,
    ) -> Result<(), BlockError> {
        let offset = word & OFFSET_MASK;
        // Which of the two bits is right nobody can say: told, and left for a human.
        if bitmap.allocated() & bitmap.zero() != 0 {
            self.report.corruptions += 1;
            self.say(format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if self.geo.in_cluster(offset) != 0 {
            self.report.corruptions += 1;
            let data = if self.geo.extended_l2() { bitmap.allocated() != 0 } else { word & ZERO == 0 };
            if data {
                self.say(format!(
                    "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
                ));
            } else {
                let verb = if walk.fix.errors { "Repairing" } else { "ERROR" };
                self.say(format!(
                    "{verb} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
                ));
                if walk.fix.errors && self.zero_l2_entry(place, bitmap).await? {
                    return Ok(());
                }
            }
        }
        if walk.active {
            self.report.allocated_clusters += 1;
            if *expected != 0 && offset != *expected {
                self.report.fragmented_clusters += 1;
            }
            *expected = offset + self.geo.cluster_size();
        }
        if self.header.has_data_file() { Ok(()) } else { self.refer(offset, self.geo.cluster_size()) }
    }
}
