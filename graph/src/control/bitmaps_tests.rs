//! Bitmaps of nodes: what marks them, what refuses, what leaves the fast path.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::rc::Rc;

use host::IoVecs;
use serde_json::json;

use super::*;
use crate::control::testing::{add, graph, run};
use crate::*;

fn new(name: &str) -> NewBitmap {
    NewBitmap { name: name.to_owned(), granularity: Some(512), ..NewBitmap::default() }
}

fn words(result: Result<()>) -> String {
    result.unwrap_err().to_string()
}

fn on_node<R: Send + 'static>(
    graph: &Graph,
    node: &str,
    work: impl AsyncFnOnce(NodeIo) -> Result<R> + Send + 'static,
) -> Result<R> {
    let id = graph.node(node).unwrap().id();
    run(graph.on_iothread_with(id, Perm::ALL, move |io| async move { work(io).await }))
}

#[test]
fn changes_are_marked_and_reads_are_not() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "n", "zeroes": true, "discard": "unmap"})).unwrap();
    run(g.bitmap_add("n", new("b"))).unwrap();
    run(g.bitmap_add("n", NewBitmap { disabled: true, ..new("off") })).unwrap();
    on_node(&g, "n", async |io| {
        io.write(0, &IoVecs::from_vec(vec![1; 600]), WriteFlags::empty()).await?;
        io.write(8192, &IoVecs::from_vec(vec![1; 512]), WriteFlags::UNCHANGED).await?;
        io.write_zeroes(2048, 512, ZeroFlags::empty()).await?;
        io.discard(4096, 512).await?;
        io.read(6000, &IoVecs::from_vec(vec![0; 600])).await
    })
    .unwrap();
    let set = g.node("n").unwrap();
    let bitmap = set.bitmaps().find("b").unwrap();
    assert_eq!(bitmap.count(), 2048);
    for (at, marked) in [(0, true), (512, true), (1024, false), (2048, true), (4096, true), (6144, false)] {
        assert_eq!(bitmap.is_dirty(at), marked, "{at}");
    }
    assert_eq!(set.bitmaps().find("off").unwrap().count(), 0);
    run(g.bitmap_merge("n", "off", &[BitmapRef { node: None, name: "b".into() }])).unwrap();
    assert_eq!(set.bitmaps().find("off").unwrap().count(), 2048);
    run(g.bitmap_clear("n", "b")).unwrap();
    assert_eq!(bitmap.count(), 0);
}

#[test]
fn recording_takes_changes_off_the_fast_path_and_gives_them_back() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "n", "fast": true})).unwrap();
    let root = run(g.attach("n", RootOptions::new("test", true), Rc::new(NoSource))).unwrap();
    let drives = || {
        let view = root.view().unwrap();
        assert!(matches!(view.resolve(Op::Read, 0, 512).target, Target::Done), "reads stay");
        matches!(view.resolve(Op::Write, 0, 512).target, Target::Drive)
    };
    assert!(!drives());
    run(g.bitmap_add("n", NewBitmap { disabled: true, ..new("b") })).unwrap();
    assert!(!drives());
    run(g.bitmap_set_recording("n", "b", true)).unwrap();
    assert!(drives());
    run(g.bitmap_set_recording("n", "b", false)).unwrap();
    assert!(!drives());
    run(g.bitmap_set_recording("n", "b", true)).unwrap();
    run(g.bitmap_remove("n", "b")).unwrap();
    assert!(!drives());
}

#[test]
fn what_cannot_be_is_refused_in_qemus_words() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "n"})).unwrap();
    add(&g, json!({"driver": "mem", "node-name": "small", "size": 4096})).unwrap();
    assert_eq!(words(run(g.bitmap_add("no", new("b")))), "Cannot find device='no' nor node-name='no'");
    assert_eq!(words(run(g.bitmap_add("n", new("")))), "Bitmap name cannot be empty");
    let odd = NewBitmap { granularity: Some(1000), ..new("b") };
    assert_eq!(words(run(g.bitmap_add("n", odd))), "Granularity must be power of 2 and at least 512");
    let kept = NewBitmap { persistent: true, ..new("b") };
    assert_eq!(
        words(run(g.bitmap_add("n", kept))),
        "Can't store persistent bitmaps to n: Operation not supported"
    );
    run(g.bitmap_add("n", new("b"))).unwrap();
    run(g.bitmap_add("small", new("s"))).unwrap();
    assert_eq!(words(run(g.bitmap_add("n", new("b")))), "Bitmap already exists: b");
    assert_eq!(words(run(g.bitmap_clear("no", "b"))), "Node 'no' not found");
    assert_eq!(words(run(g.bitmap_clear("n", "c"))), "Dirty bitmap 'c' not found");
    let other = BitmapRef { node: Some("small".into()), name: "s".into() };
    assert_eq!(
        words(run(g.bitmap_merge("n", "b", &[other]))),
        "Bitmaps are of different sizes (destination size is 1048576, source size is 4096) and can't be merged"
    );
    let bitmap = g.node("n").unwrap().bitmaps().find("b").unwrap();
    bitmap.set_busy(true);
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    assert_eq!(words(run(g.bitmap_remove("n", "b"))), busy);
    bitmap.set_busy(false);
    bitmap.set_readonly(true);
    assert_eq!(words(run(g.bitmap_clear("n", "b"))), "Bitmap 'b' is readonly and cannot be modified");
    bitmap.set_readonly(false);
    bitmap.set_inconsistent();
    for refused in [run(g.bitmap_clear("n", "b")), run(g.bitmap_set_recording("n", "b", true))] {
        assert_eq!(words(refused), "Bitmap 'b' is inconsistent and cannot be used");
    }
    let info = g.query_named_block_nodes(true);
    let shown = info.iter().find(|i| i.node_name == "n").unwrap().dirty_bitmaps.clone().unwrap();
    assert_eq!(shown[0].inconsistent, Some(true));
    run(g.bitmap_remove("n", "b")).unwrap();
    let info = g.query_named_block_nodes(true);
    assert!(info.iter().find(|i| i.node_name == "n").unwrap().dirty_bitmaps.is_none());
}

#[test]
fn bitmaps_follow_the_size() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "n", "size": 4096})).unwrap();
    run(g.bitmap_add("n", new("b"))).unwrap();
    on_node(&g, "n", async |io| io.write(8192, &IoVecs::from_vec(vec![1; 512]), WriteFlags::empty()).await)
        .unwrap();
    let bitmap = g.node("n").unwrap().bitmaps().find("b").unwrap();
    assert_eq!((bitmap.size(), bitmap.count()), (8704, 512));
}
