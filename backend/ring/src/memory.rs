//! The guest memory table of one moment (an epoch), flattened for the fast path. Sessions build it, queues and requests
//! hold it by `Arc`. It must not know rings or messages, and it never changes: a new table is a new `Memory`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::MemoryError;
use crate::iov::{self, GuestIov};
use crate::region::{Mapped, Region};
use crate::vanish;

#[cfg(test)]
mod tests;

/// Most regions one table may have: what QEMU's memory slots and Linux's vhost allow.
pub const MAX_REGIONS: usize = 509;

/// One region as the fast path sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flat {
    /// First guest physical address.
    start: u64,
    /// Size in bytes.
    size: u64,
    /// Host address of the first byte.
    host: *mut u8,
}

impl Flat {
    /// Contains no address.
    pub const NOTHING: Self = Self { start: 0, size: 0, host: std::ptr::null_mut() };

    /// Host address of `gpa` when all of `len` bytes from there are in this region.
    #[inline(always)]
    pub fn resolve(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let offset = gpa.wrapping_sub(self.start);
        // The subtraction cannot wrap where it is evaluated; `len` is not added to anything, so nothing overflows.
        if offset < self.size && len <= self.size - offset {
            Some(self.host.wrapping_add(offset as usize))
        } else {
            None
        }
    }
}

/// All guest memory of one epoch: who holds an `Arc` of it may use the addresses it gave out.
///
/// Dropping the last `Arc` unmaps what no later epoch shares. For a large guest that takes milliseconds, so an iothread
/// sends its last `Arc` to the thread that made it instead of dropping it.
///
/// # Files that get shorter
/// A front end that truncates a memory file makes the pages behind it vanish: touching them is SIGBUS. Only the
/// accesses this process makes itself are at risk (rings, indirect tables, headers, status bytes, bounce copies); system
/// calls on guest memory fail with EFAULT. QEMU and current cloud-hypervisor seal their memfds, so that it cannot happen
/// ([`Memory::is_sealed_against_shrink`]); for other files a handler puts zero pages there, and [`Memory::is_lost`] says
/// that the rings of this front end must stop.
pub struct Memory {
    /// Tells epochs apart; never 0.
    epoch: u64,
    /// Sorted by guest address, no overlaps, same order as `regions`.
    flat: Box<[Flat]>,
    regions: Box<[Arc<Mapped>]>,
}

// SAFETY: `Flat::host` are addresses inside mappings that `regions` own for the whole life of the value (Mapped is
// Send + Sync: MmapRegion says so). All accesses to the bytes behind them go through volatile or opaque copies that
// tolerate concurrent writers, which is the nature of guest memory, so threads may share and move the table.
unsafe impl Send for Memory {}
// SAFETY: as above; the table itself is never written after construction.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps the regions of a SET_MEM_TABLE message, in any order.
    ///
    /// # Errors
    /// The first region that is impossible, overlaps another, or is not covered by its file; nothing stays mapped.
    pub fn map(regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooManyRegions);
        }
        let mapped =
            regions.into_iter().map(|r| Mapped::new(r).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        Self::build(mapped)
    }

    /// Takes over the mappings of a `vm-memory` table, which must not track dirty pages.
    ///
    /// User addresses are set to the guest physical ones, so a ring's addresses are given as guest addresses. For running
    /// below a stock vhost-user daemon, which translates before it tells.
    ///
    /// # Errors
    /// As for [`Memory::map`].
    pub fn from_vm_memory(table: &GuestMemoryMmap<()>) -> Result<Self, MemoryError> {
        let mapped = table
            .iter()
            .map(|r| Mapped::adopt(r.start_addr().0, r.start_addr().0, r.get_mmap()).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        Self::build(mapped)
    }

    /// Private zeroed memory without a file: `(guest address, user address, size in bytes)` each. For tests and
    /// measurements.
    ///
    /// # Errors
    /// As for [`Memory::map`].
    pub fn anonymous(layout: &[(u64, u64, usize)]) -> Result<Self, MemoryError> {
        let mapped = layout
            .iter()
            .map(|&(guest, user, size)| Mapped::anonymous(guest, user, size).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        Self::build(mapped)
    }

    /// The next epoch with one region more (ADD_MEM_REG); all others are shared with this one.
    ///
    /// # Errors
    /// As for [`Memory::map`]; this epoch is untouched.
    pub fn with_added(&self, region: Region) -> Result<Self, MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooManyRegions);
        }
        let mut mapped = self.regions.to_vec();
        mapped.push(Arc::new(Mapped::new(region)?));
        Self::build(mapped)
    }

    /// The next epoch without one region (REM_MEM_REG), which is named by its addresses and size.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchRegion`] when no region matches in all three.
    pub fn with_removed(&self, guest_addr: u64, user_addr: u64, size: u64) -> Result<Self, MemoryError> {
        let is_it = |r: &Mapped| r.guest_addr == guest_addr && r.user_addr == user_addr && r.size == size;
        let kept: Vec<_> = self.regions.iter().filter(|r| !is_it(r)).cloned().collect();
        if kept.len() == self.regions.len() {
            return Err(MemoryError::NoSuchRegion { guest_addr });
        }
        Self::build(kept)
    }

    /// Sorts, checks for overlaps, flattens.
    fn build(mut regions: Vec<Arc<Mapped>>) -> Result<Self, MemoryError> {
        static EPOCHS: AtomicU64 = AtomicU64::new(1);
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooManyRegions);
        }
        regions.sort_unstable_by_key(|r| r.guest_addr);
        for pair in regions.windows(2) {
            // No overflow: `Mapped` refused regions whose end is not an address.
            if let [low, high] = pair
                && low.guest_addr + low.size > high.guest_addr
            {
                return Err(MemoryError::Overlap { guest_addr: high.guest_addr });
            }
        }
        let flat =
            regions.iter().map(|r| Flat { start: r.guest_addr, size: r.size, host: r.host() }).collect();
        // Relaxed: only uniqueness matters.
        let epoch = EPOCHS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { epoch, flat, regions: regions.into_boxed_slice() })
    }

    /// Number that no other epoch of this process has.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Address and length of each region's mapping in this process.
    pub(crate) fn host_ranges(&self) -> Vec<(usize, usize)> {
        self.flat.iter().map(|r| (r.host.addr(), r.size as usize)).collect()
    }

    /// How many regions the table has.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Guest memory in bytes.
    #[must_use]
    pub fn total_size(&self) -> u64 {
        // Cannot wrap: the regions are disjoint ranges of u64.
        self.regions.iter().map(|r| r.size).sum()
    }

    /// Whether no region can lose its pages because somebody truncates a file (F_SEAL_SHRINK, or no file at all).
    #[must_use]
    pub fn is_sealed_against_shrink(&self) -> bool {
        self.regions.iter().all(|r| r.sealed)
    }

    /// Whether pages were found missing because somebody truncated a file: what is read there are zeroes, and nobody sees
    /// what is written.
    #[inline]
    #[must_use]
    pub fn is_lost(&self) -> bool {
        vanish::any() && self.regions.iter().any(|r| r.is_lost())
    }

    /// Appends the host segments of `len` bytes at guest address `gpa` to `out`: one, or several when the range spans
    /// adjacent regions. An empty range gives none, wherever it is.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] when a byte of the range is in no region; `out` is then as it was.
    pub fn translate(&self, gpa: u64, len: u64, out: &mut Vec<GuestIov>) -> Result<(), MemoryError> {
        let before = out.len();
        let mut hint = Flat::NOTHING;
        if self.translate_slow(&mut hint, gpa, len, usize::MAX, out).is_none() {
            out.truncate(before);
            return Err(MemoryError::Unmapped { addr: gpa, len });
        }
        Ok(())
    }

    /// Translation for whoever keeps the last region hit in `hint` (which must come from this very table): the common
    /// case is two comparisons. `None` when a byte is unmapped or `out` would grow beyond `max`; `out` may then hold
    /// a part.
    #[inline(always)]
    pub(crate) fn translate_hinted(
        &self,
        hint: &mut Flat,
        gpa: u64,
        len: u64,
        max: usize,
        out: &mut Vec<GuestIov>,
    ) -> Option<()> {
        if let Some(host) = hint.resolve(gpa, len)
            && out.len() < max
        {
            // len <= the region's size, which fits isize.
            out.push(GuestIov::new(host, len as usize));
            return Some(());
        }
        self.translate_slow(hint, gpa, len, max, out)
    }

    /// Region by region, by binary search.
    #[cold]
    #[inline(never)]
    fn translate_slow(
        &self,
        hint: &mut Flat,
        mut gpa: u64,
        mut len: u64,
        max: usize,
        out: &mut Vec<GuestIov>,
    ) -> Option<()> {
        while len > 0 {
            let region = self.find(gpa)?;
            let take = len.min(region.size - (gpa - region.start));
            if out.len() >= max {
                return None;
            }
            out.push(GuestIov::new(region.resolve(gpa, take)?, take as usize));
            *hint = region;
            len -= take;
            // The end of a region may be 2^64 - 1 at most (see `Mapped`), so this cannot wrap while len > 0 matters:
            // if it did, no region would hold the next address and `find` would say so.
            gpa = gpa.checked_add(take)?;
        }
        Some(())
    }

    /// The region that holds `gpa`.
    fn find(&self, gpa: u64) -> Option<Flat> {
        let after = self.flat.partition_point(|r| r.start <= gpa);
        let region = *self.flat.get(after.checked_sub(1)?)?;
        (gpa - region.start < region.size).then_some(region)
    }

    /// Host address of `len` bytes (not zero) that the front end knows under `user_addr`, as a whole in one region.
    ///
    /// Several regions may share user addresses (aliases of the same memory): the one with the lowest guest address
    /// that holds all of the range wins.
    pub(crate) fn resolve_user(&self, user_addr: u64, len: u64) -> Result<*mut u8, MemoryError> {
        let mut touched = false;
        for region in &self.regions {
            let offset = user_addr.wrapping_sub(region.user_addr);
            if offset >= region.size {
                continue;
            }
            if len <= region.size - offset {
                // offset < size, which fits isize.
                return Ok(region.host().wrapping_add(offset as usize));
            }
            touched = true;
        }
        Err(if touched {
            MemoryError::CrossesRegion { addr: user_addr, len }
        } else {
            MemoryError::Unmapped { addr: user_addr, len }
        })
    }

    /// Guest physical address of what the front end knows under `user_addr`, if it is guest memory.
    #[must_use]
    pub fn user_to_guest(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = user_addr.wrapping_sub(r.user_addr);
            (offset < r.size).then(|| r.guest_addr + offset)
        })
    }

    /// The guest address behind a host address, for tests that look at segments.
    #[cfg(test)]
    pub(crate) fn guest_of_host(&self, host: *const u8) -> Option<u64> {
        self.flat.iter().find_map(|r| {
            let offset = (host.addr() as u64).wrapping_sub(r.host.addr() as u64);
            (offset < r.size).then(|| r.start + offset)
        })
    }

    /// Copies `out.len()` bytes from guest address `gpa`, each read once. Not for the path of a request.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`]; nothing was copied.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let mut segments = Vec::new();
        self.translate(gpa, out.len() as u64, &mut segments)?;
        let mut rest = out;
        for segment in &segments {
            let Some((part, tail)) = rest.split_at_mut_checked(segment.len()) else { break };
            // SAFETY: the segment was just made from this table, whose mappings live while `self` is borrowed.
            unsafe { iov::copy_in(segment.base(), part) };
            rest = tail;
        }
        Ok(())
    }

    /// Copies `data` to guest address `gpa`. Not for the path of a request.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`]; nothing was copied.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut segments = Vec::new();
        self.translate(gpa, data.len() as u64, &mut segments)?;
        let mut rest = data;
        for segment in &segments {
            let Some((part, tail)) = rest.split_at_checked(segment.len()) else { break };
            // SAFETY: the segment was just made from this table, whose mappings live while `self` is borrowed, and are
            // writable (PROT_WRITE in `Mapped`).
            unsafe { iov::copy_out(part, segment.base()) };
            rest = tail;
        }
        Ok(())
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("epoch", &self.epoch)
            .field("regions", &self.regions.len())
            .field("size", &self.total_size())
            .finish()
    }
}
