//! What the queries of the control channel answer, in the shapes of QEMU's QAPI.
//!
//! Called by `query-named-block-nodes` and `x-debug-query-block-graph` (statistics are in `blockstats`). Reads the graph,
//! changes nothing.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Graph, State};
use crate::bitmap::BitmapSet;
use crate::driver::DriverInfo;
use crate::edge::Parent;
use crate::ids::NodeId;
use crate::image;
use crate::options::DetectZeroes;
use crate::perm::Perm;
use crate::role::Roles;

pub use super::blockstats::{BlockDeviceStats, BlockLatencyHistogramInfo, BlockStats};
pub use super::picture::{
    BlockGraph, BlockGraphCounters, BlockGraphEdge, BlockGraphKind, BlockGraphNode, BlockGraphRole,
    BlockGraphUser,
};

/// Cache mode of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevCacheInfo {
    /// True if writeback mode is enabled.
    pub writeback: bool,
    /// True if the host page cache is bypassed (O_DIRECT).
    pub direct: bool,
    /// True if flush requests are ignored for the device.
    pub no_flush: bool,
}

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its id, unique inside the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of a saved machine, bytes.
    pub vm_state_size: u64,
    /// When it was made: UTC, seconds.
    pub date_sec: u64,
    /// And the rest, ns.
    pub date_nsec: u64,
    /// The guest's clock at that time, seconds.
    pub vm_clock_sec: u64,
    /// And the rest, ns.
    pub vm_clock_nsec: u64,
    /// The guest's instruction counter at that time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

impl From<image::SnapshotInfo> for SnapshotInfo {
    fn from(s: image::SnapshotInfo) -> SnapshotInfo {
        const SECOND: u64 = 1_000_000_000;
        SnapshotInfo {
            id: s.id,
            name: s.name,
            vm_state_size: s.vm_state_size,
            date_sec: s.date_sec.into(),
            date_nsec: s.date_nsec.into(),
            vm_clock_sec: s.vm_clock_nsec / SECOND,
            vm_clock_nsec: s.vm_clock_nsec % SECOND,
            icount: s.icount,
        }
    }
}

/// A dirty bitmap of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockDirtyInfo {
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Marked bytes.
    pub count: u64,
    /// Bytes one bit stands for.
    pub granularity: u32,
    /// True if changes are recorded.
    pub recording: bool,
    /// True if an operation uses it.
    pub busy: bool,
    /// True if it is kept in the image.
    pub persistent: bool,
    /// True if its content is not known; it can only be removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inconsistent: Option<bool>,
}

/// A node's bitmaps, the youngest first as in QEMU; `None` without any.
fn dirty_bitmaps(set: &BitmapSet) -> Option<Vec<BlockDirtyInfo>> {
    let list = set.list();
    let infos = list.iter().rev().map(|b| BlockDirtyInfo {
        name: Some(b.name().to_owned()),
        count: b.count(),
        granularity: b.granularity(),
        recording: b.recording(),
        busy: b.busy(),
        persistent: b.persistent(),
        inconsistent: b.inconsistent().then_some(true),
    });
    (!list.is_empty()).then(|| infos.collect())
}

/// Information about an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Name of the image file.
    pub filename: String,
    /// Format of the image file.
    pub format: String,
    /// True if the image was not cleanly closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_flag: Option<bool>,
    /// Bytes allocated on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Size as its user sees it, bytes.
    pub virtual_size: u64,
    /// Size of a cluster, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// True if the image is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    /// Name of the backing file as it is in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Full path of the backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The format of the backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Snapshots inside the image.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub snapshots: Vec<SnapshotInfo>,
    /// The same of the backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_image: Option<Box<ImageInfo>>,
    /// Information of the driver, tagged with its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<Value>,
}

/// Information about a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BlockDeviceInfo {
    /// The filename of the image.
    pub file: String,
    /// The name of the node.
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// True if the node is read-only.
    pub ro: bool,
    /// The name of the driver.
    pub drv: String,
    /// The name of the backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// Number of files in the backing chain below; 0 in a flat answer.
    pub backing_file_depth: u64,
    /// True if the node is active.
    pub active: bool,
    /// True if the image is encrypted.
    pub encrypted: bool,
    /// What the node does with written zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Total throughput limit in bytes per second; 0, limits are set by throttle nodes.
    pub bps: i64,
    /// Read limit; 0.
    pub bps_rd: i64,
    /// Write limit; 0.
    pub bps_wr: i64,
    /// Total limit in requests per second; 0.
    pub iops: i64,
    /// Read limit; 0.
    pub iops_rd: i64,
    /// Write limit; 0.
    pub iops_wr: i64,
    /// Information about the image.
    pub image: ImageInfo,
    /// The cache mode.
    pub cache: BlockdevCacheInfo,
    /// Write threshold, bytes; 0 if off.
    pub write_threshold: u64,
    /// The dirty bitmaps.
    #[serde(rename = "dirty-bitmaps", skip_serializing_if = "Option::is_none")]
    pub dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
}

/// A permission by its name on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BlockPermission {
    /// See [`Perm::CONSISTENT_READ`].
    ConsistentRead,
    /// See [`Perm::WRITE`].
    Write,
    /// See [`Perm::WRITE_UNCHANGED`].
    WriteUnchanged,
    /// See [`Perm::RESIZE`].
    Resize,
}

pub(super) fn permissions(perm: Perm) -> Vec<BlockPermission> {
    const ALL: [(Perm, BlockPermission); 4] = [
        (Perm::CONSISTENT_READ, BlockPermission::ConsistentRead),
        (Perm::WRITE, BlockPermission::Write),
        (Perm::WRITE_UNCHANGED, BlockPermission::WriteUnchanged),
        (Perm::RESIZE, BlockPermission::Resize),
    ];
    ALL.iter().filter(|(bit, _)| perm.contains(*bit)).map(|(_, p)| *p).collect()
}

/// Sort of a vertex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum XDbgBlockGraphNodeType {
    /// A user from outside: an export.
    BlockBackend,
    /// A job.
    BlockJob,
    /// A node.
    BlockDriver,
}

/// A vertex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct XDbgBlockGraphNode {
    /// Its number, unique in this answer.
    pub id: u64,
    /// Its sort.
    #[serde(rename = "type")]
    pub kind: XDbgBlockGraphNodeType,
    /// Its name; of a user from outside: who it is.
    pub name: String,
}

/// An edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct XDbgBlockGraphEdge {
    /// The upper end.
    pub parent: u64,
    /// The lower end.
    pub child: u64,
    /// Its name: "file", "backing", "root".
    pub name: String,
    /// What the parent does.
    pub perm: Vec<BlockPermission>,
    /// What it lets others do.
    pub shared_perm: Vec<BlockPermission>,
}

/// The whole graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct XDbgBlockGraph {
    /// Vertexes.
    pub nodes: Vec<XDbgBlockGraphNode>,
    /// Edges.
    pub edges: Vec<XDbgBlockGraphEdge>,
}

/// The name of a backing file as it is found from here: names in an image count from the folder the image is in. `None` for an
/// image without a plain name.
fn full_name(image: &str, backing: &str) -> Option<String> {
    let has_protocol = |name: &str| name.split('/').next().is_some_and(|first| first.contains(':'));
    if backing.starts_with('/') || has_protocol(backing) {
        return Some(backing.to_owned());
    }
    if image.is_empty() || image.starts_with("json:") {
        return None;
    }
    let folder = image.rfind('/').map_or("", |at| &image[..=at]);
    Some(format!("{folder}{backing}"))
}

impl State {
    /// The child that speaks for a node.
    pub(super) fn primary(&self, id: NodeId) -> Option<NodeId> {
        self.children(id).find(|(_, e)| e.roles.contains(Roles::PRIMARY)).map(|(_, e)| e.child)
    }

    /// The next node of the backing chain; through filters.
    pub(super) fn backing(&self, id: NodeId) -> Option<NodeId> {
        let mut at = id;
        loop {
            if let Some((_, edge)) = self.children(at).find(|(_, e)| e.roles.contains(Roles::COW)) {
                return Some(edge.child);
            }
            at = self.children(at).find(|(_, e)| e.roles.contains(Roles::FILTERED)).map(|(_, e)| e.child)?;
        }
    }

    /// What the driver says, completed from the primary child.
    fn driver_info(&self, id: NodeId) -> DriverInfo {
        let Some(slot) = self.nodes.get(&id) else { return DriverInfo::default() };
        let mut info = slot.node.driver().info();
        let mut at = id;
        while info.filename.is_empty() || info.allocated.is_none() {
            let Some(child) = self.primary(at) else { break };
            at = child;
            if let Some(slot) = self.nodes.get(&at) {
                let below = slot.node.driver().info();
                if info.filename.is_empty() {
                    info.filename = below.filename;
                }
                info.allocated = info.allocated.or(below.allocated);
            }
        }
        info
    }

    /// The image of a node; with `chain` also those below in the backing chain.
    fn image(&self, id: NodeId, chain: bool) -> Option<ImageInfo> {
        let slot = self.nodes.get(&id)?;
        let info = self.driver_info(id);
        let backing = self.backing(id);
        // The chain is walked from its end, so that its length does not matter to the stack.
        let backing_image = if chain {
            let mut ids = Vec::new();
            let mut at = backing;
            while let Some(id) = at {
                ids.push(id);
                at = self.backing(id);
            }
            ids.into_iter().rev().fold(None, |below, id| {
                let mut image = self.image(id, false)?;
                image.backing_image = below.map(Box::new);
                Some(image)
            })
        } else {
            None
        };
        let full = info.backing_file.as_deref().and_then(|name| full_name(&info.filename, name));
        Some(ImageInfo {
            filename: info.filename,
            format: slot.node.driver_name().to_owned(),
            dirty_flag: Some(info.dirty),
            actual_size: info.allocated,
            virtual_size: slot.node.size(),
            cluster_size: info.cluster_size.map(u64::from),
            encrypted: info.encrypted.then_some(true),
            full_backing_filename: full,
            backing_filename: info.backing_file,
            backing_filename_format: info.backing_format,
            snapshots: slot.node.driver().snapshots().into_iter().map(SnapshotInfo::from).collect(),
            backing_image: backing_image.map(Box::new),
            format_specific: info.format_specific,
        })
    }

    fn device_info(&self, id: NodeId, flat: bool) -> Option<BlockDeviceInfo> {
        let slot = self.nodes.get(&id)?;
        let options = slot.node.options();
        let image = self.image(id, !flat)?;
        let mut depth = 0;
        let mut backing = self.backing(id);
        while let (false, Some(below)) = (flat, backing) {
            depth += 1;
            backing = self.backing(below);
        }
        let cow = self.children(id).find(|(_, e)| e.roles.contains(Roles::COW)).map(|(_, e)| e.child);
        Some(BlockDeviceInfo {
            file: image.filename.clone(),
            node_name: slot.node.name().to_owned(),
            ro: options.read_only,
            drv: slot.node.driver_name().to_owned(),
            // What shows through now, whatever the image says.
            backing_file: cow.map(|b| self.driver_info(b).filename).filter(|n| !n.is_empty()),
            backing_file_depth: depth,
            active: !options.inactive,
            encrypted: image.encrypted.unwrap_or(false),
            detect_zeroes: options.detect_zeroes,
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            image,
            cache: BlockdevCacheInfo { writeback: true, direct: options.direct, no_flush: options.no_flush },
            write_threshold: 0,
            dirty_bitmaps: dirty_bitmaps(slot.node.bitmaps()),
        })
    }
}

impl Graph {
    /// `query-named-block-nodes`: all nodes, oldest first. `flat` leaves out what is below each image.
    pub fn query_named_block_nodes(&self, flat: bool) -> Vec<BlockDeviceInfo> {
        let state = self.state();
        let visible = state.nodes.iter().filter(|(_, s)| s.visible);
        visible.filter_map(|(id, _)| state.device_info(*id, flat)).collect()
    }

    /// `x-debug-query-block-graph`.
    pub fn query_block_graph(&self) -> XDbgBlockGraph {
        let state = self.state();
        let mut nodes: Vec<_> = state
            .nodes
            .values()
            .map(|s| XDbgBlockGraphNode {
                id: s.node.id().raw(),
                kind: XDbgBlockGraphNodeType::BlockDriver,
                name: s.node.name().to_owned(),
            })
            .collect();
        let mut edges = Vec::new();
        for edge in state.edges.values() {
            let parent = match &edge.parent {
                Parent::Node(id) => id.raw(),
                Parent::Root(info) => {
                    nodes.push(XDbgBlockGraphNode {
                        id: edge.id.raw(),
                        kind: XDbgBlockGraphNodeType::BlockBackend,
                        name: info.description.clone(),
                    });
                    edge.id.raw()
                }
            };
            edges.push(XDbgBlockGraphEdge {
                parent,
                child: edge.child.raw(),
                name: edge.name.clone(),
                perm: permissions(edge.pair.perm),
                shared_perm: permissions(edge.pair.shared),
            });
        }
        XDbgBlockGraph { nodes, edges }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::full_name;

    #[test]
    fn names_in_images_count_from_their_folder() {
        let full = full_name;
        assert_eq!(full("/a/b.qcow2", "c.qcow2").as_deref(), Some("/a/c.qcow2"));
        assert_eq!(full("b.qcow2", "c.qcow2").as_deref(), Some("c.qcow2"));
        assert_eq!(full("/a/b.qcow2", "/c.qcow2").as_deref(), Some("/c.qcow2"));
        assert_eq!(full("/a/b.qcow2", "nbd://host/c").as_deref(), Some("nbd://host/c"));
        assert_eq!(full("/a/b.qcow2", "x/c:d").as_deref(), Some("/a/x/c:d"));
        assert_eq!(full("json:{}", "c.qcow2"), None);
    }
}
