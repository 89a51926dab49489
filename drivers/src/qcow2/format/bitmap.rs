//! Bitmap directory and bitmap tables ("Bitmaps").
//!
//! Used by loading and storing bitmaps and by the checker; knows nothing of the bits themselves.

use super::{Geometry, ParseError, be16, be32, be64};

/// Most bitmaps of an image.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest directory, bytes.
pub const MAX_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// Longest name, bytes.
pub const MAX_NAME: usize = 1023;
/// Most entries of a bitmap table.
pub const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Most bytes of bitmap data (clusters included that are not stored).
pub const MAX_DATA_BYTES: u64 = 0x2000_0000;
/// Smallest and largest granularity, log2 bytes.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Flag: not saved properly; inconsistent if found at open.
pub const FLAG_IN_USE: u32 = 1;
/// Flag: recording (QEMU: enabled at load).
pub const FLAG_AUTO: u32 = 2;
/// Flags nobody knows; "extra_data_compatible" is one, as in QEMU.
pub const FLAGS_RESERVED: u32 = 0xffff_fffc;
/// Bits of a bitmap table entry that must be 0.
pub const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bytes of the fixed part of a directory entry.
pub const FIXED: usize = 24;
/// The only type: dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Where the table is, bytes, cluster-aligned.
    pub table_offset: u64,
    /// Entries of the table.
    pub table_size: u32,
    /// `FLAG_*`.
    pub flags: u32,
    /// log2 of the granularity in bytes.
    pub granularity_bits: u8,
    /// Not empty, at most 1023 bytes.
    pub name: Vec<u8>,
}

/// What a cluster of bitmap data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableEntry {
    /// All bits 0.
    Zeroes,
    /// All bits 1.
    Ones,
    /// Stored in this host cluster, bytes.
    Stored(u64),
}

impl TableEntry {
    /// Judges an entry.
    ///
    /// # Errors
    /// Reserved bits, or an offset that is not cluster-aligned.
    pub fn decode(word: u64, g: Geometry) -> Result<TableEntry, ParseError> {
        let offset = word & super::OFFSET_MASK;
        let bad = |text: String| ParseError::invalid("bitmap table entry", 0, text);
        if word & TABLE_RESERVED != 0 {
            return Err(bad(format!("Bitmap table entry {word:#x} has reserved bits set")));
        }
        if offset == 0 {
            return Ok(if word & 1 == 0 { TableEntry::Zeroes } else { TableEntry::Ones });
        }
        if g.in_cluster(offset) != 0 || word & 1 != 0 {
            return Err(bad(format!("Bitmap table entry {word:#x} is not valid")));
        }
        Ok(TableEntry::Stored(offset))
    }

    /// The entry on disk.
    pub fn encode(self) -> u64 {
        match self {
            TableEntry::Zeroes => 0,
            TableEntry::Ones => 1,
            TableEntry::Stored(offset) => offset & super::OFFSET_MASK,
        }
    }
}

/// Bytes of bitmap data for a disk.
pub fn data_bytes(disk_size: u64, granularity_bits: u8) -> u64 {
    let bits = disk_size.div_ceil(1u64.checked_shl(u32::from(granularity_bits)).unwrap_or(1));
    bits.div_ceil(8)
}

/// Entries the table of a bitmap has to have.
pub fn table_entries(disk_size: u64, granularity_bits: u8, g: Geometry) -> u64 {
    g.clusters(data_bytes(disk_size, granularity_bits))
}

impl DirEntry {
    /// Bytes on disk, padding included.
    pub fn serialised_len(&self) -> usize {
        (FIXED + self.name.len()).next_multiple_of(8)
    }

    /// Appends the entry.
    pub fn serialise(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.table_offset.to_be_bytes());
        out.extend_from_slice(&self.table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.push(DIRTY_TRACKING);
        out.push(self.granularity_bits);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.name);
        out.resize(start + self.serialised_len(), 0);
    }

    /// Whether the bitmap was not saved properly.
    pub fn in_use(&self) -> bool {
        self.flags & FLAG_IN_USE != 0
    }

    /// The table's length must be what the disk's size asks for; looked at when the bitmap is loaded.
    ///
    /// # Errors
    /// QEMU's sentence.
    pub fn check_table_size(&self, disk_size: u64, g: Geometry) -> Result<(), ParseError> {
        let expected = table_entries(disk_size, self.granularity_bits, g);
        if u64::from(self.table_size) != expected {
            let text = format!(
                "Bitmap table size {} does not correspond to bitmap size and cluster size. Expected {expected}",
                self.table_size
            );
            return Err(ParseError::invalid("bitmap_table_size", 8, text));
        }
        Ok(())
    }

    fn check(&self, kind: u8, disk_size: u64, g: Geometry) -> bool {
        let data = u64::from(self.table_size) * g.cluster_size();
        let shape = self.table_size != 0
            && self.table_offset != 0
            && g.in_cluster(self.table_offset) == 0
            && self.table_offset <= i64::MAX as u64 - u64::from(self.table_size) * 8
            && self.table_size <= MAX_TABLE_ENTRIES
            && GRANULARITY_BITS.contains(&self.granularity_bits)
            && self.flags & FLAGS_RESERVED == 0
            && (1..=MAX_NAME).contains(&self.name.len())
            && kind == DIRTY_TRACKING
            && data <= MAX_DATA_BYTES;
        // A bitmap that does not cover the disk can only be one that was not saved.
        shape && (self.in_use() || disk_size <= (data * 8) << self.granularity_bits)
    }
}

/// Parses the whole directory: `count` entries that fill `bytes` exactly.
///
/// # Errors
/// QEMU's sentences; the offset is within the directory.
pub fn parse_directory(
    bytes: &[u8],
    count: u32,
    disk_size: u64,
    g: Geometry,
) -> Result<Vec<DirEntry>, ParseError> {
    if bytes.is_empty() {
        return Err(ParseError::invalid(
            "bitmap_directory_size",
            0,
            "Requested bitmap directory size is zero",
        ));
    }
    if bytes.len() as u64 > MAX_DIRECTORY_BYTES {
        return Err(ParseError::invalid(
            "bitmap_directory_size",
            0,
            "Requested bitmap directory size is too big",
        ));
    }
    let broken = |at: usize| ParseError::invalid("bitmap directory", at as u64, "Broken bitmap directory");
    let mut all = Vec::new();
    let mut at = 0usize;
    while at < bytes.len() {
        if all.len() as u64 >= u64::from(count) {
            let text = "More bitmaps found than specified in header extension";
            return Err(ParseError::invalid("nb_bitmaps", at as u64, text));
        }
        let e = bytes.get(at..).filter(|e| e.len() >= FIXED).ok_or_else(|| broken(at))?;
        let name_len = usize::from(be16(e, 18).unwrap_or(0));
        let extra = be32(e, 20).unwrap_or(0) as usize;
        let end = FIXED.checked_add(extra).and_then(|n| n.checked_add(name_len)).ok_or_else(|| broken(at))?;
        let len = end.checked_next_multiple_of(8).filter(|&l| l <= e.len()).ok_or_else(|| broken(at))?;
        if extra != 0 {
            return Err(ParseError::invalid(
                "extra_data_size",
                at as u64 + 20,
                "Bitmap extra data is not supported",
            ));
        }
        let entry = DirEntry {
            table_offset: be64(e, 0).unwrap_or(0),
            table_size: be32(e, 8).unwrap_or(0),
            flags: be32(e, 12).unwrap_or(0),
            granularity_bits: e[17],
            name: e[FIXED..end].to_vec(),
        };
        if !entry.check(e[16], disk_size, g) {
            let text =
                format!("Bitmap '{}' doesn't satisfy the constraints", String::from_utf8_lossy(&entry.name));
            return Err(ParseError::invalid("bitmap directory", at as u64, text));
        }
        all.push(entry);
        at += len;
    }
    if (all.len() as u64) < u64::from(count) {
        let text = "Less bitmaps found than specified in header extension";
        return Err(ParseError::invalid("nb_bitmaps", at as u64, text));
    }
    Ok(all)
}

/// The directory's bytes.
pub fn serialise_directory(entries: &[DirEntry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.iter().map(DirEntry::serialised_len).sum());
    for e in entries {
        e.serialise(&mut out);
    }
    out
}
