//! What an allocating write is going to do: decided under the slice's mutex, carried out without it.
//!
//! Called by `write` and `compressed`. A plan comes with a record in the slice: nobody else changes these clusters until the
//! plan is published or dropped.

use std::sync::Arc;

use host::sync::Event;

use crate::qcow2::alloc::FreeKind;
use crate::qcow2::format::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::qcow2::node::Qcow2;
use crate::qcow2::table::{Kind, Slice};

use super::map::ALL_ALLOCATED;

/// An entry as it was when the plan was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Old {
    pub(super) entry: u64,
    pub(super) bitmap: u64,
}

/// What to do next at some guest offset.
pub(super) enum Next<'a> {
    /// Somebody else is changing these clusters: wait, then look again.
    Wait(Arc<Event>),
    /// Things have changed: look again.
    Again,
    /// This entry is not valid.
    Invalid(u64),
    /// Carry this out.
    Go(Plan<'a>),
}

/// Clusters that get new entries, and the right to give them.
pub(super) struct Plan<'a> {
    node: &'a Qcow2,
    /// Guest offset of the first cluster.
    pub(super) start: u64,
    index: usize,
    /// What the entries were, one per cluster.
    pub(super) old: Vec<Old>,
    record: u64,
    /// The host clusters that are there already and are ours, contiguous from here.
    pub(super) reuse: Option<u64>,
    /// First guest byte the write covers, surroundings included, and the one after the last.
    pub(super) from: u64,
    pub(super) to: u64,
    open: bool,
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        self.close(|_, _| ());
    }
}

impl<'a> Plan<'a> {
    /// Clusters.
    pub(super) fn count(&self) -> u64 {
        self.old.len() as u64
    }

    /// Guest offset after the last cluster.
    pub(super) fn end(&self) -> u64 {
        self.start + (self.count() << self.node.geo.cluster_bits())
    }

    /// Only the first `count` clusters are done.
    pub(super) fn shorten(&mut self, count: u64) {
        if count < self.count() {
            self.old.truncate(count as usize);
            self.to = self.to.min(self.end());
            let (record, len) = (self.record, self.old.len());
            self.node.tables.with(self.start, |slice| slice.shorten(record, len));
        }
    }

    /// Ends the record together with a last change.
    fn close(&mut self, f: impl FnOnce(&mut Slice<'_>, &Plan<'a>)) {
        if !self.open {
            return;
        }
        self.open = false;
        let this = &*self;
        // A slice with a record is never evicted.
        this.node.tables.with(this.start, |slice| {
            f(slice, this);
            slice.end(this.record);
        });
        this.node.tables.wake();
    }

    /// The data is written: the entries name it from now on, host clusters contiguous from `host`. What they named before
    /// is given up.
    pub(super) fn publish(mut self, host: u64) {
        let (geo, reused) = (self.node.geo, self.reuse.is_some());
        self.close(|slice, plan| {
            for (i, old) in plan.old.iter().enumerate() {
                let at = (i as u64) << geo.cluster_bits();
                let entry = ((host + at) & OFFSET_MASK) | COPIED;
                let bitmap = if geo.extended_l2() { plan.bitmap(plan.start + at, *old) } else { 0 };
                plan.node.tables.set_entry(slice, plan.index + i, entry, bitmap);
            }
        });
        if !reused {
            for old in &self.old {
                self.node.free_entry(old.entry, FreeKind::Keep);
            }
        }
    }

    /// As [`Plan::publish`] with one entry that is given as it is.
    pub(super) fn publish_entry(mut self, entry: u64) {
        self.close(|slice, plan| plan.node.tables.set_entry(slice, plan.index, entry, 0));
        for old in &self.old {
            self.node.free_entry(old.entry, FreeKind::Keep);
        }
    }

    /// The bitmap of the cluster at `start` after this write.
    fn bitmap(&self, start: u64, old: Old) -> u64 {
        let geo = self.node.geo;
        let first = self.from.max(start) - start;
        let last = self.to.min(start + geo.cluster_size()) - start;
        let (first, end) = (first >> geo.subcluster_bits(), last.div_ceil(geo.subcluster_size()));
        let mask = if end - first >= 32 { ALL_ALLOCATED } else { ((1u64 << (end - first)) - 1) << first };
        let kept = if old.entry & COMPRESSED != 0 { 0 } else { old.bitmap };
        // What is written has data and is not zero any more.
        (kept | mask) & !(mask << 32)
    }
}

impl Qcow2 {
    /// Gives up what an entry names, once nothing names it in memory.
    pub(super) fn free_entry(&self, entry: u64, kind: FreeKind) {
        if self.data_file.is_some() {
            // Its clusters are where they are.
            return;
        }
        if entry & COMPRESSED != 0 {
            let (offset, bytes) = self.compressed_place(entry);
            self.space.free_later(offset, bytes, kind);
        } else if entry & OFFSET_MASK != 0 {
            self.space.free_later(entry & OFFSET_MASK, self.geo.cluster_size(), kind);
        }
    }

    /// Plans a write of `at..at + len` that cannot go to where the data lies. `whole`: as one compressed cluster, whatever is
    /// there.
    pub(super) fn plan<'a>(&'a self, slice: &mut Slice<'_>, at: u64, len: u64, whole: bool) -> Next<'a> {
        let geo = self.geo;
        let index = self.tables.index_of(at);
        let start = geo.start_of_cluster(at);
        let clusters = geo.clusters(at + len - start).min((self.tables.slice_entries() - index) as u64);
        if let Some(event) = slice.in_flight(index, 1) {
            return Next::Wait(event);
        }
        let end = slice.next_in_flight(index, index + clusters as usize);
        let mut old: Vec<Old> = Vec::new();
        let mut reuse: Option<u64> = None;
        // In clusters that are there, a write stops at the first subcluster it can go to directly.
        let mut stop = at + len;
        for i in index..end {
            let (entry, bitmap) = self.tables.entry(slice, i);
            if !self.tables.decoder().valid(entry, bitmap) {
                if old.is_empty() {
                    return Next::Invalid(entry);
                }
                break;
            }
            let here = start + (((i - index) as u64) << geo.cluster_bits());
            let host = match entry & COMPRESSED {
                0 => self.tables.decoder().host(entry).filter(|_| entry & COPIED != 0),
                _ => None,
            };
            if let Some(host) = host.filter(|_| !whole) {
                let first = at.max(here);
                if let Some(direct) = self.first_direct(entry, bitmap, here, first, stop) {
                    if direct == first {
                        if old.is_empty() {
                            return Next::Again;
                        }
                        break;
                    }
                    stop = direct;
                }
                match reuse {
                    None if old.is_empty() => reuse = Some(host),
                    Some(base) if base + (here - start) == host => {}
                    _ => break,
                }
                old.push(Old { entry, bitmap });
                if stop < here + geo.cluster_size() {
                    break;
                }
            } else {
                if reuse.is_some() {
                    break;
                }
                old.push(Old { entry, bitmap });
            }
        }
        if old.is_empty() {
            return Next::Again;
        }
        let covered = start + ((old.len() as u64) << geo.cluster_bits());
        let (from, to) = self.surroundings(&old, reuse.is_some() || whole, at, stop.min(covered));
        let record = slice.begin(index, old.len());
        Next::Go(Plan { node: self, start, index, old, record, reuse, from, to, open: true })
    }

    /// The first byte of `first..stop` in this cluster that can be written where it lies.
    fn first_direct(&self, entry: u64, bitmap: u64, cluster: u64, first: u64, stop: u64) -> Option<u64> {
        let geo = self.geo;
        let end = stop.min(cluster + geo.cluster_size());
        let mut at = first;
        while at < end {
            if self.tables.decoder().kind(entry, bitmap, geo.subcluster_index(at)) == Kind::Normal {
                return Some(at);
            }
            at = (at & !(geo.subcluster_size() - 1)) + geo.subcluster_size();
        }
        None
    }

    /// The guest range that has to be written so that the new entries are right.
    fn surroundings(&self, old: &[Old], kept: bool, at: u64, end: u64) -> (u64, u64) {
        let geo = self.geo;
        // Host clusters that hold data leave as a whole; others may stay unallocated in part.
        let moved = |o: Option<&Old>| {
            !kept && o.is_some_and(|o| o.entry & COMPRESSED != 0 || (o.bitmap & ALL_ALLOCATED) != 0)
        };
        let unit = |moved: bool| if moved { geo.cluster_size() } else { geo.subcluster_size() };
        let from = at & !(unit(moved(old.first())) - 1);
        let to = end.next_multiple_of(unit(moved(old.last())));
        (from, to)
    }

    /// Whether `from..to`, inside one cluster whose entry is `old`, reads as zeroes for sure.
    pub(super) fn reads_zero(&self, old: Old, from: u64, to: u64) -> bool {
        if from >= to || from >= self.size() {
            return true;
        }
        if old.entry & COMPRESSED != 0 {
            return false;
        }
        let hidden = self.backing_size().is_none_or(|size| from >= size);
        let geo = self.geo;
        if !geo.extended_l2() {
            return old.entry & ZERO != 0 || (hidden && self.tables.decoder().host(old.entry).is_none());
        }
        let (first, last) = (geo.subcluster_index(from), geo.subcluster_index(to - 1));
        (first..=last).all(|sub| match self.tables.decoder().kind(old.entry, old.bitmap, sub) {
            Kind::Zero => true,
            Kind::Unallocated => hidden,
            _ => false,
        })
    }
}
