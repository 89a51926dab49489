//! Surgery on the running graph: reopening nodes, overlays, children that come and go. What they do is the graph's.

use graph::options::BlockdevRef;
use graph::{EdgeId, Insertion, Registry, Replacing, SnapshotAction};
use qmp::schema::SchemaBuilder;
use qmp::{Commands, QmpError};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::State;
use super::block::blockdev_options;
use crate::daemon::errors::block;

/// A node and its options: a union over the drivers, which only the registry knows.
#[derive(Clone, Deserialize)]
pub struct BlockdevOptions(pub Map<String, Value>);

impl JsonSchema for BlockdevOptions {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "BlockdevOptions".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        // Found by its name: `blockdev_options` has defined it.
        schemars::json_schema!({})
    }
}

/// `blockdev-reopen`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevReopen {
    /// The nodes, each with all its options.
    options: Vec<BlockdevOptions>,
}

/// `blockdev-insert-node`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevInsertNode {
    /// The filter: the name of a node, or the definition of one, whose child is the node the edge leads to now.
    node: BlockdevRef,
    /// The upper end of the edge: a node, or an export.
    parent: String,
    /// The name of the edge: "file", "backing"; "root" of an export. Default: the only one there is.
    child: Option<String>,
}

/// `blockdev-remove-node`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevRemoveNode {
    /// The filter.
    node_name: String,
}

/// `blockdev-replace-node`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevReplaceNode {
    /// The node whose users get another one.
    node_name: String,
    /// The other one, of the same size.
    replacement: String,
    /// Only the edge from this node or export. Default: all users.
    parent: Option<String>,
    /// The name of that edge. Default: the only one there is.
    child: Option<String>,
    /// Even if nothing shows that both hold the same data. Default: false.
    force: Option<bool>,
}

/// `x-blockdev-change`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct XBlockdevChange {
    /// The node whose children change.
    parent: String,
    /// The child that goes.
    child: Option<String>,
    /// The node that becomes a child.
    node: Option<String>,
}

/// `change-backing-file`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ChangeBackingFile {
    /// The node at the top of the chain.
    device: String,
    /// The node of the image that is changed.
    image_node_name: String,
    /// The name of its backing file from now on. It is not looked at.
    backing_file: String,
}

/// The upper end of an edge, as a client names it: an export, or else a node.
fn upper_end(daemon: &State, parent: Option<String>) -> (Option<String>, Option<EdgeId>) {
    let export = parent.as_ref().and_then(|id| daemon.exports.borrow().get(id)?.root());
    match export {
        Some(root) => (None, Some(root)),
        None => (parent, None),
    }
}

fn cuts(commands: &mut Commands<State>, registry: &Registry) {
    let all = registry.clone();
    commands.register_value(
        "blockdev-insert-node",
        "Puts a filter on an edge while it is in use: the parent uses the filter from then on. A filter that is defined in \
         place goes with its last user. QEMU has no such command.",
        move |schema: &mut SchemaBuilder| {
            blockdev_options(schema, &all);
            schema.object_from::<BlockdevInsertNode>()
        },
        SchemaBuilder::empty,
        |daemon: State, arguments| async move {
            let a: BlockdevInsertNode =
                serde_json::from_value(arguments).map_err(|e| QmpError::generic(e.to_string()))?;
            daemon.ready_graph()?;
            let (parent, root) = upper_end(&daemon, Some(a.parent));
            let insertion = Insertion { node: a.node, parent, root, child: a.child };
            daemon.graph.insert_node(insertion).await.map_err(block)?;
            Ok(Value::Null)
        },
    );
    commands.register(
        "blockdev-remove-node",
        "Takes a filter out while it is in use: its users use what it shows from then on. A filter that was added with \
         `blockdev-add` stays, without users; one that was defined in place goes. QEMU has no such command.",
        |daemon: State, a: BlockdevRemoveNode| async move {
            daemon.ready_graph()?;
            daemon.graph.remove_node(&a.node_name).await.map_err(block)
        },
    );
    commands.register(
        "blockdev-replace-node",
        "Lets one edge, or all users of a node, lead to another node while they are in use. Both must be of one size, and \
         show the same node through filters, unless `force` says that the data are as good. QEMU has no such command.",
        |daemon: State, a: BlockdevReplaceNode| async move {
            daemon.ready_graph()?;
            let (parent, root) = upper_end(&daemon, a.parent);
            let force = a.force.unwrap_or(false);
            let replacing =
                Replacing { from: a.node_name, to: a.replacement, parent, root, child: a.child, force };
            daemon.graph.replace_node(&replacing).await.map_err(block)
        },
    );
    commands.register(
        "x-blockdev-change",
        "Adds a node to the children of another one, or takes a child away, where the driver allows that: quorum, and the \
         backing file of a format.",
        |daemon: State, a: XBlockdevChange| async move {
            daemon.ready_graph()?;
            let (child, node) = (a.child.as_deref(), a.node.as_deref());
            daemon.graph.change_child(&a.parent, child, node).await.map_err(block)
        },
    );
    commands.register(
        "change-backing-file",
        "Writes another name of its backing file into an image. What is open stays open.",
        |daemon: State, a: ChangeBackingFile| async move {
            daemon.ready_graph()?;
            let graph = &daemon.graph;
            graph.change_backing_file(&a.device, &a.image_node_name, &a.backing_file).await.map_err(block)
        },
    );
}

/// `blockdev-set-active`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevSetActive {
    /// The node; what lies below goes with it. Default: all nodes.
    node_name: Option<String>,
    /// Whether it becomes active or inactive.
    active: bool,
}

/// An iothread, or none in particular.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum StrOrNull {
    /// The iothread.
    Name(String),
    /// None in particular.
    Null(()),
}

/// `x-blockdev-set-iothread`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct XBlockdevSetIothread {
    /// The node.
    node_name: String,
    /// The iothread.
    iothread: StrOrNull,
    /// Kept for QEMU's clients; default: false.
    #[expect(dead_code, reason = "there is nothing to force")]
    force: Option<bool>,
}

fn places(commands: &mut Commands<State>) {
    commands.register(
        "blockdev-set-active",
        "Makes nodes inactive, so that another process may write to their images (a guest moves there), or active again: their \
         images are read anew. A node with a user that writes, or below one that is active, stays active.",
        |daemon: State, a: BlockdevSetActive| async move {
            daemon.ready_graph()?;
            daemon.graph.set_active(a.node_name.as_deref(), a.active).await.map_err(block)
        },
    );
    commands.register(
        "x-blockdev-set-iothread",
        "For QEMU's clients. Nodes have no iothread of their own here: every request runs on the iothread of the queue it came \
         from, which is the export's affair (`iothread` and `iothread-vq-mapping` of `block-export-add`). So `null` is always \
         true, and an iothread is refused.",
        |daemon: State, a: XBlockdevSetIothread| async move {
            if daemon.graph.node(&a.node_name).is_err() {
                return Err(QmpError::generic(format!("Failed to find node with node-name='{}'", a.node_name)));
            }
            match a.iothread {
                StrOrNull::Null(()) => Ok(()),
                StrOrNull::Name(id) if daemon.objects.borrow().iothread(&id).is_none() => {
                    Err(QmpError::generic(format!("Cannot find iothread {id}")))
                }
                StrOrNull::Name(_) => Err(QmpError::generic(format!(
                    "Node '{}' has no iothread of its own: its requests run on the iothreads of the exports' queues; name \
                     these with 'iothread' or 'iothread-vq-mapping' of block-export-add",
                    a.node_name
                ))),
            }
        },
    );
}

/// `blockdev-snapshot`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevSnapshot {
    /// The node.
    pub node: String,
    /// The node above it from now on: an image with `backing: null` that nobody uses.
    pub overlay: String,
}

/// How an overlay's image comes about.
#[derive(Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NewImageMode {
    /// It is there already.
    Existing,
    /// It is created, and names the image below by its path.
    #[default]
    AbsolutePaths,
}

/// `blockdev-snapshot-sync`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockdevSnapshotSync {
    /// The export whose node is meant; or `node-name`.
    pub device: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// Path of the overlay's image. Of a quorum every child gets one: `.0`, `.1` and so on are appended.
    pub snapshot_file: String,
    /// Name of the overlay's node; the same is appended.
    pub snapshot_node_name: Option<String>,
    /// Format of the image. Default: qcow2.
    pub format: Option<String>,
    /// Whether it is created. Default: absolute-paths.
    pub mode: Option<NewImageMode>,
}

impl BlockdevSnapshotSync {
    /// As an action; a device is an export.
    ///
    /// # Errors
    /// Neither, or both, of `device` and `node-name`.
    pub fn action(self, daemon: &State) -> Result<graph::SnapshotSyncAction, QmpError> {
        let (device, name) = (self.device.unwrap_or_default(), self.node_name.unwrap_or_default());
        let export = daemon.exports.borrow().get(&device).map(|e| e.info().node_name);
        let node = match export {
            Some(node) if name.is_empty() => node,
            None if device.is_empty() && !name.is_empty() => name,
            _ => {
                return Err(QmpError::generic(format!(
                    "Cannot find device='{device}' nor node-name='{name}'"
                )));
            }
        };
        Ok(graph::SnapshotSyncAction::new(graph::NewOverlay {
            node,
            file: self.snapshot_file,
            node_name: self.snapshot_node_name,
            format: self.format.unwrap_or_else(|| "qcow2".to_owned()),
            mode: match self.mode.unwrap_or_default() {
                NewImageMode::Existing => graph::OverlayMode::Existing,
                NewImageMode::AbsolutePaths => graph::OverlayMode::AbsolutePaths,
            },
            protocol: "file".to_owned(),
        }))
    }
}

fn snapshots(commands: &mut Commands<State>) {
    commands.register(
        "blockdev-snapshot",
        "Puts an overlay above a node: what is written from now on goes there. Filters and encryption above the image stay \
         above; of a quorum the overlay goes above the whole.",
        |daemon: State, a: BlockdevSnapshot| async move {
            daemon.ready_graph()?;
            let action = SnapshotAction::new(a.node, a.overlay);
            daemon.graph.transaction(vec![Box::new(action)]).await.map_err(block)
        },
    );
    commands.register(
        "blockdev-snapshot-sync",
        "Creates an overlay above a node: what is written from now on goes there. Filters and encryption above the image stay \
         above; of a quorum every child gets an overlay.",
        |daemon: State, a: BlockdevSnapshotSync| async move {
            daemon.ready_graph()?;
            let action = a.action(&daemon)?;
            daemon.graph.transaction(vec![Box::new(action)]).await.map_err(block)
        },
    );
}

pub fn register(commands: &mut Commands<State>, registry: &Registry) {
    cuts(commands, registry);
    snapshots(commands);
    places(commands);
    let all = registry.clone();
    commands.register_value(
        "blockdev-reopen",
        "Gives nodes other options while they are in use: all of the list, or, if one is refused, none. An option that is \
         absent returns to its default. Children are given by name and may be others than before; `backing: null` takes the \
         backing file away. What cannot change is refused by name. A format's `file` can only become a node that shows the \
         same image (a filter above it, or below).",
        move |schema: &mut SchemaBuilder| {
            blockdev_options(schema, &all);
            schema.object_from::<BlockdevReopen>()
        },
        SchemaBuilder::empty,
        |daemon: State, arguments| async move {
            let a: BlockdevReopen =
                serde_json::from_value(arguments).map_err(|e| QmpError::generic(e.to_string()))?;
            let list: Vec<Value> = a.options.into_iter().map(|o| Value::Object(o.0)).collect();
            daemon.ready_graph()?;
            daemon.graph.blockdev_reopen(&list).await.map_err(block)?;
            Ok(Value::Null)
        },
    );
}
