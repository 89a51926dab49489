//! Words in memory that can be given back to the kernel while others look at them.
//!
//! For caches that are read without a lock: what is given back reads as zeroes, from the next look on or the one after, and is
//! there again when it is written to. Must not know what the words mean; whoever keeps such a cache sees to it that
//! nobody takes the zeroes for content.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// See the module's page. Zeroes at first, which take no memory.
#[derive(Debug)]
pub struct WordPages {
    memory: Memory,
    count: usize,
}

#[derive(Debug)]
enum Memory {
    Mapped(NonNull<AtomicU64>),
    /// The kernel has no mapping left for us: ordinary memory, which stays.
    Heap(Box<[AtomicU64]>),
}

// SAFETY: the mapping belongs to this value alone and consists of atomics, which any thread may use.
unsafe impl Send for WordPages {}
// SAFETY: as above.
unsafe impl Sync for WordPages {}

/// Size of a page, bytes.
fn page() -> usize {
    // SAFETY: asks a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(4096) as usize
}

impl WordPages {
    /// `count` words.
    pub fn new(count: usize) -> WordPages {
        let bytes = count.saturating_mul(8).max(8);
        // SAFETY: a new private mapping at a place the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let mapped = if at == libc::MAP_FAILED { None } else { NonNull::new(at.cast::<AtomicU64>()) };
        let heap = || Memory::Heap(std::iter::repeat_with(AtomicU64::default).take(count).collect());
        WordPages { memory: mapped.map_or_else(heap, Memory::Mapped), count }
    }

    /// All of them.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        match &self.memory {
            // SAFETY: the mapping is at least that long, aligned to pages, lives as long as `self`, and every bit pattern is a
            // value. What the kernel zeroes in `release` changes under shared references to atomics, as any store may.
            Memory::Mapped(at) => unsafe { std::slice::from_raw_parts(at.as_ptr(), self.count) },
            Memory::Heap(words) => words,
        }
    }

    /// How many words a page has: ranges given back should begin and end at multiples.
    pub fn words_per_page() -> usize {
        page() / 8
    }

    /// Gives the memory of these words back, as far as they fill whole pages; they read as zeroes then. Whoever stores to them
    /// at the same time may find the store gone.
    pub fn release(&self, range: Range<usize>) {
        let per_page = WordPages::words_per_page();
        let (from, to) =
            (range.start.next_multiple_of(per_page), range.end.min(self.count) / per_page * per_page);
        if from >= to {
            return;
        }
        match &self.memory {
            Memory::Mapped(at) => {
                // SAFETY: `from..to` lies inside of the mapping, and is private anonymous memory, which reads as zeroes
                // afterwards; nothing but atomics is there. Failing leaves it as it is.
                unsafe {
                    libc::madvise(
                        at.as_ptr().add(from).cast::<c_void>(),
                        (to - from) * 8,
                        libc::MADV_DONTNEED,
                    );
                }
            }
            Memory::Heap(words) => {
                words.iter().take(to).skip(from).for_each(|w| w.store(0, Relaxed));
            }
        }
    }
}

impl Drop for WordPages {
    fn drop(&mut self) {
        if let Memory::Mapped(at) = self.memory {
            // SAFETY: mapped in `new` with this length, and nobody has a reference any more.
            unsafe { libc::munmap(at.as_ptr().cast::<c_void>(), self.count.saturating_mul(8).max(8)) };
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_given_back_is_zero_and_can_be_used_again() {
        let per_page = WordPages::words_per_page();
        let pages = WordPages::new(3 * per_page + 5);
        assert_eq!(pages.words().len(), 3 * per_page + 5);
        for (i, word) in pages.words().iter().enumerate() {
            assert_eq!(word.swap(i as u64 + 1, Relaxed), 0);
        }
        // A page and two halves: the halves stay.
        pages.release(per_page / 2..2 * per_page + per_page / 2);
        for (i, word) in pages.words().iter().enumerate() {
            let gone = (per_page..2 * per_page).contains(&i);
            assert_eq!(word.load(Relaxed), if gone { 0 } else { i as u64 + 1 });
        }
        pages.words()[per_page].store(7, Relaxed);
        assert_eq!(pages.words()[per_page].load(Relaxed), 7);
        pages.release(0..usize::MAX);
        // The last page is not whole.
        assert_eq!(pages.words()[3 * per_page + 4].load(Relaxed), 3 * per_page as u64 + 5);
    }
}
