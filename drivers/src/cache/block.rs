//! One block of the cache: where its bytes are, which of its sectors hold something, who works on it.
//!
//! Plain values, used under the lock of a shard (`shard`). Knows no node.

/// Granularity at which a block knows what it holds, bytes; no write is torn below it.
pub(super) const SECTOR: usize = 512;
/// Largest block: a sector is a bit of a [`Mask`].
pub(super) const MAX_BLOCK: usize = 128 * SECTOR;
/// Smallest block, bytes.
pub(super) const MIN_BLOCK: usize = 4096;

/// A set of sectors of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mask(u128);

impl Mask {
    /// No sector.
    pub(super) const NONE: Mask = Mask(0);

    /// Sectors `first..end`.
    fn range(first: usize, end: usize) -> Mask {
        match end.saturating_sub(first) {
            0 => Mask::NONE,
            128.. => Mask(u128::MAX),
            count => Mask(((1 << count) - 1) << first),
        }
    }

    /// The sectors that lie wholly in the bytes `from..to` of a block.
    pub(super) fn inside(from: usize, to: usize) -> Mask {
        Mask::range(from.div_ceil(SECTOR), to / SECTOR)
    }

    /// The sectors that the bytes `from..to` of a block touch.
    pub(super) fn touched(from: usize, to: usize) -> Mask {
        if from >= to { Mask::NONE } else { Mask::range(from / SECTOR, to.div_ceil(SECTOR)) }
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether it has all of these.
    pub(super) fn contains(self, other: Mask) -> bool {
        other.minus(self).is_empty()
    }

    #[must_use]
    pub(super) fn and(self, other: Mask) -> Mask {
        Mask(self.0 & other.0)
    }

    #[must_use]
    pub(super) fn plus(self, other: Mask) -> Mask {
        Mask(self.0 | other.0)
    }

    #[must_use]
    pub(super) fn minus(self, other: Mask) -> Mask {
        Mask(self.0 & !other.0)
    }

    /// Its runs of adjacent sectors, as bytes `(from, to)` of the block.
    pub(super) fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let first = left.trailing_zeros() as usize;
            let count = (left >> first).trailing_ones() as usize;
            let run = Mask::range(first, first + count);
            left &= !run.0;
            Some((first * SECTOR, (first + count) * SECTOR))
        })
    }
}

/// Where the bytes of a block are.
#[derive(Debug, Default)]
pub(super) enum Place {
    /// Nowhere: somebody is about to change that, or the block goes when its claim does.
    #[default]
    Nowhere,
    /// In memory.
    Memory(Box<[u8]>),
    /// In this slot of the swap node.
    Swap(u32),
}

/// Who works on a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    /// Nobody.
    #[default]
    Free,
    /// Its dirty sectors are on their way to the file: it may be read and written meanwhile.
    Shared,
    /// One request: nobody else changes it, and it is read only where it is valid.
    Alone,
}

/// A block of the cache.
#[derive(Debug, Default)]
pub(super) struct Block {
    pub(super) place: Place,
    /// Sectors that hold what the node shows.
    pub(super) valid: Mask,
    /// Of these, the ones that the file does not hold yet.
    pub(super) dirty: Mask,
    /// Sectors on their way to the file, as they were when they left.
    pub(super) writing: Mask,
    pub(super) hold: Hold,
    /// Used since the clock's hand last passed.
    pub(super) used: bool,
}

impl Block {
    /// Sectors that only the cache holds.
    pub(super) fn unsaved(&self) -> Mask {
        self.dirty.plus(self.writing)
    }
}
