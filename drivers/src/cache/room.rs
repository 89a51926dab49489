//! Room for one more block: memory that is free, or of a block that goes; and the slots of the swap node.
//!
//! Called by requests with blocks of their own in hand; so whatever is claimed here is claimed without waiting. Must not be
//! called with a shard locked.

use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Mutex;

use graph::{NodeIo, Result};
use host::IoVecs;

use super::block::{Hold, Place};
use super::table::{Claim, Table, lock};
use super::{Cache, FILE, SWAP, count};

/// How often room is looked for before a request does without: each time one block or a run of them has been written.
const TRIES: usize = 8;
/// Swapped blocks that are looked at to find a clean one.
const LOOK: usize = 16;

#[derive(Default)]
struct State {
    free: Vec<u32>,
    /// Slots from here on have never been used.
    next: u32,
    limit: u32,
}

/// The slots of the swap node: one block each.
#[derive(Default)]
pub(super) struct Slots {
    state: Mutex<State>,
}

impl Slots {
    /// All are free, `limit` in number.
    pub(super) fn set_limit(&self, limit: u32) {
        *lock(&self.state) = State { free: Vec::new(), next: 0, limit };
    }

    fn take(&self) -> Option<u32> {
        let state = &mut *lock(&self.state);
        state.free.pop().or_else(|| {
            let slot = state.next;
            (slot < state.limit).then(|| {
                state.next += 1;
                slot
            })
        })
    }

    pub(super) fn give_back(&self, slot: u32) {
        lock(&self.state).free.push(slot);
    }

    /// Slots that hold a block.
    pub(super) fn used(&self) -> usize {
        let state = lock(&self.state);
        state.next as usize - state.free.len()
    }

    fn any(&self) -> bool {
        lock(&self.state).limit > 0
    }
}

/// Memory for a block; `None` where there is no more.
fn allocate(len: usize) -> Option<Box<[u8]>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).ok()?;
    memory.resize(len, 0);
    Some(memory.into_boxed_slice())
}

/// What to do about a full shard.
enum Plan<'a> {
    Take(Box<[u8]>),
    /// The block has to be moved or written first; alone for moving.
    Work(Claim<'a>, Hold),
    Nothing,
}

impl Table {
    /// The next block to go: in memory, free, not used since the hand last passed. It is off the clock then.
    fn candidate(&mut self) -> Option<u64> {
        for _ in 0..self.clock.len().saturating_mul(2) {
            let index = self.clock.pop_front()?;
            match self.blocks.get_mut(&index) {
                Some(block) if !matches!(block.place, Place::Memory(_)) => {}
                Some(block) if block.hold != Hold::Free => self.clock.push_back(index),
                Some(block) if block.used => {
                    block.used = false;
                    self.clock.push_back(index);
                }
                Some(_) => return Some(index),
                None => {}
            }
        }
        None
    }

    /// A clean block in the swap node that may go.
    fn clean_swapped(&mut self) -> Option<u64> {
        for _ in 0..LOOK.min(self.swapped.len()) {
            let after = self.swapped.range((Excluded(self.swap_hand), Unbounded)).next();
            let index = *after.or_else(|| self.swapped.iter().next())?;
            self.swap_hand = index;
            let block = self.blocks.get(&index)?;
            if block.hold == Hold::Free && block.unsaved().is_empty() {
                return Some(index);
            }
        }
        None
    }
}

impl Cache {
    /// Memory for one more block in the shard of `index`, counted in its `frames`; `None`: do without.
    pub(super) async fn frame(&self, io: &NodeIo, index: u64) -> Option<Box<[u8]>> {
        for _ in 0..TRIES {
            match self.plan(index) {
                Plan::Take(memory) => return Some(memory),
                Plan::Nothing => return None,
                Plan::Work(claim, Hold::Alone) => self.swap_out(io, claim).await,
                Plan::Work(claim, _) => {
                    let victim = claim.index;
                    if self.write_back(io, claim).await.is_err() {
                        // It stays dirty; the next try takes another one.
                        let table = &mut *self.shard(index).table();
                        if table.clock.front() == Some(&victim) {
                            table.clock.rotate_left(1);
                        }
                    }
                }
            }
        }
        None
    }

    fn plan(&self, index: u64) -> Plan<'_> {
        let table = &mut *self.shard(index).table();
        if table.frames < table.limit {
            let Some(memory) = table.spare.pop().or_else(|| allocate(self.block)) else {
                return Plan::Nothing;
            };
            table.frames += 1;
            return Plan::Take(memory);
        }
        let Some(victim) = table.candidate() else { return Plan::Nothing };
        let dirty = table.blocks.get(&victim).is_some_and(|b| !b.unsaved().is_empty());
        let swap = self.slots.any();
        if !dirty && !swap {
            let memory = self.move_block(table, victim, Place::Nowhere);
            table.blocks.remove(&victim);
            count(&self.counters.evictions, 1);
            return memory.map_or(Plan::Nothing, Plan::Take);
        }
        let hold = if swap { Hold::Alone } else { Hold::Shared };
        match self.claim_if(table, victim, hold, |_| true) {
            Some(mut claim) => {
                claim.off_clock = true;
                Plan::Work(claim, hold)
            }
            None => Plan::Nothing,
        }
    }

    /// A slot of the swap node, in place of a clean block of this shard if need be.
    fn slot(&self, index: u64) -> Option<u32> {
        if let Some(slot) = self.slots.take() {
            return Some(slot);
        }
        {
            let table = &mut *self.shard(index).table();
            let gone = table.clean_swapped()?;
            self.move_block(table, gone, Place::Nowhere);
            table.blocks.remove(&gone);
        }
        self.slots.take()
    }

    /// Moves a block to the swap node. Where that does not go, a dirty block is written back and a clean one dropped. Its
    /// memory is free then, but for failures.
    async fn swap_out(&self, io: &NodeIo, claim: Claim<'_>) {
        let index = claim.index;
        let slot = self.slot(index);
        let written = match slot {
            Some(slot) => self.write_slot(io, index, slot).await,
            None => false,
        };
        let dirty = {
            let table = &mut *self.shard(index).table();
            if let (true, Some(slot)) = (written, slot) {
                if let Some(memory) = self.move_block(table, index, Place::Swap(slot)) {
                    table.spare.push(memory);
                    table.frames -= 1;
                }
                count(&self.counters.evictions, 1);
                count(&self.counters.swapped_out, 1);
                return;
            }
            table.blocks.get(&index).is_some_and(|b| !b.unsaved().is_empty())
        };
        if let Some(slot) = slot {
            self.slots.give_back(slot);
        }
        if dirty && self.save(io, index).await.is_err() {
            return;
        }
        let table = &mut *self.shard(index).table();
        if let Some(memory) = self.move_block(table, index, Place::Nowhere) {
            table.spare.push(memory);
            table.frames -= 1;
        }
        count(&self.counters.evictions, 1);
    }

    /// Writes a block that is claimed alone into a slot; whether that went well.
    async fn write_slot(&self, io: &NodeIo, index: u64, slot: u32) -> bool {
        let Ok(buffer) = IoVecs::alloc(self.block, 4096) else { return false };
        {
            let table = self.shard(index).table();
            let Some(Place::Memory(memory)) = table.blocks.get(&index).map(|b| &b.place) else {
                return false;
            };
            buffer.copy_from(0, memory);
        }
        let result = io.child(SWAP).write(self.start(slot.into()), &buffer, graph::WriteFlags::empty()).await;
        if let Err(e) = &result {
            count(&self.counters.errors, 1);
            log::debug!("a cache's swap node fails to take a block: {e}");
        }
        result.is_ok()
    }

    /// Brings a block that is claimed alone out of the swap node: into memory if there is room, else its dirty sectors into the
    /// file. Afterwards it is not in the swap node.
    ///
    /// # Errors
    /// Dirty sectors cannot be read there, or cannot be written: the block stays where it is.
    pub(super) async fn recall(&self, io: &NodeIo, claim: &Claim<'_>) -> Result<()> {
        let index = claim.index;
        let (slot, dirty) = {
            let table = self.shard(index).table();
            match table.blocks.get(&index) {
                Some(block) => match block.place {
                    Place::Swap(slot) => (slot, !block.unsaved().is_empty()),
                    Place::Nowhere | Place::Memory(_) => return Ok(()),
                },
                None => return Ok(()),
            }
        };
        let buffer = IoVecs::alloc(self.block, 4096)?;
        let read = io.child(SWAP).read(self.start(slot.into()), &buffer).await;
        if let Err(e) = read {
            count(&self.counters.errors, 1);
            if dirty {
                return Err(e);
            }
            self.move_block(&mut self.shard(index).table(), index, Place::Nowhere);
            return Ok(());
        }
        match self.frame(io, index).await {
            Some(mut memory) => {
                buffer.copy_to(0, &mut memory);
                self.move_block(&mut self.shard(index).table(), index, Place::Memory(memory));
                count(&self.counters.swapped_in, 1);
            }
            None => {
                if dirty {
                    self.save_from(io, index, &buffer).await?;
                }
                self.move_block(&mut self.shard(index).table(), index, Place::Nowhere);
            }
        }
        Ok(())
    }

    /// Writes the dirty sectors of a block in the swap node, claimed alone, into the file; it stays there, clean.
    ///
    /// # Errors
    /// They cannot be read, or not be written: they stay dirty.
    pub(super) async fn save_swapped(&self, io: &NodeIo, claim: &Claim<'_>) -> Result<()> {
        let slot = {
            let table = self.shard(claim.index).table();
            match table.blocks.get(&claim.index).map(|b| &b.place) {
                Some(Place::Swap(slot)) => *slot,
                _ => return Ok(()),
            }
        };
        let buffer = IoVecs::alloc(self.block, 4096)?;
        let read = io.child(SWAP).read(self.start(slot.into()), &buffer).await;
        let result = match read {
            Ok(()) => self.save_from(io, claim.index, &buffer).await,
            Err(e) => Err(e),
        };
        if result.is_err() {
            count(&self.counters.errors, 1);
        }
        result
    }

    /// Writes the dirty sectors of a block that is claimed alone, whose bytes are in `buffer`, into the file.
    pub(super) async fn save_from(&self, io: &NodeIo, index: u64, buffer: &IoVecs) -> Result<()> {
        let unsaved = {
            let table = self.shard(index).table();
            table.blocks.get(&index).map(|b| b.unsaved()).unwrap_or_default()
        };
        let (start, size) = (self.start(index), self.size());
        for (from, to) in unsaved.runs() {
            let at = start + from as u64;
            let len = size.saturating_sub(at).min((to - from) as u64) as usize;
            if len == 0 {
                break;
            }
            let part = buffer.slice(from, len);
            io.child(FILE).write(at, &part, graph::WriteFlags::empty()).await?;
            count(&self.counters.written_back, len as u64);
        }
        let table = &mut *self.shard(index).table();
        if let Some(block) = table.blocks.get_mut(&index) {
            block.dirty = block.dirty.minus(unsaved);
        }
        self.settle(table, index);
        Ok(())
    }

    /// As [`Cache::save_from`], for a block in memory.
    async fn save(&self, io: &NodeIo, index: u64) -> Result<()> {
        let buffer = IoVecs::alloc(self.block, 4096)?;
        {
            let table = self.shard(index).table();
            if let Some(Place::Memory(memory)) = table.blocks.get(&index).map(|b| &b.place) {
                buffer.copy_from(0, memory);
            }
        }
        self.save_from(io, index, &buffer).await
    }
}
