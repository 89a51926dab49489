//! Requests on a blkdebug node: judged by the rules, then the child's.
//!
//! Called by views and by the graph's asynchronous path. Never looks at data.

use std::sync::Arc;

use graph::{
    BlockStatus, BoxFut, DebugEvent, Driver, DriverInfo, Errno, Limits, Location, Map, Node, NodeIo, Op,
    Perm, Reopen, ReopenContext, Result, Roles, StatusFlags, Truncate, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use serde_json::Value;

use super::options::IoType;
use super::{Blkdebug, IMAGE, reopen};

impl Blkdebug {
    /// Fails the request if a rule says so.
    async fn judge(&self, io: &NodeIo, kind: IoType, offset: u64, len: u64) -> Result<()> {
        let Some(failure) = self.rules.check(kind, offset, len) else { return Ok(()) };
        if !failure.immediately {
            io.local().yield_now().await;
        }
        Err(failure.errno.into())
    }
}

impl Driver for Blkdebug {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        if self.rules.any() || self.size.grows(op, offset, len) {
            return Map::Drive;
        }
        Map::Child { child: IMAGE, offset, len }
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.judge(io, IoType::Read, offset, bufs.len() as u64).await?;
            io.child(IMAGE).read(offset, bufs).await
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
            let len = bufs.len() as u64;
            self.judge(io, IoType::Write, offset, len).await?;
            let child = io.child(IMAGE);
            child.write(offset, bufs, flags).await?;
            self.size.note(&child, offset.saturating_add(len));
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(async move {
            // The graph cuts at the granularity; what is left below it is what the fallback is tested with.
            if len < u64::from(self.limits.write_zeroes_alignment) {
                return Err(Errno::ENOTSUP.into());
            }
            self.judge(io, IoType::WriteZeroes, offset, len).await?;
            let child = io.child(IMAGE);
            child.write_zeroes(offset, len, flags).await?;
            self.size.note(&child, offset.saturating_add(len));
            Ok(())
        })
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if len < u64::from(self.limits.discard_alignment) {
                return Err(Errno::ENOTSUP.into());
            }
            self.judge(io, IoType::Discard, offset, len).await?;
            io.child(IMAGE).discard(offset, len).await
        })
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.judge(io, IoType::Flush, 0, 0).await?;
            io.child(IMAGE).flush().await
        })
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(async move {
            self.judge(io, IoType::BlockStatus, offset, len).await?;
            let below = io.child(IMAGE).block_status(offset, len).await?;
            let flags = (below.flags & (StatusFlags::DATA | StatusFlags::ZERO)) | StatusFlags::OFFSET_VALID;
            let location = Some(Location::Child { child: IMAGE, offset });
            Ok(BlockStatus { flags, len: below.len, location })
        })
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let child = io.child(IMAGE);
            let result = child.truncate(size, how).await;
            // Also after a failure: half of it may have happened.
            self.size.look(&child);
            result
        })
    }

    fn supports_fua(&self) -> bool {
        true
    }

    fn child_perm(&self, _: usize, _: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        (perm | self.take, shared - self.unshare)
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if index == IMAGE {
            self.size.told(child.map(|(_, node)| node));
        }
    }

    fn debug_event(&self, event: DebugEvent) {
        self.rules.pass(event);
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["image"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(async move { reopen::reopen(cx, own) })
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { supports_fua: true, ..DriverInfo::default() }
    }
}
