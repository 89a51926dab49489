//! Requests on a blkverify node: to both children at the same time, then compared.
//!
//! Called by views and by the graph's asynchronous path. Nothing that matters is mapped: it is here to see the data.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverInfo, Errno, Limits, Location, Map, Node, NodeIo, Op,
    Perm, Result, Roles, StatusFlags, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;
use host::exec::join_all;

use super::{Blkverify, BlkverifyNode, PIECE, RAW, TEST};
use crate::to_the_end::to_the_end;

/// Alignment of buffers, bytes: enough for direct I/O on every device.
const ALIGN: usize = 4096;

type ToChild<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// Both results, those of `raw` and `test`.
async fn both<'a, T>(raw: ToChild<'a, T>, test: ToChild<'a, T>) -> (Result<T>, Result<T>) {
    let mut results = join_all(vec![raw, test]).await.into_iter();
    let mut next = || results.next().unwrap_or_else(|| Err(Errno::EIO.into()));
    (next(), next())
}

/// Errors as QEMU prints return values: 0, or the number below it.
fn value<T>(result: &Result<T>) -> i32 {
    result.as_ref().err().map_or(0, |e| -e.errno().raw())
}

impl Blkverify {
    /// The children differ: the log says how, the request fails.
    fn mismatch(&self, what: &str, offset: u64, len: u64, words: &str) -> BlockError {
        let name = &self.name;
        log::error!("blkverify '{name}': {what} offset={offset} bytes={len} {words}");
        BlockError::new(Errno::EIO, format!("blkverify: {what} offset={offset} bytes={len} {words}"))
    }

    /// What both answered, if it is the same.
    pub(super) fn agreed<T>(
        &self,
        what: &str,
        (offset, len): (u64, u64),
        (raw, test): (Result<T>, Result<T>),
    ) -> Result<(T, T)> {
        let (a, b) = (value(&raw), value(&test));
        if a != b {
            let words = format!("return value mismatch {a} != {b}");
            return Err(self.mismatch(what, offset, len, &words));
        }
        Ok((raw?, test?))
    }

    async fn read_both(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let _claim = self.ranges.share(offset, offset + bufs.len() as u64).await;
        for start in (0..bufs.len()).step_by(PIECE) {
            let part = bufs.slice(start, PIECE);
            let (at, len) = (offset + start as u64, part.len() as u64);
            let read = |child: NodeIo| -> ToChild<'_, IoVecs> {
                Box::pin(async move {
                    let buffer = IoVecs::alloc(len as usize, ALIGN)?;
                    child.read(at, &buffer).await?;
                    Ok(buffer)
                })
            };
            let answers = both(read(io.child(RAW)), read(io.child(TEST))).await;
            let (raw, test) = self.agreed("read", (at, len), answers)?;
            if let Some(first) = raw.first_difference(&test) {
                let words = format!("contents mismatch at offset {}", at + first as u64);
                return Err(self.mismatch("read", at, len, &words));
            }
            part.copy_iov(&test);
        }
        Ok(())
    }

    /// How much of a range `raw` has room for: its end is not moved by writes through here.
    fn in_raw(io: &NodeIo, offset: u64, len: u64) -> u64 {
        io.child(RAW).size().saturating_sub(offset).min(len)
    }

    async fn write_both(&self, io: &NodeIo, offset: u64, bufs: &IoVecs, flags: WriteFlags) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + bufs.len() as u64).await;
        for start in (0..bufs.len()).step_by(PIECE) {
            let part = bufs.slice(start, PIECE);
            let (at, len) = (offset + start as u64, part.len() as u64);
            let data = IoVecs::alloc(part.len(), ALIGN)?;
            data.copy_iov(&part);
            let write = |child: NodeIo, data: IoVecs| -> ToChild<'_, ()> {
                Box::pin(async move { child.write(at, &data, flags).await })
            };
            let for_raw = data.slice(0, Self::in_raw(io, at, len) as usize);
            let answers = both(write(io.child(RAW), for_raw), write(io.child(TEST), data)).await;
            self.agreed("write", (at, len), answers)?;
            self.size.note(&io.child(TEST), at + len);
        }
        Ok(())
    }

    async fn zero_both(&self, io: &NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let _claim = self.ranges.take(offset, offset + len).await;
        let zero = |child: NodeIo, len: u64| -> ToChild<'_, ()> {
            Box::pin(async move { child.write_zeroes(offset, len, flags).await })
        };
        let in_raw = Self::in_raw(io, offset, len);
        let answers = both(zero(io.child(RAW), in_raw), zero(io.child(TEST), len)).await;
        self.agreed("write zeroes", (offset, len), answers)?;
        self.size.note(&io.child(TEST), offset + len);
        Ok(())
    }

    async fn flush_both(&self, io: &NodeIo) -> Result<()> {
        let flush = |child: NodeIo| -> ToChild<'_, ()> { Box::pin(async move { child.flush().await }) };
        let (raw, test) = both(flush(io.child(RAW)), flush(io.child(TEST))).await;
        // Not compared: what a flush does to the disk is no part of what is tested.
        test.and(raw)
    }

    async fn resize_both(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        let result = io.child(TEST).truncate(size, how).await;
        self.size.look(&io.child(TEST));
        result?;
        io.child(RAW).truncate(size, how).await
    }
}

impl Driver for BlkverifyNode {
    #[inline]
    fn map(&self, op: Op, _: u64, len: u64) -> Map<'_> {
        match op {
            // Not passed on, as in QEMU: what is left of the data may differ.
            Op::Discard => Map::Done { len },
            Op::Read | Op::Write | Op::WriteZeroes | Op::Flush => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.0.size.get()
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(self.0.read_both(io, offset, bufs))
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
            async move { node.write_both(&at, offset, &bufs, flags).await },
        ))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        let (node, at) = (Arc::clone(&self.0), io.clone());
        Box::pin(to_the_end(io.local().clone(), async move { node.zero_both(&at, offset, len, flags).await }))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(self.0.flush_both(io))
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(async move {
            let below = io.child(RAW).block_status(offset, len).await?;
            let flags = (below.flags & (StatusFlags::DATA | StatusFlags::ZERO)) | StatusFlags::OFFSET_VALID;
            let location = Some(Location::Child { child: RAW, offset });
            Ok(BlockStatus { flags, len: below.len, location })
        })
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.0.resize_both(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        true
    }

    fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        default_child_perm(role, perm, shared, !self.0.read_only)
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if index == TEST {
            self.0.size.told(child.map(|(_, node)| node));
        }
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { supports_fua: true, ..DriverInfo::default() }
    }
}
