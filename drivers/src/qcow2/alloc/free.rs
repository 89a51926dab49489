//! Runs of host clusters with refcount 0 that nobody is waiting for.
//!
//! Used by `take.rs` under the state's lock. Pure; bounded: past [`MAX_RUNS`] the caller is told to forget a block, to be
//! scanned again when it is needed.

use std::collections::{BTreeMap, BTreeSet};

/// Most runs kept, some 100 bytes each.
pub(super) const MAX_RUNS: usize = 1 << 16;

/// Free runs by start and by length.
#[derive(Debug, Default)]
pub(super) struct FreeMap {
    by_start: BTreeMap<u64, u64>,
    by_length: BTreeSet<(u64, u64)>,
    total: u64,
}

impl FreeMap {
    fn put(&mut self, start: u64, len: u64) {
        self.by_start.insert(start, len);
        self.by_length.insert((len, start));
        self.total += len;
    }

    fn pull(&mut self, start: u64) -> Option<u64> {
        let len = self.by_start.remove(&start)?;
        self.by_length.remove(&(len, start));
        self.total -= len;
        Some(len)
    }

    /// Clusters in all runs.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Whether there are too many runs.
    pub(super) fn is_crowded(&self) -> bool {
        self.by_start.len() > MAX_RUNS
    }

    /// The shortest run.
    pub(super) fn shortest(&self) -> Option<(u64, u64)> {
        self.by_length.first().map(|(len, start)| (*start, *len))
    }

    /// Adds a run, which overlaps none.
    pub(super) fn add(&mut self, mut start: u64, mut len: u64) {
        if len == 0 {
            return;
        }
        if let Some((before, n)) = self.by_start.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before + n == start
        {
            self.pull(before);
            start = before;
            len += n;
        }
        if let Some(n) = self.pull(start + len) {
            len += n;
        }
        self.put(start, len);
    }

    /// Takes everything in `start..end` out.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        let first =
            self.by_start.range(..start).next_back().filter(|(s, l)| *s + *l > start).map(|(s, _)| *s);
        let mut hit: Vec<u64> = first.into_iter().collect();
        hit.extend(self.by_start.range(start..end).map(|(s, _)| *s));
        for s in hit {
            let Some(len) = self.pull(s) else { continue };
            if s < start {
                self.put(s, start - s);
            }
            if s + len > end {
                self.put(end, s + len - end);
            }
        }
    }

    /// Start of the best run of at least `want` clusters: the shortest such.
    pub(super) fn best(&self, want: u64) -> Option<u64> {
        self.by_length.range((want, 0)..).next().map(|(_, start)| *start)
    }

    /// The longest run: (start, length).
    pub(super) fn longest(&self) -> Option<(u64, u64)> {
        self.by_length.last().map(|(len, start)| (*start, *len))
    }

    /// The run that ends at `end`.
    pub(super) fn ending_at(&self, end: u64) -> Option<u64> {
        let (start, len) = self.by_start.range(..end).next_back()?;
        (start + len == end).then_some(*start)
    }

    /// Whether a cluster is in here.
    #[cfg(test)]
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.by_start.range(..=cluster).next_back().is_some_and(|(s, l)| s + l > cluster)
    }
}
