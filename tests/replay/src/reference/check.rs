//! The checker: who refers to which cluster, and whether the refcounts say so.
//!
//! Counts what `qemu-img check` counts as corruption. Called for every crash state; must end on any image.

use std::collections::HashMap;

use super::{COMPRESSED, COPIED, Header, OFFSET, u32_at, u64_at};
use crate::image::Image;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Violations, one line each.
    pub corruptions: Vec<String>,
    /// Clusters with a refcount above the number of references.
    pub leaks: u64,
}

struct Checker<'a> {
    image: &'a Image,
    header: &'a Header,
    /// References by cluster number.
    refs: HashMap<u64, u64>,
    report: Report,
}

/// Checks an image. While its dirty bit is set, refcounts that are too low are no corruption: they are rebuilt when it is
/// opened.
///
/// # Errors
/// The header, or a table that must be readable to go on.
pub fn check(image: &Image) -> Result<Report, String> {
    let header = Header::read(image)?;
    let mut c = Checker { image, header: &header, refs: HashMap::new(), report: Report::default() };
    let cluster = header.cluster();
    c.refer("header", 0, cluster);
    c.refer("refcount table", header.rt_offset, u64::from(header.rt_clusters) * cluster);
    for i in 0..u64::from(header.rt_clusters) * cluster / 8 {
        let block = u64_at(image, header.rt_offset + i * 8) & OFFSET;
        if block != 0 {
            c.refer("refcount block", block, cluster);
        }
    }
    if let Some((offset, len)) = header.crypto {
        c.refer("LUKS header", offset, len);
    }
    c.tables("active", header.l1_offset, header.l1_size, true);
    if header.snapshots > 0 {
        let (list, len) = header.snapshot_table(image)?;
        c.refer("snapshot table", header.snapshots_offset, len);
        for snapshot in list {
            c.tables(&format!("snapshot '{}'", snapshot.name), snapshot.l1_offset, snapshot.l1_size, false);
        }
    }
    c.bitmaps();
    c.refcounts();
    Ok(c.report)
}

impl Checker<'_> {
    fn bad(&mut self, words: String) {
        // A broken table says the same a thousand times.
        if self.report.corruptions.len() < 20 {
            self.report.corruptions.push(words);
        }
    }

    /// A range is in use once more.
    fn refer(&mut self, what: &str, offset: u64, len: u64) {
        let cluster = self.header.cluster();
        if offset == 0 && what != "header" {
            return self.bad(format!("{what} at offset 0"));
        }
        if len == 0 {
            return;
        }
        if !offset.is_multiple_of(512) || offset.checked_add(len).is_none_or(|e| e > 1 << 56) {
            return self.bad(format!("{what} at {offset:#x}+{len:#x}"));
        }
        if offset >= self.image.len() {
            self.bad(format!("{what} at {offset:#x} is past the end of the file ({:#x})", self.image.len()));
        }
        if len > 1 << 32 {
            return self.bad(format!("{what} at {offset:#x} has {len:#x} bytes"));
        }
        for number in offset / cluster..=(offset + len - 1) / cluster {
            *self.refs.entry(number).or_default() += 1;
        }
    }

    fn aligned(&mut self, what: &str, offset: u64) -> bool {
        let aligned = offset.is_multiple_of(self.header.cluster());
        if !aligned {
            self.bad(format!("{what} at {offset:#x} is not aligned"));
        }
        aligned
    }

    fn tables(&mut self, whose: &str, l1_offset: u64, l1_size: u32, active: bool) {
        if l1_size == 0 || !self.aligned(&format!("{whose} L1"), l1_offset) {
            return;
        }
        self.refer(&format!("{whose} L1"), l1_offset, u64::from(l1_size) * 8);
        for i in 0..u64::from(l1_size) {
            let entry = u64_at(self.image, l1_offset + i * 8);
            let table = entry & OFFSET;
            if entry & 0x7f00_0000_0000_01ff != 0 {
                self.bad(format!("{whose} L1 entry {i} is {entry:#x}"));
            }
            if table == 0 || !self.aligned("L2 table", table) {
                continue;
            }
            self.refer(&format!("{whose} L2 table {i}"), table, self.header.cluster());
            if active {
                self.copied(&format!("L1 entry {i}"), table, entry & COPIED != 0);
            }
            for j in 0..self.header.l2_entries() {
                let at = table + j * self.header.l2_entry();
                let word = u64_at(self.image, at);
                let bits = if self.header.extended() { u64_at(self.image, at + 8) } else { 0 };
                if word | bits != 0 {
                    self.entry(&format!("{whose} L2 entry {i}/{j}"), word, bits, active);
                }
            }
        }
    }

    fn entry(&mut self, what: &str, word: u64, bits: u64, active: bool) {
        let (header, cluster) = (self.header, self.header.cluster());
        if word & COMPRESSED != 0 {
            if word & COPIED != 0 || bits != 0 {
                self.bad(format!("{what}: compressed, and {word:#x} {bits:#x}"));
            }
            let (offset, units) = header.compressed(word);
            return self.refer(what, offset & !511, units * 512);
        }
        let reserved = if header.extended() { 0x3f00_0000_0000_01ff } else { 0x3f00_0000_0000_01fe };
        if word & reserved != 0 || (header.version == 2 && word & 1 != 0) {
            self.bad(format!("{what} is {word:#x}"));
        }
        if header.extended() && (bits & (bits >> 32) & 0xffff_ffff) != 0 {
            self.bad(format!("{what}: subclusters allocated and zero: {bits:#x}"));
        }
        let offset = word & OFFSET;
        if offset == 0 && !(header.external() && word & COPIED != 0) {
            if header.extended() && bits & 0xffff_ffff != 0 {
                self.bad(format!("{what}: subclusters without a cluster: {bits:#x}"));
            }
            return;
        }
        if !self.aligned(what, offset) || header.external() {
            return;
        }
        self.refer(what, offset, cluster);
        if active {
            self.copied(what, offset, word & COPIED != 0);
        }
    }

    fn copied(&mut self, what: &str, offset: u64, copied: bool) {
        let refcount = self.refcount(offset >> self.header.cluster_bits);
        if (refcount == 1) != copied && !self.header.dirty() {
            self.bad(format!("{what}: COPIED is {copied}, refcount of {offset:#x} is {refcount}"));
        }
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let header = self.header;
        let bits = 1u64 << header.refcount_order;
        let per_block = header.cluster() * 8 / bits;
        let index = cluster / per_block;
        if index >= u64::from(header.rt_clusters) * header.cluster() / 8 {
            return 0;
        }
        let block = u64_at(self.image, header.rt_offset + index * 8) & OFFSET;
        if block == 0 {
            return 0;
        }
        let at = cluster % per_block * bits;
        if bits >= 8 {
            let bytes = self.image.bytes(block + at / 8, (bits / 8) as usize);
            return bytes.iter().fold(0, |a, b| a << 8 | u64::from(*b));
        }
        let byte = self.image.bytes(block + at / 8, 1)[0];
        u64::from(byte) >> (at % 8) & ((1 << bits) - 1)
    }

    fn bitmaps(&mut self) {
        let Some((count, size, offset)) = self.header.bitmaps.filter(|_| self.header.autoclear & 1 != 0)
        else {
            return;
        };
        self.refer("bitmap directory", offset, size);
        let mut at = offset;
        for _ in 0..count {
            if at + 24 > offset + size {
                return self.bad(format!("the bitmap directory ends inside of entry at {at:#x}"));
            }
            let (table, entries) = (u64_at(self.image, at), u32_at(self.image, at + 8));
            let (name, extra) = (u32_at(self.image, at + 16) & 0xffff, u32_at(self.image, at + 20));
            at = (at + 24 + u64::from(extra) + u64::from(name)).next_multiple_of(8);
            if entries == 0 || entries > 1 << 20 || !self.aligned("bitmap table", table) {
                continue;
            }
            self.refer("bitmap table", table, u64::from(entries) * 8);
            for i in 0..u64::from(entries) {
                let entry = u64_at(self.image, table + i * 8);
                if entry & OFFSET != 0 {
                    self.refer("bitmap data", entry & OFFSET, self.header.cluster());
                }
            }
        }
    }

    fn refcounts(&mut self) {
        let header = self.header;
        let last = self.image.len().div_ceil(header.cluster());
        let mut wrong: Vec<String> = Vec::new();
        for cluster in 0..last {
            let refs = self.refs.get(&cluster).copied().unwrap_or(0);
            let refcount = self.refcount(cluster);
            if refcount > refs {
                self.report.leaks += 1;
            } else if refcount < refs && !header.dirty() {
                let at = cluster << header.cluster_bits;
                wrong.push(format!("cluster {at:#x}: refcount {refcount}, {refs} references"));
            }
        }
        wrong.into_iter().for_each(|w| self.bad(w));
    }
}
