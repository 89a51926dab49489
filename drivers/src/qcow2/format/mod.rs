//! The on-disk format of qcow2 as pure functions: bytes to values and back, nothing else.
//!
//! Called by everything in this driver, by the checker and by whoever inspects an image; one parser for all of them, so
//! that nobody sees less than what is opened. Must not do I/O, must not allocate more than a validated limit, and must
//! not panic on any input: every length is checked before it is multiplied, every shift after its operand was validated.
//! Section names refer to QEMU's `docs/interop/qcow2.txt`.
//!
//! | file | subject |
//! |---|---|
//! | `header.rs`, `extension.rs`, `feature.rs` | first cluster |
//! | `geometry.rs` | everything that follows from cluster size, entry size and refcount width |
//! | `entry.rs`, `subcluster.rs` | L1, L2 and refcount table entries |
//! | `refcount.rs` | entries of a refcount block |
//! | `snapshot.rs`, `bitmap.rs` | snapshot table, bitmap directory and tables |

pub mod bitmap;
pub mod entry;
mod extension;
mod feature;
mod geometry;
mod header;
pub mod refcount;
pub mod snapshot;
mod subcluster;
#[cfg(test)]
mod tests;

use std::fmt;

use graph::{BlockError, Errno};

pub use entry::{EntryError, L1Entry, L2Entry, RtEntry};
pub use extension::{BitmapsExt, CryptoExt, UnknownExt};
pub use feature::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, AUTOCLEAR_KNOWN, COMPAT_LAZY_REFCOUNTS, FeatureName,
};
pub use feature::{
    INCOMPAT_COMPRESSION, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_DIRTY, INCOMPAT_EXTENDED_L2,
    INCOMPAT_KNOWN,
};
pub use geometry::Geometry;
pub use header::{Compression, CryptMethod, Header, MAX_HEADER_BYTES, Policy, field};
pub use subcluster::{SubBitmap, SubKind};

/// Smallest `cluster_bits` (512 bytes).
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest `cluster_bits` (2 MiB).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Largest L1 table, bytes (also of a snapshot).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table, bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// Most extra data of one snapshot, bytes.
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Longest name of a backing file, bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Longest name of a backing format, bytes.
pub const MAX_BACKING_FORMAT: u32 = 15;
/// Largest header area of an encryption layer we read, bytes. QEMU has no limit; a LUKS1 header with all its key
/// material is 2 MiB.
pub const MAX_CRYPTO_HEADER: u64 = 64 << 20;

/// Bits 9–55: a host offset within an L1 or L2 entry.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what is pointed to is exactly 1.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: reads as zeroes.
pub const ZERO: u64 = 1;

/// What of the image is wrong, where it stands, and QEMU's words for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Name of the field in the specification.
    pub field: &'static str,
    /// Where the field stands, bytes from the start of the file (of the table, for tables parsed on their own).
    pub offset: u64,
    /// Which number a caller returns.
    pub errno: Errno,
    /// QEMU's words where QEMU has words.
    pub message: String,
}

impl ParseError {
    pub(crate) fn invalid(field: &'static str, offset: u64, message: impl Into<String>) -> ParseError {
        ParseError { field, offset, errno: Errno::EINVAL, message: message.into() }
    }

    pub(crate) fn unsupported(field: &'static str, offset: u64, message: impl Into<String>) -> ParseError {
        ParseError { field, offset, errno: Errno::ENOTSUP, message: message.into() }
    }

    pub(crate) fn too_big(field: &'static str, offset: u64, message: impl Into<String>) -> ParseError {
        ParseError { field, offset, errno: Errno::EFBIG, message: message.into() }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} at offset {})", self.message, self.field, self.offset)
    }
}

impl std::error::Error for ParseError {}

impl From<ParseError> for BlockError {
    fn from(e: ParseError) -> BlockError {
        BlockError::new(e.errno, e.to_string())
    }
}

/// Big-endian reads that answer `None` past the end.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_be_bytes)
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_be_bytes)
}

/// Checks place and length of a table as QEMU does for every one: at most `max_bytes`, cluster-aligned, end below 2^63.
///
/// # Errors
/// `EFBIG` "… too large", `EINVAL` "… offset invalid".
pub fn validate_table(
    geometry: &Geometry,
    (field, at): (&'static str, u64),
    name: &str,
    offset: u64,
    entries: u64,
    entry_len: u64,
    max_bytes: u64,
) -> Result<u64, ParseError> {
    if entries > max_bytes / entry_len {
        return Err(ParseError::too_big(field, at, format!("{name} too large")));
    }
    let bytes = entries * entry_len;
    if offset > i64::MAX as u64 - bytes || !offset.is_multiple_of(geometry.cluster_size()) {
        return Err(ParseError::invalid(field, at, format!("{name} offset invalid")));
    }
    Ok(bytes)
}
