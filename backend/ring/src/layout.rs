//! Where the three tables of a split ring lie, and every access to their fixed fields. Only `split` calls: it owns the
//! memory the pointers point into. What the tables mean is not known here.

use std::sync::atomic::AtomicU16;

use crate::error::QueueError;
use crate::memory::Memory;
use crate::split::UsedElement;
use crate::walk::DESCRIPTOR;

/// Largest virtqueue of the specification (virtio 1.3 §2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// `flags` and `idx` before the entries of the available and the used ring (§2.7.6, §2.7.8).
const HEADER: usize = 4;
/// Bytes of a used element (§2.7.8).
const USED_ELEMENT: usize = 8;
/// `used_event` and `avail_event` after the entries (§2.7.6, §2.7.8); there whether or not negotiated.
const EVENT: usize = 2;

/// Addresses of a ring in the front end's address space (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table: 16 bytes an entry, aligned to 16.
    pub descriptors: u64,
    /// Available ring: 6 bytes and 2 an entry, aligned to 2.
    pub available: u64,
    /// Used ring: 6 bytes and 8 an entry, aligned to 4.
    pub used: u64,
}

/// Host pointers to the tables of a ring of `size` entries.
///
/// Invariant, established by [`Rings::resolve`]: each table lies as a whole in one mapping of the `Memory` it was
/// resolved in, and is aligned as the specification asks. The unsafe methods need that memory to be alive.
#[derive(Clone, Copy)]
pub(crate) struct Rings {
    descriptors: *const u8,
    avail: *mut u8,
    used: *mut u8,
    /// All lengths follow from this one number, kept beside the pointers.
    size: u16,
}

impl Rings {
    /// Looks the tables up; `size` is at most [`MAX_QUEUE_SIZE`].
    pub fn resolve(memory: &Memory, at: &RingAddresses, size: u16) -> Result<Self, QueueError> {
        let n = usize::from(size);
        let table = |name: &'static str, addr: u64, len: usize, align: usize| {
            let len = len as u64;
            let host = memory.resolve_user(addr, len).map_err(|_| QueueError::RingUnmapped {
                table: name,
                addr,
                len,
            })?;
            // The host address decides about atomics; a front end whose addresses differ in the low bits is refused, too.
            if !host.addr().is_multiple_of(align) || !addr.is_multiple_of(align as u64) {
                return Err(QueueError::RingUnaligned { table: name, addr });
            }
            Ok(host)
        };
        Ok(Self {
            descriptors: table("descriptor table", at.descriptors, DESCRIPTOR * n, 16)?,
            avail: table("available ring", at.available, HEADER + 2 * n + EVENT, 2)?,
            used: table("used ring", at.used, HEADER + USED_ELEMENT * n + EVENT, 4)?,
            size,
        })
    }

    /// The descriptor table.
    #[inline(always)]
    pub fn descriptors(&self) -> *const u8 {
        self.descriptors
    }

    /// A 16-bit field at `offset` bytes.
    ///
    /// # Safety
    /// The field lies in the table at `table`, whose memory is alive for `'a`; `offset` is even.
    #[inline(always)]
    unsafe fn field<'a>(table: *mut u8, offset: usize) -> &'a AtomicU16 {
        // SAFETY: inside the mapping and aligned to 2 (table and offset are); the guest's accesses from outside of this
        // program are what an atomic is for, and here all accesses to the field go through it.
        unsafe { AtomicU16::from_ptr(table.add(offset).cast()) }
    }

    /// `avail.flags`.
    ///
    /// # Safety
    /// The memory is alive for `'a`. The same holds for all below.
    #[inline(always)]
    pub unsafe fn avail_flags<'a>(&self) -> &'a AtomicU16 {
        // SAFETY: offset 0 of at least 6 bytes; alive by the caller's promise.
        unsafe { Self::field(self.avail, 0) }
    }

    /// `avail.idx`.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`].
    #[inline(always)]
    pub unsafe fn avail_idx<'a>(&self) -> &'a AtomicU16 {
        // SAFETY: offset 2 of at least 6 bytes; alive by the caller's promise.
        unsafe { Self::field(self.avail, 2) }
    }

    /// `avail.ring[slot]`.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`]; `slot` is below the size.
    #[inline(always)]
    pub unsafe fn avail_entry(&self, slot: u16) -> u16 {
        debug_assert!(slot < self.size);
        // SAFETY: slot < size, so the entry is inside the table; alive by the caller's promise.
        let entry = unsafe { Self::field(self.avail, HEADER + 2 * usize::from(slot)) };
        // Relaxed: ordered by the Acquire load of the index that covers it.
        u16::from_le(entry.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// `avail.used_event`.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`].
    #[inline(always)]
    pub unsafe fn used_event<'a>(&self) -> &'a AtomicU16 {
        // SAFETY: the two bytes after `size` entries, which `resolve` counted; alive by the caller's promise.
        unsafe { Self::field(self.avail, HEADER + 2 * usize::from(self.size)) }
    }

    /// `used.flags`.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`].
    #[inline(always)]
    pub unsafe fn used_flags<'a>(&self) -> &'a AtomicU16 {
        // SAFETY: offset 0 of at least 6 bytes; alive by the caller's promise.
        unsafe { Self::field(self.used, 0) }
    }

    /// `used.idx`.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`].
    #[inline(always)]
    pub unsafe fn used_idx<'a>(&self) -> &'a AtomicU16 {
        // SAFETY: offset 2 of at least 6 bytes; alive by the caller's promise.
        unsafe { Self::field(self.used, 2) }
    }

    /// `used.avail_event`.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`].
    #[inline(always)]
    pub unsafe fn avail_event<'a>(&self) -> &'a AtomicU16 {
        // SAFETY: the two bytes after `size` elements, which `resolve` counted; alive by the caller's promise.
        unsafe { Self::field(self.used, HEADER + USED_ELEMENT * usize::from(self.size)) }
    }

    /// Writes `used.ring[slot]`: the one place that does, so the place where a dirty log would be kept.
    ///
    /// # Safety
    /// As for [`Rings::avail_flags`]; `slot` is below the size.
    #[inline(always)]
    pub unsafe fn write_used(&self, slot: u16, element: UsedElement) {
        debug_assert!(slot < self.size);
        // SAFETY: slot < size, so the 8 bytes are inside the table; it is aligned to 4 and so are header and elements.
        // Volatile: the driver reads from outside of this program, after the Release store of the index.
        unsafe {
            let at = self.used.add(HEADER + USED_ELEMENT * usize::from(slot)).cast::<u32>();
            at.write_volatile(u32::from(element.head).to_le());
            at.add(1).write_volatile(element.len.to_le());
        }
    }

    /// Asks the cache for a descriptor.
    #[inline(always)]
    pub fn prefetch_descriptor(&self, index: u16) {
        prefetch(self.descriptors.wrapping_add(DESCRIPTOR * usize::from(index)));
    }
}

/// Asks the cache for the line at `at`, wherever that is.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch is a hint: it never faults and changes nothing a program can see, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}
