//! Write-zeroes and discard: entries that read as zeroes, and host clusters given up or kept.
//!
//! Called by the graph, which cuts requests along (sub)clusters. What QEMU's driver leaves behind is what we leave behind.
//!
//! | request | cluster | entry afterwards | host cluster |
//! |---|---|---|---|
//! | zeroes | allocated | its offset and ZERO | kept |
//! | zeroes with unmap | allocated | ZERO | given up |
//! | discard, version 3 | allocated, or a backing file shows through | ZERO | given up |
//! | discard, version 2, no backing file | allocated | none | given up |
//! | either, `discard-no-unref` | allocated | its offset and ZERO | kept, its space discarded |

use graph::{BlockError, Errno, NodeIo, Result, ZeroFlags};

use super::map::{ALL_ALLOCATED, ALL_ZERO};
use crate::qcow2::alloc::FreeKind;
use crate::qcow2::format::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::table::{Kind, Slice};

/// How entries are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// Reads as zeroes; the host cluster stays.
    Zero,
    /// Reads as zeroes; the host cluster goes.
    ZeroUnmap,
    /// As [`Clear::ZeroUnmap`], where there is anything to give up or to hide.
    Discard,
    /// Nothing is left: whatever shows through shows through.
    Forget,
}

/// What is left to do after entries were changed.
#[derive(Default)]
struct After {
    /// Entries whose host clusters go.
    freed: Vec<u64>,
    /// Host clusters that stay with their space given up.
    punched: Vec<u64>,
    /// Zeroes were asked for: until the entries are on disk the clusters themselves must read as the old data or as zero.
    zeroes: bool,
}

fn unsupported() -> BlockError {
    BlockError::errno_only(Errno::ENOTSUP)
}

impl Qcow2 {
    /// Makes a range read as zeroes.
    pub(super) async fn zero_range(
        &self,
        io: &NodeIo,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        self.commits.check()?;
        let geo = self.geo;
        let unit = geo.subcluster_size();
        let end = offset + len;
        let whole = |at: u64| at.is_multiple_of(unit) || at == self.size();
        if !offset.is_multiple_of(unit) || !whole(end) {
            // A part of a unit. If all of it is zero nothing needs doing, else the graph writes.
            let (from, to) = (offset & !(unit - 1), end.next_multiple_of(unit).min(self.size().max(end)));
            return if self.is_zero(io, from, to).await? { Ok(()) } else { Err(unsupported()) };
        }
        if self.settings.data_file_raw {
            // The data file has to say the same on its own.
            io.child(self.data).write_zeroes(offset, len, flags).await?;
        }
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let mut at = offset;
        while at < end {
            let cluster = geo.start_of_cluster(at);
            let next = cluster + geo.cluster_size();
            // Parts of clusters have their zeroes in the bitmap.
            let part_only = at != cluster || (end < next && end != self.size());
            let to = if part_only {
                end.min(next)
            } else if end == self.size() {
                end
            } else {
                geo.start_of_cluster(end)
            };
            if part_only {
                at = self.zero_subclusters(io, at, to).await?;
            } else {
                at = self.clear_step(io, at, to, if unmap { Clear::ZeroUnmap } else { Clear::Zero }).await?;
            }
        }
        Ok(())
    }

    /// Whether a range reads as zeroes, as far as the tables tell.
    pub(super) async fn is_zero(&self, io: &NodeIo, from: u64, to: u64) -> Result<bool> {
        let mut at = from;
        while at < to {
            let run = self.tables.find(self, io, at, to - at).await?;
            let zero = match run.kind {
                Kind::Zero => true,
                Kind::Unallocated => self.backing_size().is_none_or(|size| at >= size),
                _ => false,
            };
            if !zero {
                return Ok(false);
            }
            at += run.len;
        }
        Ok(true)
    }

    /// Gives a range up.
    pub(super) async fn discard_range(&self, io: &NodeIo, offset: u64, len: u64) -> Result<()> {
        self.commits.check()?;
        let geo = self.geo;
        let end = offset + len;
        let aligned = geo.in_cluster(offset) == 0 && (geo.in_cluster(end) == 0 || end == self.size());
        // An entry of version 2 cannot hide what the backing file has.
        if !aligned || (!geo.v3() && self.backing_size().is_some()) {
            return Err(unsupported());
        }
        if self.settings.data_file_raw {
            io.child(self.data).write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await?;
        }
        self.clear(io, offset, end, Clear::Discard).await
    }

    /// Changes the entries of whole clusters; `end` is a cluster border or lies in the last cluster.
    pub(super) async fn clear(&self, io: &NodeIo, from: u64, end: u64, how: Clear) -> Result<()> {
        let mut at = from;
        while at < end {
            at = self.clear_step(io, at, end, how).await?;
        }
        Ok(())
    }

    /// Changes the entries of some clusters from `at` on; where to go on.
    async fn clear_step(&self, io: &NodeIo, at: u64, end: u64, how: Clear) -> Result<u64> {
        let run = self.tables.find(self, io, at, end - at).await?;
        let hidden = self.backing_size().is_none_or(|size| at >= size);
        let nothing_there = run.kind == Kind::Unallocated && run.host.is_none();
        // Nothing to change, so no table is made for it. What is there on the way is looked at below.
        let zero_already = run.kind == Kind::Zero && run.host.is_none() && how != Clear::Forget;
        if zero_already || (nothing_there && (hidden || how == Clear::Forget)) {
            let next = if at + run.len >= end { end } else { self.geo.start_of_cluster(at + run.len) };
            if next > at {
                return Ok(next);
            }
        }
        if run.kind == Kind::Invalid {
            return Err(self.invalid_entry(io, at, run.entry).await);
        }
        if self.tables.wants_commit() {
            self.commits.flush(self, io).await?;
        }
        self.tables.own(self, io, at).await?;
        let first = self.tables.index_of(at);
        let clusters = self.geo.clusters(end - at).min((self.tables.slice_entries() - first) as u64) as usize;
        let mut after = After { zeroes: how == Clear::ZeroUnmap, ..After::default() };
        let changed = self.tables.with(at, |slice| {
            let busy = slice.next_in_flight(first, first + clusters);
            if busy == first
                && let Some(event) = slice.in_flight(first, 1)
            {
                return Err(event);
            }
            let mut done = 0;
            for index in first..busy {
                let start = at + (((index - first) as u64) << self.geo.cluster_bits());
                if !self.clear_entry(slice, index, start, how, &mut after) {
                    break;
                }
                done += 1;
            }
            Ok(done)
        });
        let done: u64 = match changed {
            None => {
                self.tables.load(self, io, self.tables.slice_of(at)).await?;
                return Ok(at);
            }
            Some(Err(event)) => {
                event.wait().await;
                return Ok(at);
            }
            Some(Ok(done)) => done,
        };
        self.settle(io, after).await;
        if done == 0 {
            return Err(unsupported());
        }
        Ok((at + (done << self.geo.cluster_bits())).min(end.next_multiple_of(self.geo.cluster_size())))
    }

    /// Changes one entry; false where that cannot be done.
    fn clear_entry(
        &self,
        slice: &mut Slice<'_>,
        index: usize,
        start: u64,
        how: Clear,
        after: &mut After,
    ) -> bool {
        let geo = self.geo;
        let (entry, bitmap) = self.tables.entry(slice, index);
        if !self.tables.decoder().valid(entry, bitmap) {
            return false;
        }
        let compressed = entry & COMPRESSED != 0;
        let allocated = compressed || self.tables.decoder().host(entry).is_some();
        let hidden = self.backing_size().is_none_or(|size| start >= size);
        if how == Clear::Discard && !allocated && hidden {
            return true;
        }
        if !geo.v3() && how != Clear::Forget {
            // There is no entry that says zero: only "nothing", where nothing shows through.
            if !hidden || (how == Clear::Zero && allocated) {
                return !allocated && hidden;
            }
            if allocated {
                self.tables.set_entry(slice, index, 0, 0);
                after.freed.push(entry);
            }
            return true;
        }
        let gives_up = allocated && (compressed || how != Clear::Zero);
        let keeps = self.settings.discard_no_unref && !compressed && how != Clear::Forget;
        let base = if gives_up && !keeps { 0 } else { entry };
        let (new, new_bitmap) = match (how, geo.extended_l2()) {
            (Clear::Forget, _) => (0, 0),
            (_, true) => (base, ALL_ZERO),
            (_, false) => (base | ZERO, 0),
        };
        if (new, new_bitmap) == (entry, bitmap) {
            return true;
        }
        self.tables.set_entry(slice, index, new, new_bitmap);
        if gives_up && !keeps {
            after.freed.push(entry);
        } else if gives_up && entry & COPIED != 0 {
            after.punched.push(entry & OFFSET_MASK);
        }
        true
    }

    /// Sets the zero bits of some subclusters of one cluster; where to go on.
    async fn zero_subclusters(&self, io: &NodeIo, at: u64, to: u64) -> Result<u64> {
        let geo = self.geo;
        if !geo.extended_l2() {
            return Err(unsupported());
        }
        if self.is_zero(io, at, to).await? {
            return Ok(to);
        }
        self.tables.own(self, io, at).await?;
        let index = self.tables.index_of(at);
        let changed = self.tables.with(at, |slice| {
            if let Some(event) = slice.in_flight(index, 1) {
                return Err(Some(event));
            }
            let (entry, bitmap) = self.tables.entry(slice, index);
            if entry & COMPRESSED != 0 || !self.tables.decoder().valid(entry, bitmap) {
                return Err(None);
            }
            let first = geo.subcluster_index(at);
            let count = (to - at).div_ceil(geo.subcluster_size()) as u32;
            let mask = (ALL_ALLOCATED >> (32 - count.clamp(1, 32))) << first;
            self.tables.set_entry(slice, index, entry, (bitmap & !mask) | (mask << 32));
            Ok(())
        });
        match changed {
            None => self.tables.load(self, io, self.tables.slice_of(at)).await?,
            Some(Err(Some(event))) => event.wait().await,
            Some(Err(None)) => return Err(unsupported()),
            Some(Ok(())) => return Ok(to),
        }
        Ok(at)
    }

    /// Lets go of host clusters nothing names any more.
    async fn settle(&self, io: &NodeIo, after: After) {
        let pass = self.settings.pass_discard_request;
        let size = self.geo.cluster_size();
        let mut punched = after.punched;
        for entry in after.freed {
            if self.data_file.is_some() {
                punched.extend((entry & COPIED != 0).then_some(entry & OFFSET_MASK));
            }
            self.free_entry(entry, FreeKind::Request);
        }
        if !pass || self.settings.data_file_raw {
            return;
        }
        // The clusters stay ours and read as zeroes already: nothing depends on when this happens, or whether.
        let child = io.child(if self.data_file.is_some() { self.data } else { FILE });
        punched.sort_unstable();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for host in punched {
            match ranges.last_mut() {
                Some((start, len)) if *start + *len == host => *len += size,
                _ => ranges.push((host, size)),
            }
        }
        for (start, len) in ranges {
            // What a device shows of a range it was told to forget is its own business.
            let done = if after.zeroes {
                child.write_zeroes(start, len, ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK).await
            } else {
                child.discard(start, len).await
            };
            if let Err(e) = done {
                log::debug!("a discard of {start:#x}+{len:#x} failed: {e}");
            }
        }
    }
}
