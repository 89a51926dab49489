//! Changes of the first cluster (invariant I7): single fields by one write of one sector, extensions and names by a
//! detour that is valid at every point.
//!
//! Called by commits (dirty and corrupt bit), by the allocator (a larger refcount table), by resizing, snapshots and
//! bitmaps. Changes are serialised; whoever switches to something new has made that durable before.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph::{BlockError, NodeIo, Result};

use super::health::Health;
use super::write::{MetaWrite, write_all};
use crate::qcow2::check::Storage;
use crate::qcow2::format::{Header, INCOMPAT_CORRUPT, field};

/// What is trusted to be written as a whole.
const SECTOR: usize = 512;
/// Extension with the names of features: may be left out for a moment.
const FEATURE_NAMES: u32 = 0x6803_f857;

/// See the module's page. One per image.
pub(crate) struct HeaderIo {
    /// As on disk, once the write that is under way has ended.
    parsed: Mutex<Header>,
    /// The first cluster as on disk. Held across waiting.
    bytes: host::sync::Mutex<Vec<u8>>,
    health: Arc<Health>,
}

impl HeaderIo {
    /// `first`: the first cluster as it was read, `header`: what was parsed from it.
    pub(crate) fn new(header: Header, mut first: Vec<u8>, health: Arc<Health>) -> HeaderIo {
        first.resize(header.geometry().cluster_size() as usize, 0);
        HeaderIo { parsed: Mutex::new(header), bytes: host::sync::Mutex::new(first), health }
    }

    /// The header. Not to be held across waiting.
    pub(crate) fn header(&self) -> MutexGuard<'_, Header> {
        self.parsed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header was changed behind our back, and is this now. Drained.
    pub(crate) async fn read_again(&self, header: Header, mut first: Vec<u8>) {
        first.resize(header.geometry().cluster_size() as usize, 0);
        let mut bytes = self.bytes.lock().await;
        *self.header() = header;
        *bytes = first;
    }

    /// The first offset at which the header on disk is not what it was left as.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) async fn differs(&self, disk: &impl Storage) -> Result<Option<usize>> {
        let bytes = self.bytes.lock().await;
        let mut there = vec![0; bytes.len()];
        disk.read(0, &mut there).await?;
        Ok(there.iter().zip(bytes.iter()).position(|(a, b)| a != b))
    }

    /// Whether one of these incompatible features is set.
    pub(crate) fn has_incompatible(&self, mask: u64) -> bool {
        self.header().incompatible & mask != 0
    }

    /// Replaces fields within the first sector by one write, and changes the parsed header alike.
    async fn patch(
        &self,
        file: &NodeIo,
        patches: &[(u64, &[u8])],
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut bytes = self.bytes.lock().await;
        let mut new = bytes.clone();
        for (at, value) in patches {
            let at = *at as usize;
            if let Some(place) = new.get_mut(at..at + value.len()) {
                place.copy_from_slice(value);
            }
        }
        self.write_first(file, &bytes, &new).await?;
        *bytes = new;
        change(&mut self.header());
        Ok(())
    }

    /// Writes the first sector, or as much as the file takes at once. If that fails the old one is put back; if that fails as
    /// well nobody knows what the header says, and the image is not touched any more.
    async fn write_first(&self, file: &NodeIo, old: &[u8], new: &[u8]) -> Result<()> {
        let unit = (file.limits().request_alignment as usize).clamp(SECTOR, new.len().max(SECTOR));
        let first =
            |bytes: &[u8]| vec![MetaWrite { offset: 0, data: bytes.get(..unit).unwrap_or(bytes).to_vec() }];
        let Err(e) = write_all(file, first(new)).await else { return Ok(()) };
        if write_all(file, first(old)).await.is_err() {
            self.health.stop(&format!("the header could not be written: {e}"));
        }
        Err(e.context("Could not update qcow2 header"))
    }

    /// A switch of what the image consists of: durable when this returns.
    async fn switch(
        &self,
        file: &NodeIo,
        patches: &[(u64, &[u8])],
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        self.patch(file, patches, change).await?;
        self.health.barrier(file, None).await
    }

    /// Another refcount table, which is durable.
    ///
    /// # Errors
    /// The old one is still in use, or (failed barrier) the image is stopped.
    pub(crate) async fn switch_reftable(&self, file: &NodeIo, offset: u64, clusters: u32) -> Result<()> {
        let value = [&offset.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
        self.switch(file, &[(field::REFTABLE, &value)], |h| {
            h.reftable_offset = offset;
            h.reftable_clusters = clusters;
        })
        .await
    }

    /// Another L1 table, which is durable, and perhaps another size of the disk with it.
    ///
    /// # Errors
    /// As [`HeaderIo::switch_reftable`].
    pub(crate) async fn switch_l1(
        &self,
        file: &NodeIo,
        size: Option<u64>,
        offset: u64,
        entries: u32,
    ) -> Result<()> {
        let l1 = [&entries.to_be_bytes()[..], &offset.to_be_bytes()].concat();
        let disk = size.map(u64::to_be_bytes);
        let mut patches: Vec<(u64, &[u8])> = vec![(field::L1, &l1)];
        if let Some(disk) = &disk {
            patches.push((field::SIZE, disk));
        }
        self.switch(file, &patches, |h| {
            h.l1_offset = offset;
            h.l1_size = entries;
            h.size = size.unwrap_or(h.size);
        })
        .await
    }

    /// Another size of the disk; the L1 table is large enough.
    ///
    /// # Errors
    /// As [`HeaderIo::switch_reftable`].
    pub(crate) async fn switch_size(&self, file: &NodeIo, size: u64) -> Result<()> {
        self.switch(file, &[(field::SIZE, &size.to_be_bytes())], |h| h.size = size).await
    }

    /// Another snapshot table, which is durable.
    ///
    /// # Errors
    /// As [`HeaderIo::switch_reftable`].
    pub(crate) async fn switch_snapshots(&self, file: &NodeIo, offset: u64, count: u32) -> Result<()> {
        let value = [&count.to_be_bytes()[..], &offset.to_be_bytes()].concat();
        self.switch(file, &[(field::SNAPSHOTS, &value)], |h| {
            h.snapshots_offset = offset;
            h.snapshot_count = count;
        })
        .await
    }

    /// Sets or clears incompatible features. Durable with the next barrier.
    ///
    /// # Errors
    /// The header is as before, or the image is stopped.
    pub(crate) async fn set_incompatible(&self, file: &NodeIo, mask: u64, on: bool) -> Result<()> {
        let old = self.header().incompatible;
        let new = if on { old | mask } else { old & !mask };
        self.patch(file, &[(field::INCOMPATIBLE, &new.to_be_bytes())], |h| h.incompatible = new).await
    }

    /// Sets or clears autoclear features. Durable with the next barrier.
    ///
    /// # Errors
    /// As [`HeaderIo::set_incompatible`].
    pub(crate) async fn set_autoclear(&self, file: &NodeIo, mask: u64, on: bool) -> Result<()> {
        let old = self.header().autoclear;
        let new = if on { old | mask } else { old & !mask };
        if new == old {
            return Ok(());
        }
        self.patch(file, &[(field::AUTOCLEAR, &new.to_be_bytes())], |h| h.autoclear = new).await
    }

    /// Before the first change of any kind (invariant I9): autoclear bits nobody here understands go, durably.
    ///
    /// # Errors
    /// As [`HeaderIo::switch_reftable`].
    pub(crate) async fn clear_unknown_autoclear(&self, file: &NodeIo) -> Result<()> {
        let unknown = self.header().unknown_autoclear();
        if unknown == 0 {
            return Ok(());
        }
        self.set_autoclear(file, unknown, false).await?;
        self.health.barrier(file, None).await
    }

    /// The corrupt bit, durably; for images of version 3.
    pub(crate) async fn mark_corrupt(&self, file: &NodeIo) -> Result<()> {
        if self.header().version < 3 || self.has_incompatible(INCOMPAT_CORRUPT) {
            return Ok(());
        }
        self.set_incompatible(file, INCOMPAT_CORRUPT, true).await?;
        file.flush().await
    }

    /// Changes extensions, names, anything that is not one field. Fields that belong to a switch of tables must not be
    /// changed here unless these tables are durable. Durable when this returns.
    ///
    /// Where header, extensions and backing name fit into the first sector without the table of feature names, a reader
    /// sees the old or the new header at every point of a crash: the new one is written to the first sector without that
    /// table, then the rest, then the first sector again. Otherwise (very long names) the cluster is rewritten in one go.
    ///
    /// # Errors
    /// `ENOSPC` if it does not fit; what the disk says.
    pub(crate) async fn rewrite(&self, file: &NodeIo, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut bytes = self.bytes.lock().await;
        let mut header = self.header().clone();
        change(&mut header);
        let new = header.serialise().map_err(BlockError::from)?;
        self.health.barrier(file, None).await?;
        let sectors_equal = new.get(SECTOR..) == bytes.get(SECTOR..);
        if !sectors_equal {
            if let Some(detour) = detour(&new) {
                self.write_first(file, &bytes, &detour).await?;
                if let Some(first) = bytes.get_mut(..SECTOR) {
                    first.copy_from_slice(detour.get(..SECTOR).unwrap_or_default());
                }
                // Valid, and as asked for: a failure from here on changes nothing that matters.
                *self.header() = header.clone();
                self.health.barrier(file, None).await?;
            }
            let rest = new.get(SECTOR..).unwrap_or_default().to_vec();
            write_all(file, vec![MetaWrite { offset: SECTOR as u64, data: rest }]).await?;
            if let (Some(to), Some(from)) = (bytes.get_mut(SECTOR..), new.get(SECTOR..)) {
                to.copy_from_slice(from);
            }
            self.health.barrier(file, None).await?;
        }
        self.write_first(file, &bytes, &new).await?;
        *bytes = new;
        *self.header() = header;
        self.health.barrier(file, None).await
    }
}

/// A first cluster that says the same as `new` in its first sector alone, without feature names; `None` if that does not
/// fit.
fn detour(new: &[u8]) -> Option<Vec<u8>> {
    let be32 = |at: usize| Some(u32::from_be_bytes(new.get(at..at + 4)?.try_into().ok()?));
    let v3 = be32(4)? >= 3;
    let length = if v3 { be32(100)? as usize } else { 72 };
    let name_at = u64::from_be_bytes(new.get(8..16)?.try_into().ok()?) as usize;
    let name_len = be32(16)? as usize;
    let mut out = new.get(..length)?.to_vec();
    let mut at = length;
    loop {
        let (magic, len) = (be32(at)?, be32(at + 4)? as usize);
        let whole = 8 + len.next_multiple_of(8);
        if magic == 0 {
            break;
        }
        if magic != FEATURE_NAMES {
            out.extend_from_slice(new.get(at..at + whole)?);
        }
        at += whole;
    }
    out.extend_from_slice(&[0; 8]);
    if name_at != 0 {
        let moved = out.len() as u64;
        out.get_mut(8..16)?.copy_from_slice(&moved.to_be_bytes());
        out.extend_from_slice(new.get(name_at..name_at + name_len)?);
    }
    if out.len() > SECTOR {
        return None;
    }
    out.resize(new.len(), 0);
    Some(out)
}
