//! Deleting nodes: refused while somebody uses them, otherwise closed from the top down.
//!
//! Called for `blockdev-del`, when the last user of an inline child goes, and at the end of the process.

use super::change::{is_orphan, remove_edge};
use super::{Graph, State, perms};
use crate::edge::Parent;
use crate::error::{BlockError, Errno, Result};
use crate::ids::NodeId;
use crate::transaction::Transaction;

/// After a user of a node has gone: gives back what is not needed any more. Giving back cannot be refused; a driver that
/// tries keeps more than it needs, which is safe.
pub(super) fn relax(state: &mut State, node: NodeId) {
    let mut tran = Transaction::new();
    let result = perms::refresh(state, &mut tran, &[node]);
    if let Err(e) = tran.finish(state, result) {
        log::error!("node '{}' keeps permissions nobody needs: {e}", state.name_of(node));
    }
}

impl Graph {
    /// Deletes a node that `blockdev-add` made and nobody uses, and closes what only it used.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn blockdev_del(&self, name: &str) -> Result<()> {
        self.reap().await;
        let id = {
            let mut state = self.state_mut();
            let id = state.find(name).ok_or_else(|| {
                BlockError::new(Errno::ENOENT, format!("Failed to find node with node-name='{name}'"))
            })?;
            check_deletable(&state, id, name)?;
            if let Some(slot) = state.nodes.get_mut(&id) {
                slot.monitor_owned = false;
            }
            id
        };
        self.close_orphans(vec![id]).await;
        Ok(())
    }

    /// Closes these nodes and, in turn, children nobody else uses. Each is closed with its children still open and its
    /// locks still held.
    pub(crate) async fn close_orphans(&self, mut orphans: Vec<NodeId>) {
        while let Some(id) = orphans.pop() {
            {
                let mut state = self.state_mut();
                if !is_orphan(&state, id) {
                    continue;
                }
                if let Some(slot) = state.nodes.get_mut(&id) {
                    slot.closing = true;
                }
            }
            self.close_driver(id).await;
            let children: Vec<NodeId> = self.state().children(id).map(|(_, e)| e.child).collect();
            orphans.extend(self.forget(id));
            self.give_back(&children).await;
        }
    }

    async fn close_driver(&self, id: NodeId) {
        let result = self.on_iothread(id, |io| async move {
            let node = std::sync::Arc::clone(io.node()?);
            let mut flushed = Ok(());
            if !node.options().read_only {
                if !node.bitmaps().persistent().is_empty() {
                    flushed = node.driver().store_bitmaps(&io).await;
                }
                flushed = io.flush().await.and(flushed);
            }
            // Also after a failed flush: closing gives resources back.
            node.driver().close(&io).await.and(flushed)
        });
        match result.await {
            Ok(()) => {}
            // Without any iothread there has been no request either.
            Err(_) if self.iothread().is_err() => {}
            Err(e) => log::warn!("closing node '{}': {e}", self.state().name_of(id)),
        }
    }

    /// Takes a closed node out; returns the children nobody uses now.
    fn forget(&self, id: NodeId) -> Vec<NodeId> {
        let mut state = self.state_mut();
        let children: Vec<_> = state.children(id).map(|(_, e)| (e.id, e.child)).collect();
        for (edge, child) in &children {
            remove_edge(&mut state, *edge);
            relax(&mut state, *child);
        }
        let slot = state.nodes.remove(&id);
        if let Some(slot) = &slot {
            let owner = super::open::driver_owner(slot.node.name());
            super::freeze::thaw(&mut state, &slot.freezes, &owner);
            state.names.remove(slot.node.name());
        }
        let orphans = children.into_iter().map(|(_, c)| c).filter(|c| is_orphan(&state, *c)).collect();
        drop(state);
        // The driver goes here, after the graph is consistent and no longer borrowed.
        drop(slot);
        orphans
    }

    /// Closes nodes that lost their last user in a way that could not wait (a dropped guard, an abandoned open).
    pub async fn reap(&self) {
        let orphans: Vec<NodeId> = {
            // An invisible node on its way to its parent is never seen here: both happen without a wait in between.
            let state = self.state();
            state.nodes.keys().copied().filter(|id| is_orphan(&state, *id)).collect()
        };
        self.close_orphans(orphans).await;
    }

    /// Closes all nodes, users first, at the end of the process. Users from outside (exports, jobs) have gone by then;
    /// nodes that still have one stay open.
    pub async fn close_all(&self) {
        let all: Vec<NodeId> = {
            let mut state = self.state_mut();
            state.nodes.values_mut().for_each(|s| s.monitor_owned = false);
            state.nodes.keys().copied().collect()
        };
        self.close_orphans(all).await;
    }
}

fn check_deletable(state: &State, id: NodeId, name: &str) -> Result<()> {
    let busy = |text: String| Err(BlockError::new(Errno::EBUSY, text));
    let mut users = state.users(id);
    let root = users.find_map(|e| match &e.parent {
        Parent::Root(info) => Some(info.description.clone()),
        Parent::Node(_) => None,
    });
    if let Some(user) = root {
        return busy(format!("Node {name} is in use: it is used by {user}"));
    }
    if !state.slot(id)?.monitor_owned {
        return Err(BlockError::invalid(format!("Node {name} is not owned by the monitor")));
    }
    if let Some(edge) = state.users(id).next() {
        let user = state.describe(&edge.parent);
        return busy(format!("Block device {name} is in use: it is the '{}' child of {user}", edge.name));
    }
    Ok(())
}
