//! `transaction`: several actions at one point in time, all of them or none.
//!
//! Called by the control channel, and by the single commands that are transactions of one action. An [`Action`] says which
//! nodes it is about; the users of all of them are stopped together, every action prepares, the changes of the graph are
//! carried out as one, and then all are final. Jobs add actions of their own.

mod bitmaps;
mod overlay;
mod simple;

use super::change::{Apply, Change, is_orphan};
use super::{Graph, State, perms};
use crate::driver::BoxFut;
use crate::error::{BlockError, Errno, Result};
use crate::ids::NodeId;
use crate::transaction::Transaction;

pub use bitmaps::{
    BitmapAddAction, BitmapClearAction, BitmapMergeAction, BitmapRecordAction, BitmapRemoveAction,
};
pub use overlay::{NewOverlay, OverlayMode, SnapshotAction, SnapshotSyncAction};
pub use simple::{AbortAction, InternalSnapshotAction};

/// Most memory one transaction sets aside for the content of bitmaps before it, bytes.
const MAX_KEPT: u64 = 1 << 30;

/// One action of a transaction. In order: [`Action::ready`]; then, with the users of all nodes stopped,
/// [`Action::prepare`]; then [`Action::commit`], or, if any action was refused, [`Action::abort`] (last action first, for
/// those whose `ready` was called); at last [`Action::clean`].
pub trait Action {
    /// Before anything is stopped: what takes long and can be undone (creating an image).
    fn ready<'a>(&'a mut self, _graph: &'a Graph) -> BoxFut<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Names of the nodes whose users are stopped.
    fn nodes(&self, graph: &Graph) -> Vec<String>;

    /// Does what can be refused; what [`ActionContext::change`] changes becomes visible with the others' changes.
    fn prepare<'a>(&'a mut self, cx: &'a mut ActionContext) -> BoxFut<'a, ()>;

    /// Makes it final, users still stopped. Cannot fail: what goes wrong is logged.
    fn commit<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        let _ = graph;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes back what was done; the graph is as before. What goes wrong is logged.
    fn abort<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        let _ = graph;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Users run again.
    fn clean<'a>(&'a mut self, graph: &'a Graph) -> BoxFut<'a, ()> {
        let _ = graph;
        Box::pin(std::future::ready(Ok(())))
    }
}

/// What an action has at hand while it prepares.
pub struct ActionContext {
    graph: Graph,
    tran: Option<Transaction<State>>,
    touched: Vec<NodeId>,
    /// Memory that is left to keep what can be taken back, bytes.
    room: u64,
}

impl ActionContext {
    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Changes edges as part of the transaction: checked now, permissions once for all actions at the end.
    ///
    /// # Errors
    /// As [`Graph::change`].
    pub fn change(&mut self, changes: &[Change]) -> Result<()> {
        let state = &mut *self.graph.state_mut();
        let Some(tran) = &mut self.tran else { return Ok(()) };
        let mut apply = Apply { state, tran, touched: Vec::new() };
        let result = changes.iter().try_for_each(|c| apply.apply(c));
        self.touched.append(&mut apply.touched);
        result
    }

    /// Memory to keep something that may have to be put back, bytes.
    ///
    /// # Errors
    /// The actions together would keep more than [`MAX_KEPT`].
    fn keep(&mut self, bytes: u64) -> Result<()> {
        let left = self.room.checked_sub(bytes).ok_or_else(|| {
            BlockError::new(
                Errno::ENOMEM,
                format!("The actions change more than {MAX_KEPT} bytes of bitmaps: use several transactions"),
            )
        })?;
        self.room = left;
        Ok(())
    }

    /// Commits or takes back the changes of the graph.
    fn finish(&mut self, result: Result<()>) -> Result<()> {
        let Some(mut tran) = self.tran.take() else { return result };
        {
            let state = &mut *self.graph.state_mut();
            let result = result.and_then(|()| perms::refresh(state, &mut tran, &self.touched));
            tran.finish(state, result)?;
            super::resize::tell_parents(state, &self.touched);
            state.refresh_views(&self.touched);
        }
        self.graph.adopt_into_drains();
        Ok(())
    }
}

impl Drop for ActionContext {
    fn drop(&mut self) {
        // Given up in the middle.
        if let Some(tran) = self.tran.take() {
            tran.abort(&mut self.graph.state_mut());
        }
    }
}

impl Graph {
    /// Carries out actions, all or none, at one point in time for all nodes they are about.
    ///
    /// # Errors
    /// Of the first action that was refused; everything is as before then.
    pub async fn transaction(&self, mut actions: Vec<Box<dyn Action>>) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        self.reap().await;
        let mut begun = 0;
        let mut result = Ok(());
        for action in &mut actions {
            begun += 1;
            result = action.ready(self).await;
            if result.is_err() {
                break;
            }
        }
        let mut guards = Vec::new();
        if result.is_ok() {
            loop {
                let targets = self.targets(&actions);
                if self.state().roots_above(&targets).iter().all(|r| r.gate.is_quiet()) {
                    self.give_back(&targets).await;
                    break;
                }
                guards.push(self.drain_nodes(targets).await);
            }
            result = self.act(&mut actions).await;
        }
        if result.is_err() {
            for action in actions.iter_mut().take(begun).rev() {
                log_failure(action.abort(self).await, "taking back an action");
            }
        } else {
            for action in &mut actions {
                log_failure(action.commit(self).await, "an action after it was carried out");
            }
        }
        drop(guards);
        for action in actions.iter_mut().take(begun) {
            log_failure(action.clean(self).await, "cleaning up after an action");
        }
        self.reap().await;
        result
    }

    /// All nodes of all actions, with everything below.
    fn targets(&self, actions: &[Box<dyn Action>]) -> Vec<NodeId> {
        let names: Vec<String> = actions.iter().flat_map(|a| a.nodes(self)).collect();
        let state = self.state();
        let found: Vec<NodeId> = names.iter().filter_map(|n| state.find(n)).collect();
        state.topological(&found)
    }

    /// Prepares all actions and changes the graph.
    async fn act(&self, actions: &mut [Box<dyn Action>]) -> Result<()> {
        let mut cx = ActionContext {
            graph: self.clone(),
            tran: Some(Transaction::new()),
            touched: Vec::new(),
            room: MAX_KEPT,
        };
        let sizes = self.root_sizes();
        let mut result = Ok(());
        for action in actions {
            result = action.prepare(&mut cx).await;
            if result.is_err() {
                break;
            }
        }
        cx.finish(result)?;
        self.tell_sizes(&sizes);
        let state = self.state();
        for id in cx.touched.iter().filter(|id| is_orphan(&state, **id)) {
            log::debug!("node '{}' has lost its last user", state.name_of(*id));
        }
        Ok(())
    }
}

fn log_failure(result: Result<()>, what: &str) {
    if let Err(e) = result {
        log::error!("{what}: {e}");
    }
}
