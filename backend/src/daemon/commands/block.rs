//! Nodes: adding, removing, resizing, and the queries about them.

use graph::query::{BlockDeviceInfo, BlockStats, XDbgBlockGraph};
use graph::{CommonOptions, Registry};
use qmp::schema::{SchemaBuilder, TypeRef};
use qmp::{Commands, QmpError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::State;
use crate::daemon::errors::block;

/// `blockdev-del`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevDel {
    /// The node.
    node_name: String,
}

/// `block_resize`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockResize {
    /// The export whose node is meant; or `node-name`.
    device: Option<String>,
    /// The node.
    node_name: Option<String>,
    /// New size in bytes.
    #[schemars(extend("format" = "size"))]
    size: i64,
}

/// `query-named-block-nodes`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QueryNamedBlockNodes {
    /// Leave out the images behind each node. Default: false.
    flat: Option<bool>,
}

/// What an export shows to its front end.
#[derive(Serialize, JsonSchema)]
struct BlockInfo {
    /// The export.
    device: String,
    /// The export.
    qdev: String,
    /// Kept for QEMU's clients: "unknown".
    #[serde(rename = "type")]
    kind: String,
    /// Kept for QEMU's clients: false.
    removable: bool,
    /// Kept for QEMU's clients: false.
    locked: bool,
    /// Its node.
    #[serde(skip_serializing_if = "Option::is_none")]
    inserted: Option<BlockDeviceInfo>,
}

/// `query-blockstats`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QueryBlockstats {
    /// All nodes instead of the exports. Default: false.
    query_nodes: Option<bool>,
}

/// The export that an entry of `query-blockstats` tells of.
fn export_of(stats: &BlockStats) -> Option<String> {
    crate::export::id_in_description(stats.qdev.as_deref()?).map(str::to_owned)
}

/// The type of a node's options: a union over all drivers. Whatever refers to a node that may be defined in place needs it.
pub fn blockdev_options(schema: &mut SchemaBuilder, registry: &Registry) -> TypeRef {
    let base = schema.object_from::<CommonOptions>();
    let concerned: Vec<_> = registry.iter().filter(|d| schema.concerns(d.name)).collect();
    let variants = concerned
        .into_iter()
        .map(|d| {
            let name = format!("BlockdevOptions-{}", d.name);
            (d.name.to_owned(), schema.from_schema(&name, &(d.schema)()), String::new())
        })
        .collect();
    schema.union("BlockdevOptions", "A node and its options.", "driver", base, variants)
}

pub fn register(commands: &mut Commands<State>, registry: &Registry) {
    let registry = registry.clone();
    let options = move |schema: &mut SchemaBuilder| blockdev_options(schema, &registry);
    commands.register_value(
        "blockdev-add",
        "Creates a node, and the nodes defined inside its options. Without `node-name` inside another node it gets a \
         generated one; at the top level the name is needed.",
        options,
        SchemaBuilder::empty,
        |daemon: State, options| async move {
            daemon.ready_graph_if_any();
            daemon.graph.blockdev_add(options).await.map_err(block)?;
            Ok(serde_json::Value::Null)
        },
    );
    commands.register(
        "blockdev-del",
        "Removes a node that was added with `blockdev-add` and that nobody uses.",
        |daemon: State, a: BlockdevDel| async move {
            daemon.ready_graph()?;
            daemon.graph.blockdev_del(&a.node_name).await.map_err(block)
        },
    );
    commands.register(
        "block_resize",
        "Changes the size of a node while it is in use; guests hear of it.",
        |daemon: State, a: BlockResize| async move {
            let (device, name) = (a.device.unwrap_or_default(), a.node_name.unwrap_or_default());
            let export = daemon.exports.borrow().get(&device).map(|e| e.info().node_name);
            let node = match export {
                None if device.is_empty() && !name.is_empty() => name,
                Some(node) if name.is_empty() => node,
                _ if !device.is_empty() && !name.is_empty() => {
                    return Err(QmpError::generic("Need exactly one of 'device' and 'node-name'"));
                }
                _ => {
                    let text = format!("Cannot find device='{device}' nor node-name='{name}'");
                    return Err(QmpError::generic(text));
                }
            };
            let size =
                u64::try_from(a.size).map_err(|_| QmpError::generic("Parameter 'size' expects a >0 size"))?;
            daemon.ready_graph()?;
            daemon.graph.block_resize(&node, size).await.map_err(block)
        },
    );
    commands
        .register(
            "query-named-block-nodes",
            "Tells of all nodes.",
            |daemon: State, a: QueryNamedBlockNodes| async move {
                let nodes: Vec<BlockDeviceInfo> =
                    daemon.graph.query_named_block_nodes(a.flat.unwrap_or(false));
                Ok(nodes)
            },
        )
        .concurrent();
    commands
        .register_query(
            "query-block",
            "Tells of the disks that front ends see: one for each export.",
            |daemon: State| async move {
                let exports: Vec<_> = daemon.exports.borrow().values().map(|e| e.info()).collect();
                let nodes = daemon.graph.query_named_block_nodes(false);
                let mut disks: Vec<BlockInfo> = exports
                    .into_iter()
                    .map(|e| BlockInfo {
                        inserted: nodes.iter().find(|n| n.node_name == e.node_name).cloned(),
                        device: e.id.clone(),
                        qdev: e.id,
                        kind: "unknown".to_owned(),
                        removable: false,
                        locked: false,
                    })
                    .collect();
                disks.sort_by(|a, b| a.device.cmp(&b.device));
                Ok(disks)
            },
        )
        .concurrent();
    commands
        .register(
            "query-blockstats",
            "Tells what has been read and written: of each export, or of each node.",
            |daemon: State, a: QueryBlockstats| async move {
                let mut stats: Vec<BlockStats> =
                    daemon.graph.query_blockstats(a.query_nodes.unwrap_or(false));
                for (s, id) in
                    stats.iter_mut().filter_map(|s| Some((export_of(s)?, s))).map(|(id, s)| (s, id))
                {
                    s.device = Some(id.clone());
                    s.qdev = Some(id);
                }
                Ok(stats)
            },
        )
        .concurrent();
    commands
        .register_query(
            "x-debug-query-block-graph",
            "Tells of all nodes and edges, with the permissions on them. For tests and for people.",
            |daemon: State| async move {
                let graph: XDbgBlockGraph = daemon.graph.query_block_graph();
                Ok(graph)
            },
        )
        .concurrent();
}
