//! Where a range lives, without waiting: the hot path, and fresh clusters handed out on it.
//!
//! Called by views for every request. Must not wait, allocate memory, or take a lock that is held across waiting.
//!
//! **Fresh clusters.** Where a cluster reads as zeroes and its new host cluster does too, the entry may be published before
//! the data is written: whatever a crash leaves of the data, old and new content agree on the rest. So the request
//! that allocates is one write to the host file like any other, and further writers to the cluster need not wait for it.

use graph::Map;

use crate::qcow2::format::{COMPRESSED, COPIED, ZERO};
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::table::{Glance, Kind, Slice};

/// Bitmap of an extended entry: all subclusters have data.
pub(super) const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// Bitmap of an extended entry: all subclusters are zero.
pub(super) const ALL_ZERO: u64 = 0xffff_ffff << 32;

impl Qcow2 {
    #[inline]
    pub(super) fn map_read(&self, offset: u64, len: u64) -> Map<'_> {
        match self.tables.glance(offset, len) {
            Glance::Absent(room) => return self.map_backing(offset, room),
            Glance::Host { host, .. } if self.crypt.is_none() => {
                return Map::Child { child: self.data, offset: host, len };
            }
            _ => {}
        }
        self.map_read_closer(offset, len)
    }

    fn map_read_closer(&self, offset: u64, len: u64) -> Map<'_> {
        let Some(run) = self.tables.lookup(offset, len) else { return Map::Drive };
        match (run.kind, run.host) {
            (Kind::Normal, Some(host)) if self.crypt.is_none() => {
                Map::Child { child: self.data, offset: host, len: run.len }
            }
            (Kind::Zero, _) => Map::Zero { len: run.len },
            (Kind::Unallocated, _) => self.map_backing(offset, run.len),
            _ => Map::Drive,
        }
    }

    /// What shows through: the backing file as far as it goes, zeroes after its end.
    #[inline]
    fn map_backing(&self, offset: u64, len: u64) -> Map<'_> {
        let (Some(child), Some(size)) = (self.backing, self.backing_size()) else { return Map::Zero { len } };
        match size.checked_sub(offset) {
            None | Some(0) => Map::Zero { len },
            Some(room) => Map::Child { child, offset, len: len.min(room) },
        }
    }

    #[inline]
    pub(super) fn map_write(&self, offset: u64, len: u64) -> Map<'_> {
        if !self.commits.is_fine() {
            return Map::Drive;
        }
        match self.tables.glance(offset, len) {
            Glance::Host { host, copied: true } if self.crypt.is_none() => {
                Map::Child { child: self.data, offset: host, len }
            }
            _ => self.map_write_closer(offset, len),
        }
    }

    fn map_write_closer(&self, offset: u64, len: u64) -> Map<'_> {
        let Some(run) = self.tables.lookup(offset, len) else { return Map::Drive };
        match (run.kind, run.host) {
            (Kind::Normal, Some(host)) if run.copied && self.crypt.is_none() => {
                Map::Child { child: self.data, offset: host, len: run.len }
            }
            (Kind::Zero | Kind::Unallocated, None) => self.map_fresh(offset, len),
            _ => Map::Drive,
        }
    }

    /// Gives `offset..offset + len` fresh clusters if all of it reads as zeroes and space is at hand.
    fn map_fresh(&self, offset: u64, len: u64) -> Map<'_> {
        let geo = self.geo;
        if self.data_file.is_some() || self.crypt.is_some() || self.settings.read_only {
            return Map::Drive;
        }
        let first = self.tables.index_of(offset);
        let within = geo.in_cluster(offset);
        let count = geo.clusters(within + len) as usize;
        // Half of the cache dirty: somebody has to run a commit, and that is a driven request.
        if first + count > self.tables.slice_entries()
            || !self.tables.is_owned(offset)
            || self.tables.wants_commit()
        {
            return Map::Drive;
        }
        let host = self.tables.with(offset, |slice| {
            if slice.suspect() || slice.in_flight(first, count).is_some() {
                return None;
            }
            let start = offset - within;
            let all_zero = (0..count)
                .all(|i| self.is_blank(slice, first + i, start + ((i as u64) << geo.cluster_bits())));
            if !all_zero {
                return None;
            }
            let host = self.space.try_fresh(count as u64)?;
            let bitmap = if geo.extended_l2() { ALL_ALLOCATED } else { 0 };
            for i in 0..count {
                let entry = (host + ((i as u64) << geo.cluster_bits())) | COPIED;
                self.tables.set_entry(slice, first + i, entry, bitmap);
            }
            Some(host)
        });
        match host.flatten() {
            Some(host) => Map::Child { child: FILE, offset: host + within, len },
            None => Map::Drive,
        }
    }

    /// Whether the cluster at guest offset `start` reads as zeroes and has no host cluster.
    pub(super) fn is_blank(&self, slice: &Slice<'_>, index: usize, start: u64) -> bool {
        let (entry, bitmap) = self.tables.entry(slice, index);
        if entry & COMPRESSED != 0 || self.tables.decoder().host(entry).is_some() {
            return false;
        }
        // Nothing shows through, or all of it is hidden.
        self.backing_size().is_none_or(|size| start >= size)
            || (entry & ZERO != 0 && !self.geo.extended_l2())
            || (bitmap == ALL_ZERO && self.geo.extended_l2())
    }
}
