//! Going back to an internal snapshot.
//!
//! Called by the driver's face, drained. The active L1 is not overwritten: the snapshot's is copied, and one write to the
//! header makes it, and the size of then, the active one.

use graph::{BlockError, NodeIo, Result, SnapshotRef};

use super::Unlinked;
use crate::qcow2::alloc::{FreeKind, Kind};
use crate::qcow2::format::{COPIED, OFFSET_MASK};
use crate::qcow2::node::{FILE, Qcow2};

impl Qcow2 {
    /// Makes the snapshot's content and size those of the disk.
    ///
    /// # Errors
    /// No such snapshot, a refcount at its maximum, no space, what the disk says. Once the header names the new table, an
    /// error means that space has leaked.
    pub(in crate::qcow2) async fn return_to_snapshot(&self, io: &NodeIo, which: &SnapshotRef) -> Result<()> {
        self.snapshots_allowed()?;
        let at = self.snapshot_position(which)?;
        let snapshot = self.snapshots().get(at).cloned();
        let Some(snapshot) = snapshot else { return Err(graph::Errno::ENOENT.into()) };
        let size = snapshot.disk_size.unwrap_or_else(|| self.size());
        if size != self.size() && !self.geo.v3() {
            let text = "The snapshot has another size than the image, which images of version 2 do not bear";
            return Err(BlockError::unsupported(text));
        }
        if self.geo.l1_entries_for(size) > u64::from(snapshot.l1_size) {
            return Err(BlockError::invalid("The snapshot's L1 table is too small for its disk"));
        }
        self.commits.settle(self, io).await?;
        let mut l1 = self.read_l1(io, snapshot.l1_offset, snapshot.l1_size).await?;
        l1.iter_mut().for_each(|e| *e &= !COPIED);
        let (old, old_offset) = (self.tables.l1_entries(), self.tables.l1_offset());
        self.begin_disorder(io).await?;
        if let Err(e) = self.add_references(io, &l1).await {
            if self.commits.check().is_ok() {
                self.restore_order(io).await?;
            }
            return Err(e);
        }
        let switched = async {
            let raw = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            let table = Unlinked::write(self, io, raw).await?;
            self.write_counts_durably(io).await?;
            self.header.switch_l1(&io.child(FILE), Some(size), table.offset, l1.len() as u32).await?;
            let offset = table.offset;
            table.keep(Kind::ActiveL1);
            Ok::<u64, BlockError>(offset)
        };
        let offset = match switched.await {
            Ok(offset) => offset,
            Err(e) => {
                if self.commits.check().is_ok() {
                    self.take_back_references(io, &l1).await;
                    self.restore_order(io).await?;
                }
                return Err(e);
            }
        };
        self.tables.replace_l1(offset, &l1);
        self.decoded.clear();
        self.set_size(size);
        let cluster = self.geo.cluster_size();
        for table in l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
            self.space.add_metadata(Kind::ActiveL2, table, cluster);
        }
        let old_bytes = old.len() as u64 * 8;
        self.space.remove_metadata(old_offset, old_bytes);
        self.space.free_later(old_offset, old_bytes, FreeKind::Other);
        self.drop_references(io, &old, FreeKind::Other).await?;
        self.refresh_copied(io).await?;
        self.end_disorder(io).await
    }
}
