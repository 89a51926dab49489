//! Actions that change no edge: giving up on purpose, snapshots inside images.
//!
//! See `Action` for who calls what when.

use super::{Action, ActionContext};
use crate::control::Graph;
use crate::control::snapshots::SnapshotQuery;
use crate::driver::BoxFut;
use crate::error::BlockError;
use crate::image::NewSnapshot;

/// Refuses: for tests of whoever relies on "all or none".
#[derive(Debug, Default)]
pub struct AbortAction;

impl Action for AbortAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        Vec::new()
    }

    fn prepare<'a>(&'a mut self, _cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        let refusal = BlockError::invalid("Transaction aborted using Abort action");
        Box::pin(std::future::ready(Err(refusal)))
    }
}

/// `blockdev-snapshot-internal-sync`.
#[derive(Debug)]
pub struct InternalSnapshotAction {
    device: String,
    new: NewSnapshot,
    made: Option<String>,
}

impl InternalSnapshotAction {
    /// Of this node.
    pub fn new(device: String, new: NewSnapshot) -> Self {
        InternalSnapshotAction { device, new, made: None }
    }
}

impl Action for InternalSnapshotAction {
    fn nodes(&self, _graph: &Graph) -> Vec<String> {
        vec![self.device.clone()]
    }

    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let made = cx.graph().snapshot_create(&self.device, self.new.clone()).await?;
            self.made = Some(made.id);
            Ok(())
        })
    }

    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(async move {
            let Some(id) = self.made.take() else { return Ok(()) };
            let query = SnapshotQuery { id: Some(id), name: None };
            graph.snapshot_delete(&self.device, &query).await.map(drop)
        })
    }
}
