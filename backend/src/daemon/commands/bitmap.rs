//! Dirty bitmaps: `block-dirty-bitmap-*`. What they do is the graph's.

use graph::{BitmapRef, NewBitmap};
use qmp::Commands;
use schemars::JsonSchema;
use serde::Deserialize;

use super::State;
use crate::daemon::errors::block;

/// `block-dirty-bitmap-add`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockDirtyBitmapAdd {
    /// The node.
    pub node: String,
    /// The bitmap's name, unique in the node; at most 1023 bytes.
    pub name: String,
    /// Bytes one bit stands for: a power of 2, at least 512. Default: the cluster size of the node, not below 4 KiB and not
    /// above 64 KiB; 64 KiB where there are no clusters.
    pub granularity: Option<u32>,
    /// Keep it in the image when the node is closed. Default: false.
    pub persistent: Option<bool>,
    /// Do not record changes yet. Default: false.
    pub disabled: Option<bool>,
}

/// A bitmap of a node.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockDirtyBitmap {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// A bitmap of the node the command names, or of any.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum BlockDirtyBitmapOrStr {
    /// One of the same node.
    Local(String),
    /// One of that node.
    External(BlockDirtyBitmap),
}

/// `block-dirty-bitmap-merge`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockDirtyBitmapMerge {
    /// The node of the bitmap that is changed.
    pub node: String,
    /// The bitmap that is changed.
    pub target: String,
    /// The bitmaps whose marks it gets.
    pub bitmaps: Vec<BlockDirtyBitmapOrStr>,
}

impl BlockDirtyBitmapAdd {
    /// The node, and what it gets.
    pub fn split(self) -> (String, NewBitmap) {
        let new = NewBitmap {
            name: self.name,
            granularity: self.granularity,
            persistent: self.persistent.unwrap_or(false),
            disabled: self.disabled.unwrap_or(false),
        };
        (self.node, new)
    }
}

impl From<BlockDirtyBitmapOrStr> for BitmapRef {
    fn from(source: BlockDirtyBitmapOrStr) -> BitmapRef {
        match source {
            BlockDirtyBitmapOrStr::Local(name) => BitmapRef { node: None, name },
            BlockDirtyBitmapOrStr::External(b) => BitmapRef { node: Some(b.node), name: b.name },
        }
    }
}

pub fn register(commands: &mut Commands<State>) {
    commands.register(
        "block-dirty-bitmap-add",
        "Makes a dirty bitmap and begins to record which parts of the node change.",
        |daemon: State, a: BlockDirtyBitmapAdd| async move {
            let (node, new) = a.split();
            daemon.graph.bitmap_add(&node, new).await.map_err(block)
        },
    );
    commands.register(
        "block-dirty-bitmap-remove",
        "Removes a dirty bitmap, from the image too. An inconsistent one can be removed as well.",
        |daemon: State, a: BlockDirtyBitmap| async move {
            daemon.ready_graph()?;
            daemon.graph.bitmap_remove(&a.node, &a.name).await.map_err(block)
        },
    );
    commands.register(
        "block-dirty-bitmap-clear",
        "Unmarks everything in a dirty bitmap.",
        |daemon: State, a: BlockDirtyBitmap| async move {
            daemon.graph.bitmap_clear(&a.node, &a.name).await.map_err(block)
        },
    );
    commands.register(
        "block-dirty-bitmap-enable",
        "Begins to record changes in a dirty bitmap.",
        |daemon: State, a: BlockDirtyBitmap| async move {
            daemon.graph.bitmap_set_recording(&a.node, &a.name, true).await.map_err(block)
        },
    );
    commands.register(
        "block-dirty-bitmap-disable",
        "Stops recording changes in a dirty bitmap; its marks stay.",
        |daemon: State, a: BlockDirtyBitmap| async move {
            daemon.graph.bitmap_set_recording(&a.node, &a.name, false).await.map_err(block)
        },
    );
    commands.register(
        "block-dirty-bitmap-merge",
        "Marks in one dirty bitmap what any of the others marks; these do not change. The disks must be of one size, the \
         granularities need not be the same.",
        |daemon: State, a: BlockDirtyBitmapMerge| async move {
            let sources: Vec<BitmapRef> = a.bitmaps.into_iter().map(BitmapRef::from).collect();
            daemon.graph.bitmap_merge(&a.node, &a.target, &sources).await.map_err(block)
        },
    );
}
