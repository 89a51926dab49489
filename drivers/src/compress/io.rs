//! Requests on a compress node: writes go to the child a cluster at a time, compressed; everything else is the child's.
//!
//! Called by views and by the graph's asynchronous path, which makes whole clusters of smaller writes.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverInfo, Errno, Limits, Map, Node, NodeIo, Op, Perm, Result,
    Roles, Truncate, WriteFlags, ZeroFlags, default_child_perm,
};
use host::IoVecs;

use super::Compress;
use crate::filter::{self, FILE};

/// Most clusters of one request that are compressed at a time, as QEMU has it.
const MAX_AT_ONCE: usize = 8;

type Piece<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// Waits until at most `most` pieces are left; the first failure is kept.
async fn run_down(pieces: &mut Vec<Piece<'_>>, most: usize, failed: &mut Option<BlockError>) {
    poll_fn(|cx| {
        pieces.retain_mut(|piece| match piece.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(result) => {
                if let Err(e) = result {
                    failed.get_or_insert(e);
                }
                false
            }
        });
        if pieces.len() <= most { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

impl Compress {
    fn cluster(&self) -> u64 {
        // Without a child nothing is written.
        u64::from(self.child.cluster_size().unwrap_or(512))
    }

    /// What of a write is inside the child: the last cluster may reach past its end, filled up with zeroes.
    fn inside(child: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<IoVecs> {
        let len = bufs.len() as u64;
        let room = child.size().saturating_sub(offset).min(len) as usize;
        if room < bufs.len() && !bufs.slice(room, bufs.len() - room).is_zero() {
            // A compressed write makes nothing longer.
            return Err(Errno::EINVAL.into());
        }
        Ok(bufs.slice(0, room))
    }

    async fn write_clusters(&self, io: &NodeIo, offset: u64, bufs: &IoVecs, flags: WriteFlags) -> Result<()> {
        let child = &io.child(FILE);
        let bufs = Self::inside(child, offset, bufs)?;
        let cluster = self.cluster();
        let flags = flags | WriteFlags::COMPRESSED;
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        let mut failed = None;
        let mut done = 0;
        while done < bufs.len() && failed.is_none() {
            let at = offset + done as u64;
            let len = (bufs.len() - done).min((cluster - at % cluster) as usize);
            let part = bufs.slice(done, len);
            pieces.push(Box::pin(async move { child.write(at, &part, flags).await }));
            run_down(&mut pieces, MAX_AT_ONCE - 1, &mut failed).await;
            done += len;
        }
        // Also after a failure: what is under way must not be left behind.
        run_down(&mut pieces, 0, &mut failed).await;
        failed.map_or(Ok(()), Err)
    }
}

impl Driver for Compress {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        match op {
            Op::Write => Map::Drive,
            _ => self.child.map(op, offset, len),
        }
    }

    fn size(&self) -> u64 {
        self.child.size()
    }

    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.cluster()).unwrap_or(1);
        // Whole clusters at a time, and no more than a request of the graph's own.
        Limits { request_alignment: cluster, ..Limits::default() }
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
        Box::pin(self.write_clusters(io, offset, bufs, flags))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(self.child.write_zeroes(io, offset, len, flags))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).discard(offset, len).await })
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

    fn info(&self) -> DriverInfo {
        self.child.info()
    }
}
