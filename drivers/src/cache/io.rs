//! The driver's face to the graph: where ranges live, what users mean for the children, what there is to tell.
//!
//! Called by views and by the graph's asynchronous path; the work is in `read`, `write` and `back`.

use std::sync::Arc;
use std::sync::atomic::{Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use graph::{
    BlockStatus, BoxFut, Driver, DriverInfo, Limits, Location, Map, Node, NodeIo, Op, Perm, Reopen,
    ReopenContext, Result, Roles, StatusFlags, Truncate, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use serde_json::{Value, json};

use super::block::{Mask, Place};
use super::options::CacheMode;
use super::table::lock;
use super::{Cache, CacheNode, FILE, SWAP};

/// Blocks that are looked at for one answer about a range.
const LOOK: u64 = 1024;

impl Cache {
    /// How far `at` lies in sectors only the cache holds (`true`), or in others (`false`): the answer, and for how many
    /// bytes it holds, at most `len`.
    fn unsaved_run(&self, at: u64, len: u64) -> (bool, u64) {
        let end = at + len;
        let mut here = at;
        let mut answer = None;
        for _ in 0..LOOK {
            if here >= end {
                break;
            }
            let (index, from) = self.locate(here);
            let to = self.block.min(from + (end - here).min(self.block as u64) as usize);
            let unsaved = {
                let table = self.shard(index).table();
                table.blocks.get(&index).map(|b| b.unsaved().and(Mask::touched(from, to))).unwrap_or_default()
            };
            let first = unsaved.runs().next();
            let begins = first.is_some_and(|(low, _)| low <= from);
            if *answer.get_or_insert(begins) != begins {
                break;
            }
            // The end of the run that begins here, whichever sort it is.
            let stop = match first {
                Some((_, high)) if begins => high.min(to),
                Some((low, _)) => low,
                None => to,
            };
            here += (stop - from) as u64;
            if stop < to {
                break;
            }
        }
        (answer.unwrap_or(false), here - at)
    }

    /// Whether there is anything in it.
    fn holds_any(&self) -> bool {
        self.resident.load(Relaxed) > 0 || self.slots.used() > 0
    }

    /// The node is `size` bytes long now. Drained.
    pub(super) fn set_size(&self, size: u64) {
        // Pairs with the Acquire of `Cache::size`.
        let old = self.file_size.swap(size, Release);
        if size == old {
            return;
        }
        let edge = size.min(old);
        let (index, from) = self.locate(edge);
        // What lies behind the edge is new or gone; of the sector it cuts only the front is anyone's.
        self.forget(if from == 0 { index } else { index + 1 }, true);
        if from == 0 {
            return;
        }
        let table = &mut *self.shard(index).table();
        let Some(block) = table.blocks.get_mut(&index) else { return };
        let behind = Mask::touched(from.next_multiple_of(super::block::SECTOR), self.block);
        let cut = Mask::touched(from, from + 1).minus(Mask::inside(from, self.block));
        block.valid = block.valid.minus(behind);
        block.dirty = block.dirty.minus(behind);
        if block.dirty.contains(cut) {
            let to = from.next_multiple_of(super::block::SECTOR);
            if let Place::Memory(memory) = &mut block.place
                && let Some(tail) = memory.get_mut(from..to)
            {
                tail.fill(0);
            }
        } else {
            block.valid = block.valid.minus(cut);
        }
        self.settle(table, index);
    }

    async fn truncate(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        let child = io.child(FILE);
        // A block in the swap node has no front that could be kept by itself.
        {
            let claim = self.claim(self.locate(size.min(self.size())).0).await;
            self.recall(io, &claim).await?;
        }
        let result = child.truncate(size, how).await;
        // Also after a failure: half of it may have happened.
        self.set_size(child.size());
        result
    }

    fn stats(&self) -> Value {
        let c = &self.counters;
        let settings = *lock(&self.settings);
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
        json!({
            "driver": "cache",
            "mode": settings.mode,
            "size": settings.size,
            "block-size": settings.block,
            "resident-blocks": self.resident.load(Relaxed),
            "swapped-blocks": self.slots.used(),
            "dirty-blocks": self.unsaved.load(Relaxed),
            "hits": get(&c.hits),
            "misses": get(&c.misses),
            "bypassed": get(&c.bypassed),
            "evictions": get(&c.evictions),
            "written-back-bytes": get(&c.written_back),
            "swapped-out": get(&c.swapped_out),
            "swapped-in": get(&c.swapped_in),
            "errors": get(&c.errors),
        })
    }
}

impl Driver for CacheNode {
    #[inline]
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_> {
        let cache = &*self.cache;
        let child = Map::Child { child: FILE, offset, len };
        match op {
            // A write that has been acknowledged is counted by now.
            Op::Flush if cache.nothing_unsaved() => child,
            _ if op != Op::Flush && cache.is_off() => {
                // Growing changes our size as well.
                if op.modifies() && offset + len > cache.size() { Map::Drive } else { child }
            }
            Op::Read if cache.bypass.load(Relaxed) => match cache.absent(offset, len) {
                0 => Map::Drive,
                n => Map::Child { child: FILE, offset, len: n },
            },
            _ => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.cache.file_size.load(Acquire)
    }

    fn limits(&self) -> Limits {
        // The child aligns for itself, and the blocks are our own.
        Limits::default()
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(self.cache.read(io, offset, bufs))
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(self.cache.write(io, offset, bufs, flags))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        Box::pin(self.cache.write_zeroes(io, offset, len, flags))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(self.cache.discard(io, offset, len))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.cache.write_back_all(io).await?;
            io.child(FILE).flush().await
        })
    }

    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(async move {
            let (unsaved, len) = match self.cache.nothing_unsaved() {
                true => (false, len),
                false => self.cache.unsaved_run(offset, len),
            };
            if unsaved {
                let flags = StatusFlags::DATA | StatusFlags::ALLOCATED;
                return Ok(BlockStatus { flags, len, location: None });
            }
            let below = io.child(FILE).block_status(offset, len).await?;
            let flags =
                (below.flags - StatusFlags::EOF - StatusFlags::COMPRESSED) | StatusFlags::OFFSET_VALID;
            let location = Some(Location::Child { child: FILE, offset });
            Ok(BlockStatus { flags, len: below.len, location })
        })
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.cache.truncate(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        // Such a write goes to the child, which sees to it by itself or by a flush.
        true
    }

    fn child_perm(&self, child: usize, _: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        let cache = &*self.cache;
        if child == SWAP {
            return (Perm::CONSISTENT_READ | Perm::WRITE, Perm::NONE);
        }
        let planned = *lock(&cache.planned);
        let (settings, writable) =
            planned.unwrap_or_else(|| (*lock(&cache.settings), cache.writable.load(Relaxed)));
        // Without users there are no requests, so that what is held does not change while somebody asks. A node that is
        // made to be put between others must not be in their way before.
        if settings.size == 0 || (perm.is_empty() && !cache.holds_any()) {
            return (perm, shared);
        }
        let (mut used, mut below) = (perm | Perm::CONSISTENT_READ, shared);
        // What others write there, what is held here would contradict.
        below.remove(Perm::WRITE | Perm::RESIZE);
        let unsaved = !cache.nothing_unsaved();
        if unsaved || (settings.mode == CacheMode::Writeback && writable && perm.writes()) {
            used |= Perm::WRITE;
            below.remove(Perm::CONSISTENT_READ);
        }
        (used, below)
    }

    fn child_changed(&self, child: usize, now: Option<(&str, &Arc<Node>)>) {
        if child != FILE {
            return;
        }
        let cache = &*self.cache;
        let id = now.map(|(_, node)| node.id());
        let before = std::mem::replace(&mut *lock(&cache.file_id), id);
        if before.is_some() && id.is_some() && before != id {
            // The same content by another way, or so they say: what can be asked for again is.
            cache.forget(0, false);
        }
        cache.set_size(now.map_or(0, |(_, node)| node.size()));
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["file"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(super::reopen::prepare(&self.cache, cx, own))
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { driver_stats: Some(self.cache.stats()), supports_fua: true, ..DriverInfo::default() }
    }

    fn close<'a>(&'a self, _: &'a NodeIo) -> BoxFut<'a, ()> {
        // The graph has flushed before; what is still dirty could not be written.
        Box::pin(async move {
            let lost = self.cache.unsaved.load(Relaxed);
            if lost > 0 {
                log::error!(
                    "a cache is closed with {lost} blocks that could not be written back: they are lost"
                );
            }
            self.cache.forget(0, true);
            Ok(())
        })
    }
}
