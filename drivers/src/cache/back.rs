//! Dirty sectors on their way to the file: one by one where room is needed, all of them for a flush.
//!
//! Blocks are claimed shared meanwhile: what is written is a copy, and who dirties a sector again while it is under way
//! leaves it dirty. Neighbours go in one request.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use graph::{NodeIo, Result, WriteFlags};
use host::IoVecs;

use super::block::{Block, Hold, Mask, Place};
use super::table::Claim;
use super::{Cache, FILE, count};

/// Most bytes of one run of blocks.
const RUN: usize = 1 << 20;
/// Runs a flush has under way.
const LANES: usize = 4;

fn dirty_in_memory(block: &Block) -> bool {
    matches!(block.place, Place::Memory(_)) && !block.dirty.is_empty()
}

impl Cache {
    /// Writes the dirty sectors of a block in memory that is claimed shared, and those of its neighbours that can be had
    /// without waiting. Returns the first block that was not looked at.
    ///
    /// # Errors
    /// What the file says; the sectors of that write are dirty still.
    pub(super) async fn write_back<'a>(&'a self, io: &NodeIo, claim: Claim<'a>) -> Result<u64> {
        let first = claim.index;
        let mut claims = vec![claim];
        let blocks = (RUN / self.block).max(1);
        while claims.len() < blocks {
            let index = first + claims.len() as u64;
            let table = &mut *self.shard(index).table();
            match self.claim_if(table, index, Hold::Shared, dirty_in_memory) {
                Some(claim) => claims.push(claim),
                None => break,
            }
        }
        let end = first + claims.len() as u64;
        let buffer = IoVecs::alloc(claims.len() * self.block, 4096)?;
        // Runs of bytes from the start of the buffer; those that meet at the border of two blocks are one.
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (at, claim) in claims.iter().enumerate() {
            let table = &mut *self.shard(claim.index).table();
            let Some(block) = table.blocks.get_mut(&claim.index) else { continue };
            let Place::Memory(memory) = &block.place else { continue };
            let base = at * self.block;
            for (from, to) in block.dirty.runs() {
                buffer.copy_from(base + from, memory.get(from..to).unwrap_or_default());
                match runs.last_mut() {
                    Some(last) if last.1 == base + from => last.1 = base + to,
                    _ => runs.push((base + from, base + to)),
                }
            }
            block.writing = std::mem::take(&mut block.dirty);
        }
        let (start, size) = (self.start(first), self.size());
        let mut result = Ok(());
        for (from, to) in runs {
            let at = start + from as u64;
            // The last sector of a node of an odd size.
            let len = size.saturating_sub(at).min((to - from) as u64) as usize;
            result = match len {
                0 => Ok(()),
                _ => io.child(FILE).write(at, &buffer.slice(from, len), WriteFlags::empty()).await,
            };
            if result.is_err() {
                break;
            }
            count(&self.counters.written_back, len as u64);
            self.written(&claims, from, to);
        }
        if let Err(e) = &result {
            count(&self.counters.errors, 1);
            log::debug!("a cache cannot write back: {e}");
        }
        // What was not written becomes dirty again with the end of the claims.
        result.map(|()| end)
    }

    /// Bytes `from..to` of a run of claimed blocks are in the file.
    fn written(&self, claims: &[Claim<'_>], from: usize, to: usize) {
        for (at, claim) in claims.iter().enumerate() {
            let base = at * self.block;
            let (low, high) = (from.max(base), to.min(base + self.block));
            if low >= high {
                continue;
            }
            let table = &mut *self.shard(claim.index).table();
            if let Some(block) = table.blocks.get_mut(&claim.index) {
                block.writing = block.writing.minus(Mask::touched(low - base, high - base));
            }
            self.settle(table, claim.index);
        }
    }

    /// Writes back what is dirty as of now, wherever it is.
    ///
    /// # Errors
    /// The first failure; everything was tried.
    pub(super) async fn write_back_all(&self, io: &NodeIo) -> Result<()> {
        if self.nothing_unsaved() {
            return Ok(());
        }
        let mut all = Vec::new();
        for shard in &*self.shards {
            all.extend(shard.table().unsaved.iter().copied());
        }
        all.sort_unstable();
        // Whole runs for each lane, so that neighbours are not torn apart.
        let share = all.len().div_ceil(LANES).max((RUN / self.block).max(1));
        let lanes = all.chunks(share).map(|part| self.write_back_these(io, part));
        let mut result = Ok(());
        for outcome in join(lanes.collect()).await {
            result = result.and(outcome);
        }
        result
    }

    async fn write_back_these(&self, io: &NodeIo, indexes: &[u64]) -> Result<()> {
        let mut result = Ok(());
        let mut done = 0;
        for &index in indexes {
            if index < done {
                continue;
            }
            let outcome = self.write_back_one(io, index).await;
            if let Ok(end) = outcome {
                done = end;
            }
            result = result.and(outcome.map(|_| ()));
        }
        result
    }

    /// Sees to it that what was dirty in a block when this was called is in the file. Returns the first block that was not
    /// looked at.
    async fn write_back_one(&self, io: &NodeIo, index: u64) -> Result<u64> {
        loop {
            let swapped = {
                let table = &mut *self.shard(index).table();
                let Some(block) = table.blocks.get(&index) else { return Ok(index + 1) };
                if block.unsaved().is_empty() {
                    return Ok(index + 1);
                }
                if let Some(claim) = self.claim_if(table, index, Hold::Shared, dirty_in_memory) {
                    Some(Ok(claim))
                } else {
                    self.claim_if(table, index, Hold::Alone, |b| matches!(b.place, Place::Swap(_))).map(Err)
                }
            };
            match swapped {
                Some(Ok(claim)) => return self.write_back(io, claim).await,
                Some(Err(claim)) => {
                    self.save_swapped(io, &claim).await?;
                    return Ok(index + 1);
                }
                // Somebody else works on it: on writing it, perhaps.
                None => self.wait_free(index).await,
            }
        }
    }
}

/// A future until it has ended, its result from then on.
type Running<F, T> = (Option<Pin<Box<F>>>, Option<T>);

/// Runs futures side by side to their ends; the results in their order.
async fn join<T, F: Future<Output = T>>(futures: Vec<F>) -> Vec<T> {
    let mut running: Vec<Running<F, T>> = futures.into_iter().map(|f| (Some(Box::pin(f)), None)).collect();
    poll_fn(|cx| {
        let mut pending = false;
        for (future, result) in &mut running {
            if let Some(f) = future {
                match f.as_mut().poll(cx) {
                    Poll::Ready(value) => (*future, *result) = (None, Some(value)),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().filter_map(|(_, result)| result).collect()
}
