//! Requests on a qcow2 node.
//!
//! Called by views (`map`, the hot path) and by the graph's asynchronous path. This file is the driver's face; the work is in
//! the files beside it:
//!
//! | file | subject |
//! |---|---|
//! | `map.rs` | where a range lives, answered at once; fresh clusters handed out at once |
//! | `read.rs` | driven reads |
//! | `write.rs` | driven writes, with allocation and copy-on-write |
//! | `plan.rs` | what an allocating write is going to do |
//! | `zero.rs` | write-zeroes and discard |
//! | `compressed.rs`, `decoded.rs` | compressed clusters |
//! | `status.rs` | what is known about ranges |
//! | `truncate.rs`, `prealloc.rs` | changing the size |
//! | `backing.rs` | the name of the backing file |
//! | `check.rs` | looking for contradictions |
//! | `info.rs` | what the queries are told |

mod backing;
mod check;
mod compressed;
pub(crate) mod decoded;
mod info;
pub(crate) mod join;
mod map;
mod plan;
mod prealloc;
mod read;
mod status;
mod truncate;
mod write;
mod zero;

use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

use graph::{
    BlockError, BlockStatus, BoxFut, CheckFix, CheckReport, CheckStep, Driver, DriverInfo, Errno, Limits,
    Map, NewSnapshot, Node, NodeIo, OnlineCheck, Op, Perm, Reopen, ReopenContext, Result, Roles,
    SnapshotInfo, SnapshotRef, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;
use serde_json::Value;

use super::node::{FILE, NO_BACKING, Qcow2};

impl Driver for Qcow2 {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        match op {
            Op::Read => self.map_read(offset, len),
            Op::Write => self.map_write(offset, len),
            // Nothing to commit: the data alone.
            Op::Flush if self.data_file.is_none() && self.commits.is_clean(self) => {
                Map::Child { child: FILE, offset: 0, len }
            }
            // Zeroing and discarding change entries; a flush is a commit.
            Op::WriteZeroes | Op::Discard | Op::Flush => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        Qcow2::size(self)
    }

    fn limits(&self) -> Limits {
        let geo = self.geo;
        Limits {
            // Encryption works on whole sectors.
            request_alignment: if self.crypt.is_some() { 512 } else { 1 },
            discard_alignment: geo.cluster_size() as u32,
            write_zeroes_alignment: geo.subcluster_size() as u32,
            ..Limits::default()
        }
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(self.read_range(io, offset, bufs))
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        if flags.contains(WriteFlags::COMPRESSED) {
            return Box::pin(self.write_compressed(io, offset, bufs));
        }
        Box::pin(self.write_range(io, offset, bufs))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(self.zero_range(io, offset, len, flags))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(self.discard_range(io, offset, len))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(self.commits.flush(self, io))
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(self.status(io, offset, len))
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.bitmaps_allow_resize()?;
            self.tables.watch().upheaval();
            self.resize(io, size, how).await
        })
    }

    fn supports_compressed(&self) -> bool {
        self.data_file.is_none() && self.crypt.is_none()
    }

    fn check<'a>(&'a self, io: &'a NodeIo, fix: CheckFix) -> BoxFut<'a, CheckReport> {
        Box::pin(self.check_image(io, fix))
    }

    fn check_online<'a>(
        &'a self,
        io: &'a NodeIo,
        check: &'a mut OnlineCheck,
        drained: bool,
    ) -> BoxFut<'a, CheckStep> {
        Box::pin(self.check_piece(io, check, drained))
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.snapshot_list()
    }

    fn supports_snapshots(&self) -> bool {
        self.data_file.is_none()
    }

    fn snapshot_create<'a>(&'a self, io: &'a NodeIo, new: NewSnapshot) -> BoxFut<'a, SnapshotInfo> {
        Box::pin(async move {
            self.tables.watch().upheaval();
            self.make_snapshot(io, new).await
        })
    }

    fn snapshot_apply<'a>(&'a self, io: &'a NodeIo, which: SnapshotRef) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.tables.watch().upheaval();
            self.return_to_snapshot(io, &which).await
        })
    }

    fn snapshot_delete<'a>(&'a self, io: &'a NodeIo, which: SnapshotRef) -> BoxFut<'a, SnapshotInfo> {
        Box::pin(async move {
            self.tables.watch().upheaval();
            self.remove_snapshot(io, &which).await
        })
    }

    fn supports_bitmaps(&self) -> bool {
        true
    }

    fn make_bitmap_persistent_ok(&self, name: &str, granularity: u32) -> Result<()> {
        self.can_store_bitmap(name, granularity)
    }

    fn store_bitmaps<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.tables.watch().upheaval();
            Qcow2::store_bitmaps(self, io).await
        })
    }

    fn remove_stored_bitmap<'a>(&'a self, io: &'a NodeIo, name: String) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.tables.watch().upheaval();
            self.remove_bitmap(io, &name).await
        })
    }

    fn change_backing_file<'a>(
        &'a self,
        io: &'a NodeIo,
        name: Option<String>,
        format: Option<String>,
    ) -> BoxFut<'a, ()> {
        Box::pin(self.rename_backing(io, name, format))
    }

    fn backing_child(&self) -> Option<usize> {
        self.backing
    }

    fn add_child(&self) -> Result<(String, Roles)> {
        match self.backing_size() {
            None => Ok(("backing".to_owned(), Roles::COW)),
            Some(_) => Err(BlockError::new(Errno::EEXIST, "There is a backing file already")),
        }
    }

    fn remove_child(&self, child: usize) -> Result<()> {
        match self.backing == Some(child) {
            true => Ok(()),
            false => Err(BlockError::errno_only(Errno::ENOTSUP)),
        }
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["file", "backing"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(self.reopen_with(cx, own))
    }

    fn child_perm(&self, child: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        if child == FILE && self.beside_writer {
            // What a snapshot refers to stays as it is, whatever others write.
            return (Perm::CONSISTENT_READ, Perm::ALL);
        }
        let (mut used, below) = default_child_perm(role, perm, shared, !self.settings.read_only);
        if role.contains(Roles::DATA) && perm.contains(Perm::RESIZE) {
            // At the old end what a shorter or longer cluster must not show is zeroed, in an external data file too.
            used |= Perm::WRITE;
        }
        (used, below)
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if Some(index) == self.backing {
            // Pairs with the Acquire in `Qcow2::backing_size`.
            self.backing_size.store(child.map_or(NO_BACKING, |(_, node)| node.size()), Release);
        }
    }

    fn info(&self) -> DriverInfo {
        self.driver_info()
    }

    fn close<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if self.settings.read_only {
                return Ok(());
            }
            self.commits.close(self, io).await
        })
    }
}
