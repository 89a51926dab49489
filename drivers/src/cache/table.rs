//! The blocks of a cache, in shards, and the claims of requests on them.
//!
//! Used by everything that looks at a block. The lock of a shard is held for a look or a copy, never across waiting.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{
    AtomicU32, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};
use std::sync::{Mutex, MutexGuard, PoisonError};

use host::sync::WaitQueue;

use super::Cache;
use super::block::{Block, Hold, Mask, Place};

/// Spreads neighbours over shards and filter.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
/// Counters of the filter.
const FILTER: usize = 1 << 14;

/// Locks; a panic under one of our locks leaves values that are whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which blocks are surely *not* in the cache, without a lock: a counter for all blocks that share a hash.
///
/// A block is counted before its first write is acknowledged (Release), and asked for by requests that begin afterwards
/// (Acquire, its pair): such a request cannot miss it.
pub(super) struct Filter(Box<[AtomicU32]>);

impl Filter {
    pub(super) fn new() -> Filter {
        Filter((0..FILTER).map(|_| AtomicU32::new(0)).collect())
    }

    fn of(&self, index: u64) -> Option<&AtomicU32> {
        self.0.get((index.wrapping_mul(SPREAD) >> 40) as usize % FILTER)
    }

    pub(super) fn add(&self, index: u64) {
        if let Some(counter) = self.of(index) {
            counter.fetch_add(1, AcqRel);
        }
    }

    pub(super) fn remove(&self, index: u64) {
        if let Some(counter) = self.of(index) {
            counter.fetch_sub(1, AcqRel);
        }
    }

    /// Whether the block may be in the cache.
    pub(super) fn may_hold(&self, index: u64) -> bool {
        self.of(index).is_none_or(|c| c.load(Acquire) != 0)
    }
}

/// A part of the blocks.
pub(super) struct Shard {
    table: Mutex<Table>,
    /// Those who wait for a claim to end.
    freed: WaitQueue,
}

/// What the lock of a shard guards.
#[derive(Default)]
pub(super) struct Table {
    pub(super) blocks: HashMap<u64, Block>,
    /// Blocks in memory, the next candidate for eviction first.
    pub(super) clock: VecDeque<u64>,
    /// Memory that waits for its next block.
    pub(super) spare: Vec<Box<[u8]>>,
    /// Blocks of memory that are in use, and how many there may be.
    pub(super) frames: usize,
    pub(super) limit: usize,
    /// Blocks that hold what the file lacks.
    pub(super) unsaved: BTreeSet<u64>,
    /// Blocks in the swap node, and where the search for one to give up goes on.
    pub(super) swapped: BTreeSet<u64>,
    pub(super) swap_hand: u64,
}

impl Table {
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.spare = Vec::new();
    }
}

impl Shard {
    pub(super) fn new() -> Shard {
        Shard { table: Mutex::default(), freed: WaitQueue::new() }
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

/// A block in the hands of one request; given back when dropped.
pub(super) struct Claim<'a> {
    cache: &'a Cache,
    pub(super) index: u64,
    /// It was taken off the clock to be evicted: back it goes if it stays in memory.
    pub(super) off_clock: bool,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let shard = self.cache.shard(self.index);
        {
            let table = &mut *shard.table();
            if let Some(block) = table.blocks.get_mut(&self.index) {
                block.hold = Hold::Free;
                // Only a writer that was dropped half way leaves something here.
                block.dirty = block.dirty.plus(block.writing);
                block.writing = Mask::NONE;
                match block.place {
                    Place::Nowhere => {
                        table.blocks.remove(&self.index);
                    }
                    Place::Memory(_) if self.off_clock => table.clock.push_front(self.index),
                    Place::Memory(_) | Place::Swap(_) => {}
                }
            }
            self.cache.settle(table, self.index);
        }
        shard.freed.notify_all();
    }
}

impl Cache {
    pub(super) fn shard(&self, index: u64) -> &Shard {
        let at = (index.wrapping_mul(SPREAD) >> 48) as usize & self.shard_mask.load(Relaxed);
        // The mask is below the number of shards.
        &self.shards[at]
    }

    /// Claims a block alone, as soon as nobody has it; it need not be in the cache.
    pub(super) async fn claim(&self, index: u64) -> Claim<'_> {
        loop {
            let shard = self.shard(index);
            let wait = {
                let mut table = shard.table();
                let block = table.blocks.entry(index).or_default();
                if block.hold == Hold::Free {
                    block.hold = Hold::Alone;
                    return Claim { cache: self, index, off_clock: false };
                }
                // Entered under the lock, so that the end of the claim is not missed.
                shard.freed.wait()
            };
            wait.await;
        }
    }

    /// Claims a block that is not in the cache, if nobody else does.
    pub(super) fn claim_absent(&self, index: u64) -> Option<Claim<'_>> {
        let mut table = self.shard(index).table();
        if table.blocks.contains_key(&index) {
            return None;
        }
        table.blocks.insert(index, Block { hold: Hold::Alone, ..Block::default() });
        Some(Claim { cache: self, index, off_clock: false })
    }

    /// Claims a block that is there and free, if `fit` likes it.
    pub(super) fn claim_if(
        &self,
        table: &mut Table,
        index: u64,
        hold: Hold,
        fit: impl FnOnce(&Block) -> bool,
    ) -> Option<Claim<'_>> {
        let block = table.blocks.get_mut(&index)?;
        if block.hold != Hold::Free || !fit(block) {
            return None;
        }
        block.hold = hold;
        Some(Claim { cache: self, index, off_clock: false })
    }

    /// Waits for the end of the claim on a block, if there is one.
    pub(super) async fn wait_free(&self, index: u64) {
        let shard = self.shard(index);
        let wait = {
            let table = shard.table();
            match table.blocks.get(&index) {
                Some(block) if block.hold != Hold::Free => shard.freed.wait(),
                _ => return,
            }
        };
        wait.await;
    }

    /// Brings the set of unsaved blocks up to date after a change to a block's masks.
    pub(super) fn settle(&self, table: &mut Table, index: u64) {
        let unsaved = table.blocks.get(&index).is_some_and(|b| !b.unsaved().is_empty());
        // Release: pairs with the Acquire of `Cache::nothing_unsaved`. A flush that begins after a write has been
        // acknowledged sees it counted.
        if unsaved {
            if table.unsaved.insert(index) {
                self.unsaved.fetch_add(1, Release);
            }
        } else if table.unsaved.remove(&index) {
            self.unsaved.fetch_sub(1, Release);
        }
    }

    /// Whether the file holds everything.
    pub(super) fn nothing_unsaved(&self) -> bool {
        self.unsaved.load(Acquire) == 0
    }

    /// Puts a block that is there somewhere else, and keeps the sums right. What becomes of memory it leaves is the
    /// caller's business: it is returned, still counted in `frames`.
    pub(super) fn move_block(&self, table: &mut Table, index: u64, place: Place) -> Option<Box<[u8]>> {
        let block = table.blocks.get_mut(&index)?;
        let was_somewhere = !matches!(block.place, Place::Nowhere);
        match &place {
            Place::Nowhere => {
                (block.valid, block.dirty, block.writing) = (Mask::NONE, Mask::NONE, Mask::NONE);
            }
            Place::Memory(_) => {
                block.used = false;
                table.clock.push_back(index);
                self.resident.fetch_add(1, Relaxed);
            }
            Place::Swap(_) => {
                table.swapped.insert(index);
            }
        }
        let is_somewhere = !matches!(place, Place::Nowhere);
        let old = std::mem::replace(&mut block.place, place);
        match (was_somewhere, is_somewhere) {
            (false, true) => self.filter.add(index),
            (true, false) => self.filter.remove(index),
            _ => {}
        }
        let memory = match old {
            Place::Nowhere => None,
            Place::Memory(memory) => {
                self.resident.fetch_sub(1, Relaxed);
                Some(memory)
            }
            Place::Swap(slot) => {
                table.swapped.remove(&index);
                self.slots.give_back(slot);
                None
            }
        };
        self.settle(table, index);
        memory
    }

    /// Forgets blocks that nobody works on; for drained sections. With `all` the dirty ones too.
    pub(super) fn forget(&self, from: u64, all: bool) {
        for shard in &*self.shards {
            let table = &mut *shard.table();
            let gone: Vec<u64> = table
                .blocks
                .iter()
                .filter(|(i, b)| **i >= from && b.hold == Hold::Free && (all || b.unsaved().is_empty()))
                .map(|(i, _)| *i)
                .collect();
            for index in gone {
                if self.move_block(table, index, Place::Nowhere).is_some() {
                    table.frames -= 1;
                }
                table.blocks.remove(&index);
            }
            let Table { clock, blocks, .. } = table;
            clock.retain(|i| blocks.contains_key(i));
            // What is clean of a dirty block may be another's content now.
            for block in table.blocks.iter_mut().filter(|(i, _)| **i >= from).map(|(_, b)| b) {
                block.valid = block.unsaved();
            }
        }
    }
}
