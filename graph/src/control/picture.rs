//! `query-block-graph`: everything there is to see of the running graph at one moment, for whoever draws it.
//!
//! Called by the control channel. Reads, changes nothing. Beyond `x-debug-query-block-graph` (see `query`), which has QEMU's
//! shape, it tells roles, who froze what, what is drained, and counters whose difference over two answers is a rate.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::query::{BlockPermission, permissions};
use super::{Graph, Slot, State};
use crate::driver::{DriverKind, Op};
use crate::edge::{Parent, RootInfo};
use crate::ids::NodeId;
use crate::role::Roles;
use crate::stats::Totals;

/// Sort of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BlockGraphKind {
    /// Ends the graph: a file, a device, a network peer.
    Protocol,
    /// Interprets its child's content.
    Format,
    /// Shows its child's content.
    Filter,
}

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BlockGraphRole {
    /// Holds data the parent shows.
    Data,
    /// Holds the parent's metadata.
    Metadata,
    /// The parent is a filter on it.
    Filtered,
    /// Shows what the parent has not allocated.
    Cow,
    /// Speaks for the parent: file name, size.
    Primary,
}

/// Sums since the node was added. The difference of two answers, divided by that of their `time-ns`, is a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockGraphCounters {
    /// Completed reads.
    pub rd_operations: u64,
    /// Bytes read.
    pub rd_bytes: u64,
    /// Time spent on reads, ns.
    pub rd_total_time_ns: u64,
    /// Completed writes, writes of zeroes included.
    pub wr_operations: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Time spent on writes, ns.
    pub wr_total_time_ns: u64,
    /// Completed discards.
    pub unmap_operations: u64,
    /// Bytes discarded.
    pub unmap_bytes: u64,
    /// Completed flushes.
    pub flush_operations: u64,
    /// Failed requests of any sort.
    pub failed_operations: u64,
    /// Requests in flight, as far as the front ends have said.
    pub in_flight: u64,
}

impl BlockGraphCounters {
    fn new(t: &Totals) -> BlockGraphCounters {
        let (rd, wr, zero) = (t.op(Op::Read), t.op(Op::Write), t.op(Op::WriteZeroes));
        let (unmap, flush) = (t.op(Op::Discard), t.op(Op::Flush));
        BlockGraphCounters {
            rd_operations: rd.done,
            rd_bytes: rd.bytes,
            rd_total_time_ns: rd.total_ns,
            wr_operations: wr.done + zero.done,
            wr_bytes: wr.bytes + zero.bytes,
            wr_total_time_ns: wr.total_ns + zero.total_ns,
            unmap_operations: unmap.done,
            unmap_bytes: unmap.bytes,
            flush_operations: flush.done,
            failed_operations: t.ops.iter().map(|o| o.failed).sum(),
            in_flight: t.in_flight,
        }
    }
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockGraphNode {
    /// Its number, unique in this answer and the same in later ones.
    pub id: u64,
    /// Its name.
    pub node_name: String,
    /// Its driver.
    pub driver: String,
    /// The sort of its driver.
    pub kind: BlockGraphKind,
    /// Bytes.
    pub size: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether it is active.
    pub active: bool,
    /// Whether requests above it are held back now.
    pub drained: bool,
    /// Whether it stays without users until `blockdev-del`.
    pub monitor_owned: bool,
    /// What has gone through it.
    pub counters: BlockGraphCounters,
}

/// A user that is not a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockGraphUser {
    /// Its number, unique in this answer among nodes and users.
    pub id: u64,
    /// Who it is: "block export 'a'".
    pub description: String,
    /// Whether its requests are held back now.
    pub drained: bool,
}

/// An edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockGraphEdge {
    /// The number of the node or user at the upper end.
    pub parent: u64,
    /// The number of the node at the lower end.
    pub child: u64,
    /// Its name: "file", "backing", "root".
    pub name: String,
    /// What the child is to its parent; empty for users.
    pub roles: Vec<BlockGraphRole>,
    /// What the parent does.
    pub perm: Vec<BlockPermission>,
    /// What it lets others do.
    pub shared_perm: Vec<BlockPermission>,
    /// Who relies on this edge: as long as there is somebody, it neither goes nor leads elsewhere.
    pub frozen_by: Vec<String>,
}

/// The running graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockGraph {
    /// When this was so: the host's monotonic clock, ns.
    pub time_ns: u64,
    /// All nodes, oldest first.
    pub nodes: Vec<BlockGraphNode>,
    /// All users that are not nodes, oldest first.
    pub users: Vec<BlockGraphUser>,
    /// All edges, oldest first.
    pub edges: Vec<BlockGraphEdge>,
}

fn roles(roles: Roles) -> Vec<BlockGraphRole> {
    const ALL: [(Roles, BlockGraphRole); 5] = [
        (Roles::DATA, BlockGraphRole::Data),
        (Roles::METADATA, BlockGraphRole::Metadata),
        (Roles::FILTERED, BlockGraphRole::Filtered),
        (Roles::COW, BlockGraphRole::Cow),
        (Roles::PRIMARY, BlockGraphRole::Primary),
    ];
    ALL.iter().filter(|(bit, _)| roles.contains(*bit)).map(|(_, role)| *role).collect()
}

impl State {
    fn picture_node(&self, slot: &Slot, drained: &[NodeId]) -> BlockGraphNode {
        let node = &slot.node;
        let options = node.options();
        let kind = match node.kind() {
            DriverKind::Protocol => BlockGraphKind::Protocol,
            DriverKind::Format => BlockGraphKind::Format,
            DriverKind::Filter => BlockGraphKind::Filter,
        };
        BlockGraphNode {
            id: node.id().raw(),
            node_name: node.name().to_owned(),
            driver: node.driver_name().to_owned(),
            kind,
            size: node.size(),
            read_only: options.read_only,
            active: !options.inactive,
            drained: drained.contains(&node.id()),
            monitor_owned: slot.monitor_owned,
            counters: BlockGraphCounters::new(&node.stats().totals()),
        }
    }

    fn picture(&self, drained: &[NodeId]) -> (Vec<BlockGraphNode>, Vec<BlockGraphUser>, Vec<BlockGraphEdge>) {
        let nodes = self.nodes.values().map(|slot| self.picture_node(slot, drained)).collect();
        let mut users = Vec::new();
        let mut edges = Vec::with_capacity(self.edges.len());
        for edge in self.edges.values() {
            let parent = match &edge.parent {
                Parent::Node(id) => id.raw(),
                Parent::Root(info) => {
                    let RootInfo { description, gate, .. } = &**info;
                    let drained = gate.depth() > 0;
                    users.push(BlockGraphUser {
                        id: edge.id.raw(),
                        description: description.clone(),
                        drained,
                    });
                    edge.id.raw()
                }
            };
            edges.push(BlockGraphEdge {
                parent,
                child: edge.child.raw(),
                name: edge.name.clone(),
                roles: roles(edge.roles),
                perm: permissions(edge.pair.perm),
                shared_perm: permissions(edge.pair.shared),
                frozen_by: edge.frozen.iter().map(|owner| owner.to_string()).collect(),
            });
        }
        (nodes, users, edges)
    }
}

impl Graph {
    /// `query-block-graph`.
    pub fn query_graph(&self) -> BlockGraph {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let time_ns = (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64);
        let drains = self.inner.drains.borrow();
        let state = self.state();
        let targets: Vec<NodeId> = drains.iter().flat_map(|d| d.targets.borrow().clone()).collect();
        // A drain holds back all requests that could reach its targets: those above are as quiet.
        let mut drained: Vec<NodeId> = targets.iter().flat_map(|id| state.above(*id)).collect();
        drained.sort_unstable();
        drained.dedup();
        let (nodes, users, edges) = state.picture(&drained);
        BlockGraph { time_ns, nodes, users, edges }
    }
}
