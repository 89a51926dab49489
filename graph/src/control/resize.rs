//! Changing the size of a node while it is in use.
//!
//! Called for `block_resize`. Drained, with RESIZE held through the permission engine; parents and users hear of the new size.

use std::rc::Rc;

use super::{Graph, State, no_such_node};
use crate::drain::NoSource;
use crate::driver::Truncate;
use crate::edge::{Parent, RootOptions};
use crate::error::{BlockError, Errno, Result};
use crate::ids::{EdgeId, NodeId};
use crate::perm::Perm;

impl Graph {
    /// Changes the size of a node, bytes.
    ///
    /// # Errors
    /// No such node, a size above 2^63 - 1, somebody does not share RESIZE, or what the driver says.
    pub async fn block_resize(&self, name: &str, size: u64) -> Result<()> {
        if size > i64::MAX as u64 {
            return Err(BlockError::invalid("Parameter 'size' expects a >0 size"));
        }
        let id = self.state().find(name).ok_or_else(|| no_such_node(name))?;
        if self.node_by_id(id)?.options().read_only {
            return Err(BlockError::new(Errno::EACCES, "Image is read-only"));
        }
        let options = RootOptions {
            perm: Perm::RESIZE,
            // It sends no requests that others would have to look out for.
            granularity: 1 << 30,
            stay_at_node: true,
            ..RootOptions::new(format!("the resizing of '{name}'"), false)
        };
        let hold = self.attach(name, options, Rc::new(NoSource)).await?;
        let guard = self.drain_nodes(vec![id]).await;
        let how = Truncate::default();
        let result = self
            .on_iothread_with(id, Perm::RESIZE, move |io| async move { io.truncate(size, how).await })
            .await;
        // Also after an error: half of it may have happened.
        self.propagate_size(id);
        hold.detach().await;
        drop(guard);
        result
    }

    /// The size each user from outside sees, before a change.
    pub(super) fn root_sizes(&self) -> Vec<(EdgeId, u64)> {
        let state = self.state();
        let roots = state.edges.values().filter(|e| matches!(e.parent, Parent::Root(_)));
        roots.filter_map(|e| Some((e.id, state.slot(e.child).ok()?.node.size()))).collect()
    }

    /// After a change in a drained section: tells users whose disk has another size now.
    pub(super) fn tell_sizes(&self, before: &[(EdgeId, u64)]) {
        let told: Vec<_> = {
            let state = self.state();
            let changed = before.iter().filter_map(|(id, size)| {
                let edge = state.edges.get(id)?;
                let now = state.slot(edge.child).ok()?.node.size();
                match &edge.parent {
                    Parent::Root(info) if now != *size => Some((Rc::clone(info), now)),
                    _ => None,
                }
            });
            changed.collect()
        };
        told.iter().for_each(|(root, size)| root.gate.source().resized(*size));
    }

    /// After a node's size or limits changed, in a drained section: tells its parents, bottom up, and its users.
    pub(crate) fn propagate_size(&self, changed: NodeId) {
        let roots = {
            let state = self.state();
            tell_parents(&state, &[changed]);
            for id in state.above(changed) {
                if let Ok(slot) = state.slot(id)
                    && let Err(e) = slot.node.bitmaps().resize(slot.node.size())
                {
                    log::error!("node '{}': {e}", slot.node.name());
                }
            }
            state.refresh_views(&[changed]);
            state.roots_above(&[changed])
        };
        for root in roots {
            if let Some(view) = root.gate.view() {
                root.gate.source().resized(view.size());
            }
        }
    }
}

/// Tells every parent above these nodes about its child, each after all its children above them have been told.
pub(super) fn tell_parents(state: &State, changed: &[NodeId]) {
    let above: Vec<NodeId> = changed.iter().flat_map(|id| state.above(*id)).collect();
    let mut order = state.topological(&above);
    order.retain(|id| above.contains(id));
    for id in order.into_iter().rev() {
        let Ok(slot) = state.slot(id) else { continue };
        for (index, place) in slot.children.iter().enumerate() {
            let edge = place.as_ref().and_then(|e| state.edges.get(e));
            let child = edge.and_then(|e| Some((e.name.as_str(), &state.slot(e.child).ok()?.node)));
            slot.node.driver().child_changed(index, child);
        }
    }
}
