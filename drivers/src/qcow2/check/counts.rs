//! How often each host cluster is referred to: counters that exist only where something is counted.
//!
//! Filled while the tables are walked, compared with the refcounts on disk afterwards. A hostile image decides which
//! clusters are counted, so the memory has a limit.

use std::cell::Cell;
use std::collections::BTreeMap;

use crate::qcow2::format::refcount;

/// Counters of one chunk.
const CHUNK: u64 = 4096;

/// More distinct places are referred to than the memory for counters allows.
#[derive(Debug)]
pub(super) struct Full;

/// Sparse counters. A counter is as wide as a refcount of the image, at least 8 and at most 32 bits.
pub(super) struct Counts {
    /// Chunk number to its place in `chunks`.
    index: BTreeMap<u64, usize>,
    chunks: Vec<Box<[u8]>>,
    /// The chunk found last, by number and place: clusters come in runs.
    last: Cell<Option<(u64, usize)>>,
    order: u32,
    max: u64,
    bytes: u64,
    budget: u64,
}

impl Counts {
    /// For refcounts of `1 << order` bits; at most `budget` bytes.
    pub(super) fn new(order: u32, budget: u64) -> Counts {
        let max = refcount::max(order).min(refcount::max(5));
        let (index, chunks, last) = (BTreeMap::new(), Vec::new(), Cell::new(None));
        Counts { index, chunks, last, order: order.clamp(3, 5), max, bytes: 0, budget }
    }

    /// Everything back to 0.
    pub(super) fn clear(&mut self) {
        self.index.clear();
        self.chunks.clear();
        self.last.set(None);
        self.bytes = 0;
    }

    fn place(&self, index: u64) -> Option<usize> {
        match self.last.get() {
            Some((last, place)) if last == index => Some(place),
            _ => {
                let place = *self.index.get(&index)?;
                self.last.set(Some((index, place)));
                Some(place)
            }
        }
    }

    pub(super) fn get(&self, cluster: u64) -> u64 {
        let chunk = self.place(cluster / CHUNK).and_then(|place| self.chunks.get(place));
        chunk.map_or(0, |c| refcount::get(c, self.order, (cluster % CHUNK) as usize))
    }

    /// One more; `Ok(false)`: the counter is at the largest refcount the image can store and stays there.
    pub(super) fn add(&mut self, cluster: u64) -> Result<bool, Full> {
        let now = self.get(cluster);
        if now >= self.max {
            return Ok(false);
        }
        self.set(cluster, now + 1)?;
        Ok(true)
    }

    pub(super) fn set(&mut self, cluster: u64, value: u64) -> Result<(), Full> {
        let len = CHUNK << (self.order - 3);
        // A chunk, its node's share of the tree.
        let cost = len + 64;
        let index = cluster / CHUNK;
        let place = match self.place(index) {
            Some(place) => place,
            None => {
                if self.bytes + cost > self.budget {
                    return Err(Full);
                }
                self.bytes += cost;
                self.chunks.push(vec![0; len as usize].into_boxed_slice());
                self.index.insert(index, self.chunks.len() - 1);
                self.chunks.len() - 1
            }
        };
        let Some(chunk) = self.chunks.get_mut(place) else { return Err(Full) };
        refcount::set(chunk, self.order, (cluster % CHUNK) as usize, value);
        Ok(())
    }

    /// Whether nothing in `[cluster, cluster + n)` is counted; may say no although.
    pub(super) fn untouched(&self, cluster: u64, n: u64) -> bool {
        let last = cluster.saturating_add(n.max(1) - 1) / CHUNK;
        if n == 1 {
            return self.place(last).is_none();
        }
        self.index.range(cluster / CHUNK..=last).next().is_none()
    }

    /// The counted clusters in ascending order.
    pub(super) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let order = self.order;
        self.index.iter().flat_map(move |(index, &place)| {
            let first = index * CHUNK;
            let chunk = self.chunks.get(place).map(|c| &c[..]).unwrap_or_default();
            (0..CHUNK).filter_map(move |i| {
                let n = refcount::get(chunk, order, i as usize);
                (n != 0).then_some((first + i, n))
            })
        })
    }

    /// First cluster of the lowest run of `n` that nobody refers to, at or above `from`.
    pub(super) fn free_run(&self, from: u64, n: u64) -> u64 {
        let mut start = from;
        let mut at = from;
        while at - start < n {
            if self.untouched(at, 1) {
                at = (at / CHUNK + 1) * CHUNK;
                continue;
            }
            if self.get(at) != 0 {
                start = at + 1;
            }
            at += 1;
        }
        start
    }
}

/// Most ranges that are told apart.
const RANGES: usize = 4096;

/// Ranges of clusters past the end of the file that something refers to. They are not counted, and a file that grows
/// must not get anything new there.
#[derive(Default)]
pub(super) struct PastEnd {
    ranges: Vec<(u64, u64)>,
}

impl PastEnd {
    /// Both ends included. Where there are too many ranges they become one.
    pub(super) fn add(&mut self, first: u64, last: u64) {
        if self.ranges.len() >= RANGES {
            let low = self.ranges.iter().fold(first, |a, r| a.min(r.0));
            let high = self.ranges.iter().fold(last, |a, r| a.max(r.1));
            self.ranges.clear();
            self.ranges.push((low, high));
        } else if self.ranges.last() != Some(&(first, last)) {
            self.ranges.push((first, last));
        }
    }

    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// The first cluster behind all ranges that touch `[first, first + n)`; `None` if none does.
    pub(super) fn behind(&self, first: u64, n: u64) -> Option<u64> {
        let end = first.saturating_add(n);
        let hit = self.ranges.iter().filter(|&&(a, b)| a < end && first <= b);
        hit.map(|&(_, b)| b.saturating_add(1)).max()
    }
}
