//! Roots: users of a node that are not nodes, i.e. exports and jobs.
//!
//! Called by the process and by jobs. A root exists as long as its [`Root`].

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use super::change::{add_edge, is_orphan, remove_edge};
use super::{Graph, no_such_node, perms};
use crate::drain::{RequestSource, SourceGate};
use crate::edge::{Edge, Parent, RootInfo, RootOptions};
use crate::error::{BlockError, Errno, Result};
use crate::ids::{EdgeId, NodeId};
use crate::node::Node;
use crate::perm::{Perm, PermPair};
use crate::role::Roles;
use crate::transaction::Transaction;
use crate::view::View;

/// A user's hold on a node. [`Root::detach`] gives it back; dropping it does so too, but leaves nodes that lost their last
/// user to the next operation of the graph (`Graph::reap`).
pub struct Root {
    graph: Graph,
    id: EdgeId,
    info: Rc<RootInfo>,
}

impl Graph {
    /// Attaches a user to a node. Its source starts quiet and gets its first view by `RequestSource::resume`: before this
    /// returns, or when the drains end that are on at the time.
    ///
    /// # Errors
    /// No such node, or the permissions conflict with those of other users.
    pub async fn attach(
        &self,
        node: &str,
        options: RootOptions,
        source: Rc<dyn RequestSource>,
    ) -> Result<Root> {
        self.reap().await;
        // A user with a finer granularity takes writes of others off the fast path: these get new views.
        let find = || self.state().find(node).ok_or_else(|| no_such_node(node));
        let mut guards = Vec::new();
        let id = loop {
            let id = find()?;
            let noticed = self.noticed(id, options.granularity);
            let quiet = self.state().roots_above(&noticed).iter().all(|r| r.gate.is_quiet());
            if !quiet {
                guards.push(self.drain_nodes(noticed).await);
            } else if self.state().surplus_above(id).is_empty() {
                break id;
            } else {
                self.recall(id).await;
            }
        };
        let root = self.attach_drained(id, options, source)?;
        drop(guards);
        Ok(root)
    }

    /// Opens a node from its definition and attaches a user to it; the node goes with its last user.
    ///
    /// # Errors
    /// As `blockdev-add`, or the permissions conflict; nothing is left behind.
    pub(crate) async fn open_and_attach(
        &self,
        definition: serde_json::Map<String, serde_json::Value>,
        inherited: crate::options::NodeOptions,
        options: RootOptions,
    ) -> Result<Root> {
        self.reap().await;
        let result = async {
            let id = self.open_node(definition, inherited, 0).await?;
            // Nothing is above it: nobody to drain. No wait in between, so nobody reaps it.
            let root = self.attach_drained(id, options, Rc::new(crate::drain::NoSource))?;
            let mut state = self.state_mut();
            for below in state.topological(&[id]) {
                if let Some(slot) = state.nodes.get_mut(&below) {
                    slot.visible = true;
                }
            }
            drop(state);
            Ok(root)
        };
        let result = result.await;
        if result.is_err() {
            // Children that were opened for it are without users now.
            self.reap().await;
        }
        result
    }

    /// Nodes whose other users have to know of a user with this granularity.
    fn noticed(&self, node: NodeId, granularity: u32) -> Vec<NodeId> {
        let state = self.state();
        let mut below = state.topological(&[node]);
        below.retain(|id| {
            let Ok(slot) = state.slot(*id) else { return false };
            let align = slot.node.driver().limits().sane().request_alignment;
            let notices = !granularity.is_multiple_of(align) || (align > 1 && state.shifted(*id, 1));
            notices && !state.may_misalign(*id)
        });
        below
    }

    fn attach_drained(
        &self,
        node: NodeId,
        options: RootOptions,
        source: Rc<dyn RequestSource>,
    ) -> Result<Root> {
        let info = Rc::new(RootInfo {
            description: options.description,
            granularity: options.granularity.max(1),
            gate: SourceGate::new(source),
            stay_at_node: options.stay_at_node,
            opening: false,
            shared: Cell::new(options.shared),
            ways_out: options.ways_out,
        });
        let id = {
            let state = &mut *self.state_mut();
            let pair = PermPair { perm: options.perm, shared: options.shared };
            let id = EdgeId(state.fresh_id());
            let parent = Parent::Root(Rc::clone(&info));
            let edge = Edge {
                id,
                parent,
                child: node,
                name: options.name,
                roles: Roles::empty(),
                pair,
                frozen: Vec::new(),
            };
            let mut tran = Transaction::new();
            add_edge(state, &mut tran, edge, None);
            let result = perms::refresh(state, &mut tran, &[node]);
            tran.finish(state, result)?;
            state.refresh_views(&[node]);
            id
        };
        self.adopt_into_drains();
        // Held by the handle from here on, whatever the source does.
        let root = Root { graph: self.clone(), id, info };
        if root.info.gate.depth() == 0 {
            root.info.gate.start();
        }
        Ok(root)
    }
}

impl Root {
    /// Its number, for `Change::ReplaceRoot`.
    pub fn id(&self) -> EdgeId {
        self.id
    }

    /// The node it is attached to now.
    ///
    /// # Errors
    /// The node is gone (never, while this exists).
    pub fn node(&self) -> Result<Arc<Node>> {
        self.graph.node_by_id(self.edge()?.0)
    }

    /// The view its source has, or will get at its next resume.
    pub fn view(&self) -> Option<Arc<View>> {
        self.info.gate.view()
    }

    /// Whether some drain holds it quiet.
    pub fn is_drained(&self) -> bool {
        self.info.gate.depth() > 0
    }

    /// Changes what the user does and shares. Its own requests pause for it where the view they run with changes: what was
    /// given up is not used any more when this returns, and what was gained can be used from then on.
    ///
    /// # Errors
    /// A conflict; everything is as before then.
    pub async fn set_perm(&self, perm: Perm, shared: Perm) -> Result<()> {
        let mut guards = Vec::new();
        loop {
            let (node, before) = self.edge()?;
            if !self.graph.state().surplus_above(node).is_empty() {
                self.graph.recall(node).await;
            } else if before.perm == perm || self.info.gate.is_quiet() {
                break;
            } else {
                guards.push(self.graph.drain_roots(vec![Rc::clone(&self.info)]).await);
            }
        }
        let result = self.change_pair(perm, shared);
        drop(guards);
        result
    }

    /// The node and the pair of its edge.
    fn edge(&self) -> Result<(NodeId, PermPair)> {
        let edge = self.graph.state().edges.get(&self.id).map(|e| (e.child, e.pair));
        edge.ok_or_else(|| BlockError::new(Errno::ENODEV, "The user is gone"))
    }

    fn change_pair(&self, perm: Perm, shared: Perm) -> Result<()> {
        let (node, _) = self.edge()?;
        let state = &mut *self.graph.state_mut();
        let before = self.info.shared.replace(shared);
        let mut tran = Transaction::new();
        perms::set_edge(state, &mut tran, self.id, PermPair { perm, shared });
        let result = perms::refresh(state, &mut tran, &[node]);
        tran.finish(state, result).inspect_err(|_| self.info.shared.set(before))?;
        state.refresh_views(&[node]);
        Ok(())
    }

    /// What it holds on its node.
    pub(crate) fn perm(&self) -> Perm {
        self.edge().map_or(Perm::NONE, |(_, pair)| pair.perm)
    }

    /// Stops this user's requests alone and waits for those in flight; they resume when the guard is dropped.
    pub async fn quiesce(&self) -> crate::drain::DrainGuard {
        self.graph.drain_roots(vec![Rc::clone(&self.info)]).await
    }

    /// Gives the node back and closes it if nobody else uses it. The user has no request in flight any more.
    pub async fn detach(self) {
        let graph = self.graph.clone();
        let node = self.graph.state().edges.get(&self.id).map(|e| e.child);
        drop(self);
        let orphan = node.filter(|id| is_orphan(&graph.state(), *id));
        graph.close_orphans(orphan.into_iter().collect()).await;
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // Drains that hold it resume nothing any more.
        self.info.gate.set_view(None);
        let mut state = self.graph.state_mut();
        if let (Some(edge), _) = remove_edge(&mut state, self.id) {
            super::delete::relax(&mut state, edge.child);
        }
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({} {:?})", self.id.0, self.info.description)
    }
}
