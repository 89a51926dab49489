//! The control side by example: texts, failures that leave nothing, changes under drained sources, sizes, queries.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use serde_json::{Value, json};

use super::testing::{Told, add, graph, mem, record, run, shape};
use super::*;
use crate::*;

/// A source that notes what happens to it and is quiet at once.
#[derive(Default)]
struct Source {
    notes: RefCell<Vec<String>>,
    view: RefCell<Option<Arc<View>>>,
    quiet: Cell<bool>,
}

impl Source {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.borrow_mut())
    }
}

impl RequestSource for Source {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        assert!(!self.quiet.replace(true));
        self.notes.borrow_mut().push("quiesce".to_owned());
        Box::pin(async { Ok(()) })
    }
    fn resume(&self, view: Arc<View>) {
        self.quiet.set(false);
        self.notes.borrow_mut().push(format!("resume {}", view.nodes().len()));
        *self.view.borrow_mut() = Some(view);
    }
    fn resized(&self, size: u64) {
        assert!(self.quiet.get(), "resized while it runs");
        self.notes.borrow_mut().push(format!("resized {size}"));
    }
}

fn attach(graph: &Graph, node: &str, writable: bool) -> (Root, Rc<Source>) {
    let source = Rc::new(Source::default());
    let mut options = RootOptions::new(format!("export '{node}'"), writable);
    options.granularity = 512;
    let root = run(graph.attach(node, options, source.clone())).unwrap();
    (root, source)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, text: &str) {
    assert_eq!(result.unwrap_err().to_string(), text);
}

#[test]
fn bad_definitions_are_refused_in_qemus_words() {
    let g = graph();
    mem(&g, "n");
    let cases: [(Value, &str); 18] = [
        (json!({"driver": "mem"}), "'node-name' must be specified for the root node"),
        (json!({"node-name": "x"}), "Parameter 'driver' is missing"),
        (json!({"driver": "foo", "node-name": "x"}), "Parameter 'driver' does not accept value 'foo'"),
        (json!({"driver": "mem", "node-name": "1x"}), "Invalid node-name: '1x'"),
        (json!({"driver": "mem", "node-name": ""}), "Invalid node-name: ''"),
        (json!({"driver": "mem", "node-name": "a b"}), "Invalid node-name: 'a b'"),
        (json!({"driver": "mem", "node-name": "x".repeat(32)}), "Node name too long"),
        (json!({"driver": "mem", "node-name": "n"}), "Duplicate nodes with node-name='n'"),
        (json!({"driver": "mem", "node-name": "x", "bogus": 1}), "Parameter 'bogus' is unexpected"),
        (
            json!({"driver": "mem", "node-name": "x", "read-only": "on"}),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            json!({"driver": "mem", "node-name": "x", "cache": {"direct": 1}}),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            json!({"driver": "mem", "node-name": "x", "cache": {"write": true}}),
            "Parameter 'cache.write' is unexpected",
        ),
        (
            json!({"driver": "mem", "node-name": "x", "force-share": true}),
            "force-share=on can only be used with read-only images",
        ),
        (
            json!({"driver": "mem", "node-name": "x", "detect-zeroes": "unmap"}),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (
            json!({"driver": "mem", "node-name": "x", "detect-zeroes": "bla"}),
            "Parameter 'detect-zeroes' does not accept value 'bla'",
        ),
        (
            json!({"driver": "filter", "node-name": "x", "file": "nope"}),
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (json!({"driver": "filter", "node-name": "x"}), "Parameter 'file' is missing"),
        (json!("x"), "Invalid parameter type for 'options', expected: object"),
    ];
    for (options, text) in cases {
        refused(add(&g, options), text);
        assert_eq!(g.node_names(), ["n"]);
    }
    let name = "x".repeat(31);
    mem(&g, &name);
}

#[test]
fn nesting_has_an_end() {
    let g = graph();
    let mut options = json!({"driver": "mem"});
    for _ in 0..100 {
        options = json!({"driver": "filter", "file": options});
    }
    options["node-name"] = json!("top");
    refused(add(&g, options), "Block device definitions are nested too deeply");
    assert!(g.state().nodes.is_empty() && g.state().reserved.is_empty() && g.state().edges.is_empty());
}

#[test]
fn a_failed_open_leaves_nothing() {
    let g = graph();
    mem(&g, "base");
    let before = shape(&g);
    let inner = json!({"driver": "format", "node-name": "in", "file": {"driver": "mem", "node-name": "f"}, "backing": "base"});
    refused(
        add(&g, json!({"driver": "filter", "node-name": "top", "file": inner, "broken": true})),
        "broken",
    );
    assert_eq!(shape(&g), before);
    assert!(record("in").closed.load(SeqCst) && record("f").closed.load(SeqCst));
    assert!(!record("base").closed.load(SeqCst));
    // Locks were taken for the format's metadata and given back.
    assert!(record("f").take().contains(&Told::Set(Perm::NONE, Perm::ALL)));
    // The names are free again.
    mem(&g, "in");
    mem(&g, "f");
    mem(&g, "top");
}

#[test]
fn nodes_are_hidden_until_their_command_is_through() {
    let g = graph();
    let options =
        json!({"driver": "filter", "node-name": "top", "file": {"driver": "mem", "node-name": "f"}});
    add(&g, options).unwrap();
    let generated = json!({"driver": "filter", "node-name": "t2", "file": {"driver": "mem"}});
    add(&g, generated).unwrap();
    assert!(g.node_names().iter().any(|n| n.starts_with("#block")));
    refused(run(g.blockdev_del("f")), "Node f is not owned by the monitor");
    refused(run(g.blockdev_del("zz")), "Failed to find node with node-name='zz'");
    mem(&g, "base");
    add(&g, json!({"driver": "filter", "node-name": "t3", "file": "base"})).unwrap();
    refused(run(g.blockdev_del("base")), "Block device base is in use: it is the 'file' child of node 't3'");
    let (root, _source) = attach(&g, "top", true);
    refused(run(g.blockdev_del("top")), "Node top is in use: it is used by export 'top'");
    run(root.detach());
    run(g.blockdev_del("top")).unwrap();
    // The inline child went with it.
    assert!(record("f").closed.load(SeqCst) && !g.node_names().contains(&"f".to_owned()));
}

#[test]
fn conflicts_name_both_users() {
    let g = graph();
    mem(&g, "f");
    add(&g, json!({"driver": "format", "node-name": "n", "file": "f"})).unwrap();
    let options = RootOptions::new("export 'e'", true);
    refused(
        run(g.attach("f", options, Rc::new(NoSource))),
        "Permission conflict on node 'f': permissions 'write' are both required by export 'e' (uses node 'f' as \
         'root' child) and unshared by node 'n' (uses node 'f' as 'file' child). Way out: use node 'n' in place of node 'f'.",
    );
    refused(
        run(g.block_resize("f", 4096)),
        "Permission conflict on node 'f': permissions 'resize' are both required by the resizing of 'f' (uses node 'f' \
         as 'root' child) and unshared by node 'n' (uses node 'f' as 'file' child). Way out: use node 'n' in place of node \
         'f'.",
    );
    add(&g, json!({"driver": "mem", "node-name": "ro", "read-only": true})).unwrap();
    refused(
        run(g.attach("ro", RootOptions::new("e", true), Rc::new(NoSource))),
        "Block node is read-only. Way out: add node 'ro' with read-only=off.",
    );
    refused(run(g.block_resize("ro", 4096)), "Image is read-only");
    add(&g, json!({"driver": "mem", "node-name": "odd", "size": 1000, "align": 512})).unwrap();
    refused(
        run(g.attach("odd", RootOptions::new("e", true), Rc::new(NoSource))),
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment. Way out: resize \
         node 'odd' from 1000 bytes to a multiple of 512, or add it with cache.direct=off.",
    );
}

#[test]
fn a_filter_goes_in_under_a_running_source_and_out_again() {
    let g = graph();
    mem(&g, "disk");
    let (root, source) = attach(&g, "disk", true);
    assert_eq!(source.take(), ["resume 1"]);
    record("disk").take();
    add(&g, json!({"driver": "filter", "node-name": "flt", "file": "disk"})).unwrap();
    let replace = |from: &str, to: &str| Change::ReplaceNode { from: from.to_owned(), to: to.to_owned() };
    run(g.change(&[replace("disk", "flt")])).unwrap();
    assert_eq!(source.take(), ["quiesce", "resume 2"]);
    assert_eq!(root.node().unwrap().name(), "flt");
    // The disk was in the same hands before and after, so that its driver was left alone.
    assert_eq!(record("disk").take(), []);
    refused(
        run(g.change(&[Change::ReplaceChild {
            parent: "flt".into(),
            child: "file".into(),
            node: "flt".into(),
        }])),
        "Making 'flt' a file child of 'flt' would create a cycle",
    );
    assert_eq!(source.take(), ["quiesce", "resume 2"]);
    run(g.change(&[replace("flt", "disk")])).unwrap();
    assert_eq!(source.take(), ["quiesce", "resume 1"]);
    run(g.blockdev_del("flt")).unwrap();
    run(root.detach());
    assert_eq!(record("disk").take().last(), Some(&Told::Set(Perm::NONE, Perm::ALL)));
}

#[test]
fn frozen_links_neither_go_nor_lead_elsewhere() {
    let g = graph();
    mem(&g, "base");
    mem(&g, "f");
    add(&g, json!({"driver": "format", "node-name": "top", "file": "f", "backing": "base"})).unwrap();
    add(&g, json!({"driver": "filter", "node-name": "flt", "file": "top"})).unwrap();
    mem(&g, "other");
    let chain = g.freeze_chain("flt", "base", "job 'j'").unwrap();
    refused(
        g.freeze_chain("flt", "other", "job 'j'").map(|_| ()),
        "'other' is not in the backing chain of 'flt'",
    );
    let detach = Change::DetachChild { parent: "top".into(), child: "backing".into() };
    refused(
        run(g.change(std::slice::from_ref(&detach))),
        "Cannot remove frozen 'backing' link from 'top' to 'base': job 'j' relies on it",
    );
    let replace = Change::ReplaceChild { parent: "flt".into(), child: "file".into(), node: "other".into() };
    refused(
        run(g.change(std::slice::from_ref(&replace))),
        "Cannot change frozen 'file' link from 'flt' to 'top': job 'j' relies on it",
    );
    let again = g.freeze("top", "backing", "job 'k'").unwrap();
    let frozen = |name: &str| {
        let picture = g.query_graph();
        let edge = picture.edges.iter().find(|e| e.name == name && !e.frozen_by.is_empty());
        edge.map_or(Vec::new(), |e| e.frozen_by.clone())
    };
    assert_eq!(frozen("backing"), ["job 'j'", "job 'k'"]);
    assert_eq!(frozen("file"), ["job 'j'"]);
    drop(chain);
    run(g.change(&[replace])).unwrap();
    assert!(run(g.change(std::slice::from_ref(&detach))).is_err());
    drop(again);
    run(g.change(&[detach])).unwrap();
}

#[test]
fn several_changes_are_one() {
    let g = graph();
    for name in ["a", "b", "c"] {
        mem(&g, name);
    }
    add(&g, json!({"driver": "filter", "node-name": "f1", "file": "a"})).unwrap();
    add(&g, json!({"driver": "filter", "node-name": "f2", "file": "b"})).unwrap();
    let (_root, source) = attach(&g, "f1", true);
    source.take();
    let before = shape(&g);
    let to = |parent: &str, node: &str| Change::ReplaceChild {
        parent: parent.into(),
        child: "file".into(),
        node: node.into(),
    };
    record("b").refuse.store(true, SeqCst);
    refused(run(g.change(&[to("f1", "c"), to("f2", "a"), to("f1", "b")])), "refused");
    record("b").refuse.store(false, SeqCst);
    assert_eq!(shape(&g), before);
    assert_eq!(source.take(), ["quiesce", "resume 2"]);
    run(g.change(&[to("f1", "b"), to("f2", "a")])).unwrap();
    assert_ne!(shape(&g), before);
    let view = source.view.borrow().clone().unwrap();
    assert_eq!(view.nodes()[1].node().name(), "b");
}

#[test]
fn a_source_that_joins_a_drained_section_starts_when_it_ends() {
    let g = graph();
    mem(&g, "disk");
    let (_first, one) = attach(&g, "disk", false);
    let outer = run(g.drain("disk")).unwrap();
    let inner = run(g.drain_all());
    let (second, two) = attach(&g, "disk", false);
    assert!(second.is_drained());
    assert_eq!(two.take(), Vec::<String>::new());
    drop(outer);
    assert_eq!(one.take(), ["resume 1", "quiesce"]);
    assert_eq!(two.take(), Vec::<String>::new());
    drop(inner);
    assert_eq!(one.take(), ["resume 1"]);
    assert_eq!(two.take(), ["resume 1"]);
    // A user that goes while it is drained is not resumed.
    let guard = run(g.drain("disk")).unwrap();
    run(second.detach());
    drop(guard);
    assert_eq!(two.take(), ["quiesce"]);
    refused(run(g.drain("zz")).map(|_| ()), "Cannot find device='' nor node-name='zz'");
}

#[test]
fn a_user_that_comes_under_a_drain_by_a_change_belongs_to_it() {
    let g = graph();
    mem(&g, "a");
    mem(&g, "b");
    add(&g, json!({"driver": "filter", "node-name": "f", "file": "a"})).unwrap();
    let (_root, source) = attach(&g, "f", true);
    source.take();
    let guard = run(g.drain("b")).unwrap();
    assert_eq!(guard.sources(), 0);
    let change = Change::ReplaceChild { parent: "f".into(), child: "file".into(), node: "b".into() };
    run(g.change(&[change])).unwrap();
    assert_eq!(source.take(), ["quiesce"]);
    drop(guard);
    assert_eq!(source.take(), ["resume 2"]);
}

#[test]
fn resizing_reaches_parents_and_users() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "disk", "size": 4096})).unwrap();
    add(&g, json!({"driver": "filter", "node-name": "mid", "file": "disk"})).unwrap();
    add(&g, json!({"driver": "filter", "node-name": "top", "file": "mid"})).unwrap();
    let (_root, source) = attach(&g, "top", true);
    source.take();
    run(g.block_resize("disk", 8192)).unwrap();
    assert_eq!(source.take(), ["quiesce", "resized 8192", "resume 3"]);
    assert_eq!(g.node("top").unwrap().size(), 8192);
    refused(run(g.block_resize("disk", 1 << 63)), "Parameter 'size' expects a >0 size");
    refused(run(g.block_resize("zz", 1)), "Cannot find device='' nor node-name='zz'");
    // Nobody holds RESIZE afterwards.
    assert!(!shape(&g).edges.iter().any(|e| e.perm.contains(&query::BlockPermission::Resize)));
}

#[test]
fn a_finer_user_takes_writes_of_others_off_the_fast_path() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "disk", "align": 512, "fast": true})).unwrap();
    let (_guest, source) = attach(&g, "disk", true);
    let target = |op| {
        let view = source.view.borrow().clone().unwrap();
        matches!(view.resolve(op, 0, 4096).target, Target::Done)
    };
    assert!(target(Op::Write) && target(Op::Read));
    source.take();
    let mut fine = RootOptions::new("nbd", true);
    fine.granularity = 1;
    let nbd = run(g.attach("disk", fine, Rc::new(NoSource))).unwrap();
    assert_eq!(source.take(), ["quiesce", "resume 1"]);
    assert!(!target(Op::Write) && target(Op::Read));
    run(nbd.detach());
}

#[test]
fn options_are_inherited_by_inline_children_alone() {
    let g = graph();
    mem(&g, "own");
    let file = json!({"driver": "mem", "node-name": "f"});
    let backing = json!({"driver": "mem", "node-name": "b"});
    add(
        &g,
        json!({"driver": "format", "node-name": "top", "cache": {"direct": true}, "file": file, "backing": backing}),
    )
    .unwrap();
    let f = g.node("f").unwrap().options();
    assert!(f.direct && !f.read_only && f.discard == DiscardOption::Unmap);
    let b = g.node("b").unwrap().options();
    assert!(b.direct && b.read_only);
    assert!(!g.node("own").unwrap().options().direct);
}

#[test]
fn queries_have_qemus_shape() {
    let g = graph();
    mem(&g, "base");
    add(
        &g,
        json!({"driver": "format", "node-name": "top", "file": {"driver": "mem", "node-name": "f"}, "backing": "base"}),
    )
    .unwrap();
    let (_root, _source) = attach(&g, "top", true);
    let nodes = serde_json::to_value(g.query_named_block_nodes(false)).unwrap();
    let top = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "top").unwrap();
    for key in
        ["file", "ro", "drv", "backing_file_depth", "active", "encrypted", "detect_zeroes", "bps", "bps_rd"]
    {
        assert!(!top[key].is_null(), "{key}");
    }
    for key in ["bps_wr", "iops", "iops_rd", "iops_wr", "image", "cache", "write_threshold"] {
        assert!(!top[key].is_null(), "{key}");
    }
    assert_eq!(top["backing_file_depth"], 1);
    assert_eq!(top["image"]["virtual-size"], 1 << 20);
    assert_eq!(top["image"]["backing-image"]["format"], "mem");
    assert_eq!(top["cache"], json!({"writeback": true, "direct": false, "no-flush": false}));
    let flat = serde_json::to_value(g.query_named_block_nodes(true)).unwrap();
    assert!(flat.as_array().unwrap().iter().all(|n| n["image"]["backing-image"].is_null()));
    let graph = serde_json::to_value(g.query_block_graph()).unwrap();
    let edge =
        |name: &str| graph["edges"].as_array().unwrap().iter().find(|e| e["name"] == name).unwrap().clone();
    assert_eq!(edge("file")["perm"], json!(["consistent-read", "write", "resize"]));
    assert_eq!(edge("file")["shared-perm"], json!(["consistent-read", "write-unchanged"]));
    assert_eq!(edge("backing")["perm"], json!(["consistent-read"]));
    assert_eq!(
        edge("backing")["shared-perm"],
        json!(["consistent-read", "write", "write-unchanged", "resize"])
    );
    assert_eq!(edge("root")["perm"], json!(["consistent-read", "write"]));
    let stats = serde_json::to_value(g.query_blockstats(false)).unwrap();
    assert_eq!(stats[0]["node-name"], "top");
    assert_eq!(stats[0]["parent"]["node-name"], "f");
    assert_eq!(stats[0]["backing"]["node-name"], "base");
    assert_eq!(g.query_blockstats(true).len(), 3);
}
