//! `query-blockstats`: the sums of `stats` in the shape of QEMU's `BlockStats`.
//!
//! Called by the control channel. Reads, changes nothing.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Graph, State};
use crate::driver::Op;
use crate::edge::Parent;
use crate::ids::NodeId;
use crate::role::Roles;
use crate::stats::{OpTotals, Totals};

/// A latency histogram: `bins[0]` counts what is below `boundaries[0]`, `bins[i]` what is between `boundaries[i - 1]` and
/// `boundaries[i]`, the last one the rest. Nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockLatencyHistogramInfo {
    /// Ascending, ns.
    pub boundaries: Vec<u64>,
    /// One more than boundaries.
    pub bins: Vec<u64>,
}

impl BlockLatencyHistogramInfo {
    /// From power-of-two buckets, without the empty ones at both ends; `None` when all are empty.
    fn new(sums: &[&OpTotals]) -> Option<Self> {
        let len = sums.first()?.latency.len();
        let bucket = |i: usize| sums.iter().map(|s| s.latency.get(i).copied().unwrap_or(0)).sum::<u64>();
        let counts: Vec<u64> = (0..len).map(bucket).collect();
        let first = counts.iter().position(|c| *c != 0)?;
        let last = counts.iter().rposition(|c| *c != 0)?;
        let boundaries = (first..=last).map(|i| 1u64 << (i + 1)).collect();
        let mut bins: Vec<u64> = counts.get(first..=last)?.to_vec();
        bins.push(0);
        Some(BlockLatencyHistogramInfo { boundaries, bins })
    }
}

/// Statistics of a node. Writes include writes of zeroes; "unmap" is what a guest calls discard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockDeviceStats {
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Bytes discarded.
    pub unmap_bytes: u64,
    /// Bytes appended to zones; 0.
    pub zone_append_bytes: u64,
    /// Completed reads.
    pub rd_operations: u64,
    /// Completed writes.
    pub wr_operations: u64,
    /// Completed flushes.
    pub flush_operations: u64,
    /// Completed discards.
    pub unmap_operations: u64,
    /// Completed zone appends; 0.
    pub zone_append_operations: u64,
    /// Time spent on reads, ns.
    pub rd_total_time_ns: u64,
    /// Time spent on writes, ns.
    pub wr_total_time_ns: u64,
    /// Time spent on flushes, ns.
    pub flush_total_time_ns: u64,
    /// Time spent on discards, ns.
    pub unmap_total_time_ns: u64,
    /// Time spent on zone appends, ns; 0.
    pub zone_append_total_time_ns: u64,
    /// End of the highest write, bytes.
    pub wr_highest_offset: u64,
    /// Reads merged into others.
    pub rd_merged: u64,
    /// Writes merged into others.
    pub wr_merged: u64,
    /// Discards merged into others.
    pub unmap_merged: u64,
    /// Zone appends merged into others; 0.
    pub zone_append_merged: u64,
    /// Time since the last completed request, ns; absent before the first one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_time_ns: Option<u64>,
    /// Failed reads.
    pub failed_rd_operations: u64,
    /// Failed writes.
    pub failed_wr_operations: u64,
    /// Failed flushes.
    pub failed_flush_operations: u64,
    /// Failed discards.
    pub failed_unmap_operations: u64,
    /// Failed zone appends; 0.
    pub failed_zone_append_operations: u64,
    /// Reads refused for their parameters.
    pub invalid_rd_operations: u64,
    /// Writes refused for their parameters.
    pub invalid_wr_operations: u64,
    /// Flushes refused; 0.
    pub invalid_flush_operations: u64,
    /// Discards refused for their parameters.
    pub invalid_unmap_operations: u64,
    /// Zone appends refused; 0.
    pub invalid_zone_append_operations: u64,
    /// Whether refused requests count as accesses; false.
    pub account_invalid: bool,
    /// Whether failed requests count into times and histograms; true.
    pub account_failed: bool,
    /// Statistics over intervals; empty.
    pub timed_stats: Vec<Value>,
    /// Latencies of reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rd_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// Latencies of writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wr_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// Latencies of flushes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush_latency_histogram: Option<BlockLatencyHistogramInfo>,
}

impl BlockDeviceStats {
    /// From sums; `now_ns` is the host's monotonic clock.
    pub fn new(t: &Totals, now_ns: u64) -> BlockDeviceStats {
        let (rd, flush, unmap) = (t.op(Op::Read), t.op(Op::Flush), t.op(Op::Discard));
        let (data, zero) = (t.op(Op::Write), t.op(Op::WriteZeroes));
        BlockDeviceStats {
            rd_bytes: rd.bytes,
            wr_bytes: data.bytes + zero.bytes,
            unmap_bytes: unmap.bytes,
            rd_operations: rd.done,
            wr_operations: data.done + zero.done,
            flush_operations: flush.done,
            unmap_operations: unmap.done,
            rd_total_time_ns: rd.total_ns,
            wr_total_time_ns: data.total_ns + zero.total_ns,
            flush_total_time_ns: flush.total_ns,
            unmap_total_time_ns: unmap.total_ns,
            wr_highest_offset: t.highest_write,
            rd_merged: rd.merged,
            wr_merged: data.merged + zero.merged,
            unmap_merged: unmap.merged,
            idle_time_ns: (t.last_ns != 0).then(|| now_ns.saturating_sub(t.last_ns)),
            failed_rd_operations: rd.failed,
            failed_wr_operations: data.failed + zero.failed,
            failed_flush_operations: flush.failed,
            failed_unmap_operations: unmap.failed,
            invalid_rd_operations: rd.invalid,
            invalid_wr_operations: data.invalid + zero.invalid,
            invalid_flush_operations: flush.invalid,
            invalid_unmap_operations: unmap.invalid,
            account_failed: true,
            rd_latency_histogram: BlockLatencyHistogramInfo::new(&[rd]),
            wr_latency_histogram: BlockLatencyHistogramInfo::new(&[data, zero]),
            flush_latency_histogram: BlockLatencyHistogramInfo::new(&[flush]),
            ..BlockDeviceStats::default()
        }
    }
}

/// One entry of `query-blockstats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockStats {
    /// The device: always empty, as in QEMU for devices without a name; present for users only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Who the user is; present for users only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qdev: Option<String>,
    /// The node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The figures.
    pub stats: BlockDeviceStats,
    /// What only this driver counts, tagged with its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_specific: Option<Value>,
    /// The node that holds this one's data (its "file").
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<Box<BlockStats>>,
    /// The node this one is based on; present below users only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Box<BlockStats>>,
}

impl State {
    fn block_stats(&self, id: NodeId, chain: bool, now: u64) -> Option<BlockStats> {
        let single = |id: NodeId| {
            let slot = self.nodes.get(&id)?;
            Some(BlockStats {
                node_name: Some(slot.node.name().to_owned()),
                stats: BlockDeviceStats::new(&slot.node.stats().totals(), now),
                driver_specific: slot.node.driver().info().driver_stats,
                ..BlockStats::default()
            })
        };
        // Along primary children, then for users along the backing chain; both from the far end.
        let with_parents = |id: NodeId| {
            let mut ids = vec![id];
            while let Some(next) = ids.last().and_then(|l| self.primary(*l)) {
                ids.push(next);
            }
            ids.into_iter().rev().fold(None, |below: Option<BlockStats>, id| {
                let mut stats = single(id)?;
                stats.parent = below.map(Box::new);
                Some(stats)
            })
        };
        let cow =
            |id: NodeId| self.children(id).find(|(_, e)| e.roles.contains(Roles::COW)).map(|(_, e)| e.child);
        let mut ids = vec![id];
        while let (true, Some(next)) = (chain, ids.last().and_then(|l| cow(*l))) {
            ids.push(next);
        }
        ids.into_iter().rev().fold(None, |below: Option<BlockStats>, id| {
            let mut stats = with_parents(id)?;
            stats.backing = below.map(Box::new);
            Some(stats)
        })
    }
}

impl Graph {
    /// `query-blockstats`: of all nodes with `query_nodes`, else of the nodes that users from outside are attached to, one
    /// entry for each user. The figures are the node's, all its users together.
    pub fn query_blockstats(&self, query_nodes: bool) -> Vec<BlockStats> {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now = (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64);
        let state = self.state();
        if query_nodes {
            let visible = state.nodes.iter().filter(|(_, s)| s.visible);
            return visible.filter_map(|(id, _)| state.block_stats(*id, false, now)).collect();
        }
        let users = state.edges.values().filter_map(|e| match &e.parent {
            Parent::Root(info) if !info.opening => Some((e.child, info.description.clone())),
            _ => None,
        });
        users
            .filter_map(|(id, who)| {
                let mut stats = state.block_stats(id, true, now)?;
                stats.device = Some(String::new());
                stats.qdev = Some(who);
                Some(stats)
            })
            .collect()
    }
}
