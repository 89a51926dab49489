//! Internal snapshots: making one, going back to one, deleting one. Each consistent at every point of a crash.
//!
//! Called by the driver's face inside a drained section. Each begins with the disk saying what memory says, and works on the
//! disk's tables directly; memory follows at the end. While refcounts and COPIED flags do not agree an image of version 3
//! carries the dirty bit, so that a crash leads to a repair; in one of version 2 a crash leaves leaks, or flags that are
//! missing where they could be set. A snapshot appears, goes, or becomes the active state with one write of one sector of the header.
//!
//! | step | make | go back | delete |
//! |---|---|---|---|
//! | 1 | one more reference to all that the active L1 refers to | one more reference to all that the snapshot's L1 refers to | – |
//! | 2 | L1 copy, snapshot table written, COPIED taken off | L1 copy written | snapshot table written |
//! | 3 | barrier, header, barrier | barrier, header (L1 and size), barrier | barrier, header, barrier |
//! | 4 | – | one reference less to what the old L1 referred to | one reference less to what the snapshot's L1 referred to |
//! | 5 | – | barrier, COPIED put on where the count is 1 | barrier, COPIED put on where the count is 1 |

mod apply;
mod copied;
mod create;
mod delete;
pub(super) mod reading;
mod references;

use graph::{BlockError, Errno, NodeIo, Result, SnapshotRef, WriteFlags};
use host::IoVecs;

use super::alloc::{FreeKind, Kind};
use super::format::INCOMPAT_DIRTY;
use super::format::snapshot::{Snapshot, check_table_len};
use super::node::{FILE, Qcow2};

/// A new place for metadata that nothing refers to yet; given back unless kept.
pub(super) struct Unlinked<'a> {
    node: &'a Qcow2,
    offset: u64,
    bytes: u64,
}

impl<'a> Unlinked<'a> {
    /// Writes `data` to new clusters in a row; nothing is allocated for no data.
    pub(super) async fn write(node: &'a Qcow2, io: &NodeIo, mut data: Vec<u8>) -> Result<Unlinked<'a>> {
        if data.is_empty() {
            return Ok(Unlinked { node, offset: 0, bytes: 0 });
        }
        let clusters = node.geo.clusters(data.len() as u64);
        let bytes = clusters << node.geo.cluster_bits();
        data.resize(bytes as usize, 0);
        let file = io.child(FILE);
        let extent = node.space.alloc_in(&file, clusters, true).await?;
        let new = Unlinked { node, offset: extent.offset, bytes };
        file.write(extent.offset, &IoVecs::from_vec(data), WriteFlags::empty()).await?;
        Ok(new)
    }

    /// Where it is, bytes; 0 for no data.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// It is referred to from now on.
    pub(super) fn keep(mut self, kind: Kind) {
        self.node.space.add_metadata(kind, self.offset, self.bytes);
        self.bytes = 0;
    }
}

impl Drop for Unlinked<'_> {
    fn drop(&mut self) {
        // After a failed barrier nobody knows what the header says.
        if self.bytes != 0 && self.node.commits.check().is_ok() {
            self.node.space.give_back(self.offset, self.bytes);
        }
    }
}

impl Qcow2 {
    /// What every operation here needs.
    fn snapshots_allowed(&self) -> Result<()> {
        self.commits.check()?;
        if self.data_file.is_some() {
            let text = "Internal snapshots are not supported with an external data file";
            return Err(BlockError::unsupported(text));
        }
        Ok(())
    }

    /// Looks a snapshot up.
    fn snapshot_position(&self, which: &SnapshotRef) -> Result<usize> {
        let found = which.position(&self.snapshot_list());
        found.ok_or_else(|| BlockError::new(Errno::ENOENT, format!("Can't find snapshot {which}")))
    }

    /// From here on refcounts and flags need not agree with the tables, until [`Qcow2::end_disorder`].
    async fn begin_disorder(&self, io: &NodeIo) -> Result<()> {
        if self.geo.v3() {
            self.header.set_incompatible(&io.child(FILE), INCOMPAT_DIRTY, true).await?;
            self.commits.barrier(self, io).await?;
        }
        Ok(())
    }

    /// They agree again.
    async fn end_disorder(&self, io: &NodeIo) -> Result<()> {
        self.commits.settle(self, io).await
    }

    /// Refcounts as they are in memory are durable.
    pub(super) async fn write_counts_durably(&self, io: &NodeIo) -> Result<()> {
        self.space.write_counts(&io.child(FILE), None).await?;
        self.commits.barrier(self, io).await
    }

    /// The bytes of a snapshot table.
    fn serialise_snapshots(&self, list: &[Snapshot]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let size = self.size();
        for snapshot in list {
            snapshot.serialise(size, &mut out).map_err(BlockError::from)?;
        }
        check_table_len(out.len() as u64, 0).map_err(BlockError::from)?;
        Ok(out)
    }

    /// Makes `list` the snapshots of the image. The refcount of the table's place, and all that the entries refer to, become
    /// durable before; the old table is given up after.
    async fn switch_snapshots(&self, io: &NodeIo, list: Vec<Snapshot>) -> Result<()> {
        let old: u64 = self.snapshots().iter().map(|s| s.serialised_len() as u64).sum();
        let old_offset = self.header().snapshots_offset;
        let table = Unlinked::write(self, io, self.serialise_snapshots(&list)?).await?;
        self.write_counts_durably(io).await?;
        let count = u32::try_from(list.len()).map_err(|_| BlockError::from(Errno::EFBIG))?;
        self.header.switch_snapshots(&io.child(FILE), table.offset, count).await?;
        table.keep(Kind::SnapshotTable);
        *self.snapshots() = list;
        if old != 0 {
            self.space.remove_metadata(old_offset, old);
            self.space.free_later(old_offset, old, FreeKind::Other);
        }
        Ok(())
    }
}
