//! Memory registered with an io_uring: which range has which number in the kernel's table.
//!
//! Kept by the io_uring reactor. Looks an address up for every operation on an O_DIRECT file, so it stays a short sorted
//! list. Makes no system call itself.

use std::io;

/// Longest range the kernel takes as one buffer, bytes.
const MAX_BUFFER: usize = 1 << 30;
/// Slots in the kernel's table: what one ring can hold, in pieces of at most 1 GiB.
pub(super) const SLOTS: u32 = 1024;

/// A registered piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: usize,
    len: usize,
    slot: u16,
    id: u64,
}

/// The ranges of every `id`.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// By start address. Ranges of several ids may be the same memory.
    pieces: Vec<Piece>,
    /// How often each id was pinned.
    users: Vec<(u64, u32)>,
    free: Vec<u16>,
    next: u16,
}

impl Pins {
    /// Counts one more user of `id`; true if it is there already.
    pub(super) fn again(&mut self, id: u64) -> bool {
        let known = self.users.iter_mut().find(|(i, _)| *i == id);
        known.map(|(_, n)| *n += 1).is_some()
    }

    /// Assigns slots to the ranges: (slot, address, length) each.
    ///
    /// # Errors
    /// `ENOSPC` when the table is full; nothing is assigned.
    pub(super) fn add(&mut self, id: u64, ranges: &[(usize, usize)]) -> io::Result<Vec<(u16, usize, usize)>> {
        let wanted: usize = ranges.iter().map(|(_, len)| len.div_ceil(MAX_BUFFER)).sum();
        let room = self.free.len() + (SLOTS as usize - usize::from(self.next));
        if wanted > room {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let mut out = Vec::with_capacity(wanted);
        for &(start, len) in ranges {
            let mut done = 0;
            while done < len {
                let part = (len - done).min(MAX_BUFFER);
                let slot = self.free.pop().unwrap_or_else(|| {
                    self.next += 1;
                    self.next - 1
                });
                self.pieces.push(Piece { start: start + done, len: part, slot, id });
                out.push((slot, start + done, part));
                done += part;
            }
        }
        self.pieces.sort_unstable_by_key(|p| p.start);
        self.users.push((id, 1));
        Ok(out)
    }

    /// One user less; the slots to empty when it was the last.
    pub(super) fn remove(&mut self, id: u64) -> Vec<u16> {
        let Some(at) = self.users.iter().position(|(i, _)| *i == id) else { return Vec::new() };
        if let Some((_, n)) = self.users.get_mut(at)
            && *n > 1
        {
            *n -= 1;
            return Vec::new();
        }
        self.users.swap_remove(at);
        let gone: Vec<u16> = self.pieces.iter().filter(|p| p.id == id).map(|p| p.slot).collect();
        self.pieces.retain(|p| p.id != id);
        self.free.extend(&gone);
        gone
    }

    /// The slot that holds all of a buffer.
    #[inline]
    pub(super) fn find(&self, start: usize, len: usize) -> Option<u16> {
        let after = self.pieces.partition_point(|p| p.start <= start);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        let offset = start - piece.start;
        (offset < piece.len && len <= piece.len - offset).then_some(piece.slot)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_buffer_is_found_only_where_it_is_as_a_whole() {
        let mut pins = Pins::default();
        assert_eq!(pins.find(0x1000, 1), None);
        let slots = pins.add(7, &[(0x1000, 0x1000), (0x4000, 2 * MAX_BUFFER + 5)]).unwrap();
        assert_eq!(slots.len(), 4, "a long range is several buffers");
        assert_eq!(pins.find(0x1000, 0x1000), Some(slots[0].0));
        for outside in [(0xfff, 1), (0x1fff, 2), (0x2000, 1), (0x4000 + MAX_BUFFER - 1, 2)] {
            assert_eq!(pins.find(outside.0, outside.1), None, "{outside:x?}");
        }
        assert_eq!(pins.find(0x4000 + MAX_BUFFER, 1), Some(slots[2].0));
        assert!(pins.again(7) && !pins.again(8));
        assert_eq!(pins.remove(7), vec![], "two users");
        assert_eq!(pins.remove(7).len(), 4);
        assert_eq!(pins.remove(7), vec![]);
        assert_eq!(pins.find(0x1000, 1), None);
        let again = pins.add(9, &[(0, 1)]).unwrap();
        assert!(slots.iter().any(|s| s.0 == again[0].0), "slots are used again");
        assert!(pins.add(10, &[(0, MAX_BUFFER * 2000)]).is_err(), "more than the table holds");
        assert_eq!(pins.find(1, 1), None);
    }
}
