//! From a head to host segments: walks one descriptor chain of a split ring (virtio 1.3 §2.7.5), reading each descriptor
//! once. `split` calls it per request; it knows neither indices nor the used ring, and allocates only for an indirect
//! table that spans memory regions.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::chain::{Chain, MAX_SEGMENTS};
use crate::error::QueueError;
use crate::iov::{self, GuestIov};
use crate::memory::{Flat, Memory};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Bytes of one descriptor (§2.7.5).
pub(crate) const DESCRIPTOR: usize = 16;

/// Longest chain in bytes (§2.7.5: "longer than 2^32 bytes in total" is forbidden).
const MAX_BYTES: u64 = 1 << 32;

/// A descriptor, copied out of guest memory.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// # Safety
    /// `table + 16 * index .. + 16` lies in one live, readable mapping.
    #[inline(always)]
    pub unsafe fn read(table: *const u8, index: u16) -> Self {
        // SAFETY: the caller's promise.
        let (addr, rest) = unsafe { iov::read_descriptor(table.add(DESCRIPTOR * usize::from(index))) };
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// What a walk needs of its queue.
pub(crate) struct Walk<'a> {
    /// Host address of the ring's descriptor table: `16 * size` bytes are mapped while `memory` lives.
    pub table: *const u8,
    /// Entries in that table.
    pub size: u16,
    /// Whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    pub memory: &'a Memory,
    /// Last region hit; from `memory`.
    pub hint: &'a mut Flat,
    /// Whether a writable descriptor was seen; starts `false`.
    pub writable_seen: bool,
}

impl Walk<'_> {
    /// Unpacks the chain at `head` (which must be below `size`) into `chain`, which was begun for it.
    #[inline(always)]
    pub fn run(mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        debug_assert!(head < self.size);
        let mut index = head;
        // A chain that is no loop visits each descriptor of its table at most once.
        for _ in 0..self.size {
            // SAFETY: index < size (checked by the caller for the head, below for each `next`), and `table` has `size`
            // descriptors mapped.
            let d = unsafe { Descriptor::read(self.table, index) };
            if d.flags & INDIRECT != 0 {
                return self.indirect(d, chain);
            }
            self.add(d, chain)?;
            if d.flags & NEXT == 0 {
                return Ok(());
            }
            index = d.next;
            if index >= self.size {
                return Err(QueueError::NextRange { next: index });
            }
        }
        Err(QueueError::Loop { head })
    }

    /// The rest of the chain is in an indirect table; direct descriptors may have come before (§2.7.5.3.2).
    #[inline(always)]
    fn indirect(&mut self, d: Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head;
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated { head });
        }
        if d.flags & NEXT != 0 {
            return Err(QueueError::IndirectAndNext { head });
        }
        // WRITE in the descriptor that refers to the table has no meaning and is ignored, as §2.7.5.3.2 asks.
        if d.len == 0 || !(d.len as usize).is_multiple_of(DESCRIPTOR) {
            return Err(QueueError::IndirectLength { len: d.len });
        }
        let entries = d.len as usize / DESCRIPTOR;
        if entries > MAX_SEGMENTS {
            return Err(QueueError::TooManySegments { head });
        }
        // Fits: MAX_SEGMENTS < 2^16.
        let entries = entries as u16;
        if let Some(table) = self.hint.resolve(d.addr, u64::from(d.len)) {
            return self.table(table, entries, chain);
        }
        self.indirect_slow(d, entries, chain)
    }

    /// The table is in another region than the last hit, or in several.
    #[cold]
    #[inline(never)]
    fn indirect_slow(&mut self, d: Descriptor, entries: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let unmapped = QueueError::BufferUnmapped { addr: d.addr, len: d.len };
        let mut parts: Vec<GuestIov> = Vec::new();
        self.memory
            .translate_hinted(self.hint, d.addr, u64::from(d.len), usize::MAX, &mut parts)
            .ok_or(unmapped)?;
        if let [whole] = parts.as_slice() {
            return self.table(whole.base(), entries, chain);
        }
        // Over a region border, in the middle of a descriptor perhaps. Copied once, then walked like any other.
        let mut copy = vec![0_u8; d.len as usize];
        self.memory.read(d.addr, &mut copy).map_err(|_| unmapped)?;
        self.table(copy.as_ptr(), entries, chain)
    }

    /// Walks an indirect table of `entries` descriptors at `table`, all of them readable.
    #[inline(always)]
    fn table(&mut self, table: *const u8, entries: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head;
        let mut index = 0;
        for _ in 0..entries {
            // SAFETY: index < entries (0 first, and entries is not 0; checked below for each `next`); `table` has
            // `entries` descriptors, in guest memory that was resolved as a whole or in the caller's copy.
            let d = unsafe { Descriptor::read(table, index) };
            if d.flags & INDIRECT != 0 {
                return Err(QueueError::IndirectNested { head });
            }
            self.add(d, chain)?;
            if d.flags & NEXT == 0 {
                return Ok(());
            }
            index = d.next;
            if index >= entries {
                return Err(QueueError::NextRange { next: index });
            }
        }
        Err(QueueError::Loop { head })
    }

    /// Adds one buffer to the chain.
    #[inline(always)]
    fn add(&mut self, d: Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let len = u64::from(d.len);
        // No wrap: both sums are bounded by MAX_BYTES before the next 32-bit length is added.
        if chain.read_len + chain.write_len + len > MAX_BYTES {
            return Err(QueueError::TooLong { head: chain.head });
        }
        let writable = d.flags & WRITE != 0;
        if !writable && self.writable_seen {
            return Err(QueueError::ReadableAfterWritable { head: chain.head });
        }
        self.writable_seen = writable;
        // A buffer of no bytes is legal and of no use; its address means nothing.
        if len != 0
            && self.memory.translate_hinted(self.hint, d.addr, len, MAX_SEGMENTS, &mut chain.iovs).is_none()
        {
            return Err(Self::cannot_add(d, chain));
        }
        // Readable segments come first, so `split` rests where the last of them ended.
        let end = chain.iovs.len();
        if writable {
            chain.write_len += len;
        } else {
            chain.read_len += len;
            chain.split = end;
        }
        chain.write_end = end;
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn cannot_add(d: Descriptor, chain: &Chain) -> QueueError {
        if chain.iovs.len() >= MAX_SEGMENTS {
            QueueError::TooManySegments { head: chain.head }
        } else {
            QueueError::BufferUnmapped { addr: d.addr, len: d.len }
        }
    }
}
