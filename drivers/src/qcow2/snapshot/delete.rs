//! Deleting an internal snapshot.
//!
//! Called by the driver's face, drained. Refused while a node reads the snapshot.

use graph::{BlockError, Errno, NodeIo, Result, SnapshotInfo, SnapshotRef};

use crate::qcow2::alloc::FreeKind;
use crate::qcow2::node::{FILE, Qcow2};

/// The claim on a snapshot that is being read or deleted, with the file's node.
pub(in crate::qcow2) fn claim(id: &[u8]) -> String {
    format!("snapshot {}", String::from_utf8_lossy(id))
}

impl Qcow2 {
    /// Removes a snapshot and gives up what only it referred to.
    ///
    /// # Errors
    /// No such snapshot; `EBUSY` while it is read; what the disk says. Once the snapshot is gone from the table, an error
    /// means that space has leaked.
    pub(in crate::qcow2) async fn remove_snapshot(
        &self,
        io: &NodeIo,
        which: &SnapshotRef,
    ) -> Result<SnapshotInfo> {
        self.snapshots_allowed()?;
        let at = self.snapshot_position(which)?;
        let mut list = self.snapshots().clone();
        let info = self.snapshot_list().into_iter().nth(at).ok_or(BlockError::from(Errno::ENOENT))?;
        let file = io.child(FILE);
        let snapshot = list.remove(at);
        let _claim = file.node()?.pins().take(&claim(&snapshot.id)).ok_or_else(|| {
            let text = format!("Snapshot '{}' is in use: a node reads it", info.name);
            BlockError::new(Errno::EBUSY, text)
        })?;
        self.commits.settle(self, io).await?;
        // Read before it can no longer be found.
        let l1 = self.read_l1(io, snapshot.l1_offset, snapshot.l1_size).await?;
        self.begin_disorder(io).await?;
        if let Err(e) = self.switch_snapshots(io, list).await {
            if self.commits.check().is_ok() {
                self.restore_order(io).await?;
            }
            return Err(e);
        }
        let l1_bytes = u64::from(snapshot.l1_size) * 8;
        self.space.free_later(snapshot.l1_offset, l1_bytes, FreeKind::Snapshot);
        self.drop_references(io, &l1, FreeKind::Snapshot).await?;
        self.refresh_copied(io).await?;
        self.end_disorder(io).await?;
        Ok(info)
    }
}
