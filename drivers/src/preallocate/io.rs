//! Requests on a preallocate node: the child's, with space set aside before the file grows.
//!
//! Called by views and by the graph's asynchronous path. What lies inside the data goes the fast way.
//!
//! **Growing** happens under one lock, data excepted: the end of the data is moved before it is written, as is the end of
//! the file, so that no space is ever set aside, which zeroes it, where somebody else is writing.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Arc, PoisonError};

use graph::{
    BlockStatus, BoxFut, Driver, DriverInfo, Errno, Limits, Map, Node, NodeIo, Op, Perm, Prealloc, Reopen,
    ReopenContext, Result, Roles, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;
use host::sync::MutexGuard;
use serde_json::Value;

use super::options::Steps;
use super::{Growth, Preallocate};
use crate::filter::{self, FILE};

/// What makes a file longer.
const GROWS: Perm = Perm::WRITE.union(Perm::RESIZE);

impl Preallocate {
    fn steps(&self) -> Steps {
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data_end(&self) -> u64 {
        self.data_end.load(Acquire)
    }

    /// Something other than zeroes is about to be written up to `end`.
    fn note_data(&self, end: u64) {
        if end > self.zero_start.load(Acquire) {
            self.zero_start.fetch_max(end, AcqRel);
        }
    }

    /// Before a write of `offset..end` with data that ends behind the data there is.
    async fn grow_for_data(&self, io: &NodeIo, end: u64) {
        let growth = &mut *self.growth.lock().await;
        self.data_end.fetch_max(end, AcqRel);
        self.note_data(end);
        if end > growth.file_end {
            let from = growth.file_end;
            self.set_aside(io, growth, from, end).await;
        }
    }

    /// Before a write of zeroes over `offset..end`, likewise; whether nothing is left to write. `merge`: it need not be
    /// written where it is zero.
    async fn grow_for_zeroes(&self, io: &NodeIo, offset: u64, end: u64, merge: bool) -> bool {
        let growth = &mut *self.growth.lock().await;
        let (old_end, zero_start) = (self.data_end(), self.zero_start.load(Acquire));
        if end <= old_end {
            return false;
        }
        self.data_end.fetch_max(end, AcqRel);
        let blank = merge && offset >= zero_start;
        if !blank {
            self.note_data(end);
        }
        if end <= growth.file_end {
            return blank;
        }
        // Nobody writes behind the end of the file: what the request wants zeroed there is set aside along with the rest.
        let from = if blank { offset.clamp(old_end, growth.file_end) } else { growth.file_end };
        let (start, done) = self.set_aside(io, growth, from, end).await;
        if blank && !(done && (start <= offset || start <= from)) {
            // Written by the request itself, then.
            self.note_data(end);
            return false;
        }
        blank
    }

    /// Makes the file longer for a write that ends at `end`, behind the file's end; from where on it was done, and whether.
    /// Where it cannot be, the write makes the file longer by itself.
    async fn set_aside(&self, io: &NodeIo, growth: &mut Growth, from: u64, end: u64) -> (u64, bool) {
        let steps = self.steps().next(from, end).filter(|_| !growth.unable);
        // Behind everything that is being written, whether or not it works out.
        growth.file_end = growth.file_end.max(end);
        let Some((start, stop)) = steps else { return (from, false) };
        // Before there is anything: who asks for permissions must not find it unguarded.
        self.set_aside.store(true, Release);
        match io.child(FILE).write_zeroes(start, stop - start, ZeroFlags::NO_FALLBACK).await {
            Ok(()) => {
                growth.file_end = growth.file_end.max(stop);
                (start, true)
            }
            Err(e) => {
                growth.unable = e.errno() == Errno::ENOTSUP;
                (start, false)
            }
        }
    }

    /// Cuts off what is behind the data.
    async fn cut(&self, io: &NodeIo, growth: &mut Growth) -> Result<()> {
        let child = io.child(FILE);
        let end = self.data_end();
        if self.set_aside.load(Acquire) && child.size() > end {
            child.truncate(end, Truncate { exact: true, ..Truncate::default() }).await?;
        }
        growth.file_end = end;
        self.zero_start.store(end, Release);
        self.set_aside.store(false, Release);
        Ok(())
    }

    async fn write_data(&self, io: &NodeIo, offset: u64, bufs: &IoVecs, flags: WriteFlags) -> Result<()> {
        let end = offset.saturating_add(bufs.len() as u64);
        if end > self.data_end() {
            self.grow_for_data(io, end).await;
        } else {
            self.note_data(end);
        }
        io.child(FILE).write(offset, bufs, flags).await
    }

    async fn zero(&self, io: &NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let end = offset.saturating_add(len);
        // What must be durable, or given up, has to be done.
        let merge = (flags - ZeroFlags::NO_FALLBACK).is_empty();
        if end > self.data_end() && self.grow_for_zeroes(io, offset, end, merge).await {
            return Ok(());
        }
        io.child(FILE).write_zeroes(offset, len, flags).await
    }

    async fn resize(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        let growth = &mut *self.growth.lock().await;
        let child = io.child(FILE);
        if size > self.data_end() && size <= growth.file_end && how.prealloc == Prealloc::Falloc {
            // Set aside already: from now on it is the user's.
            self.data_end.store(size, Release);
            return Ok(());
        }
        // A file that is longer than the user knows cannot be made as long as the user wants.
        self.cut(io, growth).await?;
        let result = child.truncate(size, how).await;
        // Also after a failure: half of it may have happened.
        self.adopt(growth, child.size());
        result
    }

    /// The child is as long as it should be, and nothing is set aside.
    fn adopt(&self, growth: &mut Growth, size: u64) {
        self.data_end.store(size, Release);
        self.zero_start.store(size, Release);
        growth.file_end = size;
    }

    /// The child was changed, or exchanged, by somebody else.
    fn child_is(&self, size: u64, mut growth: MutexGuard<'_, Growth>) {
        let own = self.set_aside.load(Acquire) && (self.data_end()..=growth.file_end).contains(&size);
        if !own {
            self.set_aside.store(false, Release);
            self.adopt(&mut growth, size);
        }
        growth.unable = false;
    }
}

impl Driver for Preallocate {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        let limit = match op {
            Op::Flush => return Map::Child { child: FILE, offset, len },
            Op::Read | Op::WriteZeroes => self.data_end(),
            // Moves the start of the zeroes.
            Op::Write | Op::Discard => self.zero_start.load(Acquire),
        };
        match offset.checked_add(len) {
            Some(end) if end <= limit => Map::Child { child: FILE, offset, len },
            _ => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.data_end()
    }

    fn limits(&self) -> Limits {
        // The child aligns for itself.
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).read(offset, bufs).await })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(self.write_data(io, offset, bufs, flags))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(self.zero(io, offset, len, flags))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move {
            // It may read as anything afterwards.
            self.note_data(offset.saturating_add(len).min(self.data_end()));
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
        Box::pin(self.resize(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        // The child sees to it, by itself or by a flush.
        true
    }

    fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        let (used, shared) = default_child_perm(role, perm, shared, perm.writes());
        if perm.contains(GROWS) || self.set_aside.load(Acquire) {
            // It begins only while a user has both, so that the answer for such a user never depends on it.
            return (used | GROWS, shared - GROWS);
        }
        (used, shared)
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if index != FILE {
            return;
        }
        // Drained: nobody grows. If somebody does all the same (the graph tells of a change elsewhere), it is not over.
        if let Some(growth) = self.growth.try_lock() {
            self.child_is(child.map_or(0, |(_, node)| node.size()), growth);
        }
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["file"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(self.prepare(cx, own))
    }

    fn has_set_aside(&self) -> bool {
        self.set_aside.load(Acquire)
    }

    fn give_back<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move { self.cut(io, &mut *self.growth.lock().await).await })
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { supports_fua: true, ..DriverInfo::default() }
    }

    fn close<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        self.give_back(io)
    }
}
