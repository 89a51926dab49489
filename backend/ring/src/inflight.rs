//! The area that remembers, across a crash of this process, which chains a split ring's device holds.
//!
//! Layout and rules: vhost-user protocol, "Inflight I/O tracking", split virtqueue; sizes and rounding are those of
//! libvhost-user and DPDK, so that one back end can take over from another. The session makes and maps the area
//! ([`InflightRegion`]), `split` writes the part of its ring ([`Tracker`]) around taking and publishing. Must not know what
//! a request means; must not trust what it reads back, since the front end shares the memory: it is read at the start of
//! a ring only, each field once, and checked. While a ring runs it is only written.
//!
//! Order of stores. A process dies between two instructions, and what it stored before is in the memory file; the
//! orderings keep the compiler and the processor to the order of the program:
//!
//! | step | store | comes after, because |
//! |---|---|---|
//! | take | `counter`, then `inflight = 1` | Release store; pairs with the Acquire load of `inflight` in recovery |
//! | link | `next`, `last_batch_head` | a Release fence puts them after the batch before (its `used_idx`) |
//! | publish | `used.idx` of the ring | its Release store: the list is complete when the index says that it counts |
//! | clear | `inflight = 0` of the whole batch | the SeqCst fence after `used.idx` |
//! | settle | `used_idx` | Release store: nothing of the batch is left to be cleared |
//!
//! So if `used.idx` and `used_idx` differ, the driver has been told of a batch of that many chains, which the list from
//! `last_batch_head` names, and some of which may still be marked. If they do not, every marked chain is unknown to the
//! driver as completed, and is executed again.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::MemoryError;
use crate::layout::MAX_QUEUE_SIZE;
use crate::region::{Mapped, Region};
use crate::split::UsedElement;

#[cfg(test)]
mod tests;

/// The only version of the layout; 0 marks a part that was never used.
const VERSION: u16 = 1;
/// Each ring's part starts at a multiple of this, bytes.
const ALIGN: u64 = 64;

/// Before the entries of one ring (`struct QueueRegionSplit`). In the byte order of the host.
#[repr(C)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

/// One descriptor as a head (`struct DescStateSplit`).
#[repr(C)]
struct Entry {
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Entry>() == 16);

/// Why an area, or what a ring's part of it holds, was refused.
#[derive(Debug)]
#[non_exhaustive]
pub enum InflightError {
    /// No queues, no entries, or more entries than a ring can have.
    Shape {
        /// Rings that were asked for.
        queues: u16,
        /// Entries that were asked for, each.
        queue_size: u16,
    },
    /// The area is smaller than its rings need.
    TooSmall {
        /// Its size in bytes.
        size: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// It starts at no multiple of 64 bytes.
    Unaligned {
        /// Where it starts in its file, bytes.
        offset: u64,
    },
    /// The file cannot be mapped, or ends before the area does.
    Memory(MemoryError),
    /// The area has no part for this ring.
    NoPart {
        /// Number of the ring.
        index: u16,
    },
    /// The ring is larger than its part of the area.
    RingSize {
        /// Entries of the ring.
        ring: u16,
        /// Entries of the part.
        tracked: u16,
    },
    /// The part was written by an implementation of another layout.
    Version(u16),
    /// The part says that it has another size than the front end says.
    Entries {
        /// What it says.
        found: u16,
        /// What the front end says.
        expected: u16,
    },
    /// The ring's used index is ahead of the part's by more than can have been completed at once, and requests are in flight.
    Index {
        /// The ring's.
        used: u16,
        /// The part's.
        tracked: u16,
    },
    /// The list of the last batch leads out of the ring.
    Link {
        /// The descriptor it names.
        head: u16,
    },
}

impl fmt::Display for InflightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { queues, queue_size } => {
                write!(f, "in-flight area for {queues} queues of {queue_size} entries: not possible")
            }
            Self::TooSmall { size, needed } => {
                write!(f, "in-flight area has {size:#x} bytes, its queues need {needed:#x}")
            }
            Self::Unaligned { offset } => {
                write!(f, "in-flight area at file offset {offset:#x} is not aligned to {ALIGN} bytes")
            }
            Self::Memory(e) => write!(f, "in-flight area cannot be mapped: {e}"),
            Self::NoPart { index } => write!(f, "in-flight area has no part for queue {index}"),
            Self::RingSize { ring, tracked } => {
                write!(f, "ring of {ring} entries is larger than its part of the in-flight area ({tracked})")
            }
            Self::Version(v) => write!(f, "in-flight area has version {v}, only {VERSION} is known"),
            Self::Entries { found, expected } => {
                write!(f, "in-flight area says it has {found} entries a queue, the front end says {expected}")
            }
            Self::Index { used, tracked } => {
                write!(
                    f,
                    "in-flight area stands at used index {tracked}, the ring at {used}: they do not belong together"
                )
            }
            Self::Link { head } => write!(f, "in-flight area links to descriptor {head}, beyond the ring"),
        }
    }
}

impl std::error::Error for InflightError {}

impl From<MemoryError> for InflightError {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
    }
}

/// Bytes of one ring's part.
fn stride(queue_size: u16) -> u64 {
    (size_of::<Header>() as u64 + size_of::<Entry>() as u64 * u64::from(queue_size)).next_multiple_of(ALIGN)
}

/// The area of one device, mapped. Parts of it are lent to the rings; the last one of them unmaps it.
#[derive(Debug)]
pub struct InflightRegion {
    mapped: Mapped,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Makes a memory file for `queues` rings (1 to 65535) of up to `queue_size` entries (1 to 32768), all zero, of fixed
    /// size for good, and returns it with its size in bytes (GET_INFLIGHT_FD). Pages come into being when touched.
    ///
    /// # Errors
    /// [`InflightError::Shape`]; [`InflightError::Memory`] when the kernel has no memory or descriptor left.
    pub fn create(queues: u16, queue_size: u16) -> Result<(OwnedFd, u64), InflightError> {
        let size = Self::size(queues, queue_size)?;
        let make = || {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let fd = rustix::fs::memfd_create("ringblk-inflight", flags)?;
            rustix::fs::ftruncate(&fd, size)?;
            rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
            Ok(fd)
        };
        let fd = make().map_err(|e: rustix::io::Errno| MemoryError::from(e))?;
        Ok((fd, size))
    }

    /// Maps the area that a front end hands over (SET_INFLIGHT_FD): `size` bytes at `offset` of `fd`, of which no more is
    /// mapped than the rings need.
    ///
    /// # Errors
    /// [`InflightError::Shape`], [`InflightError::TooSmall`], [`InflightError::Unaligned`], [`InflightError::Memory`].
    pub fn map(
        fd: OwnedFd,
        offset: u64,
        size: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let needed = Self::size(queues, queue_size)?;
        if size < needed {
            return Err(InflightError::TooSmall { size, needed });
        }
        if !offset.is_multiple_of(ALIGN) {
            return Err(InflightError::Unaligned { offset });
        }
        // The size that was claimed is checked against the file as a whole, though less of it may be mapped.
        let file =
            u64::try_from(rustix::fs::fstat(fd.as_fd()).map_err(MemoryError::from)?.st_size).unwrap_or(0);
        match offset.checked_add(size) {
            Some(end) if end <= file => {}
            end => {
                let needed = end.unwrap_or(u64::MAX);
                return Err(MemoryError::FileTooShort { file, needed }.into());
            }
        }
        let region = Region { guest_addr: 0, size: needed, user_addr: 0, fd, mmap_offset: offset };
        Ok(Self { mapped: Mapped::new(region)?, queues, queue_size })
    }

    fn size(queues: u16, queue_size: u16) -> Result<u64, InflightError> {
        if queues == 0 || queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
            return Err(InflightError::Shape { queues, queue_size });
        }
        // At most 65535 * 512 KiB.
        Ok(stride(queue_size) * u64::from(queues))
    }

    /// The part of ring `index`, which has `ring_size` entries. One ring at a time may have it.
    ///
    /// # Errors
    /// [`InflightError::NoPart`], [`InflightError::RingSize`].
    pub fn tracker(self: &Arc<Self>, index: u16, ring_size: u16) -> Result<Tracker, InflightError> {
        if index >= self.queues {
            return Err(InflightError::NoPart { index });
        }
        if ring_size > self.queue_size {
            return Err(InflightError::RingSize { ring: ring_size, tracked: self.queue_size });
        }
        // Fits: `size` of all parts is mapped.
        let at = (stride(self.queue_size) * u64::from(index)) as usize;
        let part = self.mapped.host().wrapping_add(at);
        Ok(Tracker { part, size: ring_size, counter: 0, last: 0, region: self.clone() })
    }
}

/// One ring's part of the area. [`crate::SplitQueue::track`] takes it; nobody else writes it.
pub struct Tracker {
    /// The part: a header and `region.queue_size` entries, mapped while `region` lives, aligned to 64 bytes.
    part: *const u8,
    /// Entries of the ring, at most `region.queue_size`.
    size: u16,
    /// Counter of the next chain that is taken.
    counter: u64,
    /// What was stored to `last_batch_head` last: it is not read back.
    last: u16,
    region: Arc<InflightRegion>,
}

// SAFETY: `part` points into a mapping that `region`, which moves along, keeps alive and that no thread has a claim on.
unsafe impl Send for Tracker {}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("size", &self.size)
            .field("counter", &self.counter)
            .finish_non_exhaustive()
    }
}

impl Tracker {
    #[inline(always)]
    fn header(&self) -> &Header {
        // SAFETY: `part` starts with a header, is mapped while `self.region` lives and aligned to 64 (page-aligned mapping plus
        // multiples of 64). All fields are atomics: the front end may write them at any time.
        unsafe { &*self.part.cast::<Header>() }
    }

    #[inline(always)]
    fn entries(&self) -> &[Entry] {
        // SAFETY: as for the header, which `queue_size` entries follow; `size` is not more (`InflightRegion::tracker`).
        unsafe {
            let first = self.part.add(size_of::<Header>()).cast::<Entry>();
            std::slice::from_raw_parts(first, usize::from(self.size))
        }
    }

    /// Whether the front end cut the file: what is stored from then on is lost.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        self.region.mapped.is_lost()
    }

    /// Entries of the ring it was made for.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Reads the part at the start of the ring, whose used index is `used`, and finishes what a crash left half done.
    /// Returns the heads to be executed again in the order in which they had been taken: below the ring's size, each once.
    pub(crate) fn recover(&mut self, used: u16) -> Result<Vec<u16>, InflightError> {
        let header = self.header();
        // Acquire: pairs with the Release store that ends `initialise`.
        match header.version.load(Ordering::Acquire) {
            0 => {
                self.initialise(used);
                return Ok(Vec::new());
            }
            VERSION => {}
            other => return Err(InflightError::Version(other)),
        }
        let (found, expected) = (header.desc_num.load(Ordering::Relaxed), self.region.queue_size);
        if found != expected {
            return Err(InflightError::Entries { found, expected });
        }
        // Acquire: pairs with the Release stores of `inflight` (its counter) and of `used_idx` (what was cleared).
        let tracked = header.used_idx.load(Ordering::Acquire);
        let mut marked: Vec<bool> =
            self.entries().iter().map(|e| e.inflight.load(Ordering::Acquire) != 0).collect();
        let behind = used.wrapping_sub(tracked);
        // Without marks there is nothing to clear: the ring was stopped in order, and perhaps started afresh.
        if behind != 0 && marked.contains(&true) {
            if behind > self.size {
                return Err(InflightError::Index { used, tracked });
            }
            self.forget_batch(behind, &mut marked)?;
        }
        // Release: after the marks that were cleared.
        header.used_idx.store(used, Ordering::Release);
        let last = header.last_batch_head.load(Ordering::Relaxed);

        let mut list: Vec<(u64, u16)> = (0..self.size)
            .zip(self.entries().iter().zip(marked))
            .filter(|(_, (_, marked))| *marked)
            .map(|(head, (entry, _))| (entry.counter.load(Ordering::Relaxed), head))
            .collect();
        list.sort_unstable();
        // A counter that a front end made up may be the largest there is; what counts is that ours do not panic.
        self.counter = list.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        self.last = last;
        Ok(list.into_iter().map(|(_, head)| head).collect())
    }

    /// The driver has been told of the last `count` chains completed, but not all marks were cleared: clears exactly those.
    fn forget_batch(&self, count: u16, marked: &mut [bool]) -> Result<(), InflightError> {
        let mut head = self.header().last_batch_head.load(Ordering::Relaxed);
        // Checked before anything is changed: a refusal leaves the part as it was. A list of the front end's own making
        // may be a loop, but its length is counted.
        let mut batch = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let entry = self.entries().get(usize::from(head)).ok_or(InflightError::Link { head })?;
            batch.push((entry, head));
            head = entry.next.load(Ordering::Relaxed);
        }
        for (entry, head) in batch {
            entry.inflight.store(0, Ordering::Relaxed);
            if let Some(m) = marked.get_mut(usize::from(head)) {
                *m = false;
            }
        }
        Ok(())
    }

    /// The first ring of a fresh area. Its used index is where the ring stands, not 0: after a migration it stands
    /// anywhere, and a crash would take the difference for a batch.
    fn initialise(&mut self, used: u16) {
        let header = self.header();
        for entry in self.entries() {
            entry.inflight.store(0, Ordering::Relaxed);
        }
        header.features.store(0, Ordering::Relaxed);
        header.desc_num.store(self.region.queue_size, Ordering::Relaxed);
        header.last_batch_head.store(0, Ordering::Relaxed);
        header.used_idx.store(used, Ordering::Relaxed);
        // Release: everything above is there when the version says so; a crash before leaves a fresh part.
        header.version.store(VERSION, Ordering::Release);
        (self.counter, self.last) = (0, 0);
    }

    /// Nothing is in flight and nobody waits for anything: the ring was taken back in order.
    pub(crate) fn forget(&mut self, used: u16) {
        for entry in self.entries() {
            entry.inflight.store(0, Ordering::Relaxed);
        }
        self.settle(used);
    }

    /// Step "take": the chain at `head` is about to be executed.
    #[inline(always)]
    pub(crate) fn taken(&mut self, head: u16) {
        let Some(entry) = self.entries().get(usize::from(head)) else { return };
        entry.counter.store(self.counter, Ordering::Relaxed);
        entry.inflight.store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Step "link": these completions are about to be published with one index store.
    #[inline]
    pub(crate) fn link(&mut self, batch: &[UsedElement]) {
        // Release: after the used index of the batch before, see the table above.
        fence(Ordering::Release);
        let mut last = self.last;
        for element in batch {
            if let Some(entry) = self.entries().get(usize::from(element.head)) {
                entry.next.store(last, Ordering::Relaxed);
                last = element.head;
                self.header().last_batch_head.store(last, Ordering::Relaxed);
            }
        }
        self.last = last;
    }

    /// Step "clear": these completions were published, and the SeqCst fence after it was passed.
    #[inline]
    pub(crate) fn clear(&mut self, batch: &[UsedElement]) {
        for element in batch {
            if let Some(entry) = self.entries().get(usize::from(element.head)) {
                entry.inflight.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Step "settle": everything up to the used index `used` is cleared.
    #[inline]
    pub(crate) fn settle(&mut self, used: u16) {
        self.header().used_idx.store(used, Ordering::Release);
    }
}
