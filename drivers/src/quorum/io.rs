//! Requests on a quorum: to all children at the same time, in pieces of bounded size.
//!
//! Called by views and by the graph's asynchronous path. Nothing is mapped but what does nothing: a vote needs the data, and
//! a failing child needs somebody who asks the next one.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverInfo, Errno, Limits, Map, Node, NodeIo, Op, OverlayPlace,
    Perm, QuorumOp, Result, Roles, StatusFlags, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use host::exec::join_all;

use super::members::{List, Member};
use super::open::too_many;
use super::options::ReadPattern;
use super::vote::{vote, vote_errors};
use super::{BUDGET, MAX_CHILDREN, MAX_PIECE, Quorum, QuorumNode};
use crate::to_the_end::to_the_end;

/// How pieces and buffers are aligned, bytes: enough for direct I/O on every device.
const ALIGN: usize = 4096;

/// A request to one child.
type ToChild<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// Longest piece of a request that has a buffer for each of `children`, bytes.
fn piece_len(children: usize) -> usize {
    (BUDGET / children.max(1) / ALIGN * ALIGN).clamp(ALIGN, MAX_PIECE)
}

/// The child, where it has that much: one that was added with another size must not be written past its end.
fn reach(io: &NodeIo, member: &Member, end: u64) -> Result<NodeIo> {
    if end > member.node.size() {
        return Err(Errno::EIO.into());
    }
    Ok(io.child(member.index))
}

impl Quorum {
    /// Tells of a child that failed.
    fn report_bad(&self, op: QuorumOp, member: &Member, e: &BlockError, offset: u64, len: u64) {
        let words = e.errno().to_string();
        self.events.quorum_report_bad(op, Some(words), member.node.name(), offset, len);
    }

    /// Too few children succeeded: what the request answers.
    fn failed(&self, errors: &[Errno], offset: u64, len: u64) -> BlockError {
        self.events.quorum_failure(offset, len);
        vote_errors(errors).into()
    }

    async fn read_first(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let len = bufs.len() as u64;
        let mut last = BlockError::errno_only(Errno::EIO);
        for member in self.members.list().iter().filter(|m| !m.is_stale()) {
            let result = match reach(io, member, offset + len) {
                Ok(child) => child.read(offset, bufs).await,
                Err(e) => Err(e),
            };
            match result {
                Ok(()) => return Ok(()),
                Err(e) => {
                    self.report_bad(QuorumOp::Read, member, &e, offset, len);
                    last = e;
                }
            }
        }
        Err(last)
    }

    async fn read_all(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let _claim = self.ranges.share(offset, offset + bufs.len() as u64).await;
        let members = self.members.list();
        let step = piece_len(members.len());
        for start in (0..bufs.len()).step_by(step) {
            let part = bufs.slice(start, step);
            self.read_piece(io, &members, offset + start as u64, &part).await?;
        }
        Ok(())
    }

    async fn read_piece(&self, io: &NodeIo, members: &List, offset: u64, bufs: &IoVecs) -> Result<()> {
        let len = bufs.len() as u64;
        let ask = |member: &Arc<Member>| -> ToChild<'_, IoVecs> {
            let child = reach(io, member, offset + len);
            Box::pin(async move {
                let buffer = IoVecs::alloc(len as usize, ALIGN)?;
                child?.read(offset, &buffer).await?;
                Ok(buffer)
            })
        };
        let results = join_all(members.iter().map(ask).collect()).await;
        let (mut voters, mut buffers, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        for (member, result) in members.iter().zip(results) {
            match result {
                Ok(buffer) => {
                    voters.push(member);
                    buffers.push(buffer);
                }
                Err(e) => {
                    self.report_bad(QuorumOp::Read, member, &e, offset, len);
                    errors.push(e.errno());
                }
            }
        }
        if voters.len() < self.threshold {
            return Err(self.failed(&errors, offset, len));
        }
        let Some(outcome) = vote(&buffers.iter().collect::<Vec<_>>()) else { return Err(Errno::EIO.into()) };
        let winner = buffers.get(outcome.winner).ok_or(Errno::EIO)?;
        if outcome.votes < self.threshold {
            if self.blkverify
                && let [a, b] = &buffers[..]
            {
                let at = a.first_difference(b).unwrap_or_default();
                log::error!(
                    "quorum '{}': read offset={offset} bytes={len} contents mismatch at offset {}",
                    self.name,
                    offset + at as u64,
                );
            }
            return Err(self.failed(&[], offset, len));
        }
        let losers: Vec<&Member> =
            outcome.losers.iter().filter_map(|i| voters.get(*i)).map(|m| &***m).collect();
        for member in &losers {
            self.events.quorum_report_bad(QuorumOp::Read, None, member.node.name(), offset, len);
        }
        // First what concerns our own memory: the reader's is not looked at again.
        bufs.copy_iov(winner);
        if self.rewrite && !losers.is_empty() {
            self.rewrite(io, &losers, offset, winner).await;
        }
        Ok(())
    }

    /// Gives children the content that won. The reader's claim keeps writers out; a failure changes nothing for the reader.
    async fn rewrite(&self, io: &NodeIo, losers: &[&Member], offset: u64, data: &IoVecs) {
        let write = |member: &&Member| -> ToChild<'_, ()> {
            let child = io.child(member.index);
            Box::pin(async move { child.write(offset, data, WriteFlags::UNCHANGED).await })
        };
        let results = join_all(losers.iter().map(write).collect()).await;
        for (member, result) in losers.iter().zip(results) {
            if let Err(e) = result {
                self.report_bad(QuorumOp::Write, member, &e, offset, data.len() as u64);
            }
        }
    }

    /// Sends a change to all children and counts. The caller has claimed the range.
    async fn change<'a>(
        &self,
        io: &'a NodeIo,
        (offset, len): (u64, u64),
        send: impl Fn(NodeIo) -> ToChild<'a, ()>,
    ) -> Result<()> {
        let members = self.members.list();
        let to_child = |member: &Arc<Member>| -> ToChild<'a, ()> {
            match reach(io, member, offset + len) {
                Ok(child) => send(child),
                Err(e) => Box::pin(std::future::ready(Err(e))),
            }
        };
        let results = join_all(members.iter().map(to_child).collect()).await;
        let (mut bad, mut errors) = (Vec::new(), Vec::new());
        for (member, result) in members.iter().zip(results) {
            if let Err(e) = result {
                self.report_bad(QuorumOp::Write, member, &e, offset, len);
                errors.push(e.errno());
                bad.push(member);
            }
        }
        let good = members.len() - bad.len();
        if good > 0 {
            bad.iter().for_each(|m| m.set_stale());
        }
        if good < self.threshold { Err(self.failed(&errors, offset, len)) } else { Ok(()) }
    }

    async fn write_all(&self, io: &NodeIo, offset: u64, bufs: &IoVecs, flags: WriteFlags) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + bufs.len() as u64).await;
        for start in (0..bufs.len()).step_by(MAX_PIECE) {
            let part = bufs.slice(start, MAX_PIECE);
            // One copy for all: what a guest changes meanwhile must not make them differ.
            let data = &IoVecs::alloc(part.len(), ALIGN)?;
            data.copy_iov(&part);
            let at = offset + start as u64;
            let send = |child: NodeIo| -> ToChild<'_, ()> {
                let data = data.clone();
                Box::pin(async move { child.write(at, &data, flags).await })
            };
            self.change(io, (at, part.len() as u64), send).await?;
        }
        Ok(())
    }

    async fn zero_all(&self, io: &NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + len).await;
        let send = |child: NodeIo| -> ToChild<'_, ()> {
            Box::pin(async move { child.write_zeroes(offset, len, flags).await })
        };
        self.change(io, (offset, len), send).await
    }

    async fn flush_all(&self, io: &NodeIo) -> Result<()> {
        let members = self.members.list();
        let send = |member: &Arc<Member>| -> ToChild<'_, ()> {
            let child = io.child(member.index);
            Box::pin(async move { child.flush().await })
        };
        let results = join_all(members.iter().map(send).collect()).await;
        let (mut bad, mut errors) = (Vec::new(), Vec::new());
        for (member, result) in members.iter().zip(results) {
            if let Err(e) = result {
                self.report_bad(QuorumOp::Flush, member, &e, 0, member.node.size());
                errors.push(e.errno());
                bad.push(member);
            }
        }
        let good = members.len() - bad.len();
        if good > 0 {
            bad.iter().for_each(|m| m.set_stale());
        }
        if good >= self.threshold { Ok(()) } else { Err(vote_errors(&errors).into()) }
    }

    /// Zeroes where all children say so, for as long as all do; data otherwise, for as long as any does.
    async fn status(&self, io: &NodeIo, offset: u64, len: u64) -> Result<BlockStatus> {
        let (mut zero, mut data) = (len, 0);
        for member in self.members.list().iter() {
            match io.child(member.index).status_above(None, offset, len).await {
                Ok(found) if found.status.flags.contains(StatusFlags::ZERO) => {
                    zero = zero.min(found.status.len);
                }
                Ok(found) => data = data.max(found.status.len),
                Err(e) => {
                    self.report_bad(QuorumOp::Read, member, &e, offset, len);
                    data = len;
                    break;
                }
            }
        }
        let (flags, len) = if data > 0 { (StatusFlags::DATA, data) } else { (StatusFlags::ZERO, zero) };
        Ok(BlockStatus { flags: flags | StatusFlags::ALLOCATED, len, location: None })
    }
}

impl Driver for QuorumNode {
    #[inline]
    fn map(&self, op: Op, _: u64, len: u64) -> Map<'_> {
        match op {
            // Not passed on, as in QEMU: what is left of the data could be something else in each child.
            Op::Discard => Map::Done { len },
            Op::Read | Op::Write | Op::WriteZeroes | Op::Flush => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.0.size
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        match self.0.pattern {
            ReadPattern::Quorum => Box::pin(self.0.read_all(io, offset, bufs)),
            ReadPattern::Fifo => Box::pin(self.0.read_first(io, offset, bufs)),
        }
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        let (node, at, bufs) = (Arc::clone(&self.0), io.clone(), bufs.clone());
        Box::pin(to_the_end(
            io.local().clone(),
            async move { node.write_all(&at, offset, &bufs, flags).await },
        ))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        let (node, at) = (Arc::clone(&self.0), io.clone());
        Box::pin(to_the_end(io.local().clone(), async move { node.zero_all(&at, offset, len, flags).await }))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(self.0.flush_all(io))
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(self.0.status(io, offset, len))
    }

    fn supports_fua(&self) -> bool {
        // The children see to it, each for itself.
        true
    }

    fn child_perm(&self, _: usize, _: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        let rewrites = if self.0.rewrite { Perm::WRITE } else { Perm::NONE };
        // Whoever else writes or resizes a child makes it differ from the others.
        (perm | rewrites, shared & (Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED))
    }

    fn child_changed(&self, child: usize, now: Option<(&str, &Arc<Node>)>) {
        self.0.members.changed(child, now);
    }

    fn overlay_place(&self) -> OverlayPlace {
        OverlayPlace::EachChild
    }

    fn add_child(&self) -> Result<(String, Roles)> {
        if self.0.blkverify {
            return Err(BlockError::invalid("Cannot add a child to a quorum in blkverify mode"));
        }
        let (name, children) = self.0.members.next();
        if children >= MAX_CHILDREN {
            return Err(too_many());
        }
        Ok((name, Roles::DATA))
    }

    fn remove_child(&self, _: usize) -> Result<()> {
        if self.0.members.list().len() <= self.0.threshold {
            return Err(BlockError::invalid(format!(
                "The number of children cannot be lower than the vote threshold {}",
                self.0.threshold
            )));
        }
        Ok(())
    }

    fn info(&self) -> DriverInfo {
        // What all copies take up together.
        let allocated = self.0.members.list().iter().map(|m| m.node.driver().info().allocated).sum();
        DriverInfo { supports_fua: true, allocated, ..DriverInfo::default() }
    }
}
