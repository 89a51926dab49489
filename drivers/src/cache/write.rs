//! Writes, zeroes, discards: into memory, or through it to the file.
//!
//! Called by `io`. Whatever goes to the file past dirty sectors holds their blocks alone meanwhile, so that no older
//! content overtakes it.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use graph::{NodeIo, Result, WriteFlags, ZeroFlags};
use host::IoVecs;

use super::block::{Hold, Mask, Place, SECTOR};
use super::table::Claim;
use super::{Cache, FILE, count};

/// Most blocks a request holds at the same time.
const CLAIMS: u64 = 256;

/// What happens to a range in the file.
#[derive(Clone, Copy)]
enum Change<'a> {
    Write(&'a IoVecs, WriteFlags),
    Zero(ZeroFlags),
    Discard,
}

impl Cache {
    pub(super) async fn write(
        &self,
        io: &NodeIo,
        offset: u64,
        bufs: &IoVecs,
        flags: WriteFlags,
    ) -> Result<()> {
        let len = bufs.len() as u64;
        if self.is_off() {
            io.child(FILE).write(offset, bufs, flags).await?;
            self.note_growth(io, offset + len);
            return Ok(());
        }
        if !self.writes_back() || !flags.is_empty() || offset + len > self.size() {
            return self.through(io, offset, len, Change::Write(bufs, flags)).await;
        }
        let mut done = 0;
        while done < bufs.len() {
            let at = offset + done as u64;
            let (index, from) = self.locate(at);
            let piece = bufs.slice(done, (self.block - from).min(bufs.len() - done));
            if !self.put(index, from, &piece) {
                self.make_and_put(io, at, &piece).await?;
            }
            done += piece.len();
        }
        Ok(())
    }

    pub(super) async fn write_zeroes(
        &self,
        io: &NodeIo,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        if self.is_off() {
            io.child(FILE).write_zeroes(offset, len, flags).await?;
            self.note_growth(io, offset + len);
            return Ok(());
        }
        self.through(io, offset, len, Change::Zero(flags)).await
    }

    pub(super) async fn discard(&self, io: &NodeIo, offset: u64, len: u64) -> Result<()> {
        if self.is_off() {
            return io.child(FILE).discard(offset, len).await;
        }
        self.through(io, offset, len, Change::Discard).await
    }

    /// After something was written through this node.
    fn note_growth(&self, io: &NodeIo, end: u64) {
        if end > self.file_size.load(Acquire) {
            // Pairs with the Acquire of `Cache::size`: who sees the size may ask the file for what is there.
            self.file_size.fetch_max(io.child(FILE).size(), AcqRel);
        }
    }

    /// Writes into a block in memory; false where that takes more.
    fn put(&self, index: u64, from: usize, piece: &IoVecs) -> bool {
        let table = &mut *self.shard(index).table();
        match table.blocks.get(&index) {
            Some(block) if block.hold != Hold::Alone => {}
            _ => return false,
        }
        self.put_locked(table, index, from, piece)
    }

    /// The same; who claims the block is seen to.
    fn put_locked(&self, table: &mut super::table::Table, index: u64, from: usize, piece: &IoVecs) -> bool {
        let to = from + piece.len();
        let touched = Mask::touched(from, to);
        let Some(block) = table.blocks.get_mut(&index) else { return false };
        let Place::Memory(memory) = &mut block.place else { return false };
        if !block.valid.contains(touched.minus(Mask::inside(from, to))) {
            return false;
        }
        let Some(target) = memory.get_mut(from..to) else { return false };
        piece.copy_to(0, target);
        block.valid = block.valid.plus(touched);
        block.dirty = block.dirty.plus(touched);
        block.used = true;
        self.settle(table, index);
        true
    }

    /// Writes into a block that is not in memory, or not with the sectors around; to the file where there is no room.
    async fn make_and_put(&self, io: &NodeIo, at: u64, piece: &IoVecs) -> Result<()> {
        let (index, from) = self.locate(at);
        let to = from + piece.len();
        let claim = self.claim(index).await;
        self.recall(io, &claim).await?;
        let there = {
            let table = self.shard(index).table();
            table.blocks.get(&index).is_some_and(|b| matches!(b.place, Place::Memory(_)))
        };
        if !there {
            let Some(memory) = self.frame(io, index).await else {
                count(&self.counters.bypassed, 1);
                return io.child(FILE).write(at, piece, WriteFlags::empty()).await;
            };
            let table = &mut *self.shard(index).table();
            // Nothing is valid of what the memory held for another block.
            self.move_block(table, index, Place::Memory(memory));
        }
        self.complete(io, index, Mask::touched(from, to).minus(Mask::inside(from, to))).await?;
        let table = &mut *self.shard(index).table();
        self.put_locked(table, index, from, piece);
        Ok(())
    }

    /// Reads these sectors of a claimed block in memory, unless they are valid.
    async fn complete(&self, io: &NodeIo, index: u64, sectors: Mask) -> Result<()> {
        let missing = {
            let table = self.shard(index).table();
            table.blocks.get(&index).map_or(sectors, |b| sectors.minus(b.valid))
        };
        for (from, to) in missing.runs() {
            let buffer = IoVecs::alloc(to - from, SECTOR)?;
            io.child(FILE).read(self.start(index) + from as u64, &buffer).await?;
            let table = &mut *self.shard(index).table();
            let Some(block) = table.blocks.get_mut(&index) else { continue };
            let Place::Memory(memory) = &mut block.place else { continue };
            if let Some(target) = memory.get_mut(from..to) {
                buffer.copy_to(0, target);
                block.valid = block.valid.plus(Mask::touched(from, to));
            }
        }
        Ok(())
    }

    /// Changes a range in the file and in the blocks that are there, some hundred blocks at a time.
    async fn through(&self, io: &NodeIo, offset: u64, len: u64, change: Change<'_>) -> Result<()> {
        let span = CLAIMS * self.block as u64;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let stop = end.min((at - at % span) + span);
            self.through_piece(io, (at, stop), offset, change).await?;
            at = stop;
        }
        Ok(())
    }

    async fn through_piece(
        &self,
        io: &NodeIo,
        (at, stop): (u64, u64),
        offset: u64,
        change: Change<'_>,
    ) -> Result<()> {
        let (first, last) = (self.locate(at).0, self.locate(stop - 1).0);
        let mut claims = Vec::with_capacity((last - first + 1) as usize);
        // In ascending order: nobody who holds a block waits for a lower one.
        for index in first..=last {
            let claim = self.claim(index).await;
            self.recall(io, &claim).await?;
            claims.push(claim);
        }
        let (file, len) = (io.child(FILE), stop - at);
        let data = match change {
            Change::Write(bufs, _) => Some(bufs.slice((at - offset) as usize, len as usize)),
            Change::Zero(_) | Change::Discard => None,
        };
        let result = match (change, &data) {
            (Change::Write(_, flags), Some(data)) => file.write(at, data, flags).await,
            (Change::Zero(flags), _) => file.write_zeroes(at, len, flags).await,
            _ => file.discard(at, len).await,
        };
        self.note_growth(io, stop);
        for claim in &claims {
            let start = self.start(claim.index);
            let (low, high) = (at.max(start), stop.min(start + self.block as u64));
            let range = ((low - start) as usize, (high - start) as usize);
            let part = data.as_ref().map(|d| d.slice((low - at) as usize, (high - low) as usize));
            if result.is_err() {
                self.doubt(claim, range);
            } else {
                self.follow(io, claim, range, change, part).await;
            }
        }
        result
    }

    /// A change of the file failed: what it holds there may be old or new. What only the cache holds is not concerned.
    fn doubt(&self, claim: &Claim<'_>, (from, to): (usize, usize)) {
        let table = &mut *self.shard(claim.index).table();
        if let Some(block) = table.blocks.get_mut(&claim.index) {
            block.valid = block.valid.minus(Mask::touched(from, to).minus(block.unsaved()));
        }
    }

    /// Has a claimed block follow what has happened in the file.
    async fn follow(
        &self,
        io: &NodeIo,
        claim: &Claim<'_>,
        (from, to): (usize, usize),
        change: Change<'_>,
        part: Option<IoVecs>,
    ) {
        let index = claim.index;
        let inside = Mask::inside(from, to);
        let there = {
            let table = &mut *self.shard(index).table();
            let found = table.blocks.get_mut(&index);
            let there = match found {
                Some(block) => match (&mut block.place, change) {
                    (Place::Memory(_), Change::Discard) => {
                        // Of a sector in part: the rest of it may be nowhere else.
                        let kept = Mask::touched(from, to).minus(inside).and(block.unsaved());
                        block.valid = block.valid.minus(Mask::touched(from, to)).plus(kept);
                        block.dirty = block.dirty.minus(inside);
                        true
                    }
                    (Place::Memory(memory), _) => {
                        if let Some(target) = memory.get_mut(from..to) {
                            match &part {
                                Some(part) => part.copy_to(0, target),
                                None => target.fill(0),
                            }
                        }
                        // Sectors in part: as valid and as dirty as they were.
                        block.valid = block.valid.plus(inside);
                        block.dirty = block.dirty.minus(inside);
                        true
                    }
                    (Place::Nowhere | Place::Swap(_), _) => false,
                },
                None => false,
            };
            self.settle(table, index);
            there
        };
        let Some(part) = part.filter(|_| !there && !inside.is_empty()) else { return };
        let Some(mut memory) = self.frame(io, index).await else { return };
        if let Some(target) = memory.get_mut(from..to) {
            part.copy_to(0, target);
        }
        let table = &mut *self.shard(index).table();
        self.move_block(table, index, Place::Memory(memory));
        if let Some(block) = table.blocks.get_mut(&index) {
            block.valid = inside;
        }
    }
}
