//! The rules of permissions, written down a second time and another way, against the engine: random graphs, users and
//! transactions. Both agree on what is allowed, on every edge's pair, and on what every view lets through.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::query::BlockPermission;
use super::testing::{add, graph, run, shape};
use super::*;
use crate::*;

// Bits as single letters would be; nothing of `Perm` is used in the model.
const C: u8 = 1;
const W: u8 = 2;
const U: u8 = 4;
const R: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mem,
    Filter,
    Data,
    Format,
}

#[derive(Clone, Debug)]
struct MNode {
    kind: Kind,
    read_only: bool,
    force_share: bool,
    /// Its size is no multiple of its alignment.
    odd: bool,
    children: BTreeMap<&'static str, String>,
}

#[derive(Clone, Debug)]
struct MUser {
    node: String,
    used: u8,
    shared: u8,
    stays: bool,
}

#[derive(Clone, Default)]
struct Model {
    nodes: BTreeMap<String, MNode>,
    users: BTreeMap<String, MUser>,
    frozen: BTreeSet<(String, &'static str)>,
    /// Nodes that are being written to.
    written: BTreeSet<String>,
}

/// Why the model says no.
#[derive(Debug, PartialEq, Eq)]
enum No {
    Shape,
    Permissions,
}

/// (user or parent, edge, child) -> (used, shared).
type Edges = BTreeMap<(String, String, String), (u8, u8)>;

/// The table of QEMU's default permissions, bit by bit.
fn below(parent: &MNode, edge: &str, used: u8, shared: u8) -> (u8, u8) {
    let does = |bit: u8| used & bit != 0;
    let lets = |bit: u8| shared & bit != 0;
    let set = |c: bool, w: bool, u: bool, r: bool| {
        u8::from(c) * C + u8::from(w) * W + u8::from(u) * U + u8::from(r) * R
    };
    if edge == "backing" {
        return (set(does(C), false, false, false), set(true, lets(W), true, lets(W)));
    }
    match parent.kind {
        Kind::Mem => unreachable!("memory has no children"),
        Kind::Filter => (used, shared),
        Kind::Data => {
            let writes = does(W) || does(U);
            (set(does(C), writes, does(U), writes || does(R)), set(lets(C), lets(W), lets(U), false))
        }
        Kind::Format => {
            let writes = does(W) || does(U) || !parent.read_only;
            (set(true, writes, does(U), writes || does(R)), set(lets(C), false, lets(U), false))
        }
    }
}

impl Model {
    fn forced(&self, node: &str, shared: u8) -> u8 {
        if self.nodes[node].force_share { 15 } else { shared }
    }

    fn reaches(&self, from: &str, to: &str) -> bool {
        from == to || self.nodes[from].children.values().any(|c| self.reaches(c, to))
    }

    /// Everything together, by going over all edges until nothing changes.
    fn solve(&self) -> std::result::Result<Edges, No> {
        let mut edges = Edges::new();
        for (name, user) in &self.users {
            let key = (name.clone(), "root".to_owned(), user.node.clone());
            edges.insert(key, (user.used, self.forced(&user.node, user.shared)));
        }
        for (name, node) in &self.nodes {
            for (edge, child) in &node.children {
                edges.insert((name.clone(), (*edge).to_owned(), child.clone()), (0, 15));
            }
        }
        loop {
            let before = edges.clone();
            for (name, node) in &self.nodes {
                let users = edges.iter().filter(|((_, _, child), _)| child == name);
                let all = users.fold((0, 15), |all, (_, pair)| (all.0 | pair.0, all.1 & pair.1));
                for (edge, child) in &node.children {
                    let (used, shared) = below(node, edge, all.0, all.1);
                    let key = (name.clone(), (*edge).to_owned(), child.clone());
                    edges.insert(key, (used, self.forced(child, shared)));
                }
            }
            if edges == before {
                break;
            }
        }
        for (name, node) in &self.nodes {
            let users: Vec<_> = edges.iter().filter(|((_, _, child), _)| child == name).collect();
            let stands_against = users
                .iter()
                .any(|(a, (used, _))| users.iter().any(|(b, (_, shared))| a != b && used & !shared != 0));
            let used = users.iter().fold(0, |all, (_, pair)| all | pair.0);
            let no_writes = node.read_only && used & (W | U) != 0;
            let cut = node.odd && used & W != 0 && used & R == 0 && !self.written.contains(name);
            if stands_against || no_writes || cut {
                return Err(No::Permissions);
            }
        }
        Ok(edges)
    }

    fn change(&mut self, change: &Change) -> std::result::Result<(), No> {
        let edge_of = |name: &str| if name == "backing" { "backing" } else { "file" };
        match change {
            Change::ReplaceChild { parent, child, node } => {
                let edge = edge_of(child);
                let fits = self.nodes[parent].children.contains_key(edge)
                    && !self.frozen.contains(&(parent.clone(), edge))
                    && !self.reaches(node, parent);
                self.nodes.get_mut(parent).unwrap().children.insert(edge, node.clone());
                if fits { Ok(()) } else { Err(No::Shape) }
            }
            Change::AttachChild { parent, child, node, .. } => {
                let edge = edge_of(child);
                if self.nodes[parent].children.contains_key(edge) || self.reaches(node, parent) {
                    return Err(No::Shape);
                }
                self.nodes.get_mut(parent).unwrap().children.insert(edge, node.clone());
                Ok(())
            }
            Change::DetachChild { parent, child } => {
                let edge = edge_of(child);
                let frozen = self.frozen.contains(&(parent.clone(), edge));
                let had = self.nodes.get_mut(parent).unwrap().children.remove(edge);
                if had.is_none() || frozen { Err(No::Shape) } else { Ok(()) }
            }
            Change::ReplaceNode { from, to } => {
                for user in self.users.values_mut().filter(|u| u.node == *from && !u.stays) {
                    user.node.clone_from(to);
                }
                let parents: Vec<String> =
                    self.nodes.keys().filter(|p| !self.reaches(to, p)).cloned().collect();
                for parent in parents {
                    for (edge, child) in &mut self.nodes.get_mut(&parent).unwrap().children {
                        if child == from {
                            if self.frozen.contains(&(parent.clone(), *edge)) {
                                return Err(No::Shape);
                            }
                            child.clone_from(to);
                        }
                    }
                }
                Ok(())
            }
            Change::ReplaceRoot { .. } => unreachable!("made by the test itself"),
        }
    }
}

/// A source that keeps the view it runs with, as exports do.
#[derive(Default)]
struct Keeper(RefCell<Option<Arc<View>>>);

impl RequestSource for Keeper {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        Box::pin(async { Ok(()) })
    }
    fn resume(&self, view: Arc<View>) {
        *self.0.borrow_mut() = Some(view);
    }
    fn resized(&self, _size: u64) {}
}

#[derive(Clone, Debug)]
enum Surgery {
    Child { parent: usize, node: usize, backing: bool },
    Attach { parent: usize, node: usize },
    Detach(usize),
    Node { from: usize, to: usize },
    Root { user: usize, node: usize },
}

#[derive(Clone, Debug)]
enum Step {
    Mem { read_only: bool, force_share: bool, odd: bool },
    Above { kind: Kind, file: usize, backing: Option<usize>, read_only: bool, force_share: bool },
    Delete(usize),
    Come { node: usize, used: u8, shared: u8, stays: bool },
    Go(usize),
    SetPerm { user: usize, used: u8, shared: u8 },
    Surgery(Vec<Surgery>),
    Freeze(usize, bool),
    Thaw,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = || 0usize..8;
    let pair = || (0u8..16, prop_oneof![3 => Just(15u8), 1 => Just(13u8), 1 => 0u8..16]);
    let kind = prop_oneof![Just(Kind::Filter), Just(Kind::Data), Just(Kind::Format)];
    let rare = || proptest::bool::weighted(0.2);
    let surgery = prop_oneof![
        (n(), n(), any::<bool>()).prop_map(|(parent, node, backing)| Surgery::Child {
            parent,
            node,
            backing
        }),
        (n(), n()).prop_map(|(parent, node)| Surgery::Attach { parent, node }),
        n().prop_map(Surgery::Detach),
        (n(), n()).prop_map(|(from, to)| Surgery::Node { from, to }),
        (n(), n()).prop_map(|(user, node)| Surgery::Root { user, node }),
    ];
    let step = prop_oneof![
        2 => (rare(), rare(), rare())
            .prop_map(|(read_only, force_share, odd)| Step::Mem { read_only, force_share, odd }),
        3 => (kind, n(), proptest::option::of(n()), rare(), rare()).prop_map(
            |(kind, file, backing, read_only, force_share)| Step::Above { kind, file, backing, read_only, force_share }),
        1 => n().prop_map(Step::Delete),
        4 => (n(), pair(), rare())
            .prop_map(|(node, (used, shared), stays)| Step::Come { node, used, shared, stays }),
        2 => n().prop_map(Step::Go),
        2 => (n(), pair()).prop_map(|(user, (used, shared))| Step::SetPerm { user, used, shared }),
        4 => proptest::collection::vec(surgery, 1..4).prop_map(Step::Surgery),
        1 => (n(), any::<bool>()).prop_map(|(at, backing)| Step::Freeze(at, backing)),
        1 => Just(Step::Thaw),
    ];
    proptest::collection::vec(step, 1..40)
}

struct World {
    graph: Graph,
    model: Model,
    roots: BTreeMap<String, (Root, Rc<Keeper>)>,
    guards: Vec<FreezeGuard>,
    made: usize,
}

/// The name at a place, if there is any.
fn at<V>(names: &BTreeMap<String, V>, place: usize) -> Option<String> {
    names.keys().nth(place % names.len().max(1)).cloned()
}

impl World {
    /// Lets both do it; `None` when there is nothing to do it with.
    fn apply(&mut self, step: &Step) -> Option<(std::result::Result<Edges, No>, Result<()>, Model)> {
        let mut model = self.model.clone();
        let node = |place: usize| at(&self.model.nodes, place);
        let perm = |bits: u8| Perm::from_bits_truncate(bits);
        self.made += 1;
        let name = format!("n{}", self.made);
        let mut fits = Ok(());
        let result = match step {
            Step::Mem { read_only, force_share, odd } => {
                let read_only = *read_only || *force_share;
                let kind = Kind::Mem;
                let children = BTreeMap::new();
                let made = MNode { kind, read_only, force_share: *force_share, odd: *odd, children };
                model.nodes.insert(name.clone(), made);
                add(
                    &self.graph,
                    json!({"driver": "mem", "node-name": name, "read-only": read_only, "force-share": force_share,
                        "size": if *odd { 1000 } else { 8192 }, "align": 512}),
                )
            }
            Step::Above { kind, file, backing, read_only, force_share } => {
                let file = node(*file)?;
                let backing = backing.and_then(node).filter(|_| *kind == Kind::Format);
                let read_only = *read_only || *force_share;
                let mut children = BTreeMap::from([("file", file.clone())]);
                let driver = match kind {
                    Kind::Filter => "filter",
                    Kind::Data => "data",
                    _ => "format",
                };
                let mut options = json!({"driver": driver, "node-name": name, "file": file, "read-only": read_only,
                    "force-share": force_share});
                if let Some(backing) = backing {
                    options["backing"] = json!(backing);
                    children.insert("backing", backing);
                }
                let made = MNode { kind: *kind, read_only, force_share: *force_share, odd: false, children };
                model.nodes.insert(name, made);
                add(&self.graph, options)
            }
            Step::Delete(place) => {
                let name = node(*place)?;
                let used = model.users.values().any(|u| u.node == name)
                    || model.nodes.values().any(|n| n.children.values().any(|c| *c == name));
                if used {
                    fits = Err(No::Shape);
                }
                model.nodes.remove(&name);
                model.frozen.retain(|(parent, _)| *parent != name);
                run(self.graph.blockdev_del(&name))
            }
            Step::Come { node: place, used, shared, stays } => {
                let node = node(*place)?;
                let name = format!("user {}", self.made);
                let keeper = Rc::new(Keeper::default());
                let options = RootOptions {
                    perm: perm(*used),
                    shared: perm(*shared),
                    stay_at_node: *stays,
                    ..RootOptions::new(name.clone(), false)
                };
                let user = MUser { node: node.clone(), used: *used, shared: *shared, stays: *stays };
                model.users.insert(name.clone(), user);
                run(self.graph.attach(&node, options, keeper.clone())).map(|root| {
                    self.roots.insert(name, (root, keeper));
                })
            }
            Step::Go(place) => {
                let name = at(&self.model.users, *place)?;
                model.users.remove(&name);
                run(self.roots.remove(&name).unwrap().0.detach());
                Ok(())
            }
            Step::SetPerm { user, used, shared } => {
                let name = at(&self.model.users, *user)?;
                let user = model.users.get_mut(&name).unwrap();
                (user.used, user.shared) = (*used, *shared);
                run(self.roots[&name].0.set_perm(perm(*used), perm(*shared)))
            }
            Step::Surgery(list) => {
                let mut changes = Vec::new();
                for surgery in list {
                    let change = match surgery {
                        Surgery::Child { parent, node: to, backing } => Change::ReplaceChild {
                            parent: node(*parent)?,
                            child: if *backing { "backing" } else { "file" }.to_owned(),
                            node: node(*to)?,
                        },
                        Surgery::Attach { parent, node: to } => Change::AttachChild {
                            // Memory has no children in its code.
                            parent: node(*parent).filter(|p| self.model.nodes[p].kind != Kind::Mem)?,
                            child: "backing".to_owned(),
                            roles: Roles::COW,
                            node: node(*to)?,
                        },
                        Surgery::Detach(parent) => {
                            Change::DetachChild { parent: node(*parent)?, child: "backing".to_owned() }
                        }
                        Surgery::Node { from, to } => {
                            Change::ReplaceNode { from: node(*from)?, to: node(*to)? }
                        }
                        Surgery::Root { user, node: to } => {
                            let (user, to) = (at(&self.model.users, *user)?, node(*to)?);
                            model.users.get_mut(&user).unwrap().node.clone_from(&to);
                            changes.push(Change::ReplaceRoot { root: self.roots[&user].0.id(), node: to });
                            continue;
                        }
                    };
                    // After the first that does not fit the rest is of no interest, nor safe to look at.
                    if fits.is_ok() {
                        fits = model.change(&change);
                    }
                    changes.push(change);
                }
                run(self.graph.change(&changes))
            }
            Step::Freeze(place, backing) => {
                let name = node(*place)?;
                let edge = if *backing { "backing" } else { "file" };
                if !model.nodes[&name].children.contains_key(edge) {
                    fits = Err(No::Shape);
                }
                let result = self.graph.freeze(&name, edge, "a test");
                result.map(|guard| {
                    model.frozen.insert((name, edge));
                    self.guards.push(guard);
                })
            }
            Step::Thaw => {
                self.guards.clear();
                model.frozen.clear();
                Ok(())
            }
        };
        Some((fits.and_then(|()| model.solve()), result, model))
    }

    /// What the engine has, in the model's terms.
    fn edges(&self) -> Edges {
        let shape = shape(&self.graph);
        let name = |id: u64| shape.nodes.iter().find(|n| n.id == id).unwrap().name.clone();
        let bits = |list: &[BlockPermission]| {
            list.iter().fold(0, |all, p| {
                all | match p {
                    BlockPermission::ConsistentRead => C,
                    BlockPermission::Write => W,
                    BlockPermission::WriteUnchanged => U,
                    BlockPermission::Resize => R,
                }
            })
        };
        let edges = shape.edges.iter();
        edges
            .map(|e| ((name(e.parent), e.name.clone(), name(e.child)), (bits(&e.perm), bits(&e.shared_perm))))
            .collect()
    }

    /// What every running view lets through: all that its user has a right to, and nothing that somebody does not share.
    fn check_views(&self, edges: &Edges) {
        for (user, (root, keeper)) in &self.roots {
            assert!(!root.is_drained());
            let view = keeper.0.borrow().clone().expect("it runs");
            let name = |at: usize| view.nodes()[at].node().name().to_owned();
            let mut needed = BTreeMap::from([(0, self.model.users[user].used)]);
            assert_eq!(name(0), self.model.users[user].node);
            for at in 0..view.nodes().len() {
                let node = &self.model.nodes[&name(at)];
                let names: Vec<&str> =
                    ["file", "backing"].into_iter().filter(|e| node.children.contains_key(e)).collect();
                // A filter that got a backing child has it where the engine put it: found by name.
                for edge in names {
                    let child = &node.children[edge];
                    let index = (0..view.nodes()[at].child_slots()).filter_map(|s| view.nodes()[at].child(s));
                    let reached: Vec<usize> = index.filter(|i| name(*i) == *child).collect();
                    assert!(!reached.is_empty(), "{user}: no {edge} of {}", name(at));
                    let Some(used) = needed.get(&at).copied() else { continue };
                    let (need, _) = below(node, edge, used, 15);
                    // Where one node is both children either place may be the edge's: the wider one.
                    let widest =
                        reached.iter().max_by_key(|i| view.nodes()[**i].handle().bits().count_ones());
                    let widest = *widest.unwrap();
                    let lacks = need & !C & !view.nodes()[widest].handle().bits();
                    let forbidden = self.model.nodes[child].read_only;
                    assert!(
                        lacks == 0 || forbidden,
                        "{user} is refused {lacks:b} at {child} below {}",
                        name(at)
                    );
                    *needed.entry(widest).or_insert(0) |= need;
                }
            }
            for at in 0..view.nodes().len() {
                let handle = view.nodes()[at].handle().bits();
                let node = name(at);
                // The widest that anybody else lets pass; its own edge may be any one of them.
                let users: Vec<_> = edges.iter().filter(|((_, _, child), _)| *child == node).collect();
                let own_may_be = |own: &&(&(String, String, String), &(u8, u8))| {
                    users.iter().all(|other| other.0 == own.0 || handle & !other.1.1 == 0)
                };
                assert!(
                    users.iter().any(|own| own_may_be(&own)),
                    "{user} could do {handle:b} to {node} against somebody's will: {users:?}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn engine_and_model_agree(steps in steps()) {
        let mut world = World {
            graph: graph(),
            model: Model::default(),
            roots: BTreeMap::new(),
            guards: Vec::new(),
            made: 0,
        };
        for step in steps {
            let Some((expected, result, after)) = world.apply(&step) else { continue };
            let text = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let permissions = ["Permission conflict", "Block node is read-only", "Cannot get 'write'"]
                .iter()
                .any(|start| text.starts_with(start));
            match &expected {
                Ok(_) => prop_assert!(result.is_ok(), "{:?} is refused: {}", &step, &text),
                Err(No::Shape) => prop_assert!(result.is_err() && !permissions, "{:?}: {}", &step, &text),
                Err(No::Permissions) => prop_assert!(permissions, "{:?}: {}", &step, &text),
            }
            if expected.is_ok() {
                world.model = after;
            } else if permissions {
                prop_assert!(text.contains("Way out: ") || text.contains("node"), "{}", &text);
            }
            let now = world.model.solve().expect("what was allowed stays allowed");
            let writers = now.iter().filter(|(_, (used, _))| used & W != 0);
            world.model.written = writers.map(|((_, _, child), _)| child.clone()).collect();
            prop_assert_eq!(&world.edges(), &now, "after {:?}", &step);
            world.check_views(&now);
        }
    }
}
