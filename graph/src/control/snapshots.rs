//! Internal snapshots from the control channel: making, deleting, going back to one.
//!
//! Called by `blockdev-snapshot-internal-sync`, `blockdev-snapshot-delete-internal-sync`, `blockdev-snapshot-apply` and by
//! the command line tools. The node is drained meanwhile; the words of refusals are QEMU's.

use std::rc::Rc;
use std::sync::Arc;

use super::bitmaps::no_such_node_as_device;
use super::{Graph, State};
use crate::drain::NoSource;
use crate::driver::DriverKind;
use crate::edge::{Parent, RootOptions};
use crate::error::{BlockError, Errno, Result};
use crate::ids::NodeId;
use crate::image::{NewSnapshot, SnapshotInfo, SnapshotRef};
use crate::node::Node;
use crate::perm::Perm;
use crate::role::Roles;

/// A snapshot as a client names it: by id, by name, or by both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotQuery {
    /// Its id.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
}

impl SnapshotQuery {
    fn as_ref(&self) -> Result<SnapshotRef> {
        match (self.id.clone(), self.name.clone()) {
            (None, None) => Err(BlockError::invalid("Name or id must be provided")),
            (Some(id), None) => Ok(SnapshotRef::Id(id)),
            (None, Some(name)) => Ok(SnapshotRef::Name(name)),
            (Some(id), Some(name)) => Ok(SnapshotRef::Both { id, name }),
        }
    }

    /// Looks it up in the images of a node.
    fn find(&self, list: &[SnapshotInfo], device: &str) -> Result<SnapshotRef> {
        let which = self.as_ref()?;
        match which.find(list) {
            // From here on by what cannot mean another one.
            Some(s) => Ok(SnapshotRef::Both { id: s.id.clone(), name: s.name.clone() }),
            None => {
                let show = |o: &Option<String>| o.clone().unwrap_or_else(|| "null".to_owned());
                let (id, name) = (show(&self.id), show(&self.name));
                let text =
                    format!("Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'");
                Err(BlockError::new(Errno::ENOENT, text))
            }
        }
    }
}

impl State {
    /// The node whose image holds a node's snapshots: itself, or what lies below filters.
    fn snapshot_node(&self, id: NodeId) -> Option<NodeId> {
        let mut at = id;
        loop {
            let slot = self.nodes.get(&at)?;
            if slot.node.driver().supports_snapshots() {
                return Some(at);
            }
            if slot.node.kind() != DriverKind::Filter {
                return None;
            }
            at = self.children(at).find(|(_, e)| e.roles.contains(Roles::FILTERED)).map(|(_, e)| e.child)?;
        }
    }
}

impl Graph {
    /// The node of that name, and the one with its snapshots.
    fn snapshot_target(&self, device: &str) -> Result<(Arc<Node>, Option<Arc<Node>>)> {
        let state = self.state();
        let id = state.find(device).ok_or_else(|| no_such_node_as_device(device))?;
        if state.users(id).any(|e| matches!(e.parent, Parent::Node(_))) {
            return Err(BlockError::invalid("Need a root block node"));
        }
        let node = Arc::clone(&state.slot(id)?.node);
        let holder = state.snapshot_node(id).and_then(|id| Some(Arc::clone(&state.slot(id).ok()?.node)));
        Ok((node, holder))
    }

    /// Makes an internal snapshot of what the node holds now.
    ///
    /// # Errors
    /// No such node, one that others build upon, read-only, without snapshots, an empty name or one that is taken, or what the
    /// driver says.
    pub async fn snapshot_create(&self, device: &str, new: NewSnapshot) -> Result<SnapshotInfo> {
        let (node, holder) = self.snapshot_target(device)?;
        let guard = self.drain_nodes(vec![node.id()]).await;
        if node.options().read_only {
            return Err(BlockError::new(Errno::EACCES, format!("Device '{device}' is read only")));
        }
        let Some(holder) = holder else {
            let text = format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                node.driver_name()
            );
            return Err(BlockError::unsupported(text));
        };
        if new.name.is_empty() {
            return Err(BlockError::invalid("Name is empty"));
        }
        let taken = SnapshotRef::Name(new.name.clone());
        if taken.find(&holder.driver().snapshots()).is_some() {
            let text = format!("Snapshot with name '{}' already exists on device '{device}'", new.name);
            return Err(BlockError::new(Errno::EEXIST, text));
        }
        let failed = format!("Failed to create snapshot '{}' on device '{device}'", new.name);
        let made = self
            .on_iothread(holder.id(), move |io| async move {
                let node = Arc::clone(io.node()?);
                node.driver().snapshot_create(&io, new).await
            })
            .await;
        drop(guard);
        made.map_err(|e| e.context(failed))
    }

    /// Removes an internal snapshot; tells what it was.
    ///
    /// # Errors
    /// As [`Graph::snapshot_create`]; no such snapshot.
    pub async fn snapshot_delete(&self, device: &str, query: &SnapshotQuery) -> Result<SnapshotInfo> {
        let (node, holder) = self.snapshot_target(device)?;
        query.as_ref()?;
        let guard = self.drain_nodes(vec![node.id()]).await;
        let Some(holder) = holder else {
            return Err(BlockError::unsupported("Failed to get a snapshot list: Operation not supported"));
        };
        let which = query.find(&holder.driver().snapshots(), device)?;
        if node.options().read_only {
            return Err(BlockError::new(Errno::EACCES, format!("Device '{device}' is read only")));
        }
        let deleted = self
            .on_iothread(holder.id(), move |io| async move {
                let node = Arc::clone(io.node()?);
                node.driver().snapshot_delete(&io, which).await
            })
            .await;
        drop(guard);
        deleted
    }

    /// Makes the node's content that of an internal snapshot. What was written since is gone unless another snapshot holds
    /// it. The size becomes the snapshot's. Users are not asked: a guest that has the disk in use sees it change.
    ///
    /// # Errors
    /// As [`Graph::snapshot_delete`]; dirty bitmaps, which would not know what has changed; somebody who does not share
    /// RESIZE.
    pub async fn snapshot_apply(&self, device: &str, query: &SnapshotQuery) -> Result<()> {
        let (node, holder) = self.snapshot_target(device)?;
        query.as_ref()?;
        if node.options().read_only {
            return Err(BlockError::new(Errno::EACCES, format!("Device '{device}' is read only")));
        }
        let options = RootOptions {
            // Not WRITE: exports do not share that, and whoever goes back has stopped the guest, not taken its disk away.
            perm: Perm::RESIZE,
            // It sends no requests that others would have to look out for.
            granularity: 1 << 30,
            stay_at_node: true,
            ..RootOptions::new(format!("the return of '{device}' to a snapshot"), false)
        };
        let hold = self.attach(device, options, Rc::new(NoSource)).await?;
        let guard = self.drain_nodes(vec![node.id()]).await;
        let result = self.apply_drained(device, query, holder).await;
        hold.detach().await;
        drop(guard);
        result
    }

    async fn apply_drained(
        &self,
        device: &str,
        query: &SnapshotQuery,
        holder: Option<Arc<Node>>,
    ) -> Result<()> {
        let Some(holder) = holder else {
            return Err(BlockError::unsupported("Failed to get a snapshot list: Operation not supported"));
        };
        let which = query.find(&holder.driver().snapshots(), device)?;
        let above = self.state().above(holder.id());
        let marked = |id: &NodeId| self.node_by_id(*id).is_ok_and(|n| !n.bitmaps().is_empty());
        if above.iter().any(marked) {
            return Err(BlockError::new(Errno::EBUSY, "Device has active dirty bitmaps"));
        }
        let id = holder.id();
        let applied = self
            .on_iothread(id, move |io| async move {
                let node = Arc::clone(io.node()?);
                node.driver().snapshot_apply(&io, which).await
            })
            .await;
        // Also after an error: half of it may have happened.
        self.propagate_size(id);
        applied
    }
}
