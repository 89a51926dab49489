//! What an L2 entry says of guest data, decoded from its words in host byte order, and how far the same goes on.
//!
//! Used by the lookups of this folder and by whoever changes entries. Pure; the hot path of reads and writes runs through
//! [`Decoder::run`], hence the bit fiddling instead of `format::L2Entry`.

use crate::qcow2::format::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, ZERO};

/// What a subcluster (a cluster where there are none) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Content comes from the backing file, or is zero without one.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// Has data of its own.
    Normal,
    /// Part of a compressed cluster.
    Compressed,
    /// The entry is not valid: the image is corrupt.
    Invalid,
}

/// A stretch of guest addresses of one kind; host offsets, where there are any, run along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// What it is.
    pub(crate) kind: Kind,
    /// Bytes; not 0, at most what was asked.
    pub(crate) len: u64,
    /// Where the first byte lies (or would lie) on the host, if there is a host cluster.
    pub(crate) host: Option<u64>,
    /// Host clusters belong to this entry alone.
    pub(crate) copied: bool,
    /// The first entry as it stands.
    pub(crate) entry: u64,
}

/// Bits an L2 entry of a standard cluster must not have, and those of the host offset that must be 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoder {
    pub(crate) geo: Geometry,
    /// Reserved bits of a standard entry, with the low bits of the host offset.
    reserved: u64,
}

impl Decoder {
    pub(crate) fn new(geo: Geometry) -> Decoder {
        let mut reserved = 0x3f00_0000_0000_01fe | (OFFSET_MASK & (geo.cluster_size() - 1));
        if geo.extended_l2() || !geo.v3() {
            reserved |= ZERO;
        }
        Decoder { geo, reserved }
    }

    /// Bits of a standard entry that make it anything but plain data.
    pub(super) fn odd(&self) -> u64 {
        self.reserved | COMPRESSED | ZERO
    }

    /// Host cluster of a standard entry.
    #[inline]
    pub(crate) fn host(&self, entry: u64) -> Option<u64> {
        let host = entry & OFFSET_MASK;
        // In a data file the first cluster is data like any other; COPIED tells it from "not allocated".
        (host != 0 || (self.geo.data_file() && entry & COPIED != 0)).then_some(host)
    }

    /// Whether an entry with its bitmap is well formed.
    pub(crate) fn valid(&self, entry: u64, bitmap: u64) -> bool {
        if entry & COMPRESSED != 0 {
            return !self.geo.data_file() && bitmap == 0 && entry & COPIED == 0;
        }
        if entry & self.reserved != 0 {
            return false;
        }
        if !self.geo.extended_l2() {
            return true;
        }
        let (alloc, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        alloc & zero == 0 && (alloc == 0 || self.host(entry).is_some())
    }

    /// Kind of the subcluster `sub` (0 without extended L2 entries).
    #[inline]
    pub(crate) fn kind(&self, entry: u64, bitmap: u64, sub: u32) -> Kind {
        if entry & COMPRESSED != 0 {
            return if self.valid(entry, bitmap) { Kind::Compressed } else { Kind::Invalid };
        }
        if entry & self.reserved != 0 {
            return Kind::Invalid;
        }
        if !self.geo.extended_l2() {
            return if entry & ZERO != 0 {
                Kind::Zero
            } else if self.host(entry).is_some() {
                Kind::Normal
            } else {
                Kind::Unallocated
            };
        }
        let (alloc, zero) = ((bitmap >> sub) & 1 != 0, (bitmap >> (32 + sub)) & 1 != 0);
        match (alloc, zero) {
            (true, true) => Kind::Invalid,
            (true, false) if self.host(entry).is_some() => Kind::Normal,
            (true, false) => Kind::Invalid,
            (false, true) => Kind::Zero,
            (false, false) => Kind::Unallocated,
        }
    }

    /// The run at guest offset `guest`, at most `len` bytes, out of `count` entries that `get` returns; entry 0 of `get` is
    /// that of the cluster with index `index`. What lies behind the last entry is not looked at.
    #[inline]
    pub(crate) fn run(
        &self,
        get: impl Fn(usize) -> (u64, u64),
        index: usize,
        count: usize,
        guest: u64,
        len: u64,
    ) -> Run {
        if self.geo.extended_l2() {
            return self.run_extended(get, index, count, guest, len);
        }
        let size = self.geo.cluster_size();
        let within = self.geo.in_cluster(guest);
        let (entry, _) = get(index);
        let kind = self.kind(entry, 0, 0);
        let host = match kind {
            Kind::Normal | Kind::Zero => self.host(entry).map(|h| h + within),
            _ => None,
        };
        let mut have = size - within;
        let mut run = Run { kind, len: have.min(len), host, copied: entry & COPIED != 0, entry };
        if have >= len || matches!(kind, Kind::Compressed | Kind::Invalid) {
            return run;
        }
        // Flags equal and the host offset one cluster further on: one comparison for both.
        let step = if host.is_some() { size } else { 0 };
        let mut expected = entry;
        for at in index + 1..count {
            expected = expected.wrapping_add(step);
            if get(at).0 != expected {
                break;
            }
            have += size;
            if have >= len {
                break;
            }
        }
        run.len = have.min(len);
        run
    }

    fn run_extended(
        &self,
        get: impl Fn(usize) -> (u64, u64),
        index: usize,
        count: usize,
        guest: u64,
        len: u64,
    ) -> Run {
        let size = self.geo.cluster_size();
        let (first, _) = get(index);
        let mut run: Option<Run> = None;
        let mut at = index;
        let mut pos = self.geo.in_cluster(guest);
        let mut left = len;
        let mut expected = first;
        while at < count && left > 0 {
            let (entry, bitmap) = get(at);
            let sub = self.geo.subcluster_index(pos);
            let kind = self.kind(entry, bitmap, sub);
            let host = match kind {
                Kind::Compressed | Kind::Invalid => None,
                _ => self.host(entry).map(|h| h + pos),
            };
            let room = match kind {
                Kind::Compressed => size - pos,
                _ => self.geo.subcluster_size() - (pos & (self.geo.subcluster_size() - 1)),
            };
            let part = room.min(left);
            match &mut run {
                None => run = Some(Run { kind, len: part, host, copied: entry & COPIED != 0, entry }),
                Some(r) => {
                    if r.kind != kind || entry != expected {
                        break;
                    }
                    r.len += part;
                }
            }
            if matches!(kind, Kind::Compressed | Kind::Invalid) {
                break;
            }
            left -= part;
            pos += part;
            if pos == size {
                pos = 0;
                at += 1;
                if host.is_some() {
                    expected = expected.wrapping_add(size);
                }
            }
        }
        run.unwrap_or(Run { kind: Kind::Invalid, len, host: None, copied: false, entry: first })
    }
}
