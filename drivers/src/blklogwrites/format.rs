//! The log on disk: a superblock in the first sector, then entries, each a sector, most followed by data. Little endian. Pure.
//!
//! Used by `log` and `open`. Must not know nodes.

/// What a superblock begins with.
const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The only version.
const VERSION: u64 = 1;
/// Bytes of an entry without its padding; a superblock is shorter.
pub(super) const ENTRY_LEN: usize = 32;

/// Flags of an entry: everything completed before is durable.
pub(super) const FLUSH: u64 = 1 << 0;
/// Flags of an entry: the data is durable.
pub(super) const FUA: u64 = 1 << 1;
/// Flags of an entry: the range was given up; no data follows.
pub(super) const DISCARD: u64 = 1 << 2;
/// Flags of an entry: a mark that somebody set; logs of others have some.
const MARK: u64 = 1 << 3;

/// Why a log cannot be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bad {
    /// It does not begin as a log does.
    Magic,
    /// Another version.
    Version(u64),
    /// Impossible sector size.
    SectorSize(u64),
    /// Unknown flags.
    Flags(u64),
}

/// What the superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Super {
    /// How many entries are complete.
    pub(super) entries: u64,
    /// Bytes.
    pub(super) sector_size: u32,
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where the change begins, sectors.
    pub(super) sector: u64,
    /// How long it is, sectors.
    pub(super) sectors: u64,
    /// What it is.
    pub(super) flags: u64,
}

/// A sector size, if it is a possible one.
pub(super) fn sector_size(bytes: u64) -> Result<u32, Bad> {
    match u32::try_from(bytes) {
        Ok(n) if n.is_power_of_two() && (512..1 << 24).contains(&n) => Ok(n),
        _ => Err(Bad::SectorSize(bytes)),
    }
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let word = bytes.as_chunks::<8>().0.get(index);
    word.map_or(0, |w| u64::from_le_bytes(*w))
}

impl Super {
    /// Reads one.
    pub(super) fn parse(bytes: &[u8]) -> Result<Super, Bad> {
        if word(bytes, 0) != MAGIC {
            return Err(Bad::Magic);
        }
        if word(bytes, 1) != VERSION {
            return Err(Bad::Version(word(bytes, 1)));
        }
        Ok(Super { entries: word(bytes, 2), sector_size: sector_size(word(bytes, 3) & 0xffff_ffff)? })
    }

    /// The whole sector.
    pub(super) fn bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.sector_size as usize);
        for word in [MAGIC, VERSION, self.entries] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.sector_size.to_le_bytes());
        bytes.resize(self.sector_size as usize, 0);
        bytes
    }
}

impl Entry {
    /// Reads one.
    pub(super) fn parse(bytes: &[u8]) -> Result<Entry, Bad> {
        let flags = word(bytes, 2);
        if flags & !(FLUSH | FUA | DISCARD | MARK) != 0 {
            return Err(Bad::Flags(flags));
        }
        Ok(Entry { sector: word(bytes, 0), sectors: word(bytes, 1), flags })
    }

    /// Its bytes without the padding.
    pub(super) fn bytes(self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        // The last word is the length of a mark's text.
        let words = [self.sector, self.sectors, self.flags, 0];
        for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        bytes
    }

    /// How many sectors it takes in the log, its data included; `None`: more than there can be.
    pub(super) fn place(self) -> Option<u64> {
        if self.flags & DISCARD != 0 { Some(1) } else { self.sectors.checked_add(1) }
    }
}
