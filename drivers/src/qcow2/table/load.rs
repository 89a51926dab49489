//! Loading slices: one loader per slice, the others wait; no lock across the read.
//!
//! Called by driven requests that met a slice that is not cached. Validates every entry once.

use std::sync::{Arc, PoisonError};

use graph::{BlockError, DebugEvent, NodeIo, Result};
use host::IoVecs;
use host::sync::Event;

use super::Tables;
use super::cache::{Full, Reserved};
use crate::qcow2::alloc::Kinds;
use crate::qcow2::format::{COMPRESSED, COPIED, EntryError, OFFSET_MASK};
use crate::qcow2::node::{FILE, Qcow2};

/// The right to load a slice; gone, whoever waits goes on.
struct Loading<'a> {
    tables: &'a Tables,
    slice: u64,
    done: Arc<Event>,
    slot: Option<Reserved>,
    /// It had a slot at some time.
    reserved: bool,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if let Some(slot) = &self.slot {
            self.tables.cache.release(slot);
        }
        self.tables.loading.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.slice);
        self.done.set();
        // Only then has anything changed for those who wait for a slot; among them may be whoever drops this.
        if self.reserved {
            self.tables.wake();
        }
    }
}

impl Tables {
    /// Caches a slice whose table exists; it may be gone again when the caller looks.
    ///
    /// # Errors
    /// The read failed, or the table lies at an impossible place.
    pub(crate) async fn load(&self, node: &Qcow2, io: &NodeIo, slice: u64) -> Result<()> {
        loop {
            let mine = {
                let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
                if self.cache.with(slice, |_| ()).is_some() {
                    return Ok(());
                }
                match loading.get(&slice) {
                    Some(done) => Err(Arc::clone(done)),
                    None => {
                        let done = Arc::new(Event::new());
                        loading.insert(slice, Arc::clone(&done));
                        Ok(Loading { tables: self, slice, done, slot: None, reserved: false })
                    }
                }
            };
            let mut mine = match mine {
                Ok(mine) => mine,
                Err(other) => {
                    other.wait().await;
                    continue;
                }
            };
            // Entered before the look, so that no wake-up is lost.
            let room = self.room.wait();
            match self.cache.reserve(slice) {
                Ok(slot) => {
                    mine.slot = Some(slot);
                    mine.reserved = true;
                }
                Err(full) => {
                    drop(mine);
                    match full {
                        Full::Dirty => {
                            drop(room);
                            node.commits.flush(node, io).await?;
                        }
                        Full::Busy => room.await,
                    }
                    continue;
                }
            }
            drop(room);
            return self.fetch(node, io, mine).await;
        }
    }

    async fn fetch(&self, node: &Qcow2, io: &NodeIo, mut mine: Loading<'_>) -> Result<()> {
        let slice = mine.slice;
        let bits = self.slices_per_table_bits();
        let l1_index = slice >> bits;
        let bytes = self.geo().l2_entry_size() << self.slice_bits;
        let l1 = self.l1.get(l1_index);
        let table = l1 & OFFSET_MASK;
        if !table.is_multiple_of(self.geo().cluster_size()) {
            let words = format!("L2 table offset {table:#x} unaligned (L1 index: {l1_index:#x})");
            return Err(node.corrupt(io, words, None, None).await);
        }
        let buffer = IoVecs::alloc(bytes as usize, 4096).map_err(BlockError::from)?;
        let file = io.child(FILE);
        file.debug_event(DebugEvent::L2Load);
        file.read(table + (slice & ((1 << bits) - 1)) * bytes, &buffer).await?;
        let raw = buffer.to_vec();
        let mut words: Vec<u64> = raw.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
        let step = if self.geo().extended_l2() { 2 } else { 1 };
        // In a data file places are given, not shared; there COPIED also says that offset 0 is a place.
        if l1 & COPIED == 0 && !self.geo().data_file() {
            strip_copied(&mut words, step);
        }
        if let Some(complaint) = self.elsewhere(slice, &words, step) {
            return Err(node.corrupt(io, complaint, None, None).await);
        }
        let suspect = words.chunks(step).any(|e| {
            let (entry, bitmap) = (e.first().copied().unwrap_or(0), e.get(1).copied().unwrap_or(0));
            self.suspect(node, entry, bitmap)
        });
        if let Some(slot) = mine.slot.take() {
            self.cache.fill(&slot, slice, &words, suspect);
        }
        node.cleaning.set_off(io.local(), &node.tables, &node.space);
        Ok(())
    }

    /// With an external data file a cluster lies where the guest has it, and nowhere else: what is wrong, if anything.
    fn elsewhere(&self, slice: u64, words: &[u64], step: usize) -> Option<String> {
        let geo = self.geo();
        if !geo.data_file() {
            return None;
        }
        let first = slice << self.slice_bits;
        words.iter().step_by(step).enumerate().find_map(|(i, &entry)| {
            let guest = (first + i as u64) << geo.cluster_bits();
            let host = self.decoder.host(entry).filter(|&host| entry & COMPRESSED == 0 && host != guest)?;
            let index = geo.l2_index(guest);
            Some(EntryError::DataFileMismatch { host, guest }.l2_message(0, index))
        })
    }

    /// Whether an entry must be looked at each time it is used: invalid, or pointing at metadata.
    fn suspect(&self, node: &Qcow2, entry: u64, bitmap: u64) -> bool {
        if !self.decoder.valid(entry, bitmap) {
            return true;
        }
        if entry & COMPRESSED != 0 || node.settings.read_only || self.geo().data_file() {
            return false;
        }
        let size = self.geo().cluster_size();
        self.decoder.host(entry).is_some_and(|host| node.space.overlap(host, size, Kinds::NONE).is_some())
    }

    /// What is wrong with the entry of `guest`, in QEMU's words; for [`super::Kind::Invalid`].
    pub(crate) fn complaint(&self, guest: u64, entry: u64) -> String {
        let geo = self.geo();
        let l2 = geo.l2_index(guest);
        if entry & COMPRESSED != 0 {
            return format!("Invalid compressed cluster descriptor {entry:#x} (guest offset: {guest:#x})");
        }
        let host = entry & OFFSET_MASK;
        if !host.is_multiple_of(geo.cluster_size()) {
            return format!("Cluster allocation offset {host:#x} unaligned (L2 index: {l2:#x})");
        }
        if geo.extended_l2() {
            return format!("Invalid subcluster bitmap of L2 entry {entry:#x} (L2 index: {l2:#x})");
        }
        if !geo.v3() {
            return format!("Zero cluster entry found in pre-v3 image (guest offset: {guest:#x})");
        }
        format!("Reserved bits of L2 entry {entry:#x} are set (L2 index: {l2:#x})")
    }
}

/// In a table that others share nothing may be changed in place, whatever its entries say.
pub(crate) fn strip_copied(words: &mut [u64], step: usize) {
    for word in words.iter_mut().step_by(step) {
        if *word & COMPRESSED == 0 {
            *word &= !COPIED;
        }
    }
}
