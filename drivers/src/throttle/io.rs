//! Requests on a throttle node: the child's, after a while.
//!
//! Called by views and by the graph's asynchronous path. Without limits a request costs one look at a flag.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use graph::{
    BlockStatus, BoxFut, Driver, DriverInfo, Limits, Map, Node, NodeIo, Op, Perm, Reopen, ReopenContext,
    Roles, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;
use serde_json::Value;

use super::Throttle;
use super::bucket::Direction;
use crate::filter::{self, FILE};

impl Throttle {
    async fn admit(&self, io: &NodeIo, direction: Direction, bytes: u64) {
        if self.limited.load(Relaxed) {
            let member = self.with_seat(|seat| Arc::clone(&seat.member));
            member.admit(io.local(), direction, bytes).await;
        }
    }
}

impl Driver for Throttle {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        // A flush is never held back. The flag orders nothing: limits that are set this very moment miss this request.
        if op != Op::Flush && self.limited.load(Relaxed) {
            return Map::Drive;
        }
        self.child.map(op, offset, len)
    }

    fn size(&self) -> u64 {
        self.child.size()
    }

    fn limits(&self) -> Limits {
        // The child aligns for itself.
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.admit(io, Direction::Read, bufs.len() as u64).await;
            io.child(FILE).read(offset, bufs).await
        })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.admit(io, Direction::Write, bufs.len() as u64).await;
            self.child.write(io, offset, bufs, flags).await
        })
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.admit(io, Direction::Write, len).await;
            self.child.write_zeroes(io, offset, len, flags).await
        })
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.admit(io, Direction::Write, len).await;
            io.child(FILE).discard(offset, len).await
        })
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).flush().await })
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(filter::block_status(io, offset, len))
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.child.truncate(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        // The child sees to it, by itself or by a flush.
        true
    }

    fn supports_compressed(&self) -> bool {
        self.child.compresses()
    }

    fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        default_child_perm(role, perm, shared, perm.writes())
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        self.child.changed(index, child);
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["file"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(std::future::ready(self.prepare(cx, own)))
    }

    fn drain_begin(&self) {
        self.with_seat(|seat| {
            seat.drains += 1;
            if seat.drains == 1 {
                seat.member.set_drained(true);
            }
        });
    }

    fn drain_end(&self) {
        self.with_seat(|seat| {
            seat.drains = seat.drains.saturating_sub(1);
            if seat.drains == 0 {
                seat.member.set_drained(false);
            }
        });
    }

    fn info(&self) -> DriverInfo {
        self.child.info()
    }
}
