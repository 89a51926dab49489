//! One request's buffers: the storage a descriptor chain is unpacked into, and safe copies from and to it.
//! `walk` fills it, the request layer reads headers, hands the data segments to the kernel and writes the status.
//! It must not know what a request means.

use crate::error::AccessError;
use crate::iov::{self, GuestIov};
use crate::memory::Memory;

#[cfg(test)]
mod tests;

/// Most segments one chain may have, counted after ranges over region borders were split.
///
/// The kernel takes no longer vector (IOV_MAX) and QEMU's own devices refuse longer chains, so no driver makes them; and
/// it bounds what a guest can make this process hold: queue size × 1024 × 16 bytes of segments at the very worst.
pub const MAX_SEGMENTS: usize = 1024;

/// Storage beyond this many segments is given back by [`Chain::clear`]: a guest cannot leave us fat.
const KEEP_SEGMENTS: usize = 160;

/// A descriptor chain as host segments: those the device reads, then those it writes.
///
/// Make one per request slot and use it again and again: [`crate::SplitQueue::pop`] fills it without allocating once
/// its storage has grown to the requests in use. The segments are valid while the epoch they were taken in is alive
/// (see [`GuestIov`]). Copies ask for that epoch as a witness and refuse another one, so they are safe to call.
#[derive(Debug)]
pub struct Chain {
    /// Readable segments, then writable ones; parts already taken off are outside of the two ranges below.
    pub(crate) iovs: Vec<GuestIov>,
    /// First readable segment that is left.
    pub(crate) read_start: usize,
    /// Where readable ends and writable starts.
    pub(crate) split: usize,
    /// End of the writable segments that are left.
    pub(crate) write_end: usize,
    /// Bytes in the readable segments that are left.
    pub(crate) read_len: u64,
    /// Bytes in the writable segments that are left.
    pub(crate) write_len: u64,
    /// Invariant: every segment in `iovs` and `last` lies inside a mapping of the `Memory` with this number. 0: none.
    pub(crate) epoch: u64,
    /// The byte that [`Chain::reserve_last`] set aside.
    last: GuestIov,
    pub(crate) head: u16,
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// An empty chain with room for a common request.
    #[must_use]
    pub fn new() -> Self {
        Self {
            iovs: Vec::with_capacity(8),
            read_start: 0,
            split: 0,
            write_end: 0,
            read_len: 0,
            write_len: 0,
            epoch: 0,
            last: GuestIov::EMPTY,
            head: 0,
        }
    }

    /// Forgets the chain, and gives back storage that an unusually long one took.
    pub fn clear(&mut self) {
        self.begin(0, 0);
        if self.iovs.capacity() > KEEP_SEGMENTS {
            self.iovs.shrink_to(8);
        }
    }

    /// Starts over for a chain of the given head and epoch.
    #[inline(always)]
    pub(crate) fn begin(&mut self, head: u16, epoch: u64) {
        self.iovs.clear();
        self.read_start = 0;
        self.split = 0;
        self.write_end = 0;
        self.read_len = 0;
        self.write_len = 0;
        self.last = GuestIov::EMPTY;
        self.epoch = epoch;
        self.head = head;
    }

    /// The descriptor index to complete the chain with.
    #[inline]
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Number of the epoch the segments belong to ([`Memory::epoch`]).
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What the device may read and was not taken off yet; no segment is empty.
    #[inline]
    #[must_use]
    pub fn readable(&self) -> &[GuestIov] {
        self.iovs.get(self.read_start..self.split).unwrap_or(&[])
    }

    /// What the device may write and was not set aside; no segment is empty.
    #[inline]
    #[must_use]
    pub fn writable(&self) -> &[GuestIov] {
        self.iovs.get(self.split..self.write_end).unwrap_or(&[])
    }

    /// Bytes in [`Chain::readable`].
    #[inline]
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.read_len
    }

    /// Bytes in [`Chain::writable`].
    #[inline]
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.write_len
    }

    fn check(&self, memory: &Memory, needed: u64, have: u64) -> Result<(), AccessError> {
        if self.epoch != memory.epoch() {
            return Err(AccessError::WrongEpoch);
        }
        if needed > have { Err(AccessError::TooShort { needed, have }) } else { Ok(()) }
    }

    /// Asks the cache for the two lines every request touches: its first readable and its last writable byte. The driver
    /// wrote them on another processor a moment ago; asked for early, several requests' worth arrive at the same time.
    #[inline(always)]
    pub fn prefetch(&self) {
        for iov in [self.readable().first(), self.writable().last()].into_iter().flatten() {
            crate::layout::prefetch(iov.base());
        }
    }

    /// Copies the first bytes of the readable part and takes them off: for a header, which a driver may have spread
    /// over any number of descriptors.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was copied or taken off.
    #[inline]
    pub fn take_header(&mut self, memory: &Memory, out: &mut [u8]) -> Result<(), AccessError> {
        self.check(memory, out.len() as u64, self.read_len)?;
        let mut rest = out;
        while !rest.is_empty() {
            // Some, because read_len counts the segments that are left.
            let Some(segment) = self.iovs.get_mut(self.read_start).filter(|_| self.read_start < self.split)
            else {
                return Err(AccessError::TooShort { needed: rest.len() as u64, have: 0 });
            };
            let n = segment.len().min(rest.len());
            let (part, tail) = rest.split_at_mut(n);
            // SAFETY: n <= segment.len(), and the segment lies in a mapping of the epoch `memory` is (checked), which
            // lives while it is borrowed.
            unsafe { iov::copy_in(segment.base(), part) };
            if n == segment.len() {
                self.read_start += 1;
            } else {
                *segment = segment.slice(n, usize::MAX);
            }
            self.read_len -= n as u64;
            rest = tail;
        }
        Ok(())
    }

    /// Sets the last writable byte aside for [`Chain::write_last`]: a status byte. Once per chain.
    ///
    /// # Errors
    /// [`AccessError::TooShort`] when there is no writable byte.
    #[inline]
    pub fn reserve_last(&mut self) -> Result<(), AccessError> {
        let too_short = AccessError::TooShort { needed: 1, have: self.write_len };
        let Some(segment) = self.iovs.get_mut(self.split..self.write_end).and_then(|s| s.last_mut()) else {
            return Err(too_short);
        };
        let keep = segment.len() - 1;
        self.last = segment.slice(keep, 1);
        if keep == 0 {
            self.write_end -= 1;
        } else {
            *segment = segment.slice(0, keep);
        }
        self.write_len -= 1;
        Ok(())
    }

    /// Writes the byte that was set aside. May be called more than once.
    ///
    /// # Errors
    /// [`AccessError`] when none was set aside, or `memory` is another epoch.
    #[inline]
    pub fn write_last(&self, memory: &Memory, value: u8) -> Result<(), AccessError> {
        self.check(memory, 1, self.last.len() as u64)?;
        // SAFETY: `last` is one byte (checked) of a mapping of the epoch `memory` is (checked).
        unsafe { iov::copy_out(&[value], self.last.base()) };
        Ok(())
    }

    /// Copies `out.len()` bytes from `offset` bytes into the readable part. Each byte is read once per call: decide on
    /// the copy, not on a second one.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was copied.
    pub fn read_at(&self, memory: &Memory, offset: u64, out: &mut [u8]) -> Result<(), AccessError> {
        self.check(memory, offset.saturating_add(out.len() as u64), self.read_len)?;
        let mut rest = out;
        for_each_part(self.readable(), offset, rest.len(), |part| {
            let (now, tail) = std::mem::take(&mut rest).split_at_mut(part.len());
            // SAFETY: the part lies in a mapping of the epoch `memory` is (checked).
            unsafe { iov::copy_in(part.base(), now) };
            rest = tail;
        });
        Ok(())
    }

    /// Copies `data` to `offset` bytes into the writable part.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was copied.
    pub fn write_at(&self, memory: &Memory, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.check(memory, offset.saturating_add(data.len() as u64), self.write_len)?;
        let mut rest = data;
        for_each_part(self.writable(), offset, rest.len(), |part| {
            let (now, tail) = rest.split_at(part.len());
            // SAFETY: the part lies in a mapping of the epoch `memory` is (checked).
            unsafe { iov::copy_out(now, part.base()) };
            rest = tail;
        });
        Ok(())
    }

    /// Fills `len` bytes from `offset` bytes into the writable part with zeroes.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was written.
    pub fn zero_at(&self, memory: &Memory, offset: u64, len: u64) -> Result<(), AccessError> {
        self.check(memory, offset.saturating_add(len), self.write_len)?;
        // Fits: len <= write_len <= 2^32, on a 64-bit host.
        for_each_part(self.writable(), offset, len as usize, |part| {
            // SAFETY: the part lies in a mapping of the epoch `memory` is (checked).
            unsafe { iov::zero_out(part.base(), part.len()) };
        });
        Ok(())
    }
}

/// Calls `each` with the segments of `len` bytes from `offset` on. The caller has checked that they exist.
fn for_each_part(list: &[GuestIov], mut offset: u64, mut len: usize, mut each: impl FnMut(GuestIov)) {
    for iov in list {
        if len == 0 {
            return;
        }
        let have = iov.len() as u64;
        if offset >= have {
            offset -= have;
            continue;
        }
        let part = iov.slice(offset as usize, len);
        each(part);
        offset = 0;
        len -= part.len();
    }
}
