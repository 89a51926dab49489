//! Where metadata lies, so that nothing is ever allocated over it (invariant I17).
//!
//! One nibble per host cluster, in chunks that exist where there is metadata: 4 KiB per 8192 clusters, whatever the number of
//! tables. Used under a lock of its own; pure.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// Clusters of one chunk.
const CHUNK: u64 = 8192;

/// What sort of metadata; the names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The first cluster.
    Header = 1,
    /// The L1 table in use.
    ActiveL1 = 2,
    /// L2 tables it points to.
    ActiveL2 = 3,
    /// Refcount table.
    RefcountTable = 4,
    /// Refcount blocks.
    RefcountBlock = 5,
    /// Snapshot table.
    SnapshotTable = 6,
    /// L1 tables of snapshots.
    InactiveL1 = 7,
    /// L2 tables of snapshots.
    InactiveL2 = 8,
    /// Directory of bitmaps.
    BitmapDirectory = 9,
    /// Tables and data of bitmaps.
    Bitmap = 10,
    /// Header of the encryption.
    Crypto = 11,
}

/// A set of kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds(u16);

impl Kinds {
    /// All of them.
    pub(crate) const ALL: Kinds = Kinds(u16::MAX);
    /// None of them.
    pub(crate) const NONE: Kinds = Kinds(0);

    /// These.
    pub(crate) fn of(kinds: &[Kind]) -> Kinds {
        Kinds(kinds.iter().fold(0, |set, kind| set | kind.bit()))
    }

    /// Without these.
    pub(crate) fn without(self, other: Kinds) -> Kinds {
        Kinds(self.0 & !other.0)
    }

    /// With or without one.
    pub(crate) fn with(self, kind: Kind, on: bool) -> Kinds {
        if on { Kinds(self.0 | kind.bit()) } else { Kinds(self.0 & !kind.bit()) }
    }

    /// Whether one of them is in it.
    pub(crate) fn has(self, kind: Kind) -> bool {
        self.0 & kind.bit() != 0
    }
}

impl Kind {
    fn bit(self) -> u16 {
        1 << self as u8
    }

    const ALL: [Kind; 11] = [
        Kind::Header,
        Kind::ActiveL1,
        Kind::ActiveL2,
        Kind::RefcountTable,
        Kind::RefcountBlock,
        Kind::SnapshotTable,
        Kind::InactiveL1,
        Kind::InactiveL2,
        Kind::BitmapDirectory,
        Kind::Bitmap,
        Kind::Crypto,
    ];

    fn from_nibble(n: u8) -> Option<Kind> {
        Kind::ALL.get(usize::from(n).checked_sub(1)?).copied()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Header => "qcow2_header",
            Kind::ActiveL1 => "active L1 table",
            Kind::ActiveL2 => "active L2 table",
            Kind::RefcountTable => "refcount table",
            Kind::RefcountBlock => "refcount block",
            Kind::SnapshotTable => "snapshot table",
            Kind::InactiveL1 => "inactive L1 table",
            Kind::InactiveL2 => "inactive L2 table",
            Kind::BitmapDirectory => "bitmap directory",
            Kind::Bitmap => "bitmap data",
            Kind::Crypto => "encryption header",
        })
    }
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct MetaMap {
    cluster_bits: u32,
    chunks: HashMap<u64, Box<[u8]>>,
    /// Clusters where metadata of several kinds lies: L2 tables that snapshots share, and what is damaged.
    shared: BTreeMap<u64, Kinds>,
}

impl MetaMap {
    /// Nothing yet.
    pub(crate) fn new(cluster_bits: u32) -> MetaMap {
        MetaMap { cluster_bits, chunks: HashMap::new(), shared: BTreeMap::new() }
    }

    fn clusters(&self, offset: u64, bytes: u64) -> std::ops::Range<u64> {
        let end = offset.saturating_add(bytes);
        (offset >> self.cluster_bits)
            ..(end >> self.cluster_bits) + u64::from(end & ((1 << self.cluster_bits) - 1) != 0)
    }

    fn set(&mut self, cluster: u64, nibble: u8) {
        let (chunk, at) = (cluster / CHUNK, (cluster % CHUNK) as usize);
        if nibble == 0 && !self.chunks.contains_key(&chunk) {
            return;
        }
        let nibbles =
            self.chunks.entry(chunk).or_insert_with(|| vec![0; CHUNK as usize / 2].into_boxed_slice());
        if let Some(byte) = nibbles.get_mut(at / 2) {
            let shift = (at % 2) * 4;
            *byte = (*byte & !(0xf << shift)) | (nibble << shift);
        }
    }

    fn get(&self, cluster: u64) -> Option<Kind> {
        let at = (cluster % CHUNK) as usize;
        let byte = self.chunks.get(&(cluster / CHUNK))?.get(at / 2)?;
        Kind::from_nibble((byte >> ((at % 2) * 4)) & 0xf)
    }

    fn kinds(&self, cluster: u64) -> Kinds {
        let one = self.get(cluster).map_or(Kinds::NONE, |kind| Kinds(kind.bit()));
        match self.shared.is_empty() {
            true => one,
            false => self.shared.get(&cluster).copied().unwrap_or(one),
        }
    }

    /// Metadata lies in a range, perhaps besides other metadata.
    pub(crate) fn add(&mut self, kind: Kind, offset: u64, bytes: u64) {
        for cluster in self.clusters(offset, bytes) {
            let before = self.kinds(cluster);
            if before.without(Kinds(kind.bit())) != Kinds::NONE {
                self.shared.insert(cluster, before.with(kind, true));
            }
            self.set(cluster, kind as u8);
        }
    }

    /// There is none any more.
    pub(crate) fn remove(&mut self, offset: u64, bytes: u64) {
        for cluster in self.clusters(offset, bytes) {
            self.set(cluster, 0);
            if !self.shared.is_empty() {
                self.shared.remove(&cluster);
            }
        }
    }

    /// The first metadata of these kinds in a range.
    pub(crate) fn overlap(&self, offset: u64, bytes: u64, kinds: Kinds) -> Option<Kind> {
        let range = self.clusters(offset, bytes);
        let mut cluster = range.start;
        while cluster < range.end {
            if !self.chunks.contains_key(&(cluster / CHUNK)) {
                cluster = (cluster / CHUNK + 1) * CHUNK;
                continue;
            }
            let here = self.kinds(cluster);
            if let Some(kind) = Kind::ALL.into_iter().find(|kind| here.has(*kind) && kinds.has(*kind)) {
                return Some(kind);
            }
            cluster += 1;
        }
        None
    }
}
