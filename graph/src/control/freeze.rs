//! Frozen edges: links that must neither go nor lead elsewhere while a job relies on them.
//!
//! Called by jobs and by drivers that rely on the chain below them. Everything else about the nodes stays allowed.

use super::{Graph, State, no_such_node};
use crate::error::{BlockError, Result};
use crate::ids::EdgeId;

/// Keeps edges frozen until it is dropped. Freezing counts: several guards may hold the same edge.
#[must_use = "the edges thaw when the guard is dropped"]
pub struct FreezeGuard {
    graph: Graph,
    edges: Vec<EdgeId>,
}

impl Graph {
    /// Freezes one child edge of a node.
    ///
    /// # Errors
    /// No such node or child.
    pub fn freeze(&self, parent: &str, child: &str) -> Result<FreezeGuard> {
        let id = {
            let state = self.state();
            let node = state.find(parent).ok_or_else(|| no_such_node(parent))?;
            let edge = state.children(node).find(|(_, e)| e.name == child).map(|(_, e)| e.id);
            edge.ok_or_else(|| BlockError::invalid(format!("Node '{parent}' has no '{child}' child")))?
        };
        Ok(self.freeze_edges(vec![id]))
    }

    /// Freezes the links of the backing chain from `top` down to `base`, filters included.
    ///
    /// # Errors
    /// No such node, or `base` is not in the chain of `top`.
    pub fn freeze_chain(&self, top: &str, base: &str) -> Result<FreezeGuard> {
        let edges = {
            let state = self.state();
            let base_id = state.find(base).ok_or_else(|| no_such_node(base))?;
            let top_id = state.find(top).ok_or_else(|| no_such_node(top))?;
            state.chain(top_id, base_id)?
        };
        Ok(self.freeze_edges(edges))
    }

    fn freeze_edges(&self, edges: Vec<EdgeId>) -> FreezeGuard {
        freeze(&mut self.state_mut(), &edges);
        FreezeGuard { graph: self.clone(), edges }
    }
}

impl Drop for FreezeGuard {
    fn drop(&mut self) {
        thaw(&mut self.graph.state_mut(), &self.edges);
    }
}

/// One more who relies on these edges.
pub(super) fn freeze(state: &mut State, edges: &[EdgeId]) {
    for id in edges {
        if let Some(edge) = state.edges.get_mut(id) {
            edge.frozen += 1;
        }
    }
}

/// One less.
pub(super) fn thaw(state: &mut State, edges: &[EdgeId]) {
    for id in edges {
        if let Some(edge) = state.edges.get_mut(id) {
            edge.frozen = edge.frozen.saturating_sub(1);
        }
    }
}
