//! Reads: copied from memory, or brought in as whole blocks.
//!
//! Called by `io`. Misses of one block at the same time become one read: the first claims it, the others find it there.

use std::sync::atomic::Ordering::Relaxed;

use graph::{NodeIo, Result};
use host::IoVecs;

use super::block::{Mask, Place};
use super::table::Claim;
use super::{Cache, FILE, count};

/// Most bytes that are brought in at once.
const RUN: usize = 1 << 20;

impl Cache {
    pub(super) async fn read(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        if self.is_off() {
            return io.child(FILE).read(offset, bufs).await;
        }
        let mut done = 0;
        while done < bufs.len() {
            let rest = bufs.slice(done, bufs.len() - done);
            let at = offset + done as u64;
            done += match self.hit(at, &rest) {
                0 => self.miss(io, at, &rest).await?,
                n => n,
            };
        }
        Ok(())
    }

    /// Copies what one block in memory holds of a range; 0 if that is not the whole of the range in this block.
    fn hit(&self, at: u64, bufs: &IoVecs) -> usize {
        let (index, from) = self.locate(at);
        let to = self.block.min(from + bufs.len());
        let table = &mut *self.shard(index).table();
        let Some(block) = table.blocks.get_mut(&index) else { return 0 };
        let Place::Memory(memory) = &block.place else { return 0 };
        if !block.valid.contains(Mask::touched(from, to)) {
            return 0;
        }
        bufs.copy_from(0, memory.get(from..to).unwrap_or_default());
        block.used = true;
        count(&self.counters.hits, 1);
        to - from
    }

    /// How many bytes from `at` on surely are in no block of the cache, up to `len`; seen without a lock.
    pub(super) fn absent(&self, at: u64, len: u64) -> u64 {
        let (first, from) = self.locate(at);
        let mut known = 0;
        let mut index = first;
        while known < len && !self.filter.may_hold(index) {
            known += self.block as u64 - if index == first { from as u64 } else { 0 };
            index += 1;
        }
        known.min(len)
    }

    /// Reads the first part of a range that memory does not have; returns its length.
    async fn miss(&self, io: &NodeIo, at: u64, bufs: &IoVecs) -> Result<usize> {
        let (first, from) = self.locate(at);
        if self.bypass.load(Relaxed) {
            let n = self.absent(at, bufs.len() as u64) as usize;
            if n > 0 {
                count(&self.counters.bypassed, 1);
                io.child(FILE).read(at, &bufs.slice(0, n)).await?;
                return Ok(n);
            }
        }
        let claim = self.claim(first).await;
        // Somebody may have brought it in meanwhile.
        let n = self.hit(at, bufs);
        if n > 0 {
            return Ok(n);
        }
        self.recall(io, &claim).await?;
        let n = self.hit(at, bufs);
        if n > 0 {
            return Ok(n);
        }
        let mut claims = vec![claim];
        let end = at + bufs.len() as u64;
        while claims.len() < (RUN / self.block).max(1) {
            let next = first + claims.len() as u64;
            match (self.start(next) < end).then(|| self.claim_absent(next)).flatten() {
                Some(claim) => claims.push(claim),
                None => break,
            }
        }
        count(&self.counters.misses, claims.len() as u64);
        let start = self.start(first);
        let stop = self.start(first + claims.len() as u64).min(self.size().max(at + 1));
        let n = (stop.min(end) - at) as usize;
        let buffer = IoVecs::alloc((stop - start) as usize, 4096)?;
        let Ok(()) = io.child(FILE).read(start, &buffer).await else {
            // Only what was asked for may fail the request.
            drop(claims.split_off(1));
            let n = n.min(self.block - from);
            let wanted = bufs.slice(0, n);
            io.child(FILE).read(at, &wanted).await?;
            self.overlay(first, from, &wanted);
            return Ok(n);
        };
        bufs.slice(0, n).copy_iov(&buffer.slice(from, n));
        for (nth, claim) in claims.iter().enumerate() {
            let part = buffer.slice(nth * self.block, self.block);
            self.install(io, claim, &part).await;
        }
        // Sectors of the first block that only the cache holds.
        self.overlay(first, from, &bufs.slice(0, n));
        Ok(n)
    }

    /// Puts what a claimed block holds over bytes that were read from the file, which begin at `from` of the block.
    fn overlay(&self, index: u64, from: usize, bufs: &IoVecs) {
        let table = self.shard(index).table();
        let Some(block) = table.blocks.get(&index) else { return };
        let Place::Memory(memory) = &block.place else { return };
        let to = self.block.min(from + bufs.len());
        for (low, high) in block.valid.and(Mask::touched(from, to)).runs() {
            let (low, high) = (low.max(from), high.min(to));
            bufs.copy_from(low - from, memory.get(low..high).unwrap_or_default());
        }
    }

    /// Keeps what was read of a claimed block, where it holds nothing yet; `part` may end with the node.
    async fn install(&self, io: &NodeIo, claim: &Claim<'_>, part: &IoVecs) {
        let index = claim.index;
        let read = Mask::touched(0, part.len());
        let partly_there = {
            let table = &mut *self.shard(index).table();
            match table.blocks.get_mut(&index) {
                Some(block) => match &mut block.place {
                    Place::Memory(memory) => {
                        for (from, to) in read.minus(block.valid).runs() {
                            let to = to.min(part.len());
                            if let Some(target) = memory.get_mut(from..to) {
                                part.copy_to(from, target);
                            }
                        }
                        block.valid = block.valid.plus(read);
                        true
                    }
                    Place::Nowhere | Place::Swap(_) => false,
                },
                None => false,
            }
        };
        if partly_there {
            return;
        }
        let Some(mut memory) = self.frame(io, index).await else { return };
        let (body, tail) = memory.split_at_mut(part.len().min(self.block));
        part.copy_to(0, body);
        tail.fill(0);
        let table = &mut *self.shard(index).table();
        self.move_block(table, index, Place::Memory(memory));
        if let Some(block) = table.blocks.get_mut(&index) {
            block.valid = read;
        }
    }
}
