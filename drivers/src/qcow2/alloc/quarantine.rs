//! From "nothing in memory refers to it" to "free": a cluster is used again only when no mapping on disk and no request in
//! flight can still reach it (invariants I4, I5).
//!
//! `free_later` by whoever took a reference away; `take_pending`, `unlinked`, `restore` by `commit`; `release` by anyone
//! who allocates or flushes. Nothing waits here: what is not ready yet is looked at again later.

use std::collections::BTreeMap;

use graph::{BlockError, DebugEvent, Errno, NodeIo, Result};

use super::{FreeKind, Freed, Space, lock};

/// How many clusters lose references in one call: a bound on what one request pays for many.
const BATCH: u64 = 16384;

impl Space {
    /// A reference to every cluster a range touches has gone from memory: to be called after that is visible to other threads. On
    /// disk it goes with the next commit, and the clusters are counted down after that.
    pub(crate) fn free_later(&self, offset: u64, bytes: u64, kind: FreeKind) {
        if bytes == 0 {
            return;
        }
        let mut state = lock(&self.state);
        match state.pending.last_mut() {
            // Neighbours, the usual case of a discard. Only whole clusters: a piece and its neighbour may share one.
            Some(last)
                if last.kind == kind
                    && last.offset + last.bytes == offset
                    && self.geo.in_cluster(offset) == 0
                    && self.geo.in_cluster(last.offset) == 0 =>
            {
                last.bytes += bytes;
            }
            _ => state.pending.push(Freed { offset, bytes, kind }),
        }
    }

    /// Whether references have gone that the disk still has.
    pub(crate) fn has_pending(&self) -> bool {
        !lock(&self.state).pending.is_empty()
    }

    /// A commit begins: what has gone until now. Must be called before the copies of the tables are taken, so that these
    /// copies have it gone as well.
    pub(crate) fn take_pending(&self) -> Vec<Freed> {
        std::mem::take(&mut lock(&self.state).pending)
    }

    /// The commit failed: the disk may still refer to these.
    pub(crate) fn restore(&self, mut freed: Vec<Freed>) {
        let mut state = lock(&self.state);
        freed.append(&mut state.pending);
        state.pending = freed;
    }

    /// The commit is durable: the disk has no reference any more. Requests may.
    pub(crate) fn unlinked(&self, freed: Vec<Freed>) {
        if freed.is_empty() {
            return;
        }
        let ticket = self.epochs.ticket();
        lock(&self.state).waiting.push_back((ticket, freed));
    }

    /// Counts down and frees what no request can see any more.
    ///
    /// # Errors
    /// A refcount block cannot be read; a count is 0 already (the image is damaged).
    pub(crate) async fn release(&self, file: &NodeIo) -> Result<()> {
        if lock(&self.state).waiting.is_empty() {
            return Ok(());
        }
        let _slow = self.slow.lock().await;
        self.release_passed(file, false).await.map(|_| ())
    }

    /// See [`Space::release`]; whether anything became free. With `all`, requests are known to be gone. `slow` is held.
    pub(super) async fn release_passed(&self, file: &NodeIo, all: bool) -> Result<bool> {
        // Before anything is counted down: what is free must lie before the end.
        self.find_end(file).await?;
        let mut any = false;
        let mut budget = BATCH;
        loop {
            let mut freed = {
                let mut state = lock(&self.state);
                let passed = state.waiting.front().is_some_and(|(t, _)| all || self.epochs.passed(t));
                if !passed {
                    return Ok(any);
                }
                match state.waiting.pop_front() {
                    Some((_, freed)) => freed,
                    None => return Ok(any),
                }
            };
            freed.sort_unstable_by_key(|f| f.offset);
            // What could not be done goes back to the front with a ticket that has passed.
            while let Some(mut piece) = freed.pop() {
                // From the back; a long run by blocks of refcounts.
                let (first, clusters) = self.touched(piece.offset, piece.bytes);
                let last_index = self.geo.reftable_index(first + clusters - 1);
                let from = first.max(last_index << self.geo.refblock_bits());
                if from > first {
                    let kept = (from << self.geo.cluster_bits()) - piece.offset;
                    freed.push(Freed { bytes: kept, ..piece });
                    piece.bytes -= kept;
                    piece.offset += kept;
                }
                let n = first + clusters - from;
                if let Err(e) = self.count_down(file, from, n, piece.kind).await {
                    if e.errno() != Errno::EIO || self.health.check().is_ok() {
                        freed.push(piece);
                    }
                    self.put_back(freed);
                    return Err(e);
                }
                any = true;
                budget = budget.saturating_sub(n);
                if budget == 0 && !all {
                    self.put_back(freed);
                    return Ok(any);
                }
            }
        }
    }

    fn put_back(&self, freed: Vec<Freed>) {
        if !freed.is_empty() {
            lock(&self.state).waiting.push_front((graph::Ticket::default(), freed));
        }
    }

    /// One reference less to clusters of one block. Those that have none left are given up on the host first, where that is
    /// wanted, and can then be allocated. `slow` is held.
    async fn count_down(&self, file: &NodeIo, first: u64, clusters: u64, kind: FreeKind) -> Result<()> {
        file.debug_event(DebugEvent::ClusterFree);
        self.load_range(file, first, clusters).await?;
        let mut empty: BTreeMap<u64, u64> = BTreeMap::new();
        {
            let mut state = lock(&self.state);
            for cluster in first..first + clusters {
                if matches!(state.count(self.geo, cluster), None | Some(0)) {
                    drop(state);
                    let bits = self.geo.cluster_bits();
                    let message =
                        format!("Host cluster at offset {:#x} is freed with refcount 0", cluster << bits);
                    self.health.damaged(&message, Some(cluster << bits), Some(1 << bits));
                    return Err(BlockError::new(Errno::EIO, message));
                }
            }
            for cluster in first..first + clusters {
                let count = state.blocks.get(cluster).unwrap_or(1) - 1;
                state.blocks.set(cluster, count);
                if count > 0 {
                    continue;
                }
                if state.partial != 0 && state.partial >> self.geo.cluster_bits() == cluster {
                    state.partial = 0;
                }
                match empty.last_entry() {
                    Some(mut e) if *e.key() + *e.get() == cluster => *e.get_mut() += 1,
                    _ => {
                        empty.insert(cluster, 1);
                    }
                }
            }
        }
        for (start, len) in empty {
            let bits = self.geo.cluster_bits();
            if self.pass_discard.passes(kind)
                && let Err(e) = file.discard(start << bits, len << bits).await
            {
                log::debug!("a freed range of an image could not be given up: {e}");
            }
            // Whatever it was, it is that no longer.
            self.remove_metadata(start << bits, len << bits);
            let mut state = lock(&self.state);
            state.free.add(start, len);
            self.relieve(&mut state);
        }
        Ok(())
    }

    /// The image is being closed, no request is left: takes everything back. `finish` follows after a last commit.
    ///
    /// # Errors
    /// As [`Space::release`].
    pub(crate) async fn settle(&self, file: &NodeIo) -> Result<()> {
        self.drain_slots();
        let _slow = self.slow.lock().await;
        if lock(&self.state).waiting.is_empty() && lock(&self.state).end.is_none() {
            return Ok(());
        }
        self.find_end(file).await?;
        self.release_passed(file, true).await.map(|_| ())
    }
}
