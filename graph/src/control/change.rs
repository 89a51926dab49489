//! Changes of the shape of the graph, several at a time, all or nothing, under requests.
//!
//! Called by the control channel (`blockdev-snapshot`, `blockdev-reopen`) and by jobs. Each change is checked and carried
//! out in turn, then permissions are refreshed once for all, then everything is committed or taken back.

use std::sync::Arc;

use super::{Graph, State, no_such_node, perms};
use crate::drain::DrainGuard;
use crate::edge::{Edge, Parent};
use crate::error::{BlockError, Errno, Result};
use crate::ids::{EdgeId, NodeId};
use crate::perm::PermPair;
use crate::role::Roles;
use crate::transaction::{Step, Transaction};

/// One change of [`Graph::change`]. Nodes are named by their node names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Lets a child edge lead to another node.
    ReplaceChild {
        /// The parent node.
        parent: String,
        /// The name of the edge: "file", "backing".
        child: String,
        /// The node it leads to from now on.
        node: String,
    },
    /// Adds a child: a new name at the next free index, or a name that was detached at its old one.
    AttachChild {
        /// The parent node.
        parent: String,
        /// The name of the edge.
        child: String,
        /// What the child is to the parent.
        roles: Roles,
        /// The child node.
        node: String,
    },
    /// Takes a child away; its index stays empty.
    DetachChild {
        /// The parent node.
        parent: String,
        /// The name of the edge.
        child: String,
    },
    /// Moves all users of a node to another one: users that stay, and the other node itself if it uses the first one,
    /// excepted.
    ReplaceNode {
        /// Whose users.
        from: String,
        /// Where to.
        to: String,
    },
    /// Moves one root to another node.
    ReplaceRoot {
        /// `Root::id`.
        root: EdgeId,
        /// Where to.
        node: String,
    },
}

/// An edge leads elsewhere.
struct Moved {
    edge: EdgeId,
    old: NodeId,
}

impl Step<State> for Moved {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        move_edge(state, self.edge, self.old);
    }
}

/// A child edge was added.
struct Added(EdgeId);

impl Step<State> for Added {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        remove_edge(state, self.0);
    }
}

/// An edge was removed.
struct Removed {
    edge: Option<Edge>,
    index: Option<usize>,
}

impl Step<State> for Removed {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        if let Some(edge) = self.edge.take() {
            insert_edge(state, edge, self.index);
        }
    }
}

fn move_edge(state: &mut State, id: EdgeId, to: NodeId) {
    let Some(edge) = state.edges.get_mut(&id) else { return };
    let from = std::mem::replace(&mut edge.child, to);
    if let Some(slot) = state.nodes.get_mut(&from) {
        slot.parents.retain(|e| *e != id);
    }
    if let Some(slot) = state.nodes.get_mut(&to) {
        slot.parents.push(id);
    }
}

/// Puts an edge in; for a node's child at `index`, or at the end.
pub(crate) fn insert_edge(state: &mut State, edge: Edge, index: Option<usize>) {
    if let Some(slot) = state.nodes.get_mut(&edge.child) {
        slot.parents.push(edge.id);
    }
    if let Parent::Node(parent) = edge.parent
        && let Some(slot) = state.nodes.get_mut(&parent)
    {
        match index.and_then(|i| slot.children.get_mut(i)) {
            Some(place) => *place = Some(edge.id),
            None => slot.children.push(Some(edge.id)),
        }
    }
    state.edges.insert(edge.id, edge);
}

/// Takes an edge out; the index a node's child had.
pub(crate) fn remove_edge(state: &mut State, id: EdgeId) -> (Option<Edge>, Option<usize>) {
    let Some(edge) = state.edges.remove(&id) else { return (None, None) };
    if let Some(slot) = state.nodes.get_mut(&edge.child) {
        slot.parents.retain(|e| *e != id);
    }
    let mut index = None;
    if let Parent::Node(parent) = edge.parent
        && let Some(slot) = state.nodes.get_mut(&parent)
    {
        index = slot.children.iter().position(|e| *e == Some(id));
        if let Some(place) = index.and_then(|i| slot.children.get_mut(i)) {
            *place = None;
        }
    }
    (Some(edge), index)
}

/// Adds an edge inside a transaction.
pub(crate) fn add_edge(state: &mut State, tran: &mut Transaction<State>, edge: Edge, index: Option<usize>) {
    tran.add(Added(edge.id));
    insert_edge(state, edge, index);
}

/// Removes an edge inside a transaction.
pub(crate) fn drop_edge(state: &mut State, tran: &mut Transaction<State>, id: EdgeId) {
    let (edge, index) = remove_edge(state, id);
    tran.add(Removed { edge, index });
}

/// Lets an edge lead elsewhere inside a transaction, unless that closes a circle.
pub(super) fn redirect(
    state: &mut State,
    tran: &mut Transaction<State>,
    id: EdgeId,
    to: NodeId,
) -> Result<()> {
    let edge = state.edges.get(&id).ok_or_else(|| BlockError::new(Errno::ENODEV, "The user is gone"))?;
    let old = edge.child;
    check_thawed(state, edge, "change")?;
    if let Parent::Node(parent) = edge.parent
        && state.reaches(to, parent)
    {
        return Err(cycle(state, to, &edge.name, parent));
    }
    tran.add(Moved { edge: id, old });
    move_edge(state, id, to);
    Ok(())
}

/// Adds a child edge inside a transaction: where the driver has a place for its backing file, at the place of a child
/// that went, or at the end.
pub(super) fn put_edge(
    state: &mut State,
    tran: &mut Transaction<State>,
    parent: NodeId,
    name: &str,
    roles: Roles,
    to: NodeId,
) -> Result<()> {
    if state.reaches(to, parent) {
        return Err(cycle(state, to, name, parent));
    }
    let slot = state.slot(parent)?;
    let backing = slot.node.driver().backing_child().filter(|_| roles.contains(Roles::COW));
    let reserved = slot.node.driver().backing_child();
    let empty = |at: usize| slot.children.get(at).is_some_and(Option::is_none);
    let free = (0..slot.children.len()).find(|at| empty(*at) && Some(*at) != reserved);
    let index = backing.filter(|at| empty(*at)).or(free);
    let id = EdgeId(state.fresh_id());
    let edge = Edge {
        id,
        parent: Parent::Node(parent),
        child: to,
        name: name.to_owned(),
        roles,
        pair: PermPair::IDLE,
        frozen: Vec::new(),
    };
    add_edge(state, tran, edge, index);
    Ok(())
}

/// Refuses to take away an edge somebody relies on.
pub(super) fn check_removable(state: &State, id: EdgeId) -> Result<()> {
    state.edges.get(&id).map_or(Ok(()), |edge| check_thawed(state, edge, "remove"))
}

pub(super) fn cycle(state: &State, child: NodeId, name: &str, parent: NodeId) -> BlockError {
    BlockError::invalid(format!(
        "Making '{}' a {name} child of '{}' would create a cycle",
        state.name_of(child),
        state.name_of(parent),
    ))
}

fn check_thawed(state: &State, edge: &Edge, verb: &str) -> Result<()> {
    let Some(owner) = edge.frozen.first() else { return Ok(()) };
    let from = match &edge.parent {
        Parent::Node(id) => state.name_of(*id).to_owned(),
        Parent::Root(info) => info.description.clone(),
    };
    Err(BlockError::new(
        Errno::EPERM,
        format!(
            "Cannot {verb} frozen '{}' link from '{from}' to '{}': {owner} relies on it",
            edge.name,
            state.name_of(edge.child)
        ),
    ))
}

/// Nodes a change is about: whose users must be quiet, and whose permissions change.
pub(super) struct Apply<'a> {
    pub(super) state: &'a mut State,
    pub(super) tran: &'a mut Transaction<State>,
    pub(super) touched: Vec<NodeId>,
}

impl Apply<'_> {
    fn find(&self, name: &str) -> Result<NodeId> {
        self.state.find(name).ok_or_else(|| no_such_node(name))
    }

    fn child_edge(&self, parent: NodeId, child: &str) -> Result<Edge> {
        let edge = self.state.children(parent).find(|(_, e)| e.name == child);
        edge.map(|(_, e)| e.clone()).ok_or_else(|| {
            BlockError::invalid(format!("Node '{}' has no '{child}' child", self.state.name_of(parent)))
        })
    }

    fn redirect(&mut self, edge: &Edge, to: NodeId) -> Result<()> {
        redirect(self.state, self.tran, edge.id, to)?;
        self.touched.extend([edge.child, to]);
        if let Parent::Node(parent) = edge.parent {
            self.touched.push(parent);
        }
        Ok(())
    }

    pub(super) fn apply(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::ReplaceChild { parent, child, node } => {
                let (parent, to) = (self.find(parent)?, self.find(node)?);
                let edge = self.child_edge(parent, child)?;
                self.redirect(&edge, to)
            }
            Change::AttachChild { parent, child, roles, node } => {
                let (parent, to) = (self.find(parent)?, self.find(node)?);
                if self.child_edge(parent, child).is_ok() {
                    let name = self.state.name_of(parent);
                    return Err(BlockError::invalid(format!("Node '{name}' already has a '{child}' child")));
                }
                put_edge(self.state, self.tran, parent, child, *roles, to)?;
                self.touched.extend([parent, to]);
                Ok(())
            }
            Change::DetachChild { parent, child } => {
                let parent = self.find(parent)?;
                let edge = self.child_edge(parent, child)?;
                check_thawed(self.state, &edge, "remove")?;
                drop_edge(self.state, self.tran, edge.id);
                self.touched.extend([parent, edge.child]);
                Ok(())
            }
            Change::ReplaceNode { from, to } => {
                let (from, to) = (self.find(from)?, self.find(to)?);
                let users: Vec<Edge> = self.state.users(from).cloned().collect();
                for edge in users {
                    match &edge.parent {
                        Parent::Root(info) if info.stay_at_node => {}
                        // The replacement keeps its own edge: a filter or overlay that is put above.
                        Parent::Node(parent) if self.state.reaches(to, *parent) => {}
                        _ => self.redirect(&edge, to)?,
                    }
                }
                self.touched.extend([from, to]);
                Ok(())
            }
            Change::ReplaceRoot { root, node } => {
                let to = self.find(node)?;
                let edge = self.state.edges.get(root).cloned();
                let edge = edge.filter(|e| matches!(e.parent, Parent::Root(_)));
                let edge = edge.ok_or_else(|| BlockError::new(Errno::ENODEV, "The user is gone"))?;
                self.redirect(&edge, to)
            }
        }
    }
}

impl Graph {
    /// Carries out several changes, all or none, in a drained section of its own.
    ///
    /// # Errors
    /// What cannot be: no such node, no such child, a circle, a frozen edge, permissions. Nothing has changed then.
    pub async fn change(&self, changes: &[Change]) -> Result<()> {
        let targets = self.affected(changes);
        let guard = self.drain_nodes(targets).await;
        // The graph may have changed while we waited: what lies above the targets now must be quiet, too.
        let guards = self.cover(changes, guard).await;
        self.give_back(&self.affected(changes)).await;
        let result = self.change_drained(changes);
        drop(guards);
        let orphans = result?;
        self.close_orphans(orphans).await;
        Ok(())
    }

    /// Drains until every root above the affected nodes is quiet.
    async fn cover(&self, changes: &[Change], first: DrainGuard) -> Vec<DrainGuard> {
        let mut guards = vec![first];
        loop {
            let targets = self.affected(changes);
            if self.state().roots_above(&targets).iter().all(|r| r.gate.is_quiet()) {
                return guards;
            }
            guards.push(self.drain_nodes(targets).await);
        }
    }

    /// The nodes whose users notice. Unknown names are left to the change itself.
    fn affected(&self, changes: &[Change]) -> Vec<NodeId> {
        let state = self.state();
        let mut nodes = Vec::new();
        for change in changes {
            match change {
                Change::ReplaceChild { parent, node, .. } | Change::AttachChild { parent, node, .. } => {
                    nodes.extend([state.find(parent), state.find(node)]);
                }
                Change::DetachChild { parent, .. } => nodes.push(state.find(parent)),
                Change::ReplaceNode { from, to } => nodes.extend([state.find(from), state.find(to)]),
                Change::ReplaceRoot { root, node } => {
                    nodes.extend([state.edges.get(root).map(|e| e.child), state.find(node)]);
                }
            }
        }
        let tops: Vec<NodeId> = nodes.into_iter().flatten().collect();
        // With everything below: who else uses that may have to look out for new neighbours (`View` flags).
        state.topological(&tops)
    }

    /// The change itself; every root above is quiet. Returns nodes nobody uses any more.
    pub(super) fn change_drained(&self, changes: &[Change]) -> Result<Vec<NodeId>> {
        let touched = {
            let state = &mut *self.state_mut();
            let mut tran = Transaction::new();
            let mut apply = Apply { state, tran: &mut tran, touched: Vec::new() };
            let mut result = changes.iter().try_for_each(|c| apply.apply(c));
            let touched = std::mem::take(&mut apply.touched);
            if result.is_ok() {
                result = perms::refresh(state, &mut tran, &touched);
            }
            tran.finish(state, result)?;
            super::resize::tell_parents(state, &touched);
            state.refresh_views(&touched);
            touched
        };
        self.adopt_into_drains();
        let state = self.state();
        let mut orphans: Vec<NodeId> = touched.into_iter().filter(|id| is_orphan(&state, *id)).collect();
        orphans.sort_unstable();
        orphans.dedup();
        Ok(orphans)
    }

    /// A node by number, for whoever holds an edge to it.
    pub(crate) fn node_by_id(&self, id: NodeId) -> Result<Arc<crate::node::Node>> {
        Ok(Arc::clone(&self.state().slot(id)?.node))
    }
}

/// Whether nobody uses a node that lives for its users alone.
pub(crate) fn is_orphan(state: &State, id: NodeId) -> bool {
    state.nodes.get(&id).is_some_and(|s| !s.monitor_owned && !s.closing && s.parents.is_empty())
}
