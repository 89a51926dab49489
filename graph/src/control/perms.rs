//! The permission engine: what the users of a node mean for its driver and its children, prepared and committed.
//!
//! Called inside the transactions of `change`, `attach` and `delete`, after the edges have their new shape. Must not
//! change the shape.
//!
//! `refresh` walks the touched nodes and everything below, parents first: the pairs of a node's users are final when it is
//! looked at. It checks them against each other, computes the children's edges, and asks the drivers (`check_perm`) for the
//! union of what they hold and will hold; the commit tells them the rest (`set_perm`). So a driver holds, at any moment of
//! the change, enough for the graph before and for the graph after. A driver that only gives something up is not asked.

use std::sync::Arc;

use super::{State, conflict};
use crate::driver::Driver;
use crate::edge::Parent;
use crate::error::Result;
use crate::ids::{EdgeId, NodeId};
use crate::perm::{Perm, PermPair, first_conflict};
use crate::transaction::{Step, Transaction};

/// An edge got another pair.
struct EdgePerm {
    edge: EdgeId,
    before: PermPair,
}

impl Step<State> for EdgePerm {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        if let Some(edge) = state.edges.get_mut(&self.edge) {
            edge.pair = self.before;
        }
    }
}

/// A driver was asked, or needs no asking.
struct DriverPerm {
    node: NodeId,
    driver: Arc<dyn Driver>,
    after: PermPair,
    checked: bool,
}

impl Step<State> for DriverPerm {
    fn commit(&mut self, state: &mut State) {
        self.driver.set_perm(self.after.perm, self.after.shared);
        if let Some(slot) = state.nodes.get_mut(&self.node) {
            slot.held = self.after;
        }
    }
    fn abort(&mut self, _: &mut State) {
        if self.checked {
            self.driver.abort_perm();
        }
    }
}

/// Sets an edge's pair inside a transaction.
pub(crate) fn set_edge(state: &mut State, tran: &mut Transaction<State>, id: EdgeId, pair: PermPair) {
    if let Some(edge) = state.edges.get_mut(&id)
        && edge.pair != pair
    {
        tran.add(EdgePerm { edge: id, before: edge.pair });
        edge.pair = pair;
    }
}

/// Prepares the permissions of `touched` and everything below for the edges as they are now.
pub(crate) fn refresh(state: &mut State, tran: &mut Transaction<State>, touched: &[NodeId]) -> Result<()> {
    let order = state.topological(touched);
    let mut wanted = Vec::with_capacity(order.len());
    for id in &order {
        share(state, tran, *id)?;
        let after = check_users(state, *id)?;
        set_children(state, tran, *id, after)?;
        wanted.push((*id, after));
    }
    // Drivers last: what can be refused without touching files has been by now.
    for (id, after) in wanted {
        let slot = state.slot(id)?;
        let held = slot.held;
        if held == after {
            continue;
        }
        let driver = slot.node.driver();
        let during = held.join(after);
        let checked = during != held;
        if checked {
            driver.check_perm(during.perm, during.shared)?;
        }
        tran.add(DriverPerm { node: id, driver, after, checked });
    }
    Ok(())
}

/// Users that are not nodes share what they want to share, or everything where the node says so. Again at each change, since
/// they move: a user takes along what it wants, and nothing of what the node said.
fn share(state: &mut State, tran: &mut Transaction<State>, id: NodeId) -> Result<()> {
    let forced = state.slot(id)?.node.options().force_share;
    let users = state.users(id).filter_map(|e| match &e.parent {
        Parent::Root(info) => Some((e.id, PermPair { perm: e.pair.perm, shared: info.shared.get() })),
        Parent::Node(_) => None,
    });
    let users: Vec<(EdgeId, PermPair)> = users.collect();
    for (edge, mut pair) in users {
        if forced {
            pair.shared = Perm::ALL;
        }
        set_edge(state, tran, edge, pair);
    }
    Ok(())
}

/// What all users of a node together do and share, if they may.
fn check_users(state: &State, id: NodeId) -> Result<PermPair> {
    let slot = state.slot(id)?;
    let users: Vec<_> = state.users(id).collect();
    let pairs: Vec<PermPair> = users.iter().map(|e| e.pair).collect();
    if let Some((needs, refuses, bits)) = first_conflict(&pairs)
        && let (Some(needs), Some(refuses)) = (users.get(needs), users.get(refuses))
    {
        return Err(conflict::between(state, slot.node.name(), needs, refuses, bits));
    }
    let all = PermPair::cumulative(pairs);
    if all.perm.writes() && slot.node.options().refuses_writes() {
        return Err(conflict::no_writes(state, &slot.node, &users));
    }
    // Padding the last block of a node that may not grow would have to write past its end. Asked of whoever comes to write: of
    // those who write already, one may give RESIZE up (giving up is never refused); its last block is refused then
    // (`NodeIo::check_growth`).
    let align = u64::from(slot.node.driver().limits().sane().request_alignment);
    let grows = all.perm.contains(Perm::RESIZE);
    let comes_to_write = all.perm.contains(Perm::WRITE) && !slot.held.perm.contains(Perm::WRITE);
    if comes_to_write && !grows && !slot.node.size().is_multiple_of(align) {
        return Err(conflict::odd_size(&slot.node, align));
    }
    Ok(all)
}

/// What an inactive node does with a child and shares of it: another process has the image, so nothing is written, and what
/// that process writes is expected.
pub(crate) fn inactive(pair: PermPair, inactive: bool) -> PermPair {
    let writes = Perm::WRITE | Perm::RESIZE;
    match inactive {
        true => PermPair { perm: pair.perm - writes - Perm::WRITE_UNCHANGED, shared: pair.shared | writes },
        false => pair,
    }
}

fn set_children(state: &mut State, tran: &mut Transaction<State>, id: NodeId, all: PermPair) -> Result<()> {
    let node = Arc::clone(&state.slot(id)?.node);
    let (driver, inactive) = (node.driver(), node.options().inactive);
    let children: Vec<_> = state.children(id).map(|(i, e)| (i, e.id, e.roles, e.child)).collect();
    for (index, edge, roles, child) in children {
        let (perm, shared) = driver.child_perm(index, roles, all.perm, all.shared);
        let PermPair { perm, mut shared } = self::inactive(PermPair { perm, shared }, inactive);
        if state.slot(child)?.node.options().force_share {
            shared = Perm::ALL;
        }
        set_edge(state, tran, edge, PermPair { perm, shared });
    }
    Ok(())
}
