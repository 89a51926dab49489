//! L2 tables that may be changed: a new one where there is none, a copy where others share it.
//!
//! Called before entries are published. A table is complete on disk (written, if not yet durable) before the L1 entry in
//! memory names it, so that any later commit finds it behind its first barrier.

use std::sync::{Arc, PoisonError};

use graph::{BlockError, DebugEvent, NodeIo, Result, WriteFlags};
use host::IoVecs;
use host::sync::Event;

use super::Tables;
use super::load::strip_copied;
use crate::qcow2::alloc::{FreeKind, Kind};
use crate::qcow2::format::{COPIED, OFFSET_MASK};
use crate::qcow2::node::{FILE, Qcow2};

/// The right to make a table; gone, whoever waits looks again.
struct Making<'a> {
    tables: &'a Tables,
    index: u64,
    done: Arc<Event>,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.tables.making.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.index);
        self.done.set();
    }
}

impl Tables {
    /// Sees to it that the table of `guest` exists and may be changed.
    ///
    /// # Errors
    /// No space, the disk failed, the table lies at an impossible place.
    pub(crate) async fn own(&self, node: &Qcow2, io: &NodeIo, guest: u64) -> Result<()> {
        let index = self.geo().l1_index(guest);
        loop {
            if self.is_owned(guest) {
                return Ok(());
            }
            let mine = {
                let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
                match making.get(&index) {
                    Some(done) => Err(Arc::clone(done)),
                    None => {
                        let done = Arc::new(Event::new());
                        making.insert(index, Arc::clone(&done));
                        Ok(Making { tables: self, index, done })
                    }
                }
            };
            match mine {
                Err(other) => other.wait().await,
                // Looked at again: the one before us may have made it meanwhile.
                Ok(_) if self.is_owned(guest) => return Ok(()),
                Ok(_mine) => return self.make(node, io, index).await,
            }
        }
    }

    async fn make(&self, node: &Qcow2, io: &NodeIo, index: u64) -> Result<()> {
        let size = self.geo().cluster_size();
        let old = self.l1.get(index);
        let from = old & OFFSET_MASK;
        if !from.is_multiple_of(size) {
            let words = format!("L2 table offset {from:#x} unaligned (L1 index: {index:#x})");
            return Err(node.corrupt(io, words, None, None).await);
        }
        let extent = node.space.alloc(io, 1).await?;
        let file = io.child(FILE);
        let written = async {
            if from == 0 && extent.zero {
                return Ok(());
            }
            let mut table = IoVecs::alloc(size as usize, 4096).map_err(BlockError::from)?;
            if from != 0 {
                file.debug_event(DebugEvent::L2AllocCowRead);
                file.read(from, &table).await?;
                let step = if self.geo().extended_l2() { 2 } else { 1 };
                let raw = table.to_vec();
                let mut words: Vec<u64> =
                    raw.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
                strip_copied(&mut words, step);
                table = IoVecs::from_vec(words.iter().flat_map(|w| w.to_be_bytes()).collect());
            }
            file.debug_event(DebugEvent::L2AllocWrite);
            file.write(extent.offset, &table, WriteFlags::empty()).await
        };
        if let Err(e) = written.await {
            node.space.give_back(extent.offset, size);
            return Err(e);
        }
        node.space.add_metadata(Kind::ActiveL2, extent.offset, size);
        self.set_l1(index, extent.offset | COPIED);
        if from != 0 {
            // The snapshots keep theirs; ours is one reference less.
            node.space.add_metadata(Kind::InactiveL2, from, size);
            node.space.free_later(from, size, FreeKind::Other);
        }
        Ok(())
    }
}
