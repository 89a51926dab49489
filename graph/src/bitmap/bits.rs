//! The bits of one bitmap: one for each granule, in words that any thread may change.
//!
//! Used by `Bitmap` alone, which guards the change of size. Must not know names or states.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::{BlockError, Result};

/// Bits over a number of bytes.
#[derive(Debug)]
pub(super) struct Bits {
    shift: u32,
    size: u64,
    words: Box<[AtomicU64]>,
    /// Marked granules.
    count: AtomicU64,
}

/// The bits of `from..to` (both at most 64) of a word.
fn mask(from: u64, to: u64) -> u64 {
    let upto = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    upto(to) & !upto(from)
}

impl Bits {
    /// All unmarked. Takes no memory above the limit the caller checks: a size whose words cannot be addressed has none.
    pub(super) fn new(shift: u32, size: u64) -> Bits {
        let words = granules(shift, size).div_ceil(64);
        // A bitmap that is too large is refused by its maker, before it is used.
        let held = if words * 8 > super::MAX_BITMAP_BYTES { 0 } else { words };
        let words = (0..held).map(|_| AtomicU64::new(0)).collect();
        Bits { shift, size, words, count: AtomicU64::new(0) }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn granules(&self) -> u64 {
        granules(self.shift, self.size)
    }

    pub(super) fn bytes(&self) -> u64 {
        bytes(self.shift, self.size)
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Calls `f` with every word that bytes `offset..offset + len` touch, and the bits in it.
    fn each(&self, offset: u64, len: u64, mut f: impl FnMut(&AtomicU64, u64)) {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return;
        }
        let (first, last) = (offset >> self.shift, (end - 1) >> self.shift);
        for index in first / 64..=last / 64 {
            let base = index * 64;
            let bits = mask(first.saturating_sub(base), (last + 1 - base).min(64));
            if let Some(word) = self.words.get(index as usize) {
                f(word, bits);
            }
        }
    }

    pub(super) fn set(&self, offset: u64, len: u64) {
        self.each(offset, len, |word, bits| {
            // Mostly set already: no write to a line that other threads read.
            if word.load(Relaxed) & bits != bits {
                let old = word.fetch_or(bits, Relaxed);
                self.count.fetch_add((bits & !old).count_ones().into(), Relaxed);
            }
        });
    }

    pub(super) fn clear(&self, offset: u64, len: u64) {
        self.each(offset, len, |word, bits| {
            let old = word.fetch_and(!bits, Relaxed);
            self.count.fetch_sub((bits & old).count_ones().into(), Relaxed);
        });
    }

    fn word(&self, index: u64) -> u64 {
        self.words.get(index as usize).map_or(0, |w| w.load(Relaxed))
    }

    pub(super) fn get(&self, offset: u64) -> bool {
        let granule = offset >> self.shift;
        offset < self.size && self.word(granule / 64) >> (granule % 64) & 1 == 1
    }

    /// The first granule from `from` on whose bit is `wanted`; at most `end`.
    fn find(&self, from: u64, end: u64, wanted: bool) -> u64 {
        let mut at = from;
        while at < end {
            let word = self.word(at / 64) ^ if wanted { 0 } else { u64::MAX };
            let left = word >> (at % 64);
            if left != 0 {
                return (at + u64::from(left.trailing_zeros())).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    pub(super) fn next_range(&self, offset: u64, end: u64, max: u64) -> Option<(u64, u64)> {
        let end = end.min(self.size);
        if offset >= end || max == 0 {
            return None;
        }
        let last = granules(self.shift, end);
        let first = self.find(offset >> self.shift, last, true);
        if first == last {
            return None;
        }
        let start = (first << self.shift).max(offset);
        let limit = start.saturating_add(max).min(end);
        let stop = self.find(first, granules(self.shift, limit), false);
        Some((start, (stop << self.shift).min(limit) - start))
    }

    /// A copy for another size.
    pub(super) fn resized(&self, size: u64) -> Bits {
        let new = Bits::new(self.shift, size);
        let both = new.granules().min(self.granules());
        let mut count = 0;
        for (index, word) in (0u64..).zip(&new.words).take(both.div_ceil(64) as usize) {
            let bits = self.word(index) & mask(0, (both - index * 64).min(64));
            word.store(bits, Relaxed);
            count += u64::from(bits.count_ones());
        }
        new.count.store(count, Relaxed);
        new
    }

    pub(super) fn store(&self, at: u64, out: &mut [u8]) -> Result<()> {
        if !at.is_multiple_of(8) {
            return Err(BlockError::invalid("A bitmap is stored in words of 8 bytes"));
        }
        for (index, bytes) in (at / 8..).zip(out.chunks_mut(8)) {
            let word = self.word(index).to_le_bytes();
            let len = bytes.len();
            bytes.copy_from_slice(word.get(..len).unwrap_or_default());
        }
        Ok(())
    }

    pub(super) fn is_zero(&self, at: u64, len: u64) -> bool {
        let words = self.words.len() as u64;
        let (first, end) = ((at / 8).min(words), at.saturating_add(len).div_ceil(8).min(words));
        (first..end).all(|i| self.word(i) == 0)
    }

    pub(super) fn load(&self, at: u64, from: &[u8]) -> Result<()> {
        if !at.is_multiple_of(8) {
            return Err(BlockError::invalid("A bitmap is loaded in words of 8 bytes"));
        }
        let granules = self.granules();
        for (index, bytes) in (at / 8..).zip(from.chunks(8)) {
            let Some(word) = self.words.get(index as usize) else { break };
            let mut le = [0; 8];
            for (to, from) in le.iter_mut().zip(bytes) {
                *to = *from;
            }
            let new = u64::from_le_bytes(le) & mask(0, (granules - index * 64).min(64));
            let keep = mask(bytes.len() as u64 * 8, 64);
            let old = word.load(Relaxed);
            let new = new & !keep | old & keep;
            word.store(new, Relaxed);
            self.count.fetch_add(new.count_ones().into(), Relaxed);
            self.count.fetch_sub(old.count_ones().into(), Relaxed);
        }
        Ok(())
    }
}

/// Bytes of the words over a size.
pub(super) fn bytes(shift: u32, size: u64) -> u64 {
    granules(shift, size).div_ceil(64) * 8
}

fn granules(shift: u32, size: u64) -> u64 {
    (size >> shift) + u64::from(size & ((1 << shift) - 1) != 0)
}
