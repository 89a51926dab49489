//! The errors of this crate, one enum per question: is this memory table usable, is this ring sane, is this access
//! inside the chain. Callers print them to the operator; nothing here decides what happens next.

use std::fmt;
use std::io;

/// Why a memory table, or an address in it, was refused.
#[derive(Debug)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region of zero bytes, or one so large that its end is not an address.
    RegionSize {
        /// First guest physical address of the region.
        guest_addr: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// `mmap_offset + size` is not an offset a file can have.
    FileOffset {
        /// Offset of the region in its file, bytes.
        mmap_offset: u64,
        /// Size of the region, bytes.
        size: u64,
    },
    /// The file ends before the region does: touching the rest would be fatal (SIGBUS).
    FileTooShort {
        /// Size of the file, bytes.
        file: u64,
        /// Bytes the region needs it to have.
        needed: u64,
    },
    /// The descriptor is not a regular file (memfd, tmpfs, hugetlbfs, ...).
    NotAFile,
    /// Two regions share guest physical addresses.
    Overlap {
        /// First guest physical address of the region that starts inside another.
        guest_addr: u64,
    },
    /// More than [`crate::MAX_REGIONS`] regions.
    TooManyRegions,
    /// The region to be removed is not in the table.
    NoSuchRegion {
        /// First guest physical address that was named.
        guest_addr: u64,
    },
    /// An address (or a part of the range that starts there) is in no region.
    Unmapped {
        /// The first address of the range.
        addr: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// A range that must lie in one region runs over its end.
    CrossesRegion {
        /// The first address of the range.
        addr: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The kernel refused to look at, or to map, the file.
    Io(io::Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RegionSize { guest_addr, size } => {
                write!(f, "memory region at guest address {guest_addr:#x} has the impossible size {size:#x}")
            }
            Self::FileOffset { mmap_offset, size } => {
                write!(f, "memory region of {size:#x} bytes cannot start at file offset {mmap_offset:#x}")
            }
            Self::FileTooShort { file, needed } => {
                write!(f, "memory file has {file:#x} bytes, its region needs {needed:#x}")
            }
            Self::NotAFile => write!(f, "memory region's descriptor is not a regular file (use a memfd)"),
            Self::Overlap { guest_addr } => {
                write!(f, "memory region at guest address {guest_addr:#x} overlaps another region")
            }
            Self::TooManyRegions => write!(f, "more than {} memory regions", crate::MAX_REGIONS),
            Self::NoSuchRegion { guest_addr } => {
                write!(f, "no memory region at guest address {guest_addr:#x} with that size and user address")
            }
            Self::Unmapped { addr, len } => {
                write!(f, "{len:#x} bytes at address {addr:#x} are not guest memory")
            }
            Self::CrossesRegion { addr, len } => {
                write!(f, "{len:#x} bytes at address {addr:#x} do not lie in one memory region")
            }
            Self::Io(e) => write!(f, "cannot map guest memory: {e}"),
        }
    }
}

impl std::error::Error for MemoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(e) => Some(e),
            _ => None,
        }
    }
}

impl From<io::Error> for MemoryError {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<rustix::io::Errno> for MemoryError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// Why a ring was refused or stopped. Sections are those of the virtio 1.3 specification.
///
/// All but [`QueueError::NotInFlight`] are final: the queue that returned one returns it again from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueError {
    /// The size is not a power of two in 2..=32768 (§2.7), or above the maximum the caller gave.
    Size {
        /// The size that was asked for, entries.
        size: u32,
    },
    /// One of the three tables is not in guest memory, or not in one region as a whole.
    RingUnmapped {
        /// Which table: `"descriptor table"`, `"available ring"` or `"used ring"`.
        table: &'static str,
        /// Its address in the front end's address space.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// One of the three tables is not aligned as §2.7 asks (16, 2 and 4 bytes).
    RingUnaligned {
        /// Which table.
        table: &'static str,
        /// Its address in the front end's address space.
        addr: u64,
    },
    /// The driver's available index is more than the queue size ahead (§2.7.6).
    AvailIndex {
        /// The index the driver published.
        idx: u16,
        /// The next entry the device would have taken.
        next: u16,
    },
    /// The available ring names a descriptor outside the table.
    HeadRange {
        /// The descriptor index.
        head: u16,
    },
    /// The available ring names a chain that the device still holds (§2.7.13).
    HeadInFlight {
        /// The descriptor index.
        head: u16,
    },
    /// A descriptor's `next` is outside its table.
    NextRange {
        /// The value of `next`.
        next: u16,
    },
    /// A chain has more descriptors than its table: it is a loop (§2.7.5).
    Loop {
        /// Head of the chain.
        head: u16,
    },
    /// A chain needs more than [`crate::MAX_SEGMENTS`] segments, or its indirect table has more entries.
    TooManySegments {
        /// Head of the chain.
        head: u16,
    },
    /// A chain is longer than 2^32 bytes in total (§2.7.5).
    TooLong {
        /// Head of the chain.
        head: u16,
    },
    /// A descriptor the device may read follows one it may only write (§2.7.4.2).
    ReadableAfterWritable {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect descriptor though the feature was not negotiated (§2.7.5.3.1).
    IndirectNotNegotiated {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect descriptor inside an indirect table (§2.7.5.3.1).
    IndirectNested {
        /// Head of the chain.
        head: u16,
    },
    /// INDIRECT and NEXT in one descriptor (§2.7.5.3.1).
    IndirectAndNext {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect table whose length is zero or no multiple of 16.
    IndirectLength {
        /// Its length in bytes.
        len: u32,
    },
    /// A buffer or an indirect table lies (partly) outside guest memory.
    BufferUnmapped {
        /// Guest physical address of its first byte.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The caller completed a chain that the queue did not give out, or completed it twice. The queue goes on.
    NotInFlight {
        /// The head that was named.
        head: u16,
    },
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Size { size } => write!(f, "virtqueue size {size} is not a power of two within the limits"),
            Self::RingUnmapped { table, addr, len } => {
                write!(
                    f,
                    "{table} ({len:#x} bytes at user address {addr:#x}) does not lie in one memory region"
                )
            }
            Self::RingUnaligned { table, addr } => {
                write!(f, "{table} at user address {addr:#x} is not aligned")
            }
            Self::AvailIndex { idx, next } => {
                write!(f, "available index {idx} is too far ahead of {next}")
            }
            Self::HeadRange { head } => write!(f, "available ring names descriptor {head}, beyond the table"),
            Self::HeadInFlight { head } => write!(f, "available ring names chain {head}, which is in flight"),
            Self::NextRange { next } => write!(f, "descriptor links to {next}, beyond its table"),
            Self::Loop { head } => write!(f, "descriptor chain {head} is a loop"),
            Self::TooManySegments { head } => {
                write!(f, "descriptor chain {head} has more than {} segments", crate::MAX_SEGMENTS)
            }
            Self::TooLong { head } => write!(f, "descriptor chain {head} is longer than 4 GiB"),
            Self::ReadableAfterWritable { head } => {
                write!(f, "descriptor chain {head} has a readable buffer after a writable one")
            }
            Self::IndirectNotNegotiated { head } => {
                write!(f, "descriptor chain {head} is indirect, which was not negotiated")
            }
            Self::IndirectNested { head } => write!(f, "descriptor chain {head} nests indirect tables"),
            Self::IndirectAndNext { head } => {
                write!(f, "descriptor chain {head} has a descriptor with both INDIRECT and NEXT")
            }
            Self::IndirectLength { len } => {
                write!(f, "indirect table of {len} bytes is not a number of descriptors")
            }
            Self::BufferUnmapped { addr, len } => {
                write!(f, "buffer of {len:#x} bytes at guest address {addr:#x} is not guest memory")
            }
            Self::NotInFlight { head } => write!(f, "chain {head} was completed without being in flight"),
        }
    }
}

impl std::error::Error for QueueError {}

/// Why a copy between a chain and this process was refused. Nothing was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AccessError {
    /// The chain has fewer bytes in that direction than the access needs.
    TooShort {
        /// Bytes the access needs, counted from the first one the chain still has.
        needed: u64,
        /// Bytes the chain has.
        have: u64,
    },
    /// The [`crate::Memory`] that was given is not the epoch the chain was taken in.
    WrongEpoch,
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { needed, have } => {
                write!(f, "descriptor chain has {have} bytes, {needed} are needed")
            }
            Self::WrongEpoch => write!(f, "descriptor chain belongs to another memory table"),
        }
    }
}

impl std::error::Error for AccessError {}
