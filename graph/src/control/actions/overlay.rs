//! Snapshots by overlays: what is written from now on goes to a new image above the old one.
//!
//! `blockdev-snapshot` puts an overlay that is open already above a node, `blockdev-snapshot-sync` creates it. Both look for
//! the right place first (`docs/decisions/2026-11-20-snapshots-below-filters.md`): below filters, and below LUKS over another
//! format; of a quorum each child. The words of refusals are QEMU's where it has some.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::super::{State, no_such_node};
use super::{Action, ActionContext};
use crate::control::{Change, Graph};
use crate::create::{CreateContext, JobControl};
use crate::driver::{BoxFut, DriverKind, OverlayPlace};
use crate::edge::Parent;
use crate::error::{BlockError, Errno, Result};
use crate::ids::NodeId;
use crate::options::{DiscardOption, NodeOptions};
use crate::perm::Perm;
use crate::role::Roles;

impl State {
    /// The nodes an overlay goes above for a snapshot of `id`, in the order of a quorum's children. `one`: there is one
    /// overlay only, so that a quorum is a place of its own.
    fn places(&self, id: NodeId, one: bool, out: &mut Vec<NodeId>) {
        let below: Vec<_> = self.children(id).map(|(_, e)| e).collect();
        let Some(slot) = self.nodes.get(&id) else { return };
        let thawed = below.iter().all(|e| e.frozen.is_empty());
        let filtered = below.iter().find(|e| e.roles.contains(Roles::FILTERED));
        let data = || below.iter().filter(|e| e.roles.intersects(Roles::DATA | Roles::METADATA));
        match (slot.node.kind(), filtered) {
            (DriverKind::Filter, Some(edge)) if thawed => self.places(edge.child, one, out),
            _ if !thawed => out.push(id),
            _ => match slot.node.driver().overlay_place() {
                OverlayPlace::EachChild if !one => {
                    data().for_each(|edge| self.places(edge.child, one, out));
                }
                OverlayPlace::BelowFormat => {
                    let file = data().find(|e| e.roles.contains(Roles::PRIMARY));
                    match file.filter(|e| self.takes_overlay(e.child)) {
                        Some(edge) => self.places(edge.child, one, out),
                        None => out.push(id),
                    }
                }
                _ => out.push(id),
            },
        }
    }

    /// Whether a format or a quorum lies there, through filters.
    fn takes_overlay(&self, id: NodeId) -> bool {
        self.nodes.get(&self.content(id)).is_some_and(|s| {
            s.node.kind() == DriverKind::Format || s.node.driver().overlay_place() == OverlayPlace::EachChild
        })
    }
}

/// What QEMU says of a node that is another one's backing file.
fn busy(state: &State, id: NodeId) -> Result<()> {
    let user = state.users(id).find(|e| e.roles.contains(Roles::COW));
    let Some(edge) = user else { return Ok(()) };
    let Parent::Node(parent) = edge.parent else { return Ok(()) };
    let (name, parent) = (state.name_of(id), state.name_of(parent));
    let text = format!("Node '{name}' is busy: node is used as backing hd of '{parent}'");
    Err(BlockError::new(Errno::EBUSY, text))
}

/// Puts `overlay` above `base`.
async fn put_above(cx: &mut ActionContext, base: NodeId, overlay: &str) -> Result<()> {
    let (base_name, changes) = {
        let state = cx.graph().state();
        busy(&state, base)?;
        let id = state.find(overlay).ok_or_else(|| no_such_node(overlay))?;
        let slot = state.slot(id)?;
        let roots = state.users(id).fold(Perm::NONE, |all, e| all | e.pair.perm);
        if roots.contains(Perm::CONSISTENT_READ) {
            return Err(BlockError::new(Errno::EBUSY, "The overlay is already in use"));
        }
        if slot.node.kind() == DriverKind::Filter {
            return Err(BlockError::invalid("Filters cannot be used as overlays"));
        }
        let Some(place) = slot.node.driver().backing_child() else {
            return Err(BlockError::unsupported("The overlay does not support backing images"));
        };
        if state.children(id).any(|(index, _)| index == place) {
            return Err(BlockError::invalid("The overlay already has a backing image"));
        }
        let (size, below) = (slot.node.size(), state.slot(base)?.node.size());
        if size < below && state.users(base).next().is_some() {
            let base = state.name_of(base);
            return Err(BlockError::invalid(format!(
                "The overlay '{overlay}' is smaller ({size} bytes) than '{base}' ({below} bytes), whose users would lose the \
                 end of their disk"
            )));
        }
        let name = state.name_of(base).to_owned();
        let attach = Change::AttachChild {
            parent: overlay.to_owned(),
            child: "backing".to_owned(),
            roles: Roles::COW,
            node: name.clone(),
        };
        let replace = Change::ReplaceNode { from: name.clone(), to: overlay.to_owned() };
        (name, [replace, attach])
    };
    // What users were told is on disk stays so, whatever becomes of the overlay.
    let writable = !cx.graph().node_by_id(base)?.options().refuses_writes();
    if writable {
        let flushed = cx.graph().on_iothread(base, |io| async move { io.flush().await }).await;
        flushed.map_err(|e| e.context(format!("Node '{base_name}' cannot be flushed")))?;
    }
    cx.change(&changes)
}

/// Nothing writes to a backing file any more: its locks need not say so. Not being able to (somebody else writes) is no
/// reason to take the snapshot back.
async fn rest(graph: &Graph, base: NodeId) {
    let name = graph.state().name_of(base).to_owned();
    if let Err(e) = graph.reopen_read_only(base, true).await {
        log::info!("node '{name}' stays writable below its overlay: {e}");
    }
}

/// `blockdev-snapshot`.
#[derive(Debug)]
pub struct SnapshotAction {
    node: String,
    overlay: String,
    base: Option<NodeId>,
    committed: bool,
}

impl SnapshotAction {
    /// Puts `overlay` above what `node` shows.
    pub fn new(node: String, overlay: String) -> Self {
        SnapshotAction { node, overlay, base: None, committed: false }
    }
}

impl Action for SnapshotAction {
    fn ready<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let id = graph.state().find(&self.node);
            if let Some(id) = id {
                graph.flush_ahead(id).await;
            }
            Ok(())
        })
    }

    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        vec![self.node.clone(), self.overlay.clone()]
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let mut places = Vec::new();
            {
                let state = cx.graph().state();
                let missing = |name: &str| {
                    BlockError::new(
                        Errno::ENOENT,
                        format!("Cannot find device='{name}' nor node-name='{name}'"),
                    )
                };
                let id = state.find(&self.node).ok_or_else(|| missing(&self.node))?;
                busy(&state, id)?;
                state.find(&self.overlay).ok_or_else(|| missing(&self.overlay))?;
                state.places(id, true, &mut places);
            }
            let base = *places.first().ok_or(Errno::ENODEV)?;
            put_above(cx, base, &self.overlay).await?;
            self.base = Some(base);
            Ok(())
        })
    }

    fn commit<'a>(&'a mut self, _graph: &'a Graph) -> BoxFut<'a, ()> {
        self.committed = true;
        Box::pin(std::future::ready(Ok(())))
    }

    fn clean<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            if let Some(base) = self.base.take().filter(|_| self.committed) {
                rest(graph, base).await;
            }
            Ok(())
        })
    }
}

/// Where the image of an overlay comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverlayMode {
    /// It is created, and names the image below by its path.
    #[default]
    AbsolutePaths,
    /// It is there.
    Existing,
}

/// The arguments of `blockdev-snapshot-sync`.
#[derive(Clone, Debug)]
pub struct NewOverlay {
    /// The node.
    pub node: String,
    /// Path of the image.
    pub file: String,
    /// Name of the overlay's node.
    pub node_name: Option<String>,
    /// Format of the image: the name of a driver.
    pub format: String,
    /// Whether it is created.
    pub mode: OverlayMode,
    /// The driver paths belong to.
    pub protocol: String,
}

/// One overlay of a snapshot.
#[derive(Debug)]
struct Layer {
    base: NodeId,
    name: String,
    /// To be removed if nothing comes of it.
    made: Option<String>,
    opened: bool,
}

/// `blockdev-snapshot-sync`.
#[derive(Debug)]
pub struct SnapshotSyncAction {
    new: NewOverlay,
    layers: Vec<Layer>,
    committed: bool,
}

impl SnapshotSyncAction {
    /// A new overlay, or one for each child of a quorum: then `.0`, `.1` and so on are appended to its path and name.
    pub fn new(new: NewOverlay) -> Self {
        SnapshotSyncAction { new, layers: Vec::new(), committed: false }
    }

    /// Finds the places, checks the names.
    fn plan(&self, graph: &Graph) -> Result<Vec<(NodeId, String, String)>> {
        let state = graph.state();
        let id = state.find(&self.new.node).ok_or_else(|| no_such_node(&self.new.node))?;
        busy(&state, id)?;
        let Some(name) = &self.new.node_name else {
            return Err(BlockError::invalid("New overlay node name missing"));
        };
        let mut places = Vec::new();
        state.places(id, false, &mut places);
        let many = places.len() > 1;
        let suffixed = |text: &str, at: usize| if many { format!("{text}.{at}") } else { text.to_owned() };
        let mut out = Vec::with_capacity(places.len());
        for (at, base) in places.into_iter().enumerate() {
            let name = suffixed(name, at);
            if state.names.contains_key(&name) {
                return Err(BlockError::new(Errno::EEXIST, "New overlay node-name already in use"));
            }
            out.push((base, name, suffixed(&self.new.file, at)));
        }
        Ok(out)
    }

    /// Creates an image and opens it.
    async fn layer(&mut self, graph: &Graph, base: NodeId, name: String, file: String) -> Result<()> {
        let (size, options, filename, format) = {
            let state = graph.state();
            let node = &state.slot(base)?.node;
            (node.size(), node.options(), state.filename(base), node.driver_name())
        };
        let at = self.layers.len();
        self.layers.push(Layer { base, name: name.clone(), made: None, opened: false });
        let layer = self.layers.get_mut(at).ok_or(Errno::EINVAL)?;
        if self.new.mode == OverlayMode::AbsolutePaths {
            let there = file.clone();
            let existed = host::pool::run(move || Path::new(&there).exists()).await;
            layer.made = (!existed).then(|| file.clone());
            create(graph, &self.new, &file, size, &filename, format).await?;
        }
        let options = overlay_options(&self.new, &name, &file, &options);
        let id = graph.open_node(options, NodeOptions::default(), 0).await?;
        let mut state = graph.state_mut();
        for below in state.topological(&[id]) {
            if let Some(slot) = state.nodes.get_mut(&below) {
                slot.visible = true;
                // Held by us until it has users of its own.
                slot.monitor_owned |= below == id;
            }
        }
        layer.opened = true;
        Ok(())
    }
}

impl State {
    /// The path of the image a node shows; empty where there is none.
    fn filename(&self, id: NodeId) -> String {
        let mut at = id;
        loop {
            let name = self.nodes.get(&at).map(|s| s.node.driver().info().filename).unwrap_or_default();
            match self.primary(at) {
                Some(below) if name.is_empty() => at = below,
                _ => return name,
            }
        }
    }
}

/// An image of this format and size above that one.
async fn create(
    graph: &Graph,
    new: &NewOverlay,
    file: &str,
    size: u64,
    below: &str,
    its: &str,
) -> Result<()> {
    let (format, protocol_name) = (&new.format, &new.protocol);
    let unknown = || BlockError::invalid(format!("Unknown file format '{format}'"));
    let def = graph.registry().get(format).ok_or_else(unknown)?;
    let takes_backing = |create: &crate::create::CreateDef| {
        let schema = (create.schema)();
        schema.get("properties").is_some_and(|p| p.get("backing-file").is_some())
    };
    let Some(image) = def.create.filter(takes_backing) else {
        return Err(BlockError::unsupported(format!(
            "Backing file not supported for file format '{format}'"
        )));
    };
    if below.is_empty() {
        return Err(BlockError::invalid(
            "The image below has no path that could be written into the overlay: create the overlay yourself and use \
             blockdev-snapshot",
        ));
    }
    let protocol = graph.registry().get(protocol_name).and_then(|d| d.create);
    let protocol = protocol.ok_or_else(|| BlockError::unsupported("Files cannot be created here"))?;
    for (create, options) in [
        (protocol, json!({"filename": file, "size": 0})),
        (
            image,
            json!({
                "file": {"driver": protocol_name, "filename": file},
                "size": i64::try_from(size).unwrap_or(i64::MAX),
                "backing-file": below,
                "backing-fmt": its,
            }),
        ),
    ] {
        let context = CreateContext::new(graph.clone(), Arc::new(JobControl::default()));
        let made = (create.create)(context, options).await;
        graph.reap().await;
        made?;
    }
    Ok(())
}

/// The overlay's node: what holds for the node below holds for it.
fn overlay_options(new: &NewOverlay, name: &str, file: &str, below: &NodeOptions) -> Map<String, Value> {
    let discard = match below.discard {
        DiscardOption::Unmap => "unmap",
        DiscardOption::Ignore => "ignore",
    };
    let options = json!({
        "driver": new.format,
        "node-name": name,
        "file": {"driver": new.protocol, "filename": file},
        "backing": null,
        "discard": discard,
        "cache": {"direct": below.direct, "no-flush": below.no_flush},
    });
    match options {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

impl Action for SnapshotSyncAction {
    fn ready<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            for (base, name, file) in self.plan(graph)? {
                self.layer(graph, base, name, file).await?;
                graph.flush_ahead(base).await;
            }
            Ok(())
        })
    }

    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        let overlays = self.layers.iter().map(|l| l.name.clone());
        std::iter::once(self.new.node.clone()).chain(overlays).collect()
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            for layer in &self.layers {
                put_above(cx, layer.base, &layer.name).await?;
            }
            Ok(())
        })
    }

    fn commit<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        self.committed = true;
        let state = &mut *graph.state_mut();
        for layer in &self.layers {
            // Theirs from now on; one that nobody uses waits for its first user.
            if let Some(id) = state.find(&layer.name)
                && let Some(slot) = state.nodes.get_mut(&id)
            {
                slot.monitor_owned = slot.parents.is_empty();
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn clean<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            for layer in self.layers.iter().filter(|_| self.committed) {
                rest(graph, layer.base).await;
            }
            Ok(())
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            for layer in self.layers.drain(..).rev() {
                if layer.opened {
                    let mut state = graph.state_mut();
                    if let Some(id) = state.find(&layer.name)
                        && let Some(slot) = state.nodes.get_mut(&id)
                    {
                        slot.monitor_owned = false;
                    }
                }
                graph.reap().await;
                if let Some(file) = layer.made {
                    // It was not there before, so nobody misses it.
                    let removed = host::pool::run(move || std::fs::remove_file(file)).await;
                    if let Err(e) = removed.or_else(|e| match e.kind() {
                        std::io::ErrorKind::NotFound => Ok(()),
                        _ => Err(e),
                    }) {
                        log::warn!("an overlay that came to nothing could not be removed: {e}");
                    }
                }
            }
            Ok(())
        })
    }
}
