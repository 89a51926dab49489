//! Internal snapshots: making, deleting, going back to one. What they do is the graph's.

use std::time::{SystemTime, UNIX_EPOCH};

use graph::query::SnapshotInfo;
use graph::{NewSnapshot, SnapshotQuery};
use qmp::Commands;
use qmp::event::{BlockImageCorrupted, QuorumFailure, QuorumReportBad};
use schemars::JsonSchema;
use serde::Deserialize;

use super::State;
use crate::daemon::errors::block;

/// `blockdev-snapshot-internal-sync`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevSnapshotInternal {
    /// The node; no other node may be built upon it.
    pub device: String,
    /// The name of the snapshot; no other one of the node has it.
    pub name: String,
}

impl BlockdevSnapshotInternal {
    /// The node, and what is made of it, as of now.
    pub fn split(self) -> (String, NewSnapshot) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let new = NewSnapshot {
            name: self.name,
            date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nsec: now.subsec_nanos(),
            // There is no guest's clock here; the peer tells the host's as well.
            vm_clock_nsec: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        };
        (self.device, new)
    }
}

/// A snapshot of a node, by id, by name, or by both.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevSnapshotRef {
    /// The node; no other node may be built upon it.
    device: String,
    /// The id of the snapshot.
    id: Option<String>,
    /// The name of the snapshot.
    name: Option<String>,
}

impl BlockdevSnapshotRef {
    fn split(self) -> (String, SnapshotQuery) {
        (self.device, SnapshotQuery { id: self.id, name: self.name })
    }
}

pub fn register(commands: &mut Commands<State>) {
    commands.register(
        "blockdev-snapshot-internal-sync",
        "Makes a snapshot inside the image of a node. Requests wait meanwhile.",
        |daemon: State, a: BlockdevSnapshotInternal| async move {
            daemon.ready_graph()?;
            let (device, new) = a.split();
            daemon.graph.snapshot_create(&device, new).await.map(drop).map_err(block)
        },
    );
    commands.register(
        "blockdev-snapshot-delete-internal-sync",
        "Removes a snapshot from the image of a node and tells what it was. Requests wait meanwhile. Of several snapshots \
         with one name the first is meant, unless an id is given.",
        |daemon: State, a: BlockdevSnapshotRef| async move {
            daemon.ready_graph()?;
            let (device, query) = a.split();
            let gone = daemon.graph.snapshot_delete(&device, &query).await.map_err(block)?;
            Ok(SnapshotInfo::from(gone))
        },
    );
    commands.register(
        "blockdev-snapshot-apply",
        "Goes back to a snapshot inside the image of a node: its content and its size become what they were then, and what \
         was written since is gone unless another snapshot holds it. The snapshot stays. A guest that uses the disk sees it \
         change under its feet: stop it first, or have it not use the disk. Refused while the node has dirty bitmaps, and \
         while a user of the node does not share resizing. QEMU has no such command.",
        |daemon: State, a: BlockdevSnapshotRef| async move {
            daemon.ready_graph()?;
            let (device, query) = a.split();
            daemon.graph.snapshot_apply(&device, &query).await.map_err(block)
        },
    );
    commands.event::<BlockImageCorrupted>();
    commands.event::<QuorumFailure>();
    commands.event::<QuorumReportBad>();
}
