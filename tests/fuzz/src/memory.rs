//! An allocator that counts, so that a run can say how much memory an input made the code take.
//!
//! Used by `main` alone. Counts are process-wide; the fuzzer is single-threaded.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
pub struct Counting;

fn grown(by: usize) {
    let now = NOW.fetch_add(by, Relaxed) + by;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: every method hands its arguments on to `System` unchanged and returns what that returned; counting touches
// only two atomics and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise about `layout` is the one `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: as `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `ptr` came from `System` through this allocator with this layout; the caller promises so.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Both exist for a moment at worst.
        grown(new_size);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as `dealloc`; the caller promises that `new_size` is valid for the layout's alignment.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// Starts a measurement: forgets the peak; answers what is allocated now, bytes.
pub fn start() -> usize {
    let now = NOW.load(Relaxed);
    PEAK.store(now, Relaxed);
    now
}

/// The peak since [`start`], bytes above what it answered.
pub fn peak(since: usize) -> usize {
    PEAK.load(Relaxed).saturating_sub(since)
}
