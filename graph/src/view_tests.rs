//! `resolve` by example: the way down, what keeps a request off it, what the path remembers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::{Value, json};

use super::*;
use crate::Graph;
use crate::control::testing::{add, graph};

fn view_of(g: &Graph, name: &str) -> Arc<View> {
    g.state().view(g.node(name).unwrap().id(), Perm::ALL).unwrap()
}

fn disk(options: Value) -> Arc<View> {
    let g = graph();
    let mut all = json!({"driver": "mem", "node-name": "n", "size": 65536, "fast": true});
    all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    add(&g, all).unwrap();
    view_of(&g, "n")
}

#[test]
fn ranges_outside_are_refused_without_overflow() {
    let view = disk(json!({}));
    let error = |op, offset, len| matches!(view.resolve(op, offset, len).target, Target::Error(Errno::EIO));
    for op in [Op::Read, Op::Write, Op::WriteZeroes] {
        assert!(!error(op, 0, 65536));
        assert!(
            error(op, 0, 65537) && error(op, 65536, 1) && error(op, u64::MAX, 2) && error(op, 2, u64::MAX)
        );
    }
    assert!(!error(Op::Flush, 0, 0));
}

#[test]
fn what_needs_care_is_driven() {
    let drive = |v: &View, op, offset, len| matches!(v.resolve(op, offset, len).target, Target::Drive);
    let done = |v: &View, op, offset, len| matches!(v.resolve(op, offset, len).target, Target::Done);
    let view = disk(json!({"align": 512, "max-transfer": 4096, "detect-zeroes": "on", "zero-align": 4096}));
    assert!(done(&view, Op::Read, 512, 4096));
    assert!(
        drive(&view, Op::Read, 100, 512) && drive(&view, Op::Read, 0, 100) && drive(&view, Op::Read, 0, 8192)
    );
    assert!(drive(&view, Op::Write, 0, 512), "zeroes are to be detected");
    assert!(drive(&view, Op::WriteZeroes, 0, 512));
    // Discards are ignored unless they are asked for.
    assert!(done(&view, Op::Discard, 0, 512));
    let view = disk(json!({"read-only": true, "cache": {"no-flush": true}}));
    for op in [Op::Write, Op::WriteZeroes, Op::Discard] {
        assert!(matches!(view.resolve(op, 0, 512).target, Target::Error(Errno::EPERM)));
    }
    assert!(done(&view, Op::Flush, 0, 0) && done(&view, Op::Read, 0, 512));
}

#[test]
fn long_ways_remember_both_ends() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "n0", "fast": true})).unwrap();
    for i in 1..80 {
        let below = format!("n{}", i - 1);
        add(&g, json!({"driver": "filter", "node-name": format!("n{i}"), "file": below})).unwrap();
    }
    let path = |top: usize| view_of(&g, &format!("n{top}")).resolve(Op::Read, 0, 512).path;
    assert_eq!(path(0).nodes(), [0]);
    assert_eq!(path(7).nodes(), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(path(20).nodes(), [0, 1, 2, 3, 4, 5, 6, 20]);
    assert!(matches!(view_of(&g, "n63").resolve(Op::Read, 0, 512).target, Target::Done));
    // Too deep to follow: driven, which has no limit.
    assert!(matches!(view_of(&g, "n79").resolve(Op::Read, 0, 512).target, Target::Drive));
}

#[test]
fn a_diamond_is_in_the_view_once_for_each_handle() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "base"})).unwrap();
    add(&g, json!({"driver": "mem", "node-name": "f"})).unwrap();
    add(&g, json!({"driver": "filter", "node-name": "mid", "file": "base"})).unwrap();
    add(&g, json!({"driver": "format", "node-name": "top", "file": "f", "backing": "mid"})).unwrap();
    add(&g, json!({"driver": "format", "node-name": "tip", "file": "top", "backing": "base"})).unwrap();
    let view = view_of(&g, "tip");
    // Nobody writes to the base, whichever way it is reached.
    assert_eq!(view.nodes().len(), 5);
    for (at, node) in view.nodes().iter().enumerate() {
        for slot in 0..node.child_slots() {
            assert!(node.child(slot).unwrap() > at, "children come after their parents");
        }
    }
}
