//! `blockdev-reopen`: other options for nodes that are in use, for all of a list or for none.
//!
//! Called by the control channel and by other surgery that makes a node read-only. What the list means is worked out in
//! `plan`; here it is carried out inside one drained section: every driver prepares (which may do I/O), then options,
//! driver objects, edges and permissions change in one transaction, then the drivers finish or take back what they did on disk.

mod plan;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;

use super::change::{drop_edge, is_orphan, put_edge, redirect};
use super::{Config, Graph, State, perms};
use crate::driver::Driver;
use crate::edge::{Edge, Parent};
use crate::error::{BlockError, Errno, Result};
use crate::ids::{EdgeId, NodeId};
use crate::node::Node;
use crate::options::NodeOptions;
use crate::reopen::{Reopen, ReopenContext};
use crate::role::Roles;
use crate::transaction::{Step, Transaction};

use plan::{EdgeChange, Plan, Wish};

type Shared = Rc<RefCell<Option<Box<dyn Reopen>>>>;

/// A node whose driver is ready.
struct Prepared {
    plan: Plan,
    context: ReopenContext,
    reopen: Shared,
    /// Size before, bytes.
    size: u64,
}

/// A node runs with other options and perhaps another driver object.
struct Switched {
    id: NodeId,
    node: Arc<Node>,
    options: NodeOptions,
    config: Config,
    driver: Option<Arc<dyn Driver>>,
    reopen: Shared,
}

impl Step<State> for Switched {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        if let Some(driver) = self.driver.take() {
            self.node.set_driver(driver);
        }
        self.node.set_options(self.options);
        if let Some(slot) = state.nodes.get_mut(&self.id) {
            slot.config = std::mem::take(&mut self.config);
        }
        if let Some(reopen) = &mut *self.reopen.borrow_mut() {
            reopen.unapply();
        }
    }
}

/// An edge means something else to its parent.
struct Roled {
    edge: EdgeId,
    roles: Roles,
}

impl Step<State> for Roled {
    fn commit(&mut self, _: &mut State) {}
    fn abort(&mut self, state: &mut State) {
        if let Some(edge) = state.edges.get_mut(&self.edge) {
            edge.roles = self.roles;
        }
    }
}

impl Graph {
    /// Gives nodes other options: what is absent returns to its default, children given by name replace those there are. All
    /// of the list, or nothing.
    ///
    /// # Errors
    /// In QEMU's words; everything is as before then. An error of the last step, when everything has changed already, says
    /// so: an image could not be marked as in use, and takes no writes.
    pub async fn blockdev_reopen(&self, list: &[Value]) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        self.reopen_by(|state| state.plan_reopen(list)).await
    }

    /// Makes a node and what was defined inside it read-only, or writable, and leaves all else: for jobs that write to what was
    /// a backing file.
    ///
    /// # Errors
    /// No such node, somebody who writes, or what the drivers say. Nothing has changed then.
    pub async fn set_read_only(&self, name: &str, read_only: bool) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        let id = self.state().find(name).ok_or_else(|| super::no_such_node(name))?;
        self.reopen_read_only(id, read_only).await
    }

    /// The same for whoever has its turn already.
    pub(crate) async fn reopen_read_only(&self, id: NodeId, read_only: bool) -> Result<()> {
        self.reopen_by(|state| {
            let mut config = state.slot(id)?.config.clone();
            config.common.read_only = Some(read_only);
            state.plan_wishes(vec![(id, Wish { common: config.common, own: config.own, keep: true })])
        })
        .await
    }

    /// `blockdev-set-active`: hands an image over to another process, or takes it over from there; with `None` all of them.
    /// What lies below goes with it, unless something else that is active uses it.
    ///
    /// # Errors
    /// In QEMU's words: no such node, an active parent, a user that writes. Nothing has changed then.
    pub async fn set_active(&self, name: Option<&str>, active: bool) -> Result<()> {
        let _turn = self.inner.surgery.lock().await;
        if let Some(name) = name {
            let state = self.state();
            let id = state.find(name).ok_or_else(|| {
                BlockError::new(Errno::ENOENT, format!("Failed to find node with node-name='{name}'"))
            })?;
            let above = state.users(id).filter_map(|e| match e.parent {
                Parent::Node(parent) => state.nodes.get(&parent),
                Parent::Root(_) => None,
            });
            if !active && above.map(|s| s.node.options()).any(|o| !o.inactive) {
                return Err(BlockError::new(Errno::EPERM, "Node has active parent node"));
            }
        }
        let result = self.reopen_by(|state| state.plan_active(name, active)).await;
        result.map_err(|e| match (active, name) {
            (true, _) => e,
            (false, Some(_)) => e.context("Failed to inactivate node"),
            (false, None) => e.context("Failed to inactivate all nodes"),
        })
    }

    /// Whether somebody who wants to use a node has to make it active first.
    pub fn is_inactive(&self, name: &str) -> bool {
        self.node(name).is_ok_and(|node| node.options().inactive)
    }

    /// Drains, plans with nobody above, and carries it out.
    async fn reopen_by(&self, plan: impl Fn(&State) -> Result<Vec<Plan>>) -> Result<()> {
        let mut guards = Vec::new();
        let plans = loop {
            let (plans, targets, quiet) = {
                let state = self.state();
                let plans = plan(&state)?;
                check_writers(&state, &plans)?;
                let targets = state.topological(&plan::concerned(&plans));
                let quiet = state.roots_above(&targets).iter().all(|r| r.gate.is_quiet());
                (plans, targets, quiet)
            };
            if quiet {
                if self.give_back(&targets).await {
                    break plan(&self.state())?;
                }
                break plans;
            }
            guards.push(self.drain_nodes(targets).await);
        };
        let result = self.reopen_drained(plans).await;
        drop(guards);
        self.reap().await;
        result
    }

    /// Carries plans out; every root above is quiet.
    async fn reopen_drained(&self, plans: Vec<Plan>) -> Result<()> {
        let mut prepared: Vec<Prepared> = Vec::with_capacity(plans.len());
        for plan in plans {
            let context = self.reopen_context(&plan);
            let made = async {
                if plan.after.refuses_writes() && !plan.node.options().refuses_writes() {
                    self.on_iothread(plan.id, |io| async move { io.flush().await }).await?;
                }
                let reopened = plan.node.driver().reopen(&context, Value::Object(plan.own.clone())).await;
                match reopened {
                    // Nothing to prepare where the driver's own options stay.
                    Err(e) if plan.keep && e.errno() == Errno::ENOTSUP => Ok(Box::new(()) as Box<dyn Reopen>),
                    other => other,
                }
            };
            match made.await {
                Ok(reopen) => {
                    let size = plan.node.size();
                    let reopen = Rc::new(RefCell::new(Some(reopen)));
                    prepared.push(Prepared { plan, context, reopen, size });
                }
                Err(e) => {
                    take_back(prepared).await;
                    return Err(e);
                }
            }
        }
        if let Err(e) = self.switch(&prepared) {
            take_back(prepared).await;
            return Err(e);
        }
        let mut result = Ok(());
        for Prepared { plan, context, reopen, size } in prepared {
            let taken = reopen.borrow_mut().take();
            let Some(mut reopen) = taken else { continue };
            let finished = reopen.finish(&context).await;
            reopen.commit();
            if let Err(e) = finished {
                log::error!("node '{}' was reopened, but: {e}", plan.node.name());
                result = result.and(Err(e));
            }
            if plan.node.size() != size {
                self.propagate_size(plan.id);
            }
        }
        result
    }

    /// What the driver gets to know.
    fn reopen_context(&self, plan: &Plan) -> ReopenContext {
        let state = self.state();
        let mut before = state.nodes.get(&plan.id).map(|s| s.config.own.clone()).unwrap_or_default();
        let replaceable = plan.node.driver().replaceable_children();
        before.retain(|name, _| !replaceable.contains(&name.as_str()));
        let children = plan.children.iter().map(|child| {
            let (id, options) = (*child)?;
            let node = Arc::clone(&state.slot(id).ok()?.node);
            let options = options.unwrap_or_else(|| node.options());
            Some((node, options))
        });
        let children = children.collect();
        ReopenContext::new(self.clone(), Arc::clone(&plan.node), before, plan.after, children)
    }

    /// The change itself, all or nothing.
    fn switch(&self, prepared: &[Prepared]) -> Result<()> {
        let touched = {
            let state = &mut *self.state_mut();
            let mut tran = Transaction::new();
            let mut touched = Vec::new();
            let result = prepare_switch(state, &mut tran, prepared, &mut touched);
            tran.finish(state, result)?;
            super::resize::tell_parents(state, &touched);
            state.refresh_views(&touched);
            touched
        };
        self.adopt_into_drains();
        let state = self.state();
        for id in touched.iter().filter(|id| is_orphan(&state, **id)) {
            log::debug!("node '{}' has lost its last user", state.name_of(*id));
        }
        Ok(())
    }
}

/// Before anything is prepared: a node that becomes read-only has nobody who writes and stays as he is.
fn check_writers(state: &State, plans: &[Plan]) -> Result<()> {
    for plan in plans.iter().filter(|p| p.after.read_only) {
        let stays = |e: &&Edge| match e.parent {
            Parent::Root(_) => true,
            Parent::Node(id) => plans.iter().all(|p| p.id != id),
        };
        if state.users(plan.id).filter(stays).any(|e| e.pair.perm.writes()) {
            return Err(BlockError::new(
                Errno::EPERM,
                format!("Read-only block node '{}' cannot support read-write users", plan.node.name()),
            ));
        }
    }
    Ok(())
}

fn prepare_switch(
    state: &mut State,
    tran: &mut Transaction<State>,
    prepared: &[Prepared],
    touched: &mut Vec<NodeId>,
) -> Result<()> {
    for Prepared { plan, reopen, .. } in prepared {
        touched.push(plan.id);
        switch_node(state, tran, plan, reopen)?;
    }
    for Prepared { plan, reopen, .. } in prepared {
        for change in &plan.edges {
            touched.extend(change_edge(state, tran, plan.id, change)?);
        }
        let roles = reopen.borrow().as_ref().map(|r| r.roles()).unwrap_or_default();
        for (index, roles) in roles {
            let found = state.children(plan.id).find(|(i, _)| *i == index).map(|(_, e)| e.id);
            if let Some(edge) = found.and_then(|id| state.edges.get_mut(&id)) {
                tran.add(Roled { edge: edge.id, roles: edge.roles });
                edge.roles = roles;
            }
        }
    }
    perms::refresh(state, tran, touched)
}

fn switch_node(state: &mut State, tran: &mut Transaction<State>, plan: &Plan, reopen: &Shared) -> Result<()> {
    let mut held = reopen.borrow_mut();
    let mut after = plan.after;
    let mut replacement = None;
    if let Some(reopen) = &mut *held {
        reopen.apply()?;
        replacement = reopen.replacement();
        after.read_only |= reopen.read_only();
    }
    drop(held);
    let slot = state.nodes.get_mut(&plan.id);
    let config = slot.map(|slot| std::mem::replace(&mut slot.config, plan.config.clone()));
    tran.add(Switched {
        id: plan.id,
        node: Arc::clone(&plan.node),
        options: plan.node.set_options(after),
        config: config.unwrap_or_default(),
        driver: replacement.map(|new| plan.node.set_driver(new)),
        reopen: Rc::clone(reopen),
    });
    Ok(())
}

/// Returns the nodes at both ends, before and after.
fn change_edge(
    state: &mut State,
    tran: &mut Transaction<State>,
    parent: NodeId,
    change: &EdgeChange,
) -> Result<Vec<NodeId>> {
    match change {
        EdgeChange::Lead { edge, to } => {
            let old = state.edges.get(edge).map(|e| e.child);
            redirect(state, tran, *edge, *to)?;
            Ok(old.into_iter().chain([*to]).collect())
        }
        EdgeChange::Attach { name, roles, to } => {
            put_edge(state, tran, parent, name, *roles, *to)?;
            Ok(vec![*to])
        }
        EdgeChange::Detach { edge } => {
            let old = state.edges.get(edge).map(|e| e.child);
            super::change::check_removable(state, *edge)?;
            drop_edge(state, tran, *edge);
            Ok(old.into_iter().collect())
        }
    }
}

/// Everything as before, on disk as well.
async fn take_back(prepared: Vec<Prepared>) {
    for Prepared { plan, context, reopen, .. } in prepared.into_iter().rev() {
        let taken = reopen.borrow_mut().take();
        let Some(mut reopen) = taken else { continue };
        if let Err(e) = reopen.restore(&context).await {
            log::error!("node '{}' after it could not be reopened: {e}", plan.node.name());
        }
        reopen.abort();
    }
}
