//! Statistics of nodes: counters without locks or shared cache lines on the data path.
//!
//! Each request source owns one [`ShardSet`] per iothread and view: a [`StatShard`] for each node of the view, written
//! by that thread alone (a relaxed load and a relaxed store, no locked instruction) and read by anyone. A reader sums the
//! shards; a shard whose set is dropped is folded into the node's base. Must not touch the graph.
//!
//! Lock order: `NodeStats::state` is a leaf: nothing is called while it is held.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::driver::Op;
use crate::view::Path;

/// Buckets of a latency histogram: bucket `i` counts requests of `2^i ..= 2^(i+1) - 1` ns; the last one takes all above
/// (2^31 ns is two seconds), the first one includes 0.
pub const LATENCY_BUCKETS: usize = 32;

/// Which bucket a latency falls into.
pub fn latency_bucket(ns: u64) -> usize {
    ((ns | 1).ilog2() as usize).min(LATENCY_BUCKETS - 1)
}

#[derive(Default)]
struct OpCounters {
    done: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    merged: AtomicU64,
    bytes: AtomicU64,
    total_ns: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

/// The counters one thread keeps for one node.
#[derive(Default)]
pub struct StatShard {
    ops: [OpCounters; Op::COUNT],
    highest_write: AtomicU64,
    last_ns: AtomicU64,
    in_flight: AtomicU64,
}

/// Adds without a locked instruction: right because one thread writes a shard.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
}

impl StatShard {
    /// Notes one finished request. Called by the shard's owner alone.
    pub fn account(&self, op: Op, bytes: u64, latency_ns: u64, ok: bool) {
        let c = &self.ops[op as usize];
        if ok {
            bump(&c.done, 1);
            bump(&c.bytes, bytes);
        } else {
            bump(&c.failed, 1);
        }
        bump(&c.total_ns, latency_ns);
        bump(&c.latency[latency_bucket(latency_ns)], 1);
    }

    fn read(&self, into: &mut Totals) {
        for (t, c) in into.ops.iter_mut().zip(&self.ops) {
            t.done = t.done.wrapping_add(c.done.load(Relaxed));
            t.failed = t.failed.wrapping_add(c.failed.load(Relaxed));
            t.invalid = t.invalid.wrapping_add(c.invalid.load(Relaxed));
            t.merged = t.merged.wrapping_add(c.merged.load(Relaxed));
            t.bytes = t.bytes.wrapping_add(c.bytes.load(Relaxed));
            t.total_ns = t.total_ns.wrapping_add(c.total_ns.load(Relaxed));
            for (a, b) in t.latency.iter_mut().zip(&c.latency) {
                *a = a.wrapping_add(b.load(Relaxed));
            }
        }
        into.highest_write = into.highest_write.max(self.highest_write.load(Relaxed));
        into.last_ns = into.last_ns.max(self.last_ns.load(Relaxed));
        into.in_flight = into.in_flight.wrapping_add(self.in_flight.load(Relaxed));
    }
}

/// Sums of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTotals {
    /// Completed without error.
    pub done: u64,
    /// Completed with an error.
    pub failed: u64,
    /// Refused before they were started.
    pub invalid: u64,
    /// Merged into others by the source.
    pub merged: u64,
    /// Bytes of completed requests.
    pub bytes: u64,
    /// Time spent, completed and failed, ns.
    pub total_ns: u64,
    /// Histogram, see [`LATENCY_BUCKETS`].
    pub latency: [u64; LATENCY_BUCKETS],
}

/// Sums of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// By kind, indexed by `Op as usize`.
    pub ops: [OpTotals; Op::COUNT],
    /// End of the highest write, bytes.
    pub highest_write: u64,
    /// When the last request completed, ns of the host's monotonic clock; 0 = never.
    pub last_ns: u64,
    /// Requests the sources have in flight, as they last said.
    pub in_flight: u64,
}

impl Totals {
    /// The sums of one kind.
    pub fn op(&self, op: Op) -> &OpTotals {
        &self.ops[op as usize]
    }
}

#[derive(Default)]
struct State {
    folded: Totals,
    shards: Vec<Arc<StatShard>>,
}

/// The statistics of one node.
#[derive(Default)]
pub struct NodeStats {
    state: Mutex<State>,
}

impl NodeStats {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Counters cannot be left half-changed in a way that matters.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new shard; its owner gives it back with [`NodeStats::retire`].
    pub fn shard(&self) -> Arc<StatShard> {
        let shard = Arc::new(StatShard::default());
        self.state().shards.push(Arc::clone(&shard));
        shard
    }

    /// Folds a shard whose owner writes no more.
    pub fn retire(&self, shard: &Arc<StatShard>) {
        let mut state = self.state();
        let before = state.shards.len();
        state.shards.retain(|s| !Arc::ptr_eq(s, shard));
        if state.shards.len() != before {
            shard.in_flight.store(0, Relaxed);
            shard.read(&mut state.folded);
        }
    }

    /// The sums as of now. Counters of a running thread may be a request apart from each other.
    pub fn totals(&self) -> Totals {
        let state = self.state();
        let mut totals = state.folded;
        state.shards.iter().for_each(|s| s.read(&mut totals));
        totals
    }
}

/// One thread's shards for all nodes of one view; folds them when dropped. Stays on its thread.
pub struct ShardSet {
    shards: Box<[Arc<StatShard>]>,
    nodes: Box<[Arc<crate::node::Node>]>,
    now: Cell<u64>,
    not_sync: PhantomData<*const ()>,
}

impl ShardSet {
    pub(crate) fn new(nodes: impl Iterator<Item = Arc<crate::node::Node>>) -> ShardSet {
        let nodes: Box<[_]> = nodes.collect();
        let shards = nodes.iter().map(|n| n.stats().shard()).collect();
        ShardSet { shards, nodes, now: Cell::new(0), not_sync: PhantomData }
    }

    /// Says what time it is, ns; the source calls it once per batch of completions. Feeds the idle time.
    pub fn tick(&self, now_ns: u64) {
        self.now.set(now_ns);
    }

    /// Notes a finished request at every node of its path. `latency_ns` as the source saw it.
    pub fn account(&self, path: &Path, op: Op, bytes: u64, latency_ns: u64, ok: bool) {
        for &index in path.nodes() {
            self.account_node(usize::from(index), op, bytes, latency_ns, ok);
        }
    }

    /// Notes a finished request at one node, by its index in the view.
    pub fn account_node(&self, index: usize, op: Op, bytes: u64, latency_ns: u64, ok: bool) {
        if let Some(shard) = self.shards.get(index) {
            shard.account(op, bytes, latency_ns, ok);
            shard.last_ns.store(self.now.get(), Relaxed);
        }
    }

    /// Notes requests the source refused itself (bad range, bad alignment) at the root.
    pub fn account_invalid(&self, op: Op) {
        if let Some(shard) = self.shards.first() {
            bump(&shard.ops[op as usize].invalid, 1);
        }
    }

    /// Notes requests the source merged into others, at the root.
    pub fn account_merged(&self, op: Op, count: u64) {
        if let Some(shard) = self.shards.first() {
            bump(&shard.ops[op as usize].merged, count);
        }
    }

    /// Notes that a write ended at byte `end` of the node with this index.
    pub fn note_write_end(&self, index: usize, end: u64) {
        if let Some(shard) = self.shards.get(index)
            && shard.highest_write.load(Relaxed) < end
        {
            shard.highest_write.store(end, Relaxed);
        }
    }

    /// Says how many requests the source has in flight.
    pub fn set_in_flight(&self, count: u64) {
        if let Some(shard) = self.shards.first() {
            shard.in_flight.store(count, Relaxed);
        }
    }
}

impl Drop for ShardSet {
    fn drop(&mut self) {
        for (node, shard) in self.nodes.iter().zip(&self.shards) {
            node.stats().retire(shard);
        }
    }
}

#[cfg(test)]
#[path = "stats_tests.rs"]
mod tests;
