//! The stored dirty bitmaps of an image, and whether they tell the truth.

use super::{Header, OFFSET, u32_at, u64_at};
use crate::image::Image;
use crate::stamp::SECTOR;

/// "In use": somebody had it open, what is stored is not to be trusted.
const IN_USE: u32 = 1;

/// A stored bitmap.
#[derive(Clone, Debug)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// Whether it is to be trusted.
    pub valid: bool,
    /// Bytes one bit stands for.
    pub granularity: u64,
    /// The bits.
    bits: Vec<u8>,
}

impl StoredBitmap {
    fn is_set(&self, offset: u64) -> bool {
        let granule = (offset / self.granularity) as usize;
        self.bits.get(granule / 8).is_some_and(|b| b >> (granule % 8) & 1 == 1)
    }

    /// A bitmap that recorded since the disk was `old` covers everything that is different now.
    ///
    /// # Errors
    /// It does not.
    pub fn covers(&self, old: &[u8], now: &[u8]) -> Result<(), String> {
        let sectors = old.chunks(SECTOR).zip(now.chunks(SECTOR)).enumerate();
        for (sector, (old, now)) in sectors {
            if old != now && !self.is_set((sector * SECTOR) as u64) {
                return Err(format!(
                    "sector {sector} has changed and bitmap '{}' does not say so",
                    self.name
                ));
            }
        }
        Ok(())
    }
}

/// The bitmaps an image has, as far as it vouches for them.
///
/// # Errors
/// The directory makes no sense.
pub fn bitmaps(image: &Image, header: &Header) -> Result<Vec<StoredBitmap>, String> {
    let Some((count, size, offset)) = header.bitmaps.filter(|_| header.autoclear & 1 != 0) else {
        return Ok(Vec::new());
    };
    let mut list = Vec::new();
    let mut at = offset;
    for _ in 0..count {
        if at + 24 > offset + size {
            return Err(format!("the bitmap directory ends inside of the entry at {at:#x}"));
        }
        let (table, entries, flags) = (u64_at(image, at), u32_at(image, at + 8), u32_at(image, at + 12));
        let kind = u32_at(image, at + 16);
        let (granularity, name) = (1u64 << ((kind >> 16) & 63), u64::from(kind & 0xffff));
        let extra = u64::from(u32_at(image, at + 20));
        let text = image.bytes(at + 24 + extra, name as usize);
        let name_text = String::from_utf8_lossy(&text).into_owned();
        if entries > 1 << 16 {
            return Err(format!("bitmap '{name_text}' has a table of {entries} entries"));
        }
        let mut bits = Vec::new();
        for i in 0..u64::from(entries) {
            let entry = u64_at(image, table + i * 8);
            match entry & OFFSET {
                0 => {
                    bits.resize(bits.len() + header.cluster() as usize, if entry & 1 == 1 { 0xff } else { 0 })
                }
                data => bits.extend(image.bytes(data, header.cluster() as usize)),
            }
        }
        list.push(StoredBitmap { name: name_text, valid: flags & IN_USE == 0, granularity, bits });
        at = (at + 24 + extra + name).next_multiple_of(8);
    }
    Ok(list)
}
