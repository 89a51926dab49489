//! The active L1 table in memory: grows without moving, is read without a lock.
//!
//! Entries are the words of the disk in host byte order. Who changes one marks its sector dirty; the commit writes it.

use std::collections::BTreeSet;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Release},
};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Entries of a chunk.
const CHUNK: usize = 4096;
/// Most entries of a table (`MAX_L1_BYTES`).
const MAX: usize = 4 << 20;
/// Entries of a 512-byte sector.
const PER_SECTOR: usize = 64;

/// See the module's words.
pub(crate) struct L1 {
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    len: AtomicU32,
    /// Where the table lies in the file, bytes.
    offset: AtomicU64,
    dirty: Mutex<BTreeSet<u32>>,
}

fn chunk() -> Box<[AtomicU64]> {
    std::iter::repeat_with(AtomicU64::default).take(CHUNK).collect()
}

impl L1 {
    /// From the words of the disk.
    pub(crate) fn new(offset: u64, entries: &[u64]) -> L1 {
        let l1 = L1 {
            chunks: std::iter::repeat_with(OnceLock::new).take(MAX / CHUNK).collect(),
            len: AtomicU32::new(0),
            offset: AtomicU64::new(offset),
            dirty: Mutex::default(),
        };
        for (i, entry) in entries.iter().enumerate() {
            l1.store(i, *entry);
        }
        l1.len.store(entries.len() as u32, Release);
        l1
    }

    fn store(&self, index: usize, entry: u64) {
        let Some(slot) = self.chunks.get(index / CHUNK) else { return };
        if entry == 0 && slot.get().is_none() {
            return;
        }
        if let Some(word) = slot.get_or_init(chunk).get(index % CHUNK) {
            word.store(entry, Release);
        }
    }

    /// An entry; 0 past the end.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> u64 {
        let index = index as usize;
        let words = self.chunks.get(index / CHUNK).and_then(OnceLock::get);
        words.and_then(|w| w.get(index % CHUNK)).map_or(0, |w| w.load(Acquire))
    }

    /// Changes an entry; the next commit writes it.
    pub(crate) fn set(&self, index: u64, entry: u64) {
        self.store(index as usize, entry);
        self.mark((index as usize / PER_SECTOR) as u32);
    }

    fn mark(&self, sector: u32) {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).insert(sector);
    }

    /// Entries, as the header says.
    pub(crate) fn len(&self) -> u32 {
        self.len.load(Acquire)
    }

    /// Where the table lies, bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.offset.load(Acquire)
    }

    /// The whole table lies elsewhere now, and on disk is what is in memory. Drained.
    pub(crate) fn moved(&self, offset: u64, len: u32) {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.offset.store(offset, Release);
        self.len.store(len, Release);
    }

    /// The whole table is another one, and on disk is what is in memory. Drained.
    pub(crate) fn replace(&self, offset: u64, entries: &[u64]) {
        let old = self.len() as usize;
        for i in 0..old.max(entries.len()) {
            self.store(i, entries.get(i).copied().unwrap_or(0));
        }
        self.moved(offset, entries.len() as u32);
    }

    /// All entries.
    pub(crate) fn entries(&self) -> Vec<u64> {
        (0..u64::from(self.len())).map(|i| self.get(i)).collect()
    }

    /// Whether a sector waits to be written.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Takes the dirty sectors: (sector, where it goes in the file, bytes).
    pub(crate) fn collect(&self) -> Vec<(u32, u64, Vec<u8>)> {
        let sectors = std::mem::take(&mut *self.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        let (base, len) = (self.offset(), self.len() as usize);
        let mut out = Vec::with_capacity(sectors.len());
        for sector in sectors {
            let first = sector as usize * PER_SECTOR;
            let last = (first + PER_SECTOR).min(len);
            let mut bytes = Vec::with_capacity(512);
            (first..last).for_each(|i| bytes.extend_from_slice(&self.get(i as u64).to_be_bytes()));
            if !bytes.is_empty() {
                out.push((sector, base + first as u64 * 8, bytes));
            }
        }
        out
    }

    /// A sector that was taken could not be written.
    pub(crate) fn restore(&self, sector: u32) {
        self.mark(sector);
    }
}
