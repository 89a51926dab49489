//! Sectors that say what they are: address, number of the write, and words that follow from both.
//!
//! Written by workloads, recognised by the oracle, so that a sector of another address, of a write that never was, or of
//! two writes mixed is told from every legal content.

/// Bytes of a stamped sector.
pub const SECTOR: usize = 512;

/// "ringblk!" little-endian.
const MAGIC: u64 = 0x216b_6c62_676e_6972;

fn word(lba: u64, number: u64, at: u64) -> u64 {
    let mut z = lba.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.rotate_left(32) ^ (at << 56);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

/// The sector of address `lba` (in sectors) as write `number` makes it.
pub fn sector(lba: u64, number: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    for (at, to) in (0u64..).zip(out.chunks_exact_mut(8)) {
        let value = match at {
            0 => MAGIC,
            1 => lba,
            2 => number,
            _ => word(lba, number, at),
        };
        to.copy_from_slice(&value.to_le_bytes());
    }
    out
}

/// `sectors` sectors from `lba`, all of write `number`.
pub fn sectors(lba: u64, sectors: u64, number: u64) -> Vec<u8> {
    (lba..lba + sectors).flat_map(|at| sector(at, number)).collect()
}

/// What a sector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing but zeroes.
    Zero,
    /// A stamp, whole.
    Stamp {
        /// Address.
        lba: u64,
        /// Number of the write.
        number: u64,
    },
    /// A stamp in part.
    Broken {
        /// Address.
        lba: u64,
        /// Number of the write.
        number: u64,
    },
    /// Something else.
    Foreign,
}

/// Recognises a sector.
pub fn recognise(data: &[u8]) -> Found {
    let at = |i: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&data[i * 8..i * 8 + 8]);
        u64::from_le_bytes(word)
    };
    if data.iter().all(|b| *b == 0) {
        return Found::Zero;
    }
    if at(0) != MAGIC {
        return Found::Foreign;
    }
    let (lba, number) = (at(1), at(2));
    if data == sector(lba, number) { Found::Stamp { lba, number } } else { Found::Broken { lba, number } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_recognised_and_half_of_one_is_not() {
        let mut a = sector(7, 9);
        assert_eq!(recognise(&a), Found::Stamp { lba: 7, number: 9 });
        a[256..].copy_from_slice(&sector(7, 8)[256..]);
        assert_eq!(recognise(&a), Found::Broken { lba: 7, number: 9 });
        assert_eq!(recognise(&[0; SECTOR]), Found::Zero);
        assert_eq!(recognise(&[1; SECTOR]), Found::Foreign);
        assert_eq!(sectors(3, 2, 1)[512..], sector(4, 1));
    }
}
