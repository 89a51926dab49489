//! What a list of options means for the nodes it names: which options they will run with, which edges lead elsewhere.
//!
//! Called by `control::reopen` with nobody above the nodes. Reads the graph, changes nothing.
//!
//! A node that was defined inside the options of another one takes from it what its user did not say: it is reopened along
//! with it where that changes something, and may be given other options in place.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::super::open::inherit;
use super::super::{Config, State, no_such_node};
use crate::error::{BlockError, Errno, Result};
use crate::ids::{EdgeId, NodeId};
use crate::node::Node;
use crate::options::{CommonOptions, NodeOptions};
use crate::reopen::cannot_change;
use crate::role::Roles;

/// What a node is to become.
pub(crate) struct Wish {
    pub(crate) common: CommonOptions,
    pub(crate) own: Map<String, Value>,
    /// The children stay as they are, whatever `own` says.
    pub(crate) keep: bool,
}

/// A child that comes, goes, or is another one.
pub(crate) enum EdgeChange {
    Lead { edge: EdgeId, to: NodeId },
    Attach { name: String, roles: Roles, to: NodeId },
    Detach { edge: EdgeId },
}

/// One node's part.
pub(crate) struct Plan {
    pub(crate) id: NodeId,
    pub(crate) node: Arc<Node>,
    /// As it will be.
    pub(crate) config: Config,
    pub(crate) after: NodeOptions,
    /// What the driver is asked for.
    pub(crate) own: Map<String, Value>,
    /// The driver's own options and the children stay.
    pub(crate) keep: bool,
    pub(crate) edges: Vec<EdgeChange>,
    /// By index: the children as they will be, with their options where these change, too.
    pub(crate) children: Vec<Option<(NodeId, Option<NodeOptions>)>>,
}

/// The nodes whose users notice.
pub(crate) fn concerned(plans: &[Plan]) -> Vec<NodeId> {
    let ends = plans.iter().flat_map(|p| &p.edges).filter_map(|e| match e {
        EdgeChange::Lead { to, .. } | EdgeChange::Attach { to, .. } => Some(*to),
        EdgeChange::Detach { .. } => None,
    });
    plans.iter().map(|p| p.id).chain(ends).collect()
}

impl State {
    /// Works out the arguments of `blockdev-reopen`.
    pub(crate) fn plan_reopen(&self, list: &[Value]) -> Result<Vec<Plan>> {
        let mut wishes = Vec::with_capacity(list.len());
        for value in list {
            let (common, own) = CommonOptions::split(value.clone())?;
            let Some(name) = &common.node_name else {
                return Err(BlockError::invalid("node-name not specified"));
            };
            let id = self.find(name).ok_or_else(|| {
                BlockError::new(Errno::ENOENT, format!("Failed to find node with node-name='{name}'"))
            })?;
            wishes.push((id, Wish { common, own, keep: false }));
        }
        self.plan_wishes(wishes)
    }

    /// The nodes that become active or inactive together.
    pub(crate) fn plan_active(&self, name: Option<&str>, active: bool) -> Result<Vec<Plan>> {
        let tops: Vec<NodeId> = match name {
            Some(name) => vec![self.find(name).ok_or_else(|| no_such_node(name))?],
            None => self.nodes.keys().copied().collect(),
        };
        let mut changing: Vec<NodeId> = Vec::new();
        for id in self.topological(&tops) {
            let slot = self.slot(id)?;
            if slot.node.options().inactive != active {
                continue;
            }
            let stays = |e: &crate::edge::Edge| match e.parent {
                crate::edge::Parent::Node(parent) => {
                    let inactive = self.nodes.get(&parent).is_some_and(|s| s.node.options().inactive);
                    !inactive && !changing.contains(&parent)
                }
                crate::edge::Parent::Root(_) => e.pair.perm.writes(),
            };
            if !active && self.users(id).any(stays) {
                if self
                    .users(id)
                    .any(|e| matches!(e.parent, crate::edge::Parent::Root(_)) && e.pair.perm.writes())
                {
                    return Err(BlockError::errno_only(Errno::EPERM));
                }
                // Something else that is active uses it.
                continue;
            }
            changing.push(id);
        }
        let wish = |id: &NodeId| {
            let mut config = self.slot(*id)?.config.clone();
            config.common.active = Some(active);
            Ok((*id, Wish { common: config.common, own: config.own, keep: true }))
        };
        self.plan_wishes(changing.iter().map(wish).collect::<Result<Vec<_>>>()?)
    }

    /// Adds what is defined in place, and what takes options from a node that changes.
    pub(crate) fn plan_wishes(&self, list: Vec<(NodeId, Wish)>) -> Result<Vec<Plan>> {
        let tops: Vec<NodeId> = list.iter().map(|(id, _)| *id).collect();
        let mut wishes = BTreeMap::new();
        for (id, wish) in list {
            if wishes.insert(id, wish).is_some() {
                return Err(BlockError::invalid(format!("Node '{}' is listed twice", self.name_of(id))));
            }
        }
        let mut plans: Vec<Plan> = Vec::new();
        // Parents first, so that children know what they inherit.
        for id in self.topological(&tops) {
            let slot = self.slot(id)?;
            let above = slot.config.parent.and_then(|p| plans.iter().find(|plan| plan.id == p));
            let roles = self
                .users(id)
                .find(|e| matches!(e.parent, crate::edge::Parent::Node(n) if Some(n) == slot.config.parent));
            let inherited = match (above, roles) {
                (Some(plan), Some(edge)) => inherit(&plan.after, edge.roles),
                _ => slot.config.inherited,
            };
            let wish = match wishes.remove(&id) {
                Some(wish) => wish,
                // Not asked for: only where something changes by it.
                None if slot.config.common.effective(&inherited).ok()
                    == slot.config.common.effective(&slot.config.inherited).ok() =>
                {
                    continue;
                }
                None => Wish { common: slot.config.common.clone(), own: slot.config.own.clone(), keep: true },
            };
            let nested = self.nested(id, &wish)?;
            for (child, wish) in nested {
                if wishes.insert(child, wish).is_some() {
                    let name = self.name_of(child);
                    return Err(BlockError::invalid(format!("Node '{name}' is listed twice")));
                }
            }
            plans.push(self.plan(id, wish, inherited)?);
        }
        self.note_children(&mut plans);
        Ok(plans)
    }

    /// Options of children in place.
    fn nested(&self, id: NodeId, wish: &Wish) -> Result<Vec<(NodeId, Wish)>> {
        let mut out = Vec::new();
        if wish.keep {
            return Ok(out);
        }
        let replaceable = self.slot(id)?.node.driver().replaceable_children();
        for (_, edge) in self.children(id).filter(|(_, e)| replaceable.contains(&e.name.as_str())) {
            let Some(Value::Object(options)) = wish.own.get(&edge.name) else { continue };
            let child = self.slot(edge.child)?;
            if child.config.parent != Some(id) {
                return Err(cannot_change(&edge.name));
            }
            let (common, own) = CommonOptions::split(Value::Object(options.clone()))?;
            if common.node_name.as_deref().is_some_and(|name| name != child.node.name()) {
                return Err(cannot_change(&format!("{}.node-name", edge.name)));
            }
            out.push((edge.child, Wish { common, own, keep: false }));
        }
        Ok(out)
    }

    fn plan(&self, id: NodeId, wish: Wish, inherited: NodeOptions) -> Result<Plan> {
        let slot = self.slot(id)?;
        let node = Arc::clone(&slot.node);
        let Wish { common, own, keep } = wish;
        let after = common.effective(&inherited)?;
        let before = node.options();
        let replaceable = node.driver().replaceable_children();
        let edges = if keep { Vec::new() } else { self.plan_edges(id, replaceable, &own)? };
        if common.driver != node.driver_name() {
            return Err(cannot_change("driver"));
        }
        if after.inactive != before.inactive && !keep {
            return Err(cannot_change("active"));
        }
        if after.force_share != before.force_share {
            return Err(cannot_change("force-share"));
        }
        let config = Config { common, own: own.clone(), inherited, parent: slot.config.parent };
        let mut own = own;
        own.retain(|name, _| !replaceable.contains(&name.as_str()));
        Ok(Plan { id, node, config, after, own, keep, edges, children: Vec::new() })
    }

    /// What becomes of the children that may be replaced.
    fn plan_edges(
        &self,
        id: NodeId,
        replaceable: &[&str],
        own: &Map<String, Value>,
    ) -> Result<Vec<EdgeChange>> {
        let mut out = Vec::new();
        let driver = self.slot(id)?.node.driver();
        for name in replaceable {
            let edge = self.children(id).find(|(_, e)| e.name == *name).map(|(_, e)| e);
            let cow = match edge {
                Some(edge) => edge.roles.contains(Roles::COW),
                None => driver.backing_child().is_some() && *name == "backing",
            };
            match (own.get(*name), edge) {
                (None, Some(_)) if cow => {
                    let text = format!("{name} is missing for '{}'", self.name_of(id));
                    return Err(BlockError::invalid(text));
                }
                (None, Some(_)) => {
                    return Err(BlockError::invalid(format!("Parameter '{name}' is missing")));
                }
                (None, None) => {}
                (Some(value), edge) if value.is_null() || value.as_str() == Some("") => {
                    if !cow {
                        let text = format!("Invalid parameter type for '{name}', expected: BlockdevRef");
                        return Err(BlockError::invalid(text));
                    }
                    out.extend(edge.map(|e| EdgeChange::Detach { edge: e.id }));
                }
                (Some(Value::String(reference)), edge) => {
                    let to = self.find(reference).ok_or_else(|| no_such_node(reference))?;
                    match edge {
                        Some(edge) if edge.child == to => {}
                        Some(edge) => {
                            self.check_content(id, edge.roles, edge.child, to)?;
                            out.push(EdgeChange::Lead { edge: edge.id, to });
                        }
                        None if cow => {
                            out.push(EdgeChange::Attach { name: (*name).to_owned(), roles: Roles::COW, to });
                        }
                        None => return Err(cannot_change(name)),
                    }
                }
                // In place: a wish of its own.
                (Some(Value::Object(_)), Some(_)) => {}
                (Some(_), _) => return Err(cannot_change(name)),
            }
        }
        Ok(out)
    }

    /// A format has read its metadata: another image in their place would be overwritten with them.
    fn check_content(&self, parent: NodeId, roles: Roles, old: NodeId, new: NodeId) -> Result<()> {
        if !roles.contains(Roles::METADATA) || self.reaches(new, parent) || self.same_content(old, new) {
            return Ok(());
        }
        let (parent, old, new) = (self.name_of(parent), self.name_of(old), self.name_of(new));
        Err(BlockError::invalid(format!(
            "Node '{new}' does not show the same image as '{old}': '{parent}' cannot change over to it; delete '{parent}' \
             and add it again"
        )))
    }

    /// Fills in what the children of the planned nodes will be.
    fn note_children(&self, plans: &mut [Plan]) {
        let options: BTreeMap<NodeId, NodeOptions> = plans.iter().map(|p| (p.id, p.after)).collect();
        for plan in plans {
            let slots = self.nodes.get(&plan.id).map(|s| s.children.clone()).unwrap_or_default();
            let child = |place: &Option<EdgeId>| {
                let edge = self.edges.get(place.as_ref()?)?;
                let changed = plan.edges.iter().find_map(|c| match c {
                    EdgeChange::Lead { edge: id, to } if *id == edge.id => Some(Some(*to)),
                    EdgeChange::Detach { edge: id } if *id == edge.id => Some(None),
                    _ => None,
                });
                let id = changed.unwrap_or(Some(edge.child))?;
                Some((id, options.get(&id).copied()))
            };
            let mut children: Vec<_> = slots.iter().map(child).collect();
            let backing = plan.node.driver().backing_child();
            for change in &plan.edges {
                if let (EdgeChange::Attach { to, .. }, Some(index)) = (change, backing) {
                    let len = children.len().max(index + 1);
                    children.resize(len, None);
                    if let Some(place) = children.get_mut(index) {
                        *place = Some((*to, options.get(to).copied()));
                    }
                }
            }
            plan.children = children;
        }
    }
}
