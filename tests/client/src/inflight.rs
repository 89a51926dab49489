//! The area in which a backend tracks requests in flight, read from the front end's side.
//!
//! Kept by `session` across reconnects and examined by crash tests. It reads the split-ring layout of VU "Inflight
//! I/O tracking"; it never writes unless a test asks for damage.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use crate::error::Result;
use crate::frontend::InflightDescription;
use crate::memory::Region;

/// Bytes before the entries of one ring.
const RING_HEADER: u64 = 16;
/// Bytes per entry.
const ENTRY: u64 = 16;

/// The area and what was said about it.
#[derive(Debug)]
pub struct Inflight {
    description: InflightDescription,
    area: Region,
}

/// One ring's part of the area (VU `struct QueueRegionSplit`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Layout version; 0 = not initialised, 1 = the only known one.
    pub version: u16,
    /// Entries that follow.
    pub desc_num: u16,
    /// Last head of the batch being completed.
    pub last_batch_head: u16,
    /// Used index up to which completed entries have been cleared.
    pub used_idx: u16,
    /// (head, counter) of each entry marked in flight, in counter order.
    pub inflight: Vec<(u16, u64)>,
}

impl Inflight {
    /// Maps the area the backend returned.
    ///
    /// # Errors
    /// `Io` when it cannot be mapped.
    pub fn new(description: InflightDescription, fd: OwnedFd) -> Result<Self> {
        let area = Region::from_fd(0, description.mmap_size, fd, description.mmap_offset)?;
        Ok(Self { description, area })
    }

    /// What to send along with the descriptor.
    #[must_use]
    pub fn description(&self) -> &InflightDescription {
        &self.description
    }

    /// The descriptor to send.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.area.fd()
    }

    /// The mapped bytes, for tests that damage them.
    #[must_use]
    pub fn area(&self) -> &Region {
        &self.area
    }

    /// Distance between the parts of two rings: header and entries rounded up to 64 bytes, which is what
    /// QEMU's libvhost-user and DPDK use.
    #[must_use]
    pub fn stride(&self) -> u64 {
        (RING_HEADER + ENTRY * u64::from(self.description.queue_size)).next_multiple_of(64)
    }

    /// Reads the part of ring `index`.
    ///
    /// # Errors
    /// `Usage` when the area is too small for it.
    pub fn ring(&self, index: u16) -> Result<RingState> {
        let start = self.stride() * u64::from(index);
        let header = self.area.cells::<AtomicU16>(start + 8, 4)?;
        let [version, desc_num, last_batch_head, used_idx] =
            [0, 1, 2, 3].map(|at| header.get(at).map_or(0, |cell: &AtomicU16| cell.load(Ordering::Acquire)));
        let mut inflight = Vec::new();
        for head in 0..self.description.queue_size {
            let entry = start + RING_HEADER + ENTRY * u64::from(head);
            let set = self.area.cells::<AtomicU8>(entry, 1)?;
            let counter = self.area.cells::<AtomicU64>(entry + 8, 1)?;
            if set.first().is_some_and(|cell| cell.load(Ordering::Acquire) != 0) {
                inflight.push((head, counter.first().map_or(0, |cell| cell.load(Ordering::Acquire))));
            }
        }
        inflight.sort_by_key(|&(_, counter)| counter);
        Ok(RingState { version, desc_num, last_batch_head, used_idx, inflight })
    }
}

#[cfg(test)]
mod tests;
