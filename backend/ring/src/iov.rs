//! A piece of guest memory as the host sees it, and the only two functions that copy between it and this process.
//! `memory`, `chain` and `walk` call; nobody here checks whether the memory is still mapped: that is the epoch's job.

use std::ptr;

/// A run of guest memory in this process's address space: layout of the kernel's `struct iovec`.
///
/// Plain data: it may be copied, sent and kept, and doing so is safe. *Using* it is what needs care: the bytes are
/// mapped for as long as the [`crate::Memory`] it was made by (the epoch) is alive, and the guest may change them at
/// any moment. So: hold an `Arc<Memory>` of that epoch until the kernel or the device is done with it, and never
/// make a Rust reference to the bytes. It cannot be made from numbers, only from a [`crate::Memory`], and
/// only be narrowed.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct GuestIov(libc::iovec);

// SAFETY: a GuestIov is an address and a length. Nothing can be done with it in safe code but look at the numbers and
// narrow them, so moving it to, or sharing it with, another thread cannot touch memory.
unsafe impl Send for GuestIov {}
// SAFETY: as above; it has no interior mutability.
unsafe impl Sync for GuestIov {}

impl GuestIov {
    /// No bytes at all.
    pub const EMPTY: Self = Self(libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 });

    /// `len` bytes at `base`; the crate's own promise is that they lie in one mapping.
    #[inline]
    pub(crate) fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// Host address of the first byte.
    #[inline]
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are no bytes.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The part `[offset, offset + len)`, cut off at the end of `self` (possibly empty).
    #[inline]
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.len());
        Self::new(self.base().wrapping_add(offset), len.min(self.len() - offset))
    }

    /// The same list as the system calls want it; no copy.
    #[inline]
    #[must_use]
    pub fn as_iovecs(list: &[Self]) -> &[libc::iovec] {
        // SAFETY: GuestIov is repr(transparent) over libc::iovec, so the element layout is the same; the lifetime of
        // the result is that of `list`. Nothing is dereferenced.
        unsafe { std::slice::from_raw_parts(list.as_ptr().cast(), list.len()) }
    }
}

/// Appends the part `[offset, offset + len)` of the bytes that `list` describes to `out`.
///
/// Stops at the end of `list`: the caller compares lengths first if that matters. Allocates only what `out` lacks.
pub fn slice_iovs(list: &[GuestIov], mut offset: u64, mut len: u64, out: &mut Vec<GuestIov>) {
    for iov in list {
        if len == 0 {
            return;
        }
        let have = iov.len() as u64;
        if offset >= have {
            offset -= have;
            continue;
        }
        // Both fit usize: they are bounded by iov.len().
        let take = (have - offset).min(len);
        out.push(iov.slice(offset as usize, take as usize));
        offset = 0;
        len -= take;
    }
}

/// A 64-bit word at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Word(u64);

/// From this many bytes on a copy goes through `memcpy` in a function of its own.
const BULK: usize = 256;

/// Copies out of guest memory, each byte read exactly once.
///
/// Volatile (or, for bulk, opaque to the optimiser), because a compiler that believes the source to be stable may
/// read it again after the copy was validated.
///
/// # Safety
/// `src .. src + dst.len()` lies in one live mapping that is readable, and no Rust reference covers it.
#[inline]
pub(crate) unsafe fn copy_in(src: *const u8, dst: &mut [u8]) {
    if dst.len() >= BULK {
        // SAFETY: the caller's promise is passed on unchanged.
        unsafe { bulk(src, dst.as_mut_ptr(), dst.len()) };
        return;
    }
    let mut at = 0;
    let mut words = dst.chunks_exact_mut(8);
    for word in &mut words {
        // SAFETY: at + 8 <= dst.len(), so the word is inside the range the caller vouched for; Word has alignment 1
        // and no invalid bit patterns; volatile, since the guest writes concurrently.
        let value = unsafe { ptr::read_volatile(src.add(at).cast::<Word>()) };
        word.copy_from_slice(&{ value.0 }.to_ne_bytes());
        at += 8;
    }
    for byte in words.into_remainder() {
        // SAFETY: at < dst.len(), as above, one byte.
        *byte = unsafe { ptr::read_volatile(src.add(at)) };
        at += 1;
    }
}

/// Copies into guest memory.
///
/// # Safety
/// `dst .. dst + src.len()` lies in one live mapping that is writable, and no Rust reference covers it.
#[inline]
pub(crate) unsafe fn copy_out(src: &[u8], dst: *mut u8) {
    if let [byte] = src {
        // SAFETY: the one byte is inside the range the caller vouched for.
        unsafe { ptr::write_volatile(dst, *byte) };
        return;
    }
    // SAFETY: the caller's promise is passed on unchanged.
    unsafe { bulk(src.as_ptr(), dst, src.len()) };
}

/// `memcpy` between this process and guest memory, kept out of line so that no caller's optimiser can look through it
/// and replace a later read of the copy by a second read of guest memory.
///
/// # Safety
/// Both ranges are valid for `len` bytes; one of them is guest memory, which Rust objects never overlap.
#[inline(never)]
unsafe fn bulk(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise; the guest may write at the same time from outside of this program, which leaves
    // arbitrary bytes but nothing undefined, since every byte is a valid u8.
    unsafe { ptr::copy_nonoverlapping(src, dst, len) };
}

/// Fills guest memory with zeroes.
///
/// # Safety
/// `dst .. dst + len` lies in one live mapping that is writable, and no Rust reference covers it.
#[inline(never)]
pub(crate) unsafe fn zero_out(dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise is passed on unchanged.
    unsafe { ptr::write_bytes(dst, 0, len) };
}

/// Reads one 16-byte descriptor: `(addr, len | flags << 32 | next << 48)`, little endian undone.
///
/// # Safety
/// The 16 bytes at `src` lie in one live mapping that is readable. Any alignment will do (indirect tables have none).
#[inline(always)]
pub(crate) unsafe fn read_descriptor(src: *const u8) -> (u64, u64) {
    // SAFETY: 16 bytes are readable by the caller's promise; alignment 1; volatile, so each word is read once.
    let (low, high) =
        unsafe { (ptr::read_volatile(src.cast::<Word>()), ptr::read_volatile(src.add(8).cast::<Word>())) };
    (u64::from_le(low.0), u64::from_le(high.0))
}
