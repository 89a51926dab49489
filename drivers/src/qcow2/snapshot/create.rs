//! Making an internal snapshot.
//!
//! Called by the driver's face, drained. Takes time in proportion to the L2 tables of the image.

use graph::{BlockError, Errno, NewSnapshot, NodeIo, Result, SnapshotInfo};

use super::Unlinked;
use crate::qcow2::alloc::Kind;
use crate::qcow2::format::snapshot::Snapshot;
use crate::qcow2::format::{COPIED, MAX_SNAPSHOTS, OFFSET_MASK};
use crate::qcow2::node::Qcow2;

/// Longest name QEMU can work with, bytes.
const MAX_NAME: usize = 255;

impl Qcow2 {
    /// Makes a snapshot of the disk as it is.
    ///
    /// # Errors
    /// Too many snapshots, a refcount at its maximum, no space, what the disk says; the image is as before then, but for
    /// space that may have leaked.
    pub(in crate::qcow2) async fn make_snapshot(
        &self,
        io: &NodeIo,
        new: NewSnapshot,
    ) -> Result<SnapshotInfo> {
        self.snapshots_allowed()?;
        if new.name.len() > MAX_NAME {
            return Err(BlockError::invalid(format!("A snapshot's name has at most {MAX_NAME} bytes")));
        }
        if self.snapshots().len() >= MAX_SNAPSHOTS as usize {
            return Err(BlockError::new(Errno::EFBIG, "The image has as many snapshots as it can"));
        }
        self.commits.settle(self, io).await?;
        self.begin_disorder(io).await?;
        let l1 = self.tables.l1_entries();
        let made = match self.add_references(io, &l1).await {
            Ok(()) => match self.link_snapshot(io, &l1, new).await {
                Ok(made) => Ok(made),
                Err(e) => {
                    if self.commits.check().is_ok() {
                        self.take_back_references(io, &l1).await;
                    }
                    Err(e)
                }
            },
            Err(e) => Err(e),
        };
        if let Err(e) = made {
            // As it was: the counts are back in memory, and the flags follow them.
            if self.commits.check().is_ok() {
                self.restore_order(io).await?;
            }
            return Err(e);
        }
        self.end_disorder(io).await?;
        made
    }

    /// References are counted, nothing else has happened.
    async fn link_snapshot(&self, io: &NodeIo, l1: &[u64], new: NewSnapshot) -> Result<SnapshotInfo> {
        // Flags mean nothing in a table that is not the active one.
        let copy: Vec<u8> = l1.iter().flat_map(|e| (e & !COPIED).to_be_bytes()).collect();
        let table = Unlinked::write(self, io, copy).await?;
        self.write_counts_durably(io).await?;
        self.refresh_copied(io).await?;
        let snapshot = Snapshot {
            l1_offset: table.offset,
            l1_size: l1.len() as u32,
            id: self.next_id().into_bytes(),
            name: new.name.into_bytes(),
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size: 0,
            disk_size: Some(self.size()),
            icount: None,
            extra_size: 24,
            unknown_extra: Vec::new(),
        };
        let mut list = self.snapshots().clone();
        list.push(snapshot);
        self.switch_snapshots(io, list).await?;
        table.keep(Kind::InactiveL1);
        for table in l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
            if !self.settings.guarded.has(Kind::InactiveL2) {
                break;
            }
            self.space.add_metadata(Kind::InactiveL2, table, self.geo.cluster_size());
        }
        self.snapshot_list().pop().ok_or_else(|| Errno::EIO.into())
    }

    /// The next id: one more than the largest number.
    fn next_id(&self) -> String {
        let numbers = self
            .snapshots()
            .iter()
            .filter_map(|s| std::str::from_utf8(&s.id).ok()?.parse::<u64>().ok())
            .max();
        numbers.unwrap_or(0).saturating_add(1).to_string()
    }

    /// After something failed half-way: flags as the counts have them, and the dirty bit off.
    pub(super) async fn restore_order(&self, io: &NodeIo) -> Result<()> {
        self.commits.flush(self, io).await?;
        self.space.settle(&io.child(crate::qcow2::node::FILE)).await?;
        self.write_counts_durably(io).await?;
        self.refresh_copied(io).await?;
        self.end_disorder(io).await
    }
}
