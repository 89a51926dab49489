//! A second opinion on qcow2 images: a small reader and checker of its own, straight from the specification
//! (QEMU, `docs/interop/qcow2.txt`), over images in memory.
//!
//! Shares no code with the driver, so that a misreading there is not repeated here. It knows no encryption and no
//! decompression; it is simple, not fast, and it trusts nothing but the length of what it reads.

use crate::image::Image;

mod bitmaps;
mod check;
mod read;

pub use bitmaps::{StoredBitmap, bitmaps};
pub use check::{Report, check};
pub use read::{Chain, read_guest};

/// Bits of the header's incompatible features.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// The image is known to be damaged.
    pub const CORRUPT: u64 = 2;
    /// Guest data is in another file.
    pub const DATA_FILE: u64 = 4;
    /// L2 entries have two words.
    pub const EXTENDED_L2: u64 = 16;
}

/// The header of an image.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Size of the disk, bytes.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1.
    pub l1_size: u32,
    /// Where it is.
    pub l1_offset: u64,
    /// Refcount table.
    pub rt_offset: u64,
    /// Clusters of it.
    pub rt_clusters: u32,
    /// Snapshots.
    pub snapshots: u32,
    /// Their table.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: u64,
    /// Autoclear features.
    pub autoclear: u64,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// Bitmaps, size of their directory in bytes, its offset.
    pub bitmaps: Option<(u32, u64, u64)>,
    /// Offset and length of the LUKS header.
    pub crypto: Option<(u64, u64)>,
    /// Whether there is a backing file.
    pub backing: bool,
}

/// A snapshot in the table.
#[derive(Clone, Debug)]
pub struct SnapshotEntry {
    /// Its name.
    pub name: String,
    /// Its L1 table.
    pub l1_offset: u64,
    /// Entries of it.
    pub l1_size: u32,
    /// Size of the disk then, bytes.
    pub size: u64,
}

pub(crate) fn u32_at(image: &Image, offset: u64) -> u32 {
    let mut word = [0; 4];
    image.read(offset, &mut word);
    u32::from_be_bytes(word)
}

pub(crate) fn u64_at(image: &Image, offset: u64) -> u64 {
    let mut word = [0; 8];
    image.read(offset, &mut word);
    u64::from_be_bytes(word)
}

fn u16_at(image: &Image, offset: u64) -> u16 {
    (u32_at(image, offset) >> 16) as u16
}

/// The offset in an L1, L2 or refcount table entry.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// "Copied": nobody else refers to it.
pub(crate) const COPIED: u64 = 1 << 63;
/// A compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;

impl Header {
    /// Reads the header.
    ///
    /// # Errors
    /// What makes no sense, in words.
    pub fn read(image: &Image) -> Result<Header, String> {
        if u32_at(image, 0) != 0x5146_49fb {
            return Err("no qcow2 magic".to_owned());
        }
        let mut h = Header {
            version: u32_at(image, 4),
            backing: u64_at(image, 8) != 0,
            cluster_bits: u32_at(image, 20),
            size: u64_at(image, 24),
            crypt_method: u32_at(image, 32),
            l1_size: u32_at(image, 36),
            l1_offset: u64_at(image, 40),
            rt_offset: u64_at(image, 48),
            rt_clusters: u32_at(image, 56),
            snapshots: u32_at(image, 60),
            snapshots_offset: u64_at(image, 64),
            refcount_order: 4,
            ..Header::default()
        };
        let mut extensions = 72;
        match h.version {
            2 => {}
            3 => {
                h.incompatible = u64_at(image, 72);
                h.autoclear = u64_at(image, 88);
                h.refcount_order = u32_at(image, 96);
                extensions = u64::from(u32_at(image, 100));
            }
            v => return Err(format!("version {v}")),
        }
        if !(9..=21).contains(&h.cluster_bits) || h.refcount_order > 6 {
            return Err(format!("cluster_bits {}, refcount_order {}", h.cluster_bits, h.refcount_order));
        }
        if h.l1_size > 4 << 20 || h.rt_clusters > 1 << 14 || h.snapshots > 65536 {
            return Err(format!("tables too large: {h:?}"));
        }
        let end = match u64_at(image, 8) {
            0 => h.cluster(),
            backing => backing.min(h.cluster()),
        };
        while extensions + 8 <= end {
            let (kind, len) = (u32_at(image, extensions), u64::from(u32_at(image, extensions + 4)));
            let body = extensions + 8;
            match kind {
                0 => break,
                0x2385_2875 => {
                    h.bitmaps =
                        Some((u32_at(image, body), u64_at(image, body + 8), u64_at(image, body + 16)));
                }
                0x0537_be77 => h.crypto = Some((u64_at(image, body), u64_at(image, body + 8))),
                _ => {}
            }
            extensions = body + len.next_multiple_of(8);
        }
        Ok(h)
    }

    /// Cluster size, bytes.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have a second word.
    pub fn extended(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether guest data is in a file of its own.
    pub fn external(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether refcounts may be wrong.
    pub fn dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Bytes of an L2 entry.
    pub(crate) fn l2_entry(&self) -> u64 {
        if self.extended() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry()
    }

    /// The snapshot table; the second value is its length in bytes.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn snapshot_table(&self, image: &Image) -> Result<(Vec<SnapshotEntry>, u64), String> {
        let mut at = self.snapshots_offset;
        let mut list = Vec::new();
        for _ in 0..self.snapshots {
            at = at.next_multiple_of(8);
            if at > image.len() {
                return Err(format!("the snapshot table leaves the file at {at:#x}"));
            }
            let (id, name) = (u64::from(u16_at(image, at + 12)), u64::from(u16_at(image, at + 14)));
            let extra = u64::from(u32_at(image, at + 36));
            if extra > 1024 {
                return Err(format!("{extra} bytes of extra data in the snapshot table at {at:#x}"));
            }
            let size = if extra >= 16 { u64_at(image, at + 48) } else { self.size };
            let text = image.bytes(at + 40 + extra + id, name as usize);
            list.push(SnapshotEntry {
                name: String::from_utf8_lossy(&text).into_owned(),
                l1_offset: u64_at(image, at),
                l1_size: u32_at(image, at + 8),
                size,
            });
            at += 40 + extra + id + name;
        }
        Ok((list, at - self.snapshots_offset))
    }

    /// Offset and number of 512-byte units of a compressed cluster.
    pub(crate) fn compressed(&self, entry: u64) -> (u64, u64) {
        let shift = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let units = ((entry & (COMPRESSED - 1)) >> shift) + 1;
        (offset, units)
    }
}
