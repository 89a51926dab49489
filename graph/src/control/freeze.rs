//! Frozen edges: links that must neither go nor lead elsewhere while a job relies on them.
//!
//! Called by jobs and by drivers that rely on the chain below them. Everything else about the nodes stays allowed. Who froze
//! an edge is told in the refusal to change it, and in `query-block-graph`.

use std::rc::Rc;

use super::{Graph, State, no_such_node};
use crate::error::{BlockError, Result};
use crate::ids::EdgeId;

/// Keeps edges frozen until it is dropped. Freezing counts: several guards may hold the same edge.
#[must_use = "the edges thaw when the guard is dropped"]
pub struct FreezeGuard {
    graph: Graph,
    edges: Vec<EdgeId>,
    owner: Rc<str>,
}

impl Graph {
    /// Freezes one child edge of a node. `owner` is who relies on it, as messages name it: "job 'j'".
    ///
    /// # Errors
    /// No such node or child.
    pub fn freeze(&self, parent: &str, child: &str, owner: &str) -> Result<FreezeGuard> {
        let id = {
            let state = self.state();
            let node = state.find(parent).ok_or_else(|| no_such_node(parent))?;
            let edge = state.children(node).find(|(_, e)| e.name == child).map(|(_, e)| e.id);
            edge.ok_or_else(|| BlockError::invalid(format!("Node '{parent}' has no '{child}' child")))?
        };
        Ok(self.freeze_edges(vec![id], owner))
    }

    /// Freezes the links of the backing chain from `top` down to `base`, filters included. `owner` as in [`Graph::freeze`].
    ///
    /// # Errors
    /// No such node, or `base` is not in the chain of `top`.
    pub fn freeze_chain(&self, top: &str, base: &str, owner: &str) -> Result<FreezeGuard> {
        let edges = {
            let state = self.state();
            let base_id = state.find(base).ok_or_else(|| no_such_node(base))?;
            let top_id = state.find(top).ok_or_else(|| no_such_node(top))?;
            state.chain(top_id, base_id)?
        };
        Ok(self.freeze_edges(edges, owner))
    }

    fn freeze_edges(&self, edges: Vec<EdgeId>, owner: &str) -> FreezeGuard {
        let owner: Rc<str> = owner.into();
        freeze(&mut self.state_mut(), &edges, &owner);
        FreezeGuard { graph: self.clone(), edges, owner }
    }
}

impl Drop for FreezeGuard {
    fn drop(&mut self) {
        thaw(&mut self.graph.state_mut(), &self.edges, &self.owner);
    }
}

/// One more who relies on these edges.
pub(super) fn freeze(state: &mut State, edges: &[EdgeId], owner: &Rc<str>) {
    for id in edges {
        if let Some(edge) = state.edges.get_mut(id) {
            edge.frozen.push(Rc::clone(owner));
        }
    }
}

/// One less.
pub(super) fn thaw(state: &mut State, edges: &[EdgeId], owner: &Rc<str>) {
    for id in edges {
        if let Some(edge) = state.edges.get_mut(id)
            && let Some(at) = edge.frozen.iter().position(|o| o == owner)
        {
            edge.frozen.remove(at);
        }
    }
}
