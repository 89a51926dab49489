//! The snapshot table: read as far as it makes sense, cut or completed and rewritten by a repair.
//!
//! First and last step of a check; QEMU opens an image for checking without looking at this table, and so do we.

use graph::{BlockError, Errno};

use super::{Checker, Storage};
use crate::qcow2::format::snapshot::{self, Snapshot, Step};
use crate::qcow2::format::{
    MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, field, validate_table,
};

/// How much of the table is read at once, bytes; an entry is at most 40 + 1024 + 2 × 65535 where it is valid.
const PIECE: usize = 256 << 10;

impl<S: Storage> Checker<'_, S> {
    pub(super) async fn read_snapshots(&mut self) -> Result<(), BlockError> {
        let mut count = self.header.snapshot_count;
        if count > MAX_SNAPSHOTS && self.fix.errors {
            self.say(format!("Discarding {} overhanging snapshots", count - MAX_SNAPSHOTS));
            self.snapshot_corruptions += u64::from(count - MAX_SNAPSHOTS);
            count = MAX_SNAPSHOTS;
        }
        let (at, n, max) = (self.header.snapshots_offset, u64::from(count), u64::from(MAX_SNAPSHOTS) * 40);
        let place = ("snapshots_offset", field::SNAPSHOTS + 4);
        if let Err(e) = validate_table(&self.geo, place, "snapshot table", at, n, 40, max) {
            self.report.check_errors += 1;
            self.say(format!("ERROR {}", e.message));
            if count > MAX_SNAPSHOTS {
                let extra = count - MAX_SNAPSHOTS;
                self.say(format!(
                    "You can force-remove all {extra} overhanging snapshots with qemu-img check -r all"
                ));
            }
            return Err(e.into());
        }
        self.read_entries(count).await?;
        if self.header.version >= 3 {
            for i in 0..self.snapshots.len() {
                if self.snapshots[i].extra_size < 16 {
                    self.snapshot_corruptions += 1;
                    let verb = self.verb();
                    self.say(format!("{verb} snapshot table entry {i} is incomplete"));
                }
            }
        }
        Ok(())
    }

    async fn read_entries(&mut self, count: u32) -> Result<(), BlockError> {
        let base = self.header.snapshots_offset;
        // A repair takes longer extra data, and drops what is too much.
        let max_extra = if self.fix.errors { u32::MAX } else { MAX_SNAPSHOT_EXTRA };
        let mut len = 0u64;
        let mut buf = Vec::new();
        let mut start = 0u64;
        for i in 0..count {
            let mut need = snapshot::FIXED;
            let (mut entry, used) = loop {
                let have = (start + buf.len() as u64).saturating_sub(len) as usize;
                if have < need {
                    if need as u64 > MAX_SNAPSHOT_TABLE_BYTES {
                        return self.too_big(i, count);
                    }
                    start = len;
                    buf = vec![0; need.max(PIECE)];
                    if let Err(e) = self.storage.read(base + len, &mut buf).await {
                        return Err(self.unreadable(e.errno(), "Failed to read snapshot table".into()));
                    }
                }
                let rest = buf.get((len - start) as usize..).unwrap_or_default();
                match Snapshot::parse(rest, i, base + len, max_extra) {
                    Ok(Step::Entry(entry, used)) => break (entry, used),
                    Ok(Step::Need(n)) => need = n,
                    Err(e) => return Err(self.unreadable(e.errno, e.message)),
                }
            };
            if snapshot::check_table_len(len + used as u64, base).is_err() {
                return self.too_big(i, count);
            }
            if entry.extra_size > MAX_SNAPSHOT_EXTRA {
                let (was, max) = (entry.extra_size, MAX_SNAPSHOT_EXTRA);
                self.say(format!(
                    "Discarding too much extra metadata in snapshot table entry {i} ({was} > {max})"
                ));
                self.snapshot_corruptions += 1;
                entry.unknown_extra.truncate((MAX_SNAPSHOT_EXTRA - 24) as usize);
            }
            len += used as u64;
            self.snapshots.push(*entry);
        }
        self.snapshots_bytes = len;
        Ok(())
    }

    fn unreadable(&mut self, errno: Errno, message: String) -> BlockError {
        self.report.check_errors += 1;
        self.say(format!("ERROR failed to read the snapshot table: {message}"));
        self.snapshots.clear();
        BlockError::new(errno, message)
    }

    /// The table is longer than allowed from entry `i` on: a repair drops the rest.
    fn too_big(&mut self, i: u32, count: u32) -> Result<(), BlockError> {
        if !self.fix.errors {
            return Err(self.unreadable(Errno::EFBIG, "Snapshot table is too big".into()));
        }
        self.say(format!("Discarding {} overhanging snapshots (snapshot table is too big)", count - i));
        self.snapshot_corruptions += u64::from(count - i);
        let (size, all) = (self.header.virtual_size(), &self.snapshots);
        let mut bytes = Vec::new();
        // The clusters of the old table are counted as far as what is kept of it reaches.
        self.snapshots_bytes =
            all.iter().try_fold(0, |_, s| s.serialise(size, &mut bytes).map(|()| bytes.len() as u64))?;
        Ok(())
    }

    /// Rewrites the table where something in it was found wrong and may be fixed; answers whether it did.
    pub(super) async fn fix_snapshots(&mut self) -> Result<bool, BlockError> {
        let found = std::mem::take(&mut self.snapshot_corruptions);
        if found == 0 || !self.fix.errors {
            self.report.corruptions += found;
            return Ok(false);
        }
        if let Err(e) = self.rewrite_snapshots().await {
            self.report.check_errors += 1;
            self.report.corruptions += found;
            self.say(format!("ERROR failed to update snapshot table: {}", e.errno()));
            return Err(e);
        }
        self.report.corruptions_fixed += found;
        Ok(true)
    }

    async fn rewrite_snapshots(&mut self) -> Result<(), BlockError> {
        let mut bytes = Vec::new();
        for s in &self.snapshots {
            s.serialise(self.header.virtual_size(), &mut bytes)?;
        }
        snapshot::check_table_len(bytes.len() as u64, self.header.snapshots_offset)?;
        let (old, old_bytes) = (self.header.snapshots_offset, self.snapshots_bytes);
        let offset = if bytes.is_empty() { 0 } else { self.allocate(bytes.len() as u64).await? };
        let mut switch = [0u8; 12];
        switch[..4].copy_from_slice(&(self.snapshots.len() as u32).to_be_bytes());
        switch[4..].copy_from_slice(&offset.to_be_bytes());
        if !bytes.is_empty() {
            self.write(offset, &bytes).await?;
        }
        self.write_blocks().await?;
        self.storage.flush().await?;
        self.write(field::SNAPSHOTS, &switch).await?;
        self.storage.flush().await?;
        self.header.snapshot_count = self.snapshots.len() as u32;
        self.header.snapshots_offset = offset;
        self.snapshots_bytes = bytes.len() as u64;
        let bits = self.geo.cluster_bits();
        if old_bytes > 0 {
            for cluster in old >> bits..=(old + old_bytes - 1) >> bits {
                // A table that lay past the end of the file was never counted.
                match self.refcount(cluster).await? {
                    0 => {}
                    n => self.set_refcount(cluster, n - 1).await?,
                }
            }
        }
        self.write_blocks().await?;
        self.storage.flush().await
    }

    /// Contiguous clusters with refcount 0, now with 1. May add a refcount block.
    async fn allocate(&mut self, bytes: u64) -> Result<u64, BlockError> {
        let n = self.geo.clusters(bytes);
        let mut start = 1;
        let mut at = 1;
        while at - start < n {
            if !self.blocks.covers(at) {
                self.add_block(at).await?;
            }
            if self.refcount(at).await? != 0 || self.counts.get(at) != 0 {
                start = at + 1;
            }
            if let Some(behind) = self.past_end.behind(at, 1) {
                start = behind;
                at = behind;
                continue;
            }
            at += 1;
        }
        for cluster in start..at {
            self.set_refcount(cluster, 1).await?;
        }
        self.storage.grow(at << self.geo.cluster_bits()).await?;
        Ok(start << self.geo.cluster_bits())
    }

    /// A refcount block for clusters that have none, in the first of them.
    async fn add_block(&mut self, cluster: u64) -> Result<(), BlockError> {
        let index = self.geo.reftable_index(cluster);
        let first = index << self.geo.refblock_bits();
        let offset = first << self.geo.cluster_bits();
        let words = &mut self.blocks.table;
        let Some(entry) = usize::try_from(index).ok().and_then(|i| words.get_mut(i)) else {
            return Err(BlockError::new(Errno::ENOSPC, "No room in the refcount table"));
        };
        *entry = offset;
        self.storage.grow(offset + self.geo.cluster_size()).await?;
        self.write(offset, &vec![0; self.geo.cluster_size() as usize]).await?;
        self.set_refcount(first, 1).await?;
        self.write_blocks().await?;
        self.storage.flush().await?;
        self.write(self.header.reftable_offset + index * 8, &offset.to_be_bytes()).await?;
        self.storage.flush().await
    }
}
