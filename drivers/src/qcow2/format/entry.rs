//! Entries of L1, L2 and refcount tables ("Cluster mapping", "Refcount table").
//!
//! Decoded wherever a table is loaded, so that what is cached has been judged; the checker looks at the raw words too.

use super::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, SubBitmap, ZERO};

/// Bits of an L1 entry that must be 0.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard, uncompressed L2 entry that must be 0.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of a refcount table entry that must be 0.
pub const REFTABLE_RESERVED: u64 = 0x1ff;

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry for an L2 table at a cluster-aligned offset below 2^56.
    pub fn new(offset: u64, copied: bool) -> L1Entry {
        L1Entry(offset & OFFSET_MASK | if copied { COPIED } else { 0 })
    }

    /// Where the L2 table is, bytes; 0: there is none.
    pub fn offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// Whether the table's refcount is exactly 1; means something in the active L1 only.
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Whether a bit is set that must not be.
    pub fn reserved(self) -> bool {
        self.0 & L1_RESERVED != 0
    }

    /// The table's offset, `None` if there is none.
    ///
    /// # Errors
    /// [`EntryError::Unaligned`].
    pub fn table(self, g: Geometry) -> Result<Option<u64>, EntryError> {
        match self.offset() {
            0 => Ok(None),
            offset if g.in_cluster(offset) != 0 => Err(EntryError::Unaligned(offset)),
            offset => Ok(Some(offset)),
        }
    }
}

/// An entry of a refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RtEntry(pub u64);

impl RtEntry {
    /// Where the refcount block is, bytes; 0: there is none.
    pub fn offset(self) -> u64 {
        self.0 & !REFTABLE_RESERVED
    }

    /// Whether a bit is set that must not be.
    pub fn reserved(self) -> bool {
        self.0 & REFTABLE_RESERVED != 0
    }

    /// The block's offset, `None` if there is none.
    ///
    /// # Errors
    /// [`EntryError::Unaligned`], also for an offset no file can have.
    pub fn block(self, g: Geometry) -> Result<Option<u64>, EntryError> {
        match self.offset() {
            0 => Ok(None),
            offset if g.in_cluster(offset) != 0 || offset > i64::MAX as u64 => {
                Err(EntryError::Unaligned(offset))
            }
            offset => Ok(Some(offset)),
        }
    }
}

/// A number as C's `%#x` prints it: 0 has no prefix.
pub(crate) fn hex(n: u64) -> String {
    if n == 0 { "0".into() } else { format!("{n:#x}") }
}

/// Why an entry cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryError {
    /// A host offset that is not a multiple of the cluster size.
    Unaligned(u64),
    /// The ZERO flag in a version 2 image.
    ZeroInV2,
    /// A compressed cluster in an image whose data lies in another file.
    CompressedWithDataFile,
    /// A subcluster both allocated and zero, or allocated without a host cluster.
    InvalidBitmap(u64),
    /// With an external data file: the host offset differs from the guest's.
    DataFileMismatch {
        /// Host offset, bytes.
        host: u64,
        /// Guest offset, bytes.
        guest: u64,
    },
}

impl EntryError {
    /// QEMU's words for an entry of an L2 table.
    pub fn l2_message(self, l2_offset: u64, l2_index: u64) -> String {
        let index = hex(l2_index);
        let place = format!("(L2 offset: {l2_offset:#x}, L2 index: {index})");
        match self {
            EntryError::Unaligned(o) => format!("Cluster allocation offset {o:#x} unaligned {place}"),
            EntryError::ZeroInV2 => format!("Zero cluster entry found in pre-v3 image {place}"),
            EntryError::CompressedWithDataFile => {
                format!("Compressed cluster entry found in image with external data file {place}")
            }
            EntryError::InvalidBitmap(_) => format!("Invalid cluster entry found {place}"),
            EntryError::DataFileMismatch { host, guest } => format!(
                "External data file host cluster offset {} does not match guest cluster offset: {}, L2 index: {index})",
                hex(host),
                hex(guest)
            ),
        }
    }

    /// QEMU's words for an entry of an L1 table.
    pub fn l1_message(self, l1_index: u64) -> String {
        match self {
            EntryError::Unaligned(o) => {
                format!("L2 table offset {o:#x} unaligned (L1 index: {})", hex(l1_index))
            }
            other => other.l2_message(0, l1_index),
        }
    }
}

/// What an L2 entry says about its cluster. With extended L2 entries the bitmap beside it says the rest: then
/// `Unallocated` means "no host cluster" and `Zero` does not occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: the backing file's content, or zeroes.
    Unallocated,
    /// Reads as zeroes.
    Zero {
        /// A host cluster kept for it, bytes.
        host: Option<u64>,
        /// The host cluster's refcount is exactly 1.
        copied: bool,
    },
    /// Data in a host cluster.
    Normal {
        /// Bytes, cluster-aligned.
        host: u64,
        /// The host cluster's refcount is exactly 1.
        copied: bool,
    },
    /// A compressed cluster.
    Compressed {
        /// Where the stream begins, bytes, any alignment.
        offset: u64,
        /// How many bytes it may have: up to the end of its last 512-byte sector, which may pass the end of the file.
        len: u64,
    },
}

impl L2Entry {
    /// Judges an entry. `bitmap` is the second word of an extended entry, else ignored. Reserved bits are not looked
    /// at here: QEMU reads such entries, only its check complains ([`l2_reserved`]).
    ///
    /// # Errors
    /// What QEMU would mark the image corrupt for.
    pub fn decode(word: u64, bitmap: u64, g: Geometry) -> Result<L2Entry, EntryError> {
        if word & COMPRESSED != 0 {
            if g.data_file() {
                return Err(EntryError::CompressedWithDataFile);
            }
            let (offset, len) = compressed_range(word, g);
            return Ok(L2Entry::Compressed { offset, len });
        }
        let (host, copied) = (word & OFFSET_MASK, word & COPIED != 0);
        // In a data file offset 0 is a place like any other; there only COPIED says that it is meant.
        let allocated = host != 0 || (g.data_file() && copied);
        if word & ZERO != 0 && !g.extended_l2() {
            if !g.v3() {
                return Err(EntryError::ZeroInV2);
            }
            if g.in_cluster(host) != 0 {
                return Err(EntryError::Unaligned(host));
            }
            return Ok(L2Entry::Zero { host: allocated.then_some(host), copied });
        }
        if g.extended_l2() {
            SubBitmap(bitmap).validate(allocated)?;
        }
        if !allocated {
            return Ok(L2Entry::Unallocated);
        }
        if g.in_cluster(host) != 0 {
            return Err(EntryError::Unaligned(host));
        }
        Ok(L2Entry::Normal { host, copied })
    }

    /// As [`L2Entry::decode`], and with an external data file the host offset must be the guest's.
    ///
    /// # Errors
    /// What QEMU would mark the image corrupt for.
    pub fn decode_at(word: u64, bitmap: u64, guest_cluster: u64, g: Geometry) -> Result<L2Entry, EntryError> {
        let entry = L2Entry::decode(word, bitmap, g)?;
        match entry {
            L2Entry::Normal { host, .. } | L2Entry::Zero { host: Some(host), .. }
                if g.data_file() && host != guest_cluster =>
            {
                Err(EntryError::DataFileMismatch { host, guest: guest_cluster })
            }
            entry => Ok(entry),
        }
    }

    /// The first word of the entry.
    pub fn encode(self, g: Geometry) -> u64 {
        let flag = |copied| if copied { COPIED } else { 0 };
        match self {
            L2Entry::Unallocated => 0,
            L2Entry::Zero { host, copied } => {
                let zero = if g.extended_l2() { 0 } else { ZERO };
                host.map_or(0, |h| h & OFFSET_MASK | flag(copied)) | zero
            }
            L2Entry::Normal { host, copied } => host & OFFSET_MASK | flag(copied),
            L2Entry::Compressed { offset, len } => compressed_word(offset, len, g),
        }
    }

    /// The host cluster or stream this refers to: offset and length, bytes.
    pub fn host_range(self, g: Geometry) -> Option<(u64, u64)> {
        match self {
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => None,
            L2Entry::Zero { host: Some(host), .. } | L2Entry::Normal { host, .. } => {
                Some((host, g.cluster_size()))
            }
            L2Entry::Compressed { offset, len } => Some((offset, len)),
        }
    }
}

/// Place and longest length of a compressed cluster, from its L2 entry.
pub fn compressed_range(word: u64, g: Geometry) -> (u64, u64) {
    let offset = word & g.compressed_offset_mask();
    let sectors = (word >> g.csize_shift()) & g.csize_mask();
    (offset, (sectors + 1) * 512 - (offset & 511))
}

/// The L2 entry of a compressed cluster of `len` > 0 bytes at `offset`.
pub fn compressed_word(offset: u64, len: u64, g: Geometry) -> u64 {
    let last = (offset & 511) + len.max(1) - 1;
    COMPRESSED | (offset & g.compressed_offset_mask()) | ((last / 512) & g.csize_mask()) << g.csize_shift()
}

/// Whether a bit of an uncompressed L2 entry is set that must not be. Extended entries have no ZERO flag.
pub fn l2_reserved(word: u64, g: Geometry) -> bool {
    let extra = if g.extended_l2() { ZERO } else { 0 };
    word & COMPRESSED == 0 && word & (L2_RESERVED | extra) != 0
}
