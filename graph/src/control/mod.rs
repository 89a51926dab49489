//! The control side: the one owner and writer of the graph, on the main thread.
//!
//! Called by the control channel, jobs and exports. Everything that changes edges is a transaction (`change`, `perms`) and,
//! where requests could notice, happens in a drained section. Must not run on an iothread ([`Graph`] is not `Send`) and must
//! not block: what waits is a future.

pub(crate) mod actions;
mod attach;
pub(crate) mod bitmaps;
mod blockstats;
pub(crate) mod change;
mod conflict;
mod delete;
pub(crate) mod freeze;
pub(crate) mod open;
pub(crate) mod perms;
pub(crate) mod picture;
pub mod query;
mod reopen;
mod resize;
pub(crate) mod snapshots;
pub(crate) mod surgery;

use std::cell::{Ref, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use host::IoThread;
use serde_json::{Map, Value};

use crate::drain::{DrainGuard, DrainState};
use crate::driver::Registry;
use crate::edge::{Edge, Parent, RootInfo};
use crate::error::{BlockError, Errno, Result};
use crate::events::{EventHub, EventSink};
use crate::ids::{EdgeId, NodeId};
use crate::node::Node;
use crate::objects::Objects;
use crate::options::{CommonOptions, NodeOptions};
use crate::perm::{Perm, PermPair};
use crate::role::Roles;
use crate::secret::Secrets;
use crate::view::{View, ViewNode};

pub use attach::Root;
pub use change::Change;
pub use freeze::FreezeGuard;

/// Most nodes of a graph: a bound on what a control client can make us hold, and paths keep 16-bit indexes.
pub const MAX_NODES: usize = 4096;

/// A node's place in the graph.
pub(crate) struct Slot {
    pub(crate) node: Arc<Node>,
    /// By child index; a child that was detached leaves its place empty.
    pub(crate) children: Vec<Option<EdgeId>>,
    pub(crate) parents: Vec<EdgeId>,
    /// Made by `blockdev-add` at the top level: stays without users until `blockdev-del`.
    pub(crate) monitor_owned: bool,
    /// The command that makes it is through: others may name it.
    pub(crate) visible: bool,
    /// Its driver is being closed.
    pub(crate) closing: bool,
    /// What its driver holds for its users.
    pub(crate) held: PermPair,
    /// Edges that its driver relies on: frozen in its name as long as it lives.
    pub(crate) freezes: Vec<EdgeId>,
    /// What its user asked for.
    pub(crate) config: Config,
}

/// The options of a node as its user gave them, and where it takes the others from.
#[derive(Clone, Default)]
pub(crate) struct Config {
    /// The common members.
    pub(crate) common: CommonOptions,
    /// The driver's own.
    pub(crate) own: Map<String, Value>,
    /// What holds where the user said nothing.
    pub(crate) inherited: NodeOptions,
    /// The node in whose options this one was defined, and which it takes `inherited` from.
    pub(crate) parent: Option<NodeId>,
}

/// The graph itself.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<NodeId, Slot>,
    pub(crate) names: HashMap<String, NodeId>,
    /// Names of nodes that are being opened.
    pub(crate) reserved: BTreeSet<String>,
    pub(crate) edges: BTreeMap<EdgeId, Edge>,
    next_id: u64,
    next_generated: u64,
}

impl State {
    pub(crate) fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn generated_name(&mut self) -> String {
        loop {
            let name = format!("#block{:03}", self.next_generated);
            self.next_generated += 1;
            if !self.names.contains_key(&name) && !self.reserved.contains(&name) {
                return name;
            }
        }
    }

    pub(crate) fn slot(&self, id: NodeId) -> Result<&Slot> {
        self.nodes.get(&id).ok_or_else(|| BlockError::new(Errno::ENODEV, "The node is gone"))
    }

    pub(crate) fn name_of(&self, id: NodeId) -> &str {
        self.nodes.get(&id).map_or("(gone)", |s| s.node.name())
    }

    /// A node others may name.
    pub(crate) fn find(&self, name: &str) -> Option<NodeId> {
        let id = *self.names.get(name)?;
        self.nodes.get(&id).filter(|s| s.visible && !s.closing).map(|_| id)
    }

    /// The edges to a node from its users.
    pub(crate) fn users(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        let parents = self.nodes.get(&id).map(|s| s.parents.as_slice()).unwrap_or_default();
        parents.iter().filter_map(|e| self.edges.get(e))
    }

    /// The edges to a node's children, with their indexes.
    pub(crate) fn children(&self, id: NodeId) -> impl Iterator<Item = (usize, &Edge)> {
        let children = self.nodes.get(&id).map(|s| s.children.as_slice()).unwrap_or_default();
        children.iter().enumerate().filter_map(|(i, e)| Some((i, self.edges.get(e.as_ref()?)?)))
    }

    /// A user as messages name it.
    pub(crate) fn describe(&self, parent: &Parent) -> String {
        match parent {
            Parent::Node(id) => format!("node '{}'", self.name_of(*id)),
            Parent::Root(info) => info.description.clone(),
        }
    }

    /// All nodes reachable from `tops`, each after all its parents among them.
    pub(crate) fn topological(&self, tops: &[NodeId]) -> Vec<NodeId> {
        // Depth first without recursion: a node is emitted when its children have been; reversed at the end.
        let mut done = Vec::new();
        let mut seen = BTreeSet::new();
        let mut stack: Vec<(NodeId, bool)> = tops.iter().rev().map(|t| (*t, false)).collect();
        while let Some((id, expanded)) = stack.pop() {
            if expanded {
                done.push(id);
            } else if self.nodes.contains_key(&id) && seen.insert(id) {
                stack.push((id, true));
                stack.extend(self.children(id).map(|(_, e)| (e.child, false)));
            }
        }
        done.reverse();
        done
    }

    /// All roots above these nodes.
    pub(crate) fn roots_above(&self, targets: &[NodeId]) -> Vec<Rc<RootInfo>> {
        let mut roots: Vec<Rc<RootInfo>> = Vec::new();
        let mut seen = BTreeSet::new();
        let mut todo = targets.to_vec();
        while let Some(id) = todo.pop() {
            if !seen.insert(id) {
                continue;
            }
            for edge in self.users(id) {
                match &edge.parent {
                    Parent::Node(parent) => todo.push(*parent),
                    Parent::Root(info) => {
                        if !roots.iter().any(|r| Rc::ptr_eq(r, info)) {
                            roots.push(Rc::clone(info));
                        }
                    }
                }
            }
        }
        roots
    }

    /// The nodes these roots' requests may be held back in.
    pub(crate) fn below_roots(&self, roots: &[Rc<RootInfo>]) -> Vec<Arc<Node>> {
        let is_one =
            |e: &&Edge| matches!(&e.parent, Parent::Root(r) if roots.iter().any(|x| Rc::ptr_eq(x, r)));
        let tops: Vec<NodeId> = self.edges.values().filter(is_one).map(|e| e.child).collect();
        let below = self.topological(&tops);
        below.iter().filter_map(|id| self.nodes.get(id)).map(|s| Arc::clone(&s.node)).collect()
    }

    /// The links of the backing chain from `top` down to `base`, filters included.
    pub(crate) fn chain(&self, top: NodeId, base: NodeId) -> Result<Vec<EdgeId>> {
        let mut at = top;
        let mut edges = Vec::new();
        while at != base {
            let next = self.children(at).find(|(_, e)| e.roles.intersects(Roles::FILTERED | Roles::COW));
            let Some((_, edge)) = next else {
                let (top, base) = (self.name_of(top), self.name_of(base));
                return Err(BlockError::invalid(format!("'{base}' is not in the backing chain of '{top}'")));
            };
            edges.push(edge.id);
            at = edge.child;
        }
        Ok(edges)
    }

    /// The node whose content a node shows: itself, or what lies below filters.
    pub(crate) fn content(&self, id: NodeId) -> NodeId {
        let mut at = id;
        while let Some((_, edge)) = self.children(at).find(|(_, e)| e.roles.contains(Roles::FILTERED)) {
            at = edge.child;
        }
        at
    }

    /// Whether two nodes show the same content for sure: one node's, through filters. Drained and flushed, since a filter may
    /// hold back writes until it is flushed.
    pub(crate) fn same_content(&self, a: NodeId, b: NodeId) -> bool {
        self.content(a) == self.content(b)
    }

    /// Whether `below` can be reached from `above`.
    pub(crate) fn reaches(&self, above: NodeId, below: NodeId) -> bool {
        self.topological(&[above]).contains(&below)
    }

    /// The smallest granularity any user above a node promises; a node without users from outside has no guests to
    /// wait for.
    fn granularity(&self, id: NodeId) -> u32 {
        let roots = self.roots_above(&[id]);
        roots.iter().filter(|r| !r.opening).map(|r| r.granularity).min().unwrap_or(u32::MAX)
    }

    /// Whether somebody may send this node requests below its alignment.
    fn may_misalign(&self, id: NodeId) -> bool {
        let Some(slot) = self.nodes.get(&id) else { return false };
        let align = slot.node.driver().limits().sane().request_alignment;
        let granularity = self.granularity(id);
        align > 1 && granularity != u32::MAX && (!granularity.is_multiple_of(align) || self.shifted(id, 2))
    }

    /// Whether some node above (or this one) has at least `users` users, one of which may show its data at another
    /// offset (raw with an offset): what is aligned up there need not be aligned here.
    fn shifted(&self, id: NodeId, users: usize) -> bool {
        let shifts = |e: &Edge| e.roles & (Roles::DATA | Roles::METADATA) == Roles::DATA;
        self.above(id).into_iter().any(|n| self.users(n).count() >= users && self.users(n).any(shifts))
    }

    /// A node and all nodes above it.
    pub(crate) fn above(&self, id: NodeId) -> Vec<NodeId> {
        let mut above = vec![id];
        let mut at = 0;
        while let Some(id) = above.get(at).copied() {
            for edge in self.users(id) {
                if let Parent::Node(parent) = edge.parent
                    && !above.contains(&parent)
                {
                    above.push(parent);
                }
            }
            at += 1;
        }
        above
    }

    /// The snapshot below a node for a user that holds `handle` on it. Handles inside carry what their edges hold.
    pub(crate) fn view(&self, top: NodeId, handle: Perm) -> Result<Arc<View>> {
        let order = self.topological(&[top]);
        if order.is_empty() {
            return Err(BlockError::new(Errno::ENODEV, "The node is gone"));
        }
        // Once for each set of permissions it is reached with: usually one.
        let mut places: Vec<(NodeId, Perm)> = Vec::with_capacity(order.len());
        let mut reached: HashMap<NodeId, Vec<Perm>> = HashMap::from([(top, vec![handle & Perm::MODIFIES])]);
        for id in &order {
            // All parents have been here before.
            places.extend(reached.remove(id).unwrap_or_default().into_iter().map(|h| (*id, h)));
            for (_, edge) in self.children(*id) {
                let handles = reached.entry(edge.child).or_default();
                let handle = edge.pair.perm & Perm::MODIFIES;
                if !handles.contains(&handle) {
                    handles.push(handle);
                }
            }
        }
        let index: HashMap<(NodeId, Perm), u32> = places.iter().copied().zip(0..).collect();
        let mut nodes = Vec::with_capacity(places.len());
        for (id, handle) in places {
            let slot = self.slot(id)?;
            let child = |edge: &Option<EdgeId>| {
                let edge = edge.as_ref().and_then(|e| self.edges.get(e));
                edge.and_then(|e| index.get(&(e.child, e.pair.perm & Perm::MODIFIES)).copied())
                    .unwrap_or(u32::MAX)
            };
            let children: Box<[u32]> = slot.children.iter().map(child).collect();
            nodes.push(ViewNode::new(Arc::clone(&slot.node), children, self.may_misalign(id), handle));
        }
        Ok(Arc::new(View::new(nodes.into())))
    }

    /// Roots whose source runs with a view that allows more at or below `node` than the edges hold by now. They had a
    /// reason once: some user that has gone. Harmless, until somebody comes who does not share what they have left over.
    pub(crate) fn surplus_above(&self, node: NodeId) -> Vec<Rc<RootInfo>> {
        let below = self.topological(&[node]);
        let mut roots = self.roots_above(&below);
        roots.retain(|r| r.gate.running().is_some_and(|view| self.exceeds(&view, &below)));
        roots
    }

    /// Whether some handle on one of these nodes allows more than its edge holds. The root's own does not: that changes with
    /// the root alone.
    fn exceeds(&self, view: &View, on: &[NodeId]) -> bool {
        view.nodes().iter().any(|parent| {
            let slots =
                self.nodes.get(&parent.node().id()).map(|s| s.children.as_slice()).unwrap_or_default();
            slots.iter().enumerate().any(|(slot, edge)| {
                let held = edge.as_ref().and_then(|e| self.edges.get(e)).map_or(Perm::NONE, |e| e.pair.perm);
                let child = parent.child(slot).and_then(|c| view.nodes().get(c));
                child.is_some_and(|c| on.contains(&c.node().id()) && !(c.handle() - held).is_empty())
            })
        })
    }

    /// Gives every root above or below these nodes a view of the graph as it is now.
    pub(crate) fn refresh_views(&self, touched: &[NodeId]) {
        let below = self.topological(touched);
        for root in self.roots_above(&below) {
            let edge =
                self.edges.values().find(|e| matches!(&e.parent, Parent::Root(r) if Rc::ptr_eq(r, &root)));
            let Some(edge) = edge else { continue };
            match self.view(edge.child, edge.pair.perm) {
                Ok(view) => root.gate.set_view(Some(view)),
                Err(e) => log::error!("no view for {}: {e}", root.description),
            }
        }
    }
}

/// Starts an iothread, or hands out the one it started before.
pub type IoThreadSource = Box<dyn Fn() -> Result<IoThread>>;

pub(crate) struct Inner {
    pub(crate) registry: Registry,
    pub(crate) state: RefCell<State>,
    pub(crate) drains: Rc<RefCell<Vec<Rc<DrainState>>>>,
    pub(crate) iothread: RefCell<Option<IoThread>>,
    iothread_source: RefCell<Option<IoThreadSource>>,
    pub(crate) events: Arc<EventHub>,
    secrets: Secrets,
    objects: Objects,
    /// Held across waiting by whoever carries out a change in several steps: one after the other.
    surgery: host::sync::Mutex<()>,
}

/// The graph: a handle for the main thread, cheap to clone.
#[derive(Clone)]
pub struct Graph {
    pub(crate) inner: Rc<Inner>,
}

impl Graph {
    /// An empty graph over these drivers. `iothread` runs what the control side itself has to read and write (headers of
    /// images, resizing, closing); without one such operations fail until [`Graph::set_iothread`].
    pub fn new(registry: Registry, iothread: Option<IoThread>) -> Graph {
        Graph {
            inner: Rc::new(Inner {
                registry,
                state: RefCell::default(),
                drains: Rc::default(),
                iothread: RefCell::new(iothread),
                iothread_source: RefCell::default(),
                events: Arc::default(),
                secrets: Secrets::default(),
                objects: Objects::default(),
                surgery: host::sync::Mutex::new(()),
            }),
        }
    }

    /// Names the iothread for the control side's own requests.
    pub fn set_iothread(&self, iothread: Option<IoThread>) {
        let old = self.inner.iothread.replace(iothread);
        drop(old);
    }

    /// Names who starts an iothread when one is needed and none was named.
    pub fn set_iothread_source(&self, source: IoThreadSource) {
        *self.inner.iothread_source.borrow_mut() = Some(source);
    }

    /// Names the place where the nodes' news go; once.
    pub fn set_event_sink(&self, sink: EventSink) {
        self.inner.events.set(sink);
    }

    /// The secrets drivers may ask for.
    pub fn secrets(&self) -> &Secrets {
        &self.inner.secrets
    }

    /// The objects drivers may ask for.
    pub fn objects(&self) -> &Objects {
        &self.inner.objects
    }

    /// The limits of a node together with those of everything below it: what a user of the node had better respect.
    ///
    /// # Errors
    /// No such node.
    pub fn limits(&self, name: &str) -> Result<crate::driver::Limits> {
        let state = self.state();
        let id = state.find(name).ok_or_else(|| no_such_node(name))?;
        state.view(id, Perm::NONE).map(|v| *v.limits())
    }

    /// The drivers.
    pub fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    pub(crate) fn state(&self) -> Ref<'_, State> {
        self.inner.state.borrow()
    }

    pub(crate) fn state_mut(&self) -> RefMut<'_, State> {
        self.inner.state.borrow_mut()
    }

    pub(crate) fn iothread(&self) -> Result<IoThread> {
        let named = self.inner.iothread.borrow().clone();
        let iothread = match (&named, &*self.inner.iothread_source.borrow()) {
            (None, Some(source)) => Some(source()?),
            _ => named,
        };
        iothread.ok_or_else(|| BlockError::new(Errno::ENODEV, "There is no iothread for this operation"))
    }

    /// The node of this name.
    ///
    /// # Errors
    /// `Cannot find device='' nor node-name='x'`.
    pub fn node(&self, name: &str) -> Result<Arc<Node>> {
        let state = self.state();
        let id = state.find(name).ok_or_else(|| no_such_node(name))?;
        Ok(Arc::clone(&state.slot(id)?.node))
    }

    /// The names of all nodes, oldest first.
    pub fn node_names(&self) -> Vec<String> {
        self.state().nodes.values().filter(|s| s.visible).map(|s| s.node.name().to_owned()).collect()
    }

    /// Stops all requests above a node, waits for those in flight; they resume when the guard is dropped.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn drain(&self, name: &str) -> Result<DrainGuard> {
        let id = self.state().find(name).ok_or_else(|| no_such_node(name))?;
        Ok(self.drain_nodes(vec![id]).await)
    }

    /// Stops all requests of the whole graph.
    pub async fn drain_all(&self) -> DrainGuard {
        let all = self.state().nodes.keys().copied().collect();
        self.drain_nodes(all).await
    }

    /// Stops the requests of these roots alone.
    pub(crate) async fn drain_roots(&self, roots: Vec<Rc<RootInfo>>) -> DrainGuard {
        let nodes = self.state().below_roots(&roots);
        let guard = DrainGuard::start(Vec::new(), roots, nodes, &self.inner.drains);
        guard.quiet().await;
        guard
    }

    /// Takes back from running sources what the edges at and below `node` do not hold any more. When it returns, and until
    /// the next wait, no handle there allows what no edge holds: whoever takes a new permission, or stops sharing one, is
    /// checked against edges, and so against everything that can happen.
    pub(crate) async fn recall(&self, node: NodeId) {
        loop {
            let roots = self.state().surplus_above(node);
            if roots.is_empty() {
                return;
            }
            let guard = self.drain_roots(roots).await;
            self.state().refresh_views(&[node]);
            drop(guard);
        }
    }

    pub(crate) async fn drain_nodes(&self, targets: Vec<NodeId>) -> DrainGuard {
        let (roots, nodes) = {
            let state = self.state();
            let roots = state.roots_above(&targets);
            (roots.clone(), state.below_roots(&roots))
        };
        let guard = DrainGuard::start(targets, roots, nodes, &self.inner.drains);
        guard.quiet().await;
        guard
    }

    /// After edges changed: roots that came to lie above a node that is drained belong to that drain from now on. They
    /// are quiet, since whoever changed the edges drained them.
    pub(crate) fn adopt_into_drains(&self) {
        let drains = self.inner.drains.borrow().clone();
        for drain in drains {
            let roots = self.state().roots_above(&drain.targets.borrow());
            for root in roots.iter().filter(|r| !drain.holds(r)) {
                drain.adopt(root);
            }
        }
    }
}

/// QEMU's words for a name that leads nowhere.
pub(crate) fn no_such_node(name: &str) -> BlockError {
    BlockError::new(Errno::ENOENT, format!("Cannot find device='' nor node-name='{name}'"))
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod perm_tests;
#[cfg(test)]
mod rules_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
