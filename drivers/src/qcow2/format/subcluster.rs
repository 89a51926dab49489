//! The bitmap of an extended L2 entry: 32 subclusters, each unallocated, allocated or zero ("Extended L2 Entries").
//!
//! Used by lookup, allocation and check; changes nothing but its own 64 bits.

use super::{EntryError, L2Entry};

/// What a subcluster (with standard entries: a cluster) is, as QEMU names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SubKind {
    /// No data, no host cluster.
    UnallocatedPlain,
    /// No data of its own in a host cluster that is there.
    UnallocatedAlloc,
    /// Zeroes, no host cluster.
    ZeroPlain,
    /// Zeroes; a host cluster is there.
    ZeroAlloc,
    /// Data.
    Normal,
    /// Compressed.
    Compressed,
}

/// Second word of an extended L2 entry: bits 0–31 allocated, bits 32–63 zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SubBitmap(pub u64);

impl SubBitmap {
    /// All subclusters allocated.
    pub const ALL_ALLOCATED: SubBitmap = SubBitmap(0xffff_ffff);
    /// All subclusters zero.
    pub const ALL_ZERO: SubBitmap = SubBitmap(0xffff_ffff << 32);

    /// The allocated bits.
    pub fn allocated(self) -> u32 {
        self.0 as u32
    }

    /// The zero bits.
    pub fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// From both halves.
    pub fn new(allocated: u32, zero: u32) -> SubBitmap {
        SubBitmap(u64::from(zero) << 32 | u64::from(allocated))
    }

    /// Bits of subclusters `from..to` (at most 32).
    pub fn mask(from: u32, to: u32) -> u32 {
        let below = |n: u32| if n >= 32 { u32::MAX } else { (1 << n) - 1 };
        below(to) & !below(from)
    }

    /// With these subclusters allocated (and no longer zero).
    pub fn with_allocated(self, mask: u32) -> SubBitmap {
        SubBitmap::new(self.allocated() | mask, self.zero() & !mask)
    }

    /// With these subclusters zero (and no longer allocated).
    pub fn with_zero(self, mask: u32) -> SubBitmap {
        SubBitmap::new(self.allocated() & !mask, self.zero() | mask)
    }

    /// With these subclusters neither.
    pub fn without(self, mask: u32) -> SubBitmap {
        SubBitmap::new(self.allocated() & !mask, self.zero() & !mask)
    }

    /// # Errors
    /// [`EntryError::InvalidBitmap`]: both set for one subcluster, or allocated without a host cluster.
    pub fn validate(self, host: bool) -> Result<(), EntryError> {
        let wrong = if host { self.allocated() & self.zero() } else { self.allocated() };
        if wrong != 0 { Err(EntryError::InvalidBitmap(self.0)) } else { Ok(()) }
    }

    /// What subcluster `index` is; `entry` and the bitmap were judged by [`L2Entry::decode`].
    pub fn kind(self, entry: L2Entry, index: u32) -> SubKind {
        let bit = 1u32.checked_shl(index).unwrap_or(0);
        match entry {
            L2Entry::Compressed { .. } => SubKind::Compressed,
            L2Entry::Unallocated if self.zero() & bit != 0 => SubKind::ZeroPlain,
            L2Entry::Unallocated => SubKind::UnallocatedPlain,
            L2Entry::Zero { host: None, .. } => SubKind::ZeroPlain,
            L2Entry::Zero { host: Some(_), .. } => SubKind::ZeroAlloc,
            L2Entry::Normal { .. } if self.zero() & bit != 0 => SubKind::ZeroAlloc,
            L2Entry::Normal { .. } if self.allocated() & bit != 0 => SubKind::Normal,
            L2Entry::Normal { .. } => SubKind::UnallocatedAlloc,
        }
    }

    /// Kind of the subcluster `from`, and how many from there on are of that kind.
    pub fn run(self, entry: L2Entry, from: u32) -> (SubKind, u32) {
        let kind = self.kind(entry, from);
        let same = match entry {
            L2Entry::Compressed { .. } | L2Entry::Zero { .. } => 32u32.saturating_sub(from),
            L2Entry::Unallocated => same_run(self.zero(), from),
            L2Entry::Normal { .. } => same_run(self.zero(), from).min(same_run(self.allocated(), from)),
        };
        (kind, same.max(1))
    }
}

/// How many bits from `from` on equal that bit.
fn same_run(bits: u32, from: u32) -> u32 {
    let rest = bits.checked_shr(from).unwrap_or(0);
    let run = if rest & 1 == 1 { rest.trailing_ones() } else { rest.trailing_zeros() };
    run.min(32u32.saturating_sub(from))
}

impl SubKind {
    /// What a standard entry is.
    pub fn of(entry: L2Entry) -> SubKind {
        match entry {
            L2Entry::Unallocated => SubKind::UnallocatedPlain,
            L2Entry::Zero { host: None, .. } => SubKind::ZeroPlain,
            L2Entry::Zero { host: Some(_), .. } => SubKind::ZeroAlloc,
            L2Entry::Normal { .. } => SubKind::Normal,
            L2Entry::Compressed { .. } => SubKind::Compressed,
        }
    }
}
