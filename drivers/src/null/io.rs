//! Requests on a null node: answered by `map` at once, or after the configured time.
//!
//! Called by views and by the graph's asynchronous path. Holds no state.

use graph::{
    BlockStatus, BoxFut, Driver, DriverInfo, Limits, Map, NodeIo, Op, Perm, Reopen, ReopenContext, Roles,
    StatusFlags, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use serde_json::Value;

use super::Null;

impl Null {
    /// Takes as long as the options say.
    fn wait<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if self.latency_ns != 0 {
                io.local().sleep(self.latency_ns).await;
            }
            Ok(())
        })
    }
}

impl Driver for Null {
    #[inline]
    fn map(&self, op: Op, _offset: u64, len: u64) -> Map<'_> {
        match op {
            _ if self.latency_ns != 0 => Map::Drive,
            Op::Read if self.read_zeroes => Map::Zero { len },
            _ => Map::Done { len },
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, _offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.wait(io).await?;
            if self.read_zeroes {
                bufs.fill(0);
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, io: &'a NodeIo, _: u64, _: &'a IoVecs, _: WriteFlags) -> BoxFut<'a, ()> {
        self.wait(io)
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, _: u64, _: u64, _: ZeroFlags) -> BoxFut<'a, ()> {
        self.wait(io)
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, _: u64, _: u64) -> BoxFut<'a, ()> {
        self.wait(io)
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        self.wait(io)
    }

    fn block_status<'a>(&'a self, _: &'a NodeIo, _offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        let content = if self.read_zeroes { StatusFlags::ZERO } else { StatusFlags::DATA };
        let flags = content | StatusFlags::ALLOCATED;
        Box::pin(std::future::ready(Ok(BlockStatus { flags, len, location: None })))
    }

    fn supports_fua(&self) -> bool {
        // There is nothing that could be less durable than it is.
        true
    }

    fn child_perm(&self, _child: usize, _role: Roles, _perm: Perm, _shared: Perm) -> (Perm, Perm) {
        // No children, so nothing is ever asked of one.
        (Perm::NONE, Perm::ALL)
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(super::reopen::reopen(cx, own))
    }

    fn info(&self) -> DriverInfo {
        DriverInfo {
            filename: self.filename.clone(),
            allocated: Some(0),
            supports_fua: true,
            ..DriverInfo::default()
        }
    }
}
