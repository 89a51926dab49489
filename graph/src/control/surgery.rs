//! Single cuts: a filter put on an edge or taken out, an edge led to another node, children that come and go, the name of
//! a backing file.
//!
//! Called by `blockdev-insert-node`, `blockdev-remove-node`, `blockdev-replace-node`, `x-blockdev-change` and
//! `change-backing-file`. Each is one transaction under requests; what it refuses it refuses before anything has changed.

use std::rc::Rc;
use std::sync::Arc;

use super::change::Change;
use super::{Graph, State, no_such_node};
use crate::drain::NoSource;
use crate::edge::{Edge, Parent, RootOptions};
use crate::error::{BlockError, Errno, Result};
use crate::ids::{EdgeId, NodeId};
use crate::options::{BlockdevRef, NodeOptions};
use crate::perm::Perm;
use crate::role::Roles;

/// The arguments of `blockdev-insert-node`.
#[derive(Clone, Debug)]
pub struct Insertion {
    /// The filter: a node that is there, or the definition of one.
    pub node: BlockdevRef,
    /// The upper end of the edge: a node.
    pub parent: Option<String>,
    /// Or a user from outside: `Root::id`.
    pub root: Option<EdgeId>,
    /// The name of the edge; may be left out where there is only one.
    pub child: Option<String>,
}

/// The arguments of `blockdev-replace-node`.
#[derive(Clone, Debug, Default)]
pub struct Replacing {
    /// The node whose users get another one.
    pub from: String,
    /// The other one.
    pub to: String,
    /// Only the edge from this node.
    pub parent: Option<String>,
    /// Or only the edge from this user: `Root::id`.
    pub root: Option<EdgeId>,
    /// The name of the edge; may be left out where there is only one.
    pub child: Option<String>,
    /// Even if the contents cannot be shown to be the same.
    pub force: bool,
}

impl State {
    /// The edge a client means.
    fn named_edge(&self, parent: Option<&str>, root: Option<EdgeId>, child: Option<&str>) -> Result<&Edge> {
        if let Some(root) = root {
            let edge = self.edges.get(&root).filter(|e| child.is_none_or(|c| c == e.name));
            let what = child.unwrap_or("root");
            return edge
                .ok_or_else(|| BlockError::invalid(format!("The export does not have child '{what}'")));
        }
        let name = parent.unwrap_or_default();
        let id = self.find(name).ok_or_else(|| no_such_node(name))?;
        let mut edges = self.children(id).map(|(_, e)| e).filter(|e| child.is_none_or(|c| c == e.name));
        match (edges.next(), edges.next(), child) {
            (Some(edge), None, _) => Ok(edge),
            (_, _, Some(child)) => {
                Err(BlockError::invalid(format!("Node '{name}' does not have child '{child}'")))
            }
            (Some(_), Some(_), None) => Err(BlockError::invalid(format!(
                "Node '{name}' has several children: say which with 'child'"
            ))),
            (None, ..) => Err(BlockError::invalid(format!("Node '{name}' has no child"))),
        }
    }

    /// The node a filter shows.
    fn filtered(&self, id: NodeId) -> Option<NodeId> {
        self.children(id).find(|(_, e)| e.roles.contains(Roles::FILTERED)).map(|(_, e)| e.child)
    }

    fn change_of(&self, edge: &Edge, to: NodeId) -> Change {
        let node = self.name_of(to).to_owned();
        match &edge.parent {
            Parent::Node(id) => {
                let parent = self.name_of(*id).to_owned();
                Change::ReplaceChild { parent, child: edge.name.clone(), node }
            }
            Parent::Root(_) => Change::ReplaceRoot { root: edge.id, node },
        }
    }

    fn check_size(&self, from: NodeId, to: NodeId) -> Result<()> {
        let (old, new) = (self.slot(from)?.node.size(), self.slot(to)?.node.size());
        if old == new {
            return Ok(());
        }
        let (from, to) = (self.name_of(from), self.name_of(to));
        Err(BlockError::invalid(format!(
            "Cannot replace '{from}' ({old} bytes) by '{to}' ({new} bytes): they differ in size"
        )))
    }

    fn check_movable(&self, id: NodeId) -> Result<()> {
        let stays = self.users(id).find_map(|e| match &e.parent {
            Parent::Root(info) if info.stay_at_node => Some(info.description.clone()),
            _ => None,
        });
        match stays {
            Some(user) => {
                let text = format!("Node '{}' is in use: it is used by {user}", self.name_of(id));
                Err(BlockError::new(Errno::EBUSY, text))
            }
            None => Ok(()),
        }
    }
}

impl Graph {
    /// Changes edges once `plan` has said which, with everybody above the nodes it names quiet. `flush`: these are flushed
    /// first, since a filter may hold back writes; once while users still run, so that little is left when they stand.
    async fn cut(
        &self,
        flush: bool,
        concerned: impl Fn(&State) -> Result<Vec<NodeId>>,
        plan: impl Fn(&State) -> Result<Vec<Change>>,
    ) -> Result<()> {
        let mut guards = Vec::new();
        if flush {
            let named = {
                let state = self.state();
                plan(&state)?;
                concerned(&state)?
            };
            for id in named {
                self.flush_ahead(id).await;
            }
        }
        let changes = loop {
            let (changes, named, targets, quiet) = {
                let state = self.state();
                let changes = plan(&state)?;
                let named = concerned(&state)?;
                let targets = state.topological(&named);
                let quiet = state.roots_above(&targets).iter().all(|r| r.gate.is_quiet());
                (changes, named, targets, quiet)
            };
            if quiet {
                for id in named.iter().filter(|_| flush) {
                    self.flush_before(*id).await?;
                }
                if self.give_back(&named).await {
                    // Sizes below are others now.
                    break plan(&self.state())?;
                }
                break changes;
            }
            guards.push(self.drain_nodes(targets).await);
        };
        let sizes = self.root_sizes();
        let result = self.change_drained(&changes);
        if result.is_ok() {
            self.tell_sizes(&sizes);
        }
        drop(guards);
        let orphans = result?;
        self.close_orphans(orphans).await;
        Ok(())
    }

    /// Flushes a node while its users run, so that little is left to flush once they stand. A failure is found again then.
    pub(super) async fn flush_ahead(&self, id: NodeId) {
        let Ok(node) = self.node_by_id(id) else { return };
        if node.options().refuses_writes() {
            return;
        }
        let options = RootOptions {
            perm: Perm::NONE,
            // It sends no requests that others would have to look out for.
            granularity: 1 << 30,
            stay_at_node: true,
            ..RootOptions::new("a flush ahead of a change", false)
        };
        // Held meanwhile: nothing else keeps it open.
        if let Ok(hold) = self.attach(node.name(), options, Rc::new(NoSource)).await {
            let _ = self.on_iothread(id, |io| async move { io.flush().await }).await;
            hold.detach().await;
        }
    }

    async fn flush_before(&self, id: NodeId) -> Result<()> {
        let node = self.node_by_id(id)?;
        if node.options().refuses_writes() {
            return Ok(());
        }
        let flushed = self.on_iothread(id, |io| async move { io.flush().await }).await;
        flushed.map_err(|e| e.context(format!("Node '{}' cannot be flushed", node.name())))
    }

    /// Puts a filter on an edge: the parent uses the filter, the filter what the parent used. A filter that is defined here
    /// belongs to its parent.
    ///
    /// # Errors
    /// No such node or edge, no filter, a filter on something else, a frozen edge, a circle, permissions, a bad definition.
    /// Nothing has changed then.
    pub async fn insert_node(&self, insertion: Insertion) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        self.reap().await;
        let Insertion { node, parent, root, child } = insertion;
        // Before anything is opened.
        self.state().named_edge(parent.as_deref(), root, child.as_deref())?;
        let (filter, made) = match node {
            BlockdevRef::Reference(name) => {
                (self.state().find(&name).ok_or_else(|| no_such_node(&name))?, false)
            }
            BlockdevRef::Inline(options) => (self.open_for_insertion(options).await?, true),
        };
        let edge = |state: &State| -> Result<Edge> {
            state.named_edge(parent.as_deref(), root, child.as_deref()).cloned()
        };
        let result = self
            .cut(
                false,
                |state| Ok(vec![edge(state)?.child, filter]),
                |state| {
                    let edge = edge(state)?;
                    let (below, filter_name) = (state.name_of(edge.child), state.name_of(filter));
                    let Some(shown) = state.filtered(filter) else {
                        return Err(BlockError::invalid(format!("Node '{filter_name}' is not a filter")));
                    };
                    if filter == edge.child {
                        return Err(BlockError::invalid(format!(
                            "Node '{filter_name}' is the '{}' child of {} already",
                            edge.name,
                            state.describe(&edge.parent)
                        )));
                    }
                    if shown != edge.child {
                        return Err(BlockError::invalid(format!(
                            "Node '{filter_name}' is a filter on '{}', not on '{below}', which is the '{}' child of {}",
                            state.name_of(shown),
                            edge.name,
                            state.describe(&edge.parent)
                        )));
                    }
                    state.check_size(edge.child, filter)?;
                    Ok(vec![state.change_of(&edge, filter)])
                },
            )
            .await;
        if made {
            // Its parent's from now on, or nobody's.
            if let Some(slot) = self.state_mut().nodes.get_mut(&filter) {
                slot.monitor_owned = false;
            }
            self.reap().await;
        }
        result
    }

    /// Opens a node that nobody uses yet, and that stays until it is said whose it is.
    async fn open_for_insertion(
        &self,
        options: serde_json::Map<String, serde_json::Value>,
    ) -> Result<NodeId> {
        match self.open_node(options, NodeOptions::default(), 0).await {
            Ok(id) => {
                let mut state = self.state_mut();
                for below in state.topological(&[id]) {
                    if let Some(slot) = state.nodes.get_mut(&below) {
                        slot.visible = true;
                        slot.monitor_owned |= below == id;
                    }
                }
                Ok(id)
            }
            Err(e) => {
                self.reap().await;
                Err(e)
            }
        }
    }

    /// Takes a filter out: its users use what it shows. The node stays if `blockdev-add` made it, else it goes.
    ///
    /// # Errors
    /// No such node, no filter, nobody uses it, a job relies on it, a frozen edge, permissions. Nothing has changed then.
    pub async fn remove_node(&self, name: &str) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        self.reap().await;
        self.cut(
            true,
            |state| Ok(vec![state.find(name).ok_or_else(|| no_such_node(name))?]),
            |state| {
                let id = state.find(name).ok_or_else(|| no_such_node(name))?;
                let Some(below) = state.filtered(id) else {
                    return Err(BlockError::invalid(format!("Node '{name}' is not a filter")));
                };
                if state.users(id).next().is_none() {
                    return Err(BlockError::invalid(format!(
                        "Node '{name}' has no users: blockdev-del removes it"
                    )));
                }
                state.check_movable(id)?;
                state.check_size(id, below)?;
                Ok(state.users(id).map(|edge| state.change_of(edge, below)).collect())
            },
        )
        .await
    }

    /// Lets one edge, or all users of a node, lead to another node of the same size.
    ///
    /// # Errors
    /// No such node or edge, another size, contents that cannot be shown to be the same (they show one node through filters)
    /// without `force`, a frozen edge, a circle, permissions. Nothing has changed then.
    pub async fn replace_node(&self, replacing: &Replacing) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        self.reap().await;
        let Replacing { from, to, parent, root, child, force } = replacing;
        let ends = |state: &State| -> Result<(NodeId, NodeId)> {
            Ok((
                state.find(from).ok_or_else(|| no_such_node(from))?,
                state.find(to).ok_or_else(|| no_such_node(to))?,
            ))
        };
        self.cut(
            true,
            |state| ends(state).map(|(from, to)| vec![from, to]),
            |state| {
                let (old, new) = ends(state)?;
                let one = parent.is_some() || root.is_some();
                let edge = match one {
                    true => Some(state.named_edge(parent.as_deref(), *root, child.as_deref())?),
                    false => None,
                };
                if let Some(edge) = edge.filter(|e| e.child != old) {
                    let text = format!(
                        "The '{}' child of {} is '{}', not '{from}'",
                        edge.name,
                        state.describe(&edge.parent),
                        state.name_of(edge.child)
                    );
                    return Err(BlockError::invalid(text));
                }
                if old == new {
                    return Err(BlockError::invalid(format!("Node '{from}' cannot be replaced by itself")));
                }
                if let Some(edge) = edge
                    && let Parent::Node(above) = edge.parent
                    && state.reaches(new, above)
                {
                    return Err(super::change::cycle(state, new, &edge.name, above));
                }
                if edge.is_none() && state.users(old).next().is_none() {
                    return Err(BlockError::invalid(format!("Node '{from}' has no users")));
                }
                state.check_size(old, new)?;
                if !force && !state.same_content(old, new) {
                    return Err(BlockError::invalid(format!(
                        "Cannot replace '{from}' by '{to}': nothing shows that they hold the same data; 'force' replaces it \
                         all the same"
                    )));
                }
                match edge {
                    Some(edge) => Ok(vec![state.change_of(edge, new)]),
                    None => Ok(vec![Change::ReplaceNode { from: from.clone(), to: to.clone() }]),
                }
            },
        )
        .await
    }

    /// `x-blockdev-change`: adds the node `node` to the children of `parent`, or takes the child `child` away.
    ///
    /// # Errors
    /// In QEMU's words; what the driver says; a frozen edge, a circle, permissions. Nothing has changed then.
    pub async fn change_child(&self, parent: &str, child: Option<&str>, node: Option<&str>) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        let found =
            self.state().find(parent).ok_or_else(|| super::bitmaps::no_such_node_as_device(parent))?;
        match (child, node) {
            (Some(_), Some(_)) => Err(BlockError::invalid("The parameters child and node are in conflict")),
            (None, None) => Err(BlockError::invalid("Either child or node must be specified")),
            (Some(child), None) => {
                self.cut(
                    false,
                    |_| Ok(vec![found]),
                    |state| {
                        let edge = state.children(found).find(|(_, e)| e.name == child);
                        let Some((index, _)) = edge else {
                            let text = format!("Node '{parent}' does not have child '{child}'");
                            return Err(BlockError::invalid(text));
                        };
                        let refused = state.slot(found)?.node.driver().remove_child(index);
                        refused.map_err(|e| named(e, parent, "removing"))?;
                        let (parent, child) = (parent.to_owned(), child.to_owned());
                        Ok(vec![Change::DetachChild { parent, child }])
                    },
                )
                .await
            }
            (None, Some(node)) => {
                let missing = || BlockError::new(Errno::ENOENT, format!("Node '{node}' not found"));
                self.cut(
                    false,
                    |state| Ok(vec![found, state.find(node).ok_or_else(missing)?]),
                    |state| {
                        let id = state.find(node).ok_or_else(missing)?;
                        let added = state.slot(found)?.node.driver().add_child();
                        let (child, roles) = added.map_err(|e| named(e, parent, "adding"))?;
                        if state.users(id).next().is_some() && !state.reaches(id, found) {
                            let text = format!("The node {node} already has a parent");
                            return Err(BlockError::new(Errno::EBUSY, text));
                        }
                        let (parent, node) = (parent.to_owned(), node.to_owned());
                        Ok(vec![Change::AttachChild { parent, child, roles, node }])
                    },
                )
                .await
            }
        }
    }

    /// `change-backing-file`: writes another name of its backing file into an image of the chain of `device`.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn change_backing_file(&self, device: &str, image: &str, name: &str) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        let (id, format) = {
            let state = self.state();
            let top = state.find(device).ok_or_else(|| super::bitmaps::no_such_node_as_device(device))?;
            let id = state.find(image).ok_or_else(|| super::bitmaps::no_such_node_as_device(image))?;
            let slot = state.slot(id)?;
            let place = slot.node.driver().backing_child();
            let backing = state.children(id).find(|(index, _)| Some(*index) == place);
            let Some((_, backing)) = backing else {
                return Err(BlockError::invalid(
                    "not allowing backing file change on an image without a backing file",
                ));
            };
            if !state.reaches(top, id) {
                let text = format!("'{device}' and image file are not in the same chain");
                return Err(BlockError::invalid(text));
            }
            (id, state.slot(state.content_format(backing.child))?.node.driver_name())
        };
        let node = self.node_by_id(id)?;
        let guard = self.drain_nodes(vec![id]).await;
        let read_only = node.options().read_only;
        if read_only {
            self.reopen_read_only(id, false).await?;
        }
        let (text, format) = (Some(name.to_owned()), Some(format.to_owned()).filter(|_| !name.is_empty()));
        let changed = self
            .on_iothread(id, move |io| async move {
                let driver = Arc::clone(io.node()?).driver();
                driver.change_backing_file(&io, text, format).await
            })
            .await;
        if read_only && let Err(e) = self.reopen_read_only(id, true).await {
            log::warn!("node '{image}' stays writable: {e}");
        }
        drop(guard);
        changed.map_err(|e| e.context(format!("Could not change backing file to '{name}'")))
    }
}

impl State {
    /// The node whose driver is the format of what a node shows.
    fn content_format(&self, id: NodeId) -> NodeId {
        let mut at = id;
        while let Some(slot) = self.nodes.get(&at)
            && slot.node.kind() == crate::driver::DriverKind::Filter
            && let Some(below) = self.filtered(at)
        {
            at = below;
        }
        at
    }
}

/// A driver does not know how its node is called.
fn named(e: BlockError, node: &str, what: &str) -> BlockError {
    if e.errno() == Errno::ENOTSUP {
        return BlockError::unsupported(format!("The node {node} does not support {what} a child"));
    }
    e
}

#[cfg(test)]
mod tests;
