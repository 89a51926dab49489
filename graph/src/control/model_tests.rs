//! Random graphs and random changes against the rules of permissions, written down a second time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;
use serde_json::json;

use super::testing::{Told, add, graph, record, run, shape};
use super::*;
use crate::*;

#[derive(Clone, Debug)]
enum Step {
    Mem(bool),
    Above { kind: usize, file: usize, backing: Option<usize>, read_only: bool },
    Delete(usize),
    Attach { node: usize, perm: u8, shared: u8 },
    Detach(usize),
    SetPerm { root: usize, perm: u8, shared: u8 },
    ReplaceChild { parent: usize, node: usize, backing: bool },
    AttachBacking { parent: usize, node: usize },
    DetachBacking(usize),
    ReplaceNode { from: usize, to: usize },
    MoveRoot { root: usize, node: usize },
    Freeze(usize),
    Thaw(usize),
}

fn steps() -> impl Strategy<Value = Vec<(Step, Option<usize>)>> {
    let n = || 0usize..12;
    let step = prop_oneof![
        2 => any::<bool>().prop_map(Step::Mem),
        3 => (0..3usize, n(), proptest::option::of(n()), any::<bool>())
            .prop_map(|(kind, file, backing, read_only)| Step::Above { kind, file, backing, read_only }),
        1 => n().prop_map(Step::Delete),
        // Sharing a lot is usual; random bits alone would conflict nearly always.
        4 => (n(), 0u8..16, prop_oneof![Just(15u8), 0u8..16])
            .prop_map(|(node, perm, shared)| Step::Attach { node, perm, shared }),
        1 => n().prop_map(Step::Detach),
        2 => (n(), 0u8..16, prop_oneof![Just(15u8), 0u8..16])
            .prop_map(|(root, perm, shared)| Step::SetPerm { root, perm, shared }),
        2 => (n(), n(), any::<bool>())
            .prop_map(|(parent, node, backing)| Step::ReplaceChild { parent, node, backing }),
        1 => (n(), n()).prop_map(|(parent, node)| Step::AttachBacking { parent, node }),
        1 => n().prop_map(Step::DetachBacking),
        2 => (n(), n()).prop_map(|(from, to)| Step::ReplaceNode { from, to }),
        1 => (n(), n()).prop_map(|(root, node)| Step::MoveRoot { root, node }),
        1 => n().prop_map(Step::Freeze),
        1 => n().prop_map(Step::Thaw),
    ];
    // Now and then a driver refuses what it is asked.
    proptest::collection::vec((step, proptest::option::weighted(0.2, 0usize..12)), 1..40)
}

struct World {
    graph: Graph,
    names: Vec<String>,
    roots: Vec<Root>,
    frozen: Vec<FreezeGuard>,
    /// What each driver holds, from what it was told.
    held: HashMap<String, PermPair>,
    made: usize,
}

impl World {
    fn name(&self, at: usize) -> String {
        let names = self.graph.node_names();
        if names.is_empty() { "none".to_owned() } else { names[at % names.len()].clone() }
    }

    fn apply(&mut self, step: &Step) -> Result<()> {
        let graph = self.graph.clone();
        let pick = |at: &usize| self.name(*at);
        let change = |c: Change| run(graph.change(&[c]));
        let perm = |bits: &u8| Perm::from_bits_truncate(*bits);
        match step {
            Step::Mem(read_only) => {
                self.made += 1;
                let name = format!("m{}", self.made);
                self.names.push(name.clone());
                let align = if self.made.is_multiple_of(3) { 4096 } else { 1 };
                add(
                    &graph,
                    json!({"driver": "mem", "node-name": name, "read-only": read_only, "size": 8192, "align": align}),
                )
            }
            Step::Above { kind, file, backing, read_only } => {
                let file = pick(file);
                let backing = backing.as_ref().map(pick);
                self.made += 1;
                let name = format!("a{}", self.made);
                let driver = ["filter", "data", "format"][*kind];
                let mut options =
                    json!({"driver": driver, "node-name": name, "file": file, "read-only": read_only});
                if let (Some(backing), 2) = (backing, kind) {
                    options["backing"] = json!(backing);
                }
                self.names.push(name);
                add(&graph, options)
            }
            Step::Delete(at) => run(graph.blockdev_del(&pick(at))),
            Step::Attach { node, perm: p, shared } => {
                let mut options = RootOptions::new(format!("user {}", self.made), false);
                options.perm = perm(p);
                options.shared = perm(shared);
                options.granularity = if *p & 1 == 0 { 512 } else { 4096 };
                let root = run(graph.attach(&pick(node), options, Rc::new(NoSource)))?;
                self.roots.push(root);
                Ok(())
            }
            Step::Detach(at) => {
                if self.roots.is_empty() {
                    return Ok(());
                }
                let root = self.roots.remove(at % self.roots.len());
                run(root.detach());
                Ok(())
            }
            Step::SetPerm { root, perm: p, shared } => match self.roots.get(*root) {
                Some(root) => run(root.set_perm(perm(p), perm(shared))),
                None => Ok(()),
            },
            Step::ReplaceChild { parent, node, backing } => {
                let child = if *backing { "backing" } else { "file" }.to_owned();
                change(Change::ReplaceChild { parent: pick(parent), child, node: pick(node) })
            }
            Step::AttachBacking { parent, node } => {
                let (parent, node) = (pick(parent), pick(node));
                // Memory has no children in its code.
                if parent.starts_with('m') {
                    return Ok(());
                }
                change(Change::AttachChild { parent, child: "backing".to_owned(), roles: Roles::COW, node })
            }
            Step::DetachBacking(parent) => {
                change(Change::DetachChild { parent: pick(parent), child: "backing".to_owned() })
            }
            Step::ReplaceNode { from, to } => change(Change::ReplaceNode { from: pick(from), to: pick(to) }),
            Step::MoveRoot { root, node } => match self.roots.get(*root) {
                Some(root) => change(Change::ReplaceRoot { root: root.id(), node: pick(node) }),
                None => Ok(()),
            },
            Step::Freeze(at) => {
                self.frozen.push(graph.freeze(&pick(at), "file", "the test")?);
                Ok(())
            }
            Step::Thaw(at) => {
                if !self.frozen.is_empty() {
                    drop(self.frozen.remove(at % self.frozen.len()));
                }
                Ok(())
            }
        }
    }

    /// Replays what every driver was told: a legal story, whose end is what the driver holds.
    fn listen(&mut self, failed: bool) {
        for name in &self.names {
            let told = record(name).take();
            let before = *self.held.entry(name.clone()).or_insert(PermPair::IDLE);
            let mut held = before;
            let mut during: Option<PermPair> = None;
            for event in told {
                match event {
                    Told::Check(perm, shared) => {
                        assert!(during.is_none(), "{name}: asked twice");
                        let asked = PermPair { perm, shared };
                        assert_eq!(asked, held.join(asked), "{name}: asked for less than it holds");
                        during = Some(asked);
                    }
                    Told::Refused => assert!(during.is_none() && failed, "{name}: a refusal was ignored"),
                    Told::Set(perm, shared) => {
                        let after = PermPair { perm, shared };
                        match during.take() {
                            // Exactly union and intersection, no more.
                            Some(during) => assert_eq!(during, held.join(after), "{name}"),
                            None => assert!(held.relaxes_to(after), "{name}: {held:?} -> {after:?} unasked"),
                        }
                        held = after;
                    }
                    Told::Abort => assert!(during.take().is_some(), "{name}: abort without check"),
                }
            }
            assert!(during.is_none(), "{name}: left hanging");
            self.held.insert(name.clone(), held);
        }
    }

    /// The rules, once more.
    fn check(&self) {
        let state = self.graph.state();
        for (id, slot) in &state.nodes {
            let users: Vec<&Edge> = state.users(*id).collect();
            for a in &users {
                for b in &users {
                    let conflict = a.id != b.id && !b.pair.shared.contains(a.pair.perm);
                    assert!(!conflict, "{} and {} on {}", a.name, b.name, slot.node.name());
                }
            }
            let all = PermPair::cumulative(users.iter().map(|e| e.pair));
            assert_eq!(slot.held, all, "{}", slot.node.name());
            assert_eq!(self.held.get(slot.node.name()).copied().unwrap_or(PermPair::IDLE), all);
            assert!(!(slot.node.options().read_only && all.perm.writes()));
            for (index, edge) in state.children(*id) {
                assert_eq!(edge.parent_node(), Some(*id));
                let (perm, shared) = slot.node.driver().child_perm(index, edge.roles, all.perm, all.shared);
                assert_eq!(
                    edge.pair,
                    PermPair { perm, shared },
                    "edge {} of {}",
                    edge.name,
                    slot.node.name()
                );
                assert!(state.nodes[&edge.child].parents.contains(&edge.id));
                assert!(!state.reaches(edge.child, *id), "a circle");
            }
            for edge in &slot.parents {
                assert_eq!(state.edges[edge].child, *id);
            }
        }
        let ends: usize = state.nodes.values().map(|s| s.parents.len()).sum();
        assert_eq!(ends, state.edges.len());
        assert!(state.reserved.is_empty());
        drop(state);
        for root in &self.roots {
            assert!(!root.is_drained());
            // The source has a view of the graph as it is.
            let view = root.view().unwrap();
            assert_eq!(view.root().name(), root.node().unwrap().name());
        }
        assert!(self.graph.inner.drains.borrow().is_empty());
    }
}

impl Edge {
    fn parent_node(&self) -> Option<NodeId> {
        match self.parent {
            Parent::Node(id) => Some(id),
            Parent::Root(_) => None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_change_breaks_the_rules(steps in steps()) {
        let mut world = World {
            graph: graph(),
            names: Vec::new(),
            roots: Vec::new(),
            frozen: Vec::new(),
            held: HashMap::new(),
            made: 0,
        };
        for (step, refuse) in steps {
            let refuser = refuse.map(|at| record(&world.name(at)));
            if let Some(refuser) = &refuser {
                refuser.refuse.store(true, SeqCst);
            }
            let before = (shape(&world.graph), world.held.clone());
            let result = world.apply(&step);
            if let Some(refuser) = &refuser {
                refuser.refuse.store(false, SeqCst);
            }
            world.listen(result.is_err());
            if result.is_err() {
                prop_assert_eq!(&shape(&world.graph), &before.0, "{:?} failed and left traces", &step);
                for (name, held) in &before.1 {
                    prop_assert_eq!(&world.held[name], held, "{:?} failed and {} holds something else", &step, name);
                }
            }
            world.check();
        }
        // Everything can be taken apart again, and all drivers end up with nothing.
        world.frozen.clear();
        for root in world.roots.drain(..) {
            run(root.detach());
        }
        run(world.graph.close_all());
        world.listen(false);
        prop_assert!(world.graph.state().nodes.is_empty() && world.graph.state().edges.is_empty());
        for (name, held) in &world.held {
            prop_assert!(held.perm.is_empty(), "{} still holds {:?}", name, held);
        }
    }
}
