//! Guest memory: memfd regions that a backend maps too, and the only place that turns them into references.
//!
//! Used by `queue`, `fast`, `disk` and by tests that place bytes by hand. Everything handed out is either atomic
//! cells or copies, because the backend may write any byte at any time; plain references into a region must not
//! leave this file.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::{Error, Result};
use crate::wire::MemoryRegion;

/// Integers that two processes may touch at once.
pub trait Cell: sealed::Sealed + Sync {}
mod sealed {
    pub trait Sealed {}
}
macro_rules! cells {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Cell for $t {})* };
}
cells!(AtomicU8, AtomicU16, AtomicU32, AtomicU64);

#[derive(Debug)]
struct Mapping {
    gpa: u64,
    len: usize,
    base: NonNull<u8>,
    fd: OwnedFd,
    offset: u64,
}

// SAFETY: the mapping is shared memory that is only reached through atomics and raw copies, which need no owner
// thread; address and length never change after creation.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a plain reference into the mapping.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are exactly what mmap returned, and every `Cells` holds the region alive, so
        // nothing points into the mapping any more. A failure cannot be acted upon here.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// One region of guest memory, shared with the backend through its memfd. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Region(Arc<Mapping>);

impl Region {
    /// Creates a region of `len` bytes at guest address `gpa`, sealed against shrinking as QEMU's memfd backend
    /// seals its own; `len` is rounded up to 4 KiB.
    ///
    /// # Errors
    /// `Io` when the kernel refuses the memory.
    pub fn new(gpa: u64, len: u64) -> Result<Self> {
        let fd = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(Error::io("memfd_create"))?;
        let len = len.next_multiple_of(4096);
        ftruncate(&fd, len).map_err(Error::io("sizing guest memory"))?;
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(Error::io("sealing guest memory"))?;
        Self::from_fd(gpa, len, fd, 0)
    }

    /// Maps `len` bytes of `fd` from `offset` as a region; for tests with memory of their own making (unsealed,
    /// truncated later, a file).
    ///
    /// # Errors
    /// `Io` when it cannot be mapped.
    pub fn from_fd(gpa: u64, len: u64, fd: OwnedFd, offset: u64) -> Result<Self> {
        let len = usize::try_from(len).map_err(|_| Error::Usage("region too long".into()))?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let base = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, offset)
        }
        .map_err(Error::io("mapping guest memory"))?;
        let base = NonNull::new(base.cast()).ok_or_else(|| Error::Usage("mapped at address zero".into()))?;
        Ok(Self(Arc::new(Mapping { gpa, len, base, fd, offset })))
    }

    /// First guest physical address.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.0.gpa
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len as u64
    }

    /// Whether the region has no bytes; it never does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The descriptor to pass to the backend.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// What the memory table says of this region. The user address is the true one, as in QEMU.
    #[must_use]
    pub fn describe(&self) -> MemoryRegion {
        MemoryRegion {
            guest_addr: self.0.gpa,
            size: self.0.len as u64,
            user_addr: self.0.base.as_ptr() as u64,
            mmap_offset: self.0.offset,
        }
    }

    fn check(&self, gpa: u64, len: usize) -> Result<usize> {
        gpa.checked_sub(self.0.gpa)
            .and_then(|offset| usize::try_from(offset).ok())
            .filter(|&offset| offset.checked_add(len).is_some_and(|end| end <= self.0.len))
            .ok_or_else(|| Error::Usage(format!("{len} bytes at {gpa:#x} are not in the region")))
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// `Usage` when the range is not in the region.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<()> {
        let offset = self.check(gpa, into.len())?;
        // SAFETY: check() keeps offset+len inside the mapping; `into` is ours alone, so they do not overlap. The
        // other process may write meanwhile: the copy then holds a mix, which is all the caller may assume.
        unsafe {
            let from = self.0.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
        Ok(())
    }

    /// Copies bytes into guest memory.
    ///
    /// # Errors
    /// `Usage` when the range is not in the region.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        let offset = self.check(gpa, from.len())?;
        // SAFETY: as in read(), the other way round.
        unsafe {
            let to = self.0.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
        Ok(())
    }

    /// `count` atomic integers starting at `gpa`.
    ///
    /// # Errors
    /// `Usage` when the range is not in the region or not aligned for `T`.
    pub fn cells<T: Cell>(&self, gpa: u64, count: usize) -> Result<Cells<T>> {
        let bytes = count.checked_mul(size_of::<T>()).ok_or_else(|| Error::Usage("too many cells".into()))?;
        let offset = self.check(gpa, bytes)?;
        // SAFETY: check() keeps offset inside the mapping, which one allocation covers.
        let first = unsafe { self.0.base.add(offset) }.cast::<T>();
        if !first.is_aligned() {
            return Err(Error::Usage(format!("{gpa:#x} is not aligned to {}", align_of::<T>())));
        }
        Ok(Cells { first, count, _region: self.clone() })
    }
}

/// A run of atomic integers in guest memory; derefs to a slice and keeps its region mapped.
#[derive(Debug)]
pub struct Cells<T: Cell> {
    first: NonNull<T>,
    count: usize,
    _region: Region,
}

// SAFETY: the cells are atomics in memory that the region keeps mapped; any thread may use them.
unsafe impl<T: Cell> Send for Cells<T> {}
// SAFETY: as above.
unsafe impl<T: Cell> Sync for Cells<T> {}

impl<T: Cell> Deref for Cells<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `cells()` checked range and alignment, the region is held alive by `_region`, every bit pattern
        // is a valid integer, and atomics allow the other process to write at the same time.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

/// Guest memory as the front end sees it: regions and a simple allocator over them.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
    /// First unused guest address per region, same order.
    next: Vec<u64>,
    /// Returned blocks by size; sizes are powers of two.
    free: BTreeMap<u64, Vec<u64>>,
}

impl GuestMemory {
    /// Creates one region per (guest address, length in bytes).
    ///
    /// # Errors
    /// `Io` when the kernel refuses the memory.
    pub fn new(layout: &[(u64, u64)]) -> Result<Self> {
        let mut memory = Self::default();
        for &(gpa, len) in layout {
            memory.add(Region::new(gpa, len)?);
        }
        Ok(memory)
    }

    /// Adds a region; tell the backend separately.
    pub fn add(&mut self, region: Region) {
        self.next.push(region.gpa());
        self.regions.push(region);
    }

    /// Removes the region that starts at `gpa`; blocks in it must not be used again.
    pub fn remove(&mut self, gpa: u64) -> Option<Region> {
        let at = self.regions.iter().position(|region| region.gpa() == gpa)?;
        self.next.remove(at);
        let region = self.regions.remove(at);
        for blocks in self.free.values_mut() {
            blocks.retain(|&block| region.check(block, 1).is_err());
        }
        Some(region)
    }

    /// The regions in the order they were added.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region that holds `len` bytes at `gpa`.
    ///
    /// # Errors
    /// `Usage` when none does.
    pub fn region(&self, gpa: u64, len: usize) -> Result<&Region> {
        self.regions
            .iter()
            .find(|region| region.check(gpa, len).is_ok())
            .ok_or_else(|| Error::Usage(format!("{len} bytes at {gpa:#x} are in no region")))
    }

    /// Copies guest memory out of one region.
    ///
    /// # Errors
    /// `Usage` when no region holds the range.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<()> {
        self.region(gpa, into.len())?.read(gpa, into)
    }

    /// Copies bytes into one region.
    ///
    /// # Errors
    /// `Usage` when no region holds the range.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        self.region(gpa, from.len())?.write(gpa, from)
    }

    /// Takes `len` bytes whose address is a multiple of `align` (a power of two) from the first region with room.
    ///
    /// # Errors
    /// `Usage` when no region has room.
    pub fn allocate(&mut self, len: u64, align: u64) -> Result<u64> {
        let order: Vec<usize> = (0..self.regions.len()).collect();
        self.allocate_in(&order, len, align)
    }

    /// As `allocate`, trying only the regions with these positions, in this order.
    ///
    /// # Errors
    /// `Usage` when none has room.
    pub fn allocate_in(&mut self, order: &[usize], len: u64, align: u64) -> Result<u64> {
        for &at in order {
            let (Some(region), Some(next)) = (self.regions.get(at), self.next.get_mut(at)) else { continue };
            let start = next.next_multiple_of(align);
            if start.checked_add(len).is_some_and(|end| end <= region.gpa() + region.len()) {
                *next = start + len;
                return Ok(start);
            }
        }
        Err(Error::Usage(format!("no room for {len} bytes in guest memory")))
    }

    /// A block for one request: rounded up to a power of two of at least 16 bytes and aligned to its size (to a
    /// page at most); give it back with `release`.
    ///
    /// # Errors
    /// `Usage` when memory is used up.
    pub fn block(&mut self, len: u64) -> Result<u64> {
        let class = len.max(16).next_power_of_two();
        if let Some(gpa) = self.free.get_mut(&class).and_then(Vec::pop) {
            return Ok(gpa);
        }
        self.allocate(class, class.min(4096))
    }

    /// Gives back a block of `len` bytes that came from `block`.
    pub fn release(&mut self, gpa: u64, len: u64) {
        self.free.entry(len.max(16).next_power_of_two()).or_default().push(gpa);
    }
}

#[cfg(test)]
mod tests;
