//! What drivers have set aside below them and hold permissions for, given back: before edges change, and after a user went.
//!
//! Called wherever edges change (`change`, `surgery`, `reopen`, `actions`), by `delete` and by `attach`. Where it fails the driver keeps the permissions along with what it holds, which is
//! safe; the change that follows may be refused for it.

use super::Graph;
use crate::ids::NodeId;

impl Graph {
    /// Has every such driver at or below these nodes give back what it holds; whether there was one.
    pub(crate) async fn give_back(&self, tops: &[NodeId]) -> bool {
        let holders: Vec<NodeId> = {
            let state = self.state();
            let mut below = state.topological(tops);
            below.retain(|id| {
                let slot = state.nodes.get(id);
                slot.is_some_and(|s| !s.closing && s.node.driver().has_set_aside())
            });
            below
        };
        for id in &holders {
            let id = *id;
            let work = self.on_iothread(id, |io| async move {
                let driver = io.node()?.driver();
                driver.give_back(&io).await
            });
            let result = work.await;
            let state = &mut *self.state_mut();
            if let Err(e) = result {
                log::warn!("node '{}' keeps what it has set aside: {e}", state.name_of(id));
            }
            super::delete::relax(state, id);
        }
        !holders.is_empty()
    }
}
