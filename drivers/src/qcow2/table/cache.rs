//! The cache of L2 slices: sets of eight slots, found by guest slice number, read without a lock.
//!
//! A slice is a part of an L2 table, 4 KiB by default. Called by the lookups (`Tables`), the loader and the writers of this
//! driver. Must not wait: the loader does the I/O.
//!
//! **Reading.** A slot has a sequence number (odd while it changes), a key, and words. A reader loads the number, the key,
//! the words it wants, and the number again; if both are equal and even, what it has belongs together (a seqlock over
//! atomics, no unsafe code). Slots are never freed, so that a reader at worst looks at a slot that has become another's.
//!
//! **Writing.** Under the slot's mutex, which is never held across waiting. It also guards what must not be lost: the
//! mask of dirty sectors, and the records of allocating writes in flight. A slot with either is no victim.
//!
//! **Placement.** Slice n may be in any slot of set n mod sets. As long as the cache is as large as the tables, no two slices
//! ever compete. Victims are chosen by one round of CLOCK within the set.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use host::WordPages;
use host::sync::Event;

/// Slots of a set.
pub(crate) const WAYS: usize = 8;
/// Sets that are allocated together.
const CHUNK_SETS: usize = 16;
/// In a key: the slice holds an entry that needs a closer look; the lock-free lookup passes it by.
const SUSPECT: u64 = 1 << 63;

/// The keys of a set in one cache line: slice number + 1, 0 for none.
#[derive(Default)]
#[repr(align(64))]
struct Set {
    keys: [AtomicU64; WAYS],
}

/// A write that allocates, from its decision to its publication. Whoever wants to change the same clusters waits.
struct Record {
    id: u64,
    first: usize,
    count: usize,
    done: Arc<Event>,
}

#[derive(Default)]
pub(super) struct SlotState {
    /// Sectors that differ from the disk, one bit each.
    dirty: u128,
    /// Sectors a commit is writing.
    writing: u128,
    /// Taken by a loader.
    reserved: bool,
    records: Vec<Record>,
    next_record: u64,
}

impl SlotState {
    fn evictable(&self) -> bool {
        self.dirty == 0 && self.writing == 0 && !self.reserved && self.records.is_empty()
    }
}

/// The words of a slice, and a bit for each that says whether it is 0. In a chain of images most lookups find nothing: they
/// read the bits alone, a cache line for a whole slice instead of one for eight entries.
pub(super) struct Words<'a> {
    cells: &'a [AtomicU64],
    set: &'a [AtomicU64],
}

impl Words<'_> {
    /// A word in host byte order; 0 past the end.
    #[inline]
    pub(super) fn get(&self, index: usize) -> u64 {
        self.cells.get(index).map_or(0, |w| w.load(Relaxed))
    }

    /// Whether a word is 0.
    #[inline]
    pub(super) fn is_zero(&self, index: usize) -> bool {
        self.set.get(index / 64).is_none_or(|w| w.load(Relaxed) >> (index % 64) & 1 == 0)
    }

    /// Under the slot's mutex.
    fn store(&self, index: usize, value: u64) {
        let (Some(cell), Some(set)) = (self.cells.get(index), self.set.get(index / 64)) else { return };
        cell.store(value, Relaxed);
        let bit = 1 << (index % 64);
        let others = set.load(Relaxed) & !bit;
        set.store(if value == 0 { others } else { others | bit }, Relaxed);
    }
}

/// What a reader needs comes first.
#[derive(Default)]
#[repr(C)]
struct Slot {
    seq: AtomicU64,
    used: AtomicBool,
    state: Mutex<SlotState>,
}

struct Chunk {
    sets: [Set; CHUNK_SETS],
    slots: Box<[Slot]>,
    /// The words of all slots, one after the other; their memory comes and goes.
    cells: WordPages,
    /// Which of them are not 0.
    set: Box<[AtomicU64]>,
}

impl Chunk {
    fn new(words: usize) -> Box<Chunk> {
        let slots = CHUNK_SETS * WAYS;
        Box::new(Chunk {
            sets: Default::default(),
            slots: std::iter::repeat_with(Slot::default).take(slots).collect(),
            cells: WordPages::new(slots * words),
            set: std::iter::repeat_with(AtomicU64::default).take(slots * words.div_ceil(64)).collect(),
        })
    }

    /// The words of a slot, each slot having `count`.
    #[inline]
    fn words(&self, slot: usize, count: usize) -> Option<Words<'_>> {
        let bits = count.div_ceil(64);
        let cells = self.cells.words().get(slot * count..(slot + 1) * count)?;
        Some(Words { cells, set: self.set.get(slot * bits..(slot + 1) * bits)? })
    }

    fn key(&self, slot: usize) -> Option<&AtomicU64> {
        self.sets.get(slot / WAYS)?.keys.get(slot % WAYS)
    }
}

/// See the module's words.
pub(super) struct Cache {
    chunks: Box<[OnceLock<Box<Chunk>>]>,
    /// Number of sets - 1; a power of two less one.
    mask: u64,
    /// 64-bit words of a slice.
    words: usize,
    /// Words of a dirty sector.
    sector_words: usize,
    /// Slices that became dirty.
    dirty: Mutex<Vec<u64>>,
}

/// A slot that was reserved for a load.
pub(super) struct Reserved {
    set: usize,
    way: usize,
}

/// Why no slot could be had.
pub(super) enum Full {
    /// A commit would free some.
    Dirty,
    /// Allocating writes or loads hold them.
    Busy,
}

/// Sectors of a slice that wait to be written.
pub(super) struct DirtySlice {
    pub(super) slice: u64,
    pub(super) mask: u128,
    /// (sector, its bytes as they go to disk)
    pub(super) sectors: Vec<(u32, Vec<u8>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    /// For `slots` slots (rounded up to whole sets and a power of two) of `words` words, with dirty sectors of
    /// `sector_words`.
    pub(super) fn new(slots: u64, words: usize, sector_words: usize) -> Cache {
        let sets = slots.div_ceil(WAYS as u64).max(1).next_power_of_two();
        let chunks = (sets as usize).div_ceil(CHUNK_SETS);
        Cache {
            chunks: std::iter::repeat_with(OnceLock::new).take(chunks).collect(),
            mask: sets - 1,
            words,
            sector_words,
            dirty: Mutex::default(),
        }
    }

    /// How many slots there are.
    pub(super) fn slots(&self) -> u64 {
        (self.mask + 1) * WAYS as u64
    }

    /// Slices that wait to be written.
    pub(super) fn dirty_slices(&self) -> usize {
        lock(&self.dirty).len()
    }

    #[inline]
    fn place(&self, slice: u64) -> usize {
        (slice & self.mask) as usize
    }

    #[inline]
    fn chunk(&self, set: usize) -> Option<&Chunk> {
        self.chunks.get(set / CHUNK_SETS).and_then(OnceLock::get).map(|c| &**c)
    }

    #[inline]
    fn slot(&self, set: usize, way: usize) -> Option<(&AtomicU64, &Slot)> {
        let chunk = self.chunk(set)?;
        let local = set % CHUNK_SETS;
        Some((chunk.sets.get(local)?.keys.get(way)?, chunk.slots.get(local * WAYS + way)?))
    }

    fn words(&self, set: usize, way: usize) -> Option<Words<'_>> {
        self.chunk(set)?.words(set % CHUNK_SETS * WAYS + way, self.words)
    }

    /// Looks at a slice without a lock: `f` gets a way to load words, and its answer counts only if nothing changed
    /// meanwhile. `None`: not cached, suspect, or changing right now.
    #[inline]
    pub(super) fn read<R>(&self, slice: u64, f: impl Fn(&Words<'_>) -> R) -> Option<R> {
        let set = self.place(slice);
        let chunk = self.chunk(set)?;
        let local = set % CHUNK_SETS;
        let keys = &chunk.sets.get(local)?.keys;
        let way = keys.iter().position(|k| k.load(Relaxed) == slice + 1)?;
        let slot = chunk.slots.get(local * WAYS + way)?;
        let words = chunk.words(local * WAYS + way, self.words)?;
        for _ in 0..4 {
            let before = slot.seq.load(Acquire);
            if before & 1 == 0 {
                if keys.get(way)?.load(Relaxed) != slice + 1 {
                    return None;
                }
                let answer = f(&words);
                fence(Acquire);
                if slot.seq.load(Relaxed) == before {
                    // Only where it is not set yet: a shared store per hit would cost more than the lookup.
                    if !slot.used.load(Relaxed) {
                        slot.used.store(true, Relaxed);
                    }
                    return Some(answer);
                }
            }
            std::hint::spin_loop();
        }
        None
    }

    /// One word of a slice, as [`Cache::read`] would answer it; shorter, for the hottest of paths.
    #[inline]
    pub(super) fn word(&self, slice: u64, index: usize) -> Option<u64> {
        let set = self.place(slice);
        let chunk = self.chunk(set)?;
        let local = set % CHUNK_SETS;
        let keys = &chunk.sets.get(local)?.keys;
        // Where it was put first, unless that was taken.
        let first = self.first_way(slice);
        let way = match keys.get(first)?.load(Relaxed) == slice + 1 {
            true => first,
            false => keys.iter().position(|k| k.load(Relaxed) == slice + 1)?,
        };
        let slot = chunk.slots.get(local * WAYS + way)?;
        let before = slot.seq.load(Acquire);
        if before & 1 != 0 || keys.get(way)?.load(Relaxed) != slice + 1 {
            return None;
        }
        let words = chunk.words(local * WAYS + way, self.words)?;
        let word = if words.is_zero(index) { 0 } else { words.get(index) };
        fence(Acquire);
        if slot.seq.load(Relaxed) != before {
            return None;
        }
        if !slot.used.load(Relaxed) {
            slot.used.store(true, Relaxed);
        }
        Some(word)
    }

    /// The way of its set a slice is put into if it is free.
    #[inline]
    fn first_way(&self, slice: u64) -> usize {
        (slice >> self.mask.trailing_ones()) as usize % WAYS
    }

    fn find(&self, slice: u64) -> Option<(usize, usize)> {
        let set = self.place(slice);
        let keys = &self.chunk(set)?.sets.get(set % CHUNK_SETS)?.keys;
        keys.iter().position(|k| k.load(Acquire) & !SUSPECT == slice + 1).map(|way| (set, way))
    }

    /// Works on a cached slice under its mutex. `None`: not cached.
    pub(super) fn with<R>(&self, slice: u64, f: impl FnOnce(&mut Slice<'_>) -> R) -> Option<R> {
        loop {
            let (set, way) = self.find(slice)?;
            let (key, slot) = self.slot(set, way)?;
            let state = lock(&slot.state);
            let now = key.load(Acquire);
            if now & !SUSPECT != slice + 1 {
                // Became another's before we had the mutex.
                continue;
            }
            slot.used.store(true, Relaxed);
            let words = self.words(set, way)?;
            let mut slice = Slice {
                cache: self,
                slice,
                seq: &slot.seq,
                words,
                state,
                changing: false,
                suspect: now & SUSPECT != 0,
            };
            return Some(f(&mut slice));
        }
    }

    /// Takes a slot for `slice`: free or clean, least recently used. Its old content is gone.
    pub(super) fn reserve(&self, slice: u64) -> Result<Reserved, Full> {
        let set = self.place(slice);
        let busy = Err(Full::Busy);
        let Some(cell) = self.chunks.get(set / CHUNK_SETS) else { return busy };
        cell.get_or_init(|| Chunk::new(self.words));
        let start = self.first_way(slice);
        let mut any_dirty = false;
        // Free ones first, then those not used since the last round, then any.
        for round in 0..3 {
            for step in 0..WAYS {
                let way = (start + step) % WAYS;
                let Some((key, slot)) = self.slot(set, way) else { return busy };
                if round == 0 && key.load(Relaxed) != 0 {
                    continue;
                }
                let mut state = lock(&slot.state);
                if !state.evictable() {
                    any_dirty |= state.dirty != 0 || state.writing != 0;
                    continue;
                }
                if round == 1 && slot.used.swap(false, Relaxed) {
                    continue;
                }
                state.reserved = true;
                let seq = slot.seq.load(Relaxed);
                slot.seq.store(seq + 1, Relaxed);
                fence(Release);
                key.store(0, Release);
                slot.seq.store(seq + 2, Release);
                return Ok(Reserved { set, way });
            }
        }
        Err(if any_dirty { Full::Dirty } else { Full::Busy })
    }

    /// Fills a reserved slot.
    pub(super) fn fill(&self, at: &Reserved, slice: u64, words: &[u64], suspect: bool) {
        let Some((key, slot)) = self.slot(at.set, at.way) else { return };
        let mut state = lock(&slot.state);
        let Some(cells) = self.words(at.set, at.way) else { return };
        let seq = slot.seq.load(Relaxed);
        slot.seq.store(seq + 1, Relaxed);
        fence(Release);
        for (index, word) in words.iter().enumerate() {
            cells.store(index, *word);
        }
        key.store((slice + 1) | if suspect { SUSPECT } else { 0 }, Release);
        slot.used.store(true, Relaxed);
        slot.seq.store(seq + 2, Release);
        state.reserved = false;
    }

    /// Gives a reserved slot back unfilled.
    pub(super) fn release(&self, at: &Reserved) {
        if let Some((_, slot)) = self.slot(at.set, at.way) {
            lock(&slot.state).reserved = false;
        }
    }

    /// Forgets everything clean. Drained, after a commit: what the tables say changed behind the cache's back.
    pub(super) fn clear(&self) {
        for chunk in self.chunks.iter().filter_map(OnceLock::get) {
            for (local, set) in chunk.sets.iter().enumerate() {
                for (way, key) in set.keys.iter().enumerate() {
                    let Some(slot) = chunk.slots.get(local * WAYS + way) else { continue };
                    let state = lock(&slot.state);
                    if state.evictable() {
                        let seq = slot.seq.load(Relaxed);
                        slot.seq.store(seq + 1, Relaxed);
                        fence(Release);
                        key.store(0, Release);
                        slot.seq.store(seq + 2, Release);
                    }
                }
            }
        }
    }

    /// Forgets what is clean and was not used since the last call, and gives its memory back. Whether anything is left.
    pub(super) fn clean(&self) -> bool {
        // Slots that share a page.
        let group = (WordPages::words_per_page() / self.words.max(1)).clamp(1, CHUNK_SETS * WAYS);
        let mut left = false;
        for chunk in self.chunks.iter().filter_map(OnceLock::get) {
            for first in (0..CHUNK_SETS * WAYS).step_by(group) {
                let slots = first..(first + group).min(CHUNK_SETS * WAYS);
                // In ascending order; nobody else has more than one.
                let states: Vec<_> =
                    chunk.slots.iter().take(slots.end).skip(first).map(|s| lock(&s.state)).collect();
                let (mut gone, mut empty) = (false, true);
                for (index, state) in slots.clone().zip(&states) {
                    let (Some(key), Some(slot)) = (chunk.key(index), chunk.slots.get(index)) else {
                        continue;
                    };
                    if key.load(Relaxed) == 0 {
                        empty &= !state.reserved;
                    } else if !state.evictable() || slot.used.swap(false, Relaxed) {
                        empty = false;
                    } else {
                        gone = true;
                        let seq = slot.seq.load(Relaxed);
                        slot.seq.store(seq + 1, Relaxed);
                        fence(Release);
                        key.store(0, Release);
                        slot.seq.store(seq + 2, Release);
                    }
                }
                left |= !empty;
                if empty && (gone || group > 1) {
                    // Whoever reads without a lock and meets the zeroes meets the new sequence number as well: the kernel
                    // takes the pages away on all processors first.
                    chunk.cells.release(first * self.words..slots.end * self.words);
                }
            }
        }
        left
    }

    /// Whether any slice is cached.
    pub(super) fn has_any(&self) -> bool {
        let mut sets = self.chunks.iter().filter_map(OnceLock::get).flat_map(|c| &c.sets);
        sets.any(|s| s.keys.iter().any(|k| k.load(Acquire) != 0))
    }

    /// Copies all dirty sectors; they count as being written until [`Cache::written`].
    pub(super) fn collect(&self) -> Vec<DirtySlice> {
        let slices = std::mem::take(&mut *lock(&self.dirty));
        let mut out = Vec::with_capacity(slices.len());
        for slice in slices {
            let copied = self.with(slice, |s| {
                let mask = std::mem::take(&mut s.state.dirty);
                s.state.writing |= mask;
                let mut sectors = Vec::with_capacity(mask.count_ones() as usize);
                for sector in (0..128u32).filter(|n| mask & (1 << n) != 0) {
                    let first = sector as usize * self.sector_words;
                    let mut bytes = Vec::with_capacity(self.sector_words * 8);
                    for word in s.words.cells.iter().skip(first).take(self.sector_words) {
                        bytes.extend_from_slice(&word.load(Relaxed).to_be_bytes());
                    }
                    sectors.push((sector, bytes));
                }
                DirtySlice { slice, mask, sectors }
            });
            out.extend(copied);
        }
        out
    }

    /// The sectors of `mask` are on disk, or (`!ok`) are not and stay dirty.
    pub(super) fn written(&self, slice: u64, mask: u128, ok: bool) {
        self.with(slice, |s| {
            s.state.writing &= !mask;
            if !ok {
                s.mark(mask);
            }
        });
    }
}

/// A cached slice under its mutex.
pub(crate) struct Slice<'a> {
    cache: &'a Cache,
    slice: u64,
    seq: &'a AtomicU64,
    words: Words<'a>,
    state: MutexGuard<'a, SlotState>,
    changing: bool,
    suspect: bool,
}

impl Slice<'_> {
    /// A word in host byte order; 0 past the end.
    #[inline]
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words.get(index)
    }

    /// Changes a word; the next commit writes its sector.
    pub(crate) fn set_word(&mut self, index: usize, value: u64) {
        if index >= self.words.cells.len() {
            return;
        }
        if !self.changing {
            self.changing = true;
            let seq = self.seq.load(Relaxed);
            self.seq.store(seq + 1, Relaxed);
            fence(Release);
        }
        self.words.store(index, value);
        let sector = index / self.cache.sector_words;
        self.mark(1u128.checked_shl(sector as u32).unwrap_or(0));
    }

    /// Its number.
    pub(super) fn number(&self) -> u64 {
        self.slice
    }

    /// The sector a word is in.
    pub(super) fn sector_of(&self, word: usize) -> u32 {
        (word / self.cache.sector_words) as u32
    }

    /// Sectors that memory has ahead of the disk, or that are on their way there.
    pub(super) fn unwritten(&self) -> u128 {
        self.state.dirty | self.state.writing
    }

    fn mark(&mut self, mask: u128) {
        if mask != 0 && self.state.dirty == 0 {
            lock(&self.cache.dirty).push(self.slice);
        }
        self.state.dirty |= mask;
    }

    /// Whether an entry of the slice needs a closer look.
    pub(crate) fn suspect(&self) -> bool {
        self.suspect
    }

    /// What to wait for before these entries may be changed.
    pub(crate) fn in_flight(&self, first: usize, count: usize) -> Option<Arc<Event>> {
        let overlaps = |r: &&Record| r.first < first + count && first < r.first + r.count;
        self.state.records.iter().find(overlaps).map(|r| Arc::clone(&r.done))
    }

    /// The first entry from `first` on, before `end`, that belongs to a write in flight.
    pub(crate) fn next_in_flight(&self, first: usize, end: usize) -> usize {
        let starts = self.state.records.iter().filter(|r| r.first + r.count > first);
        starts.map(|r| r.first.max(first)).min().map_or(end, |at| at.min(end))
    }

    /// Notes a write that allocates these entries; its number.
    pub(crate) fn begin(&mut self, first: usize, count: usize) -> u64 {
        let id = self.state.next_record;
        self.state.next_record += 1;
        self.state.records.push(Record { id, first, count, done: Arc::new(Event::new()) });
        id
    }

    /// The write allocates fewer entries than it thought. Who waited for the others may look again.
    pub(crate) fn shorten(&mut self, id: u64, count: usize) {
        if let Some(record) = self.state.records.iter_mut().find(|r| r.id == id) {
            record.count = count;
            let old = std::mem::replace(&mut record.done, Arc::new(Event::new()));
            old.set();
        }
    }

    /// The write is published or has failed.
    pub(crate) fn end(&mut self, id: u64) {
        if let Some(at) = self.state.records.iter().position(|r| r.id == id) {
            self.state.records.swap_remove(at).done.set();
        }
    }
}

impl Drop for Slice<'_> {
    fn drop(&mut self) {
        if self.changing {
            let seq = self.seq.load(Relaxed);
            self.seq.store(seq + 1, Release);
        }
    }
}
