//! Permissions by example: what a handle lets through, views that follow a change of permissions, ways out of a conflict.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use host::IoVecs;
use serde_json::json;

use super::testing::{add, graph, mem, run};
use super::*;
use crate::*;

const READ: Perm = Perm::CONSISTENT_READ;
const RW: Perm = Perm::CONSISTENT_READ.union(Perm::WRITE);
const JEALOUS: Perm = Perm::ALL.difference(Perm::WRITE);

/// A source that keeps the view it runs with, as exports do.
#[derive(Default)]
struct Keeper {
    view: RefCell<Option<Arc<View>>>,
    pauses: Cell<usize>,
}

impl RequestSource for Keeper {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        self.pauses.set(self.pauses.get() + 1);
        Box::pin(async { Ok(()) })
    }
    fn resume(&self, view: Arc<View>) {
        *self.view.borrow_mut() = Some(view);
    }
    fn resized(&self, _size: u64) {}
}

fn user(g: &Graph, node: &str, perm: Perm, shared: Perm) -> Result<(Root, Rc<Keeper>)> {
    let keeper = Rc::new(Keeper::default());
    let options = RootOptions {
        perm,
        shared,
        granularity: 512,
        ..RootOptions::new(format!("user of '{node}'"), false)
    };
    let root = run(g.attach(node, options, keeper.clone()))?;
    Ok((root, keeper))
}

fn on<R: Send + 'static>(
    g: &Graph,
    view: Arc<View>,
    work: impl AsyncFnOnce(NodeIo) -> R + Send + 'static,
) -> R {
    let iothread = g.iothread().unwrap();
    run(iothread.call(move |local| async move { work(view.io(&local)).await })).ok().unwrap()
}

fn data() -> IoVecs {
    IoVecs::from_vec(vec![7; 512])
}

/// Which requests a handle lets through: write, unchanged write, zeroes, discard, truncate.
async fn allowed(io: &NodeIo) -> [bool; 5] {
    let ok = |r: Result<()>| match r {
        Ok(()) => true,
        Err(e) if e.errno() == Errno::EPERM => false,
        // Let through, to a driver that has no such thing.
        Err(e) if e.errno() == Errno::ENOTSUP => true,
        Err(e) => panic!("{e}"),
    };
    let size = io.size();
    [
        ok(io.write(0, &data(), WriteFlags::empty()).await),
        ok(io.write(0, &data(), WriteFlags::UNCHANGED).await),
        ok(io.write_zeroes(0, 512, ZeroFlags::empty()).await),
        ok(io.discard(0, 512).await),
        ok(io.truncate(size, Truncate::default()).await),
    ]
}

#[test]
fn a_handle_lets_through_what_it_holds_and_nothing_else() {
    let g = graph();
    add(&g, json!({"driver": "mem", "node-name": "m", "zeroes": true, "fast": true, "discard": "unmap"}))
        .unwrap();
    add(&g, json!({"driver": "filter", "node-name": "n", "file": "m", "discard": "unmap"})).unwrap();
    let write = Perm::WRITE;
    let unchanged = Perm::WRITE_UNCHANGED;
    for (perm, expected) in [
        (READ, [false; 5]),
        (write, [true, true, true, true, false]),
        (unchanged, [false, true, false, false, false]),
        (Perm::RESIZE, [false, false, false, false, true]),
        (write | Perm::RESIZE, [true; 5]),
    ] {
        for node in ["m", "n"] {
            let (root, _keeper) = user(&g, node, perm, Perm::ALL).unwrap();
            let view = root.view().unwrap();
            assert_eq!(view.read_only(), !perm.contains(write));
            for op in [Op::Write, Op::WriteZeroes, Op::Discard] {
                let refused = matches!(view.resolve(op, 0, 512).target, Target::Error(Errno::EPERM));
                assert_eq!(refused, !perm.contains(write), "{op:?} {perm:?} on the fast path of {node}");
            }
            assert!(matches!(view.resolve(Op::Read, 0, 512).target, Target::Done));
            assert!(matches!(view.resolve(Op::Flush, 0, 0).target, Target::Done));
            if node == "m" {
                assert_eq!(on(&g, view, async |io| allowed(&io).await), expected, "{perm:?}");
            } else {
                // Below as above: the filter's child has what the filter's users have.
                assert_eq!(on(&g, view, async |io| allowed(&io.child(0)).await), expected, "{perm:?}");
            }
            run(root.detach());
        }
    }
}

#[test]
fn a_child_is_written_through_the_edge_that_holds_the_permission_alone() {
    let g = graph();
    mem(&g, "m");
    add(&g, json!({"driver": "data", "node-name": "d", "file": "m"})).unwrap();
    // The same memory twice: as the place of the image, and as its backing file.
    add(&g, json!({"driver": "format", "node-name": "top", "file": "d", "backing": "m"})).unwrap();
    let (root, _keeper) = user(&g, "top", RW, Perm::ALL).unwrap();
    let view = root.view().unwrap();
    on(&g, view, async |io| {
        let (file, backing) = (io.child(0), io.child(1));
        assert_eq!(allowed(&file).await, [true; 5]);
        assert_eq!(allowed(&file.child(0)).await, [true; 5]);
        assert_eq!(allowed(&backing).await, [false; 5]);
        assert_eq!(file.child(0).node().unwrap().name(), backing.node().unwrap().name());
        // The end is moved by whoever holds RESIZE.
        let end = backing.size();
        file.child(0).write(end, &data(), WriteFlags::empty()).await.unwrap();
        assert_eq!(backing.size(), end + 512);
    });
    run(root.detach());
    run(g.blockdev_del("top")).unwrap();
    let (root, _keeper) = user(&g, "d", RW, Perm::ALL).unwrap();
    on(&g, root.view().unwrap(), async |io| {
        // "data" gets RESIZE for its child, although its own user has none.
        assert_eq!(allowed(&io).await, [true, true, true, true, false]);
        assert_eq!(allowed(&io.child(0)).await, [true; 5]);
    });
    run(root.detach());
    add(&g, json!({"driver": "filter", "node-name": "f", "file": "m"})).unwrap();
    let (root, _keeper) = user(&g, "f", RW, Perm::ALL).unwrap();
    on(&g, root.view().unwrap(), async |io| {
        let child = io.child(0);
        let end = child.size();
        let past = child.write(end - 100, &data(), WriteFlags::empty()).await;
        assert_eq!(past.unwrap_err().errno(), Errno::EPERM);
        let past = child.write_zeroes(end, 512, ZeroFlags::empty()).await;
        assert_eq!(past.unwrap_err().errno(), Errno::EPERM);
        assert_eq!(child.size(), end);
    });
}

#[test]
fn a_user_that_changes_its_mind_runs_with_a_new_view() {
    let g = graph();
    mem(&g, "m");
    let (root, keeper) = user(&g, "m", READ, Perm::ALL).unwrap();
    let writes = || !keeper.view.borrow().as_ref().unwrap().read_only();
    assert!(!writes());
    run(root.set_perm(RW, Perm::ALL)).unwrap();
    assert!(writes() && keeper.pauses.get() == 1 && !root.is_drained());
    // What it shares is no business of its requests.
    run(root.set_perm(RW, JEALOUS)).unwrap();
    assert!(writes() && keeper.pauses.get() == 1);
    run(root.set_perm(READ, JEALOUS)).unwrap();
    assert!(!writes() && keeper.pauses.get() == 2);
    // A refusal leaves view and permissions, and requests go on.
    let (other, _other_keeper) = user(&g, "m", READ, JEALOUS).unwrap();
    assert!(run(root.set_perm(RW, Perm::ALL)).is_err());
    assert!(!writes() && !root.is_drained() && root.perm() == READ);
    run(other.detach());
    // Inside a drained section the view comes with its end.
    let guard = run(g.drain("m")).unwrap();
    run(root.set_perm(RW, Perm::ALL)).unwrap();
    assert!(!writes());
    drop(guard);
    assert!(writes());
}

#[test]
fn what_a_view_has_left_over_is_taken_back_before_somebody_relies_on_it() {
    let g = graph();
    mem(&g, "m");
    add(&g, json!({"driver": "filter", "node-name": "n", "file": "m"})).unwrap();
    let (writer, _w) = user(&g, "n", RW, Perm::ALL).unwrap();
    let (_reader, keeper) = user(&g, "n", READ, Perm::ALL).unwrap();
    let below = || keeper.view.borrow().as_ref().unwrap().nodes()[1].handle();
    assert_eq!(below(), Perm::WRITE);
    // Nobody is stopped because somebody leaves.
    run(writer.detach());
    assert_eq!((below(), keeper.pauses.get()), (Perm::WRITE, 0));
    let (jealous, _j) = user(&g, "m", READ, JEALOUS).unwrap();
    assert_eq!((below(), keeper.pauses.get()), (Perm::NONE, 1));
    run(jealous.detach());
    // Nothing is left over: nobody is stopped.
    let (_jealous, _j) = user(&g, "m", READ, JEALOUS).unwrap();
    assert_eq!(keeper.pauses.get(), 1);
}

fn named(g: &Graph, node: &str, name: &str, perm: Perm, shared: Perm) -> Result<Root> {
    let ways_out = WaysOut {
        share: Some(format!("let {name} share")),
        need_less: Some(format!("let {name} only read")),
    };
    let options = RootOptions { perm, shared, ways_out, ..RootOptions::new(name, false) };
    run(g.attach(node, options, Rc::new(NoSource)))
}

#[track_caller]
fn ways<T: std::fmt::Debug>(result: Result<T>) -> String {
    let text = result.unwrap_err().to_string();
    text.split_once(" Way out: ").unwrap_or_else(|| panic!("no way out in: {text}")).1.to_owned()
}

#[test]
fn the_way_out_names_whoever_can_do_something() {
    let g = graph();
    mem(&g, "base");
    mem(&g, "f");
    add(&g, json!({"driver": "filter", "node-name": "filter", "file": "base"})).unwrap();
    add(&g, json!({"driver": "format", "node-name": "top", "file": "f", "backing": "filter"})).unwrap();
    // Two levels up is an export that does not share; two levels down one that wants to write.
    let export = named(&g, "top", "a", RW, JEALOUS).unwrap();
    assert_eq!(ways(named(&g, "base", "b", RW, Perm::ALL)), "let a share, or let b only read.");
    run(export.detach());
    let export = named(&g, "filter", "b", RW, Perm::ALL).unwrap();
    assert_eq!(ways(named(&g, "top", "a", RW, JEALOUS)), "let a share, or let b only read.");
    // A format that writes on its own account.
    assert_eq!(ways(named(&g, "f", "c", READ, JEALOUS)), "let c share, or add node 'top' with read-only=on.");
    assert_eq!(
        ways(named(&g, "f", "c", RW, Perm::ALL)),
        "use node 'top' in place of node 'f', or let c only read."
    );
    // A format that comes second: whoever was there gives way.
    run(export.detach());
    let export = named(&g, "base", "b", RW, Perm::ALL).unwrap();
    let second = json!({"driver": "format", "node-name": "second", "file": "base"});
    assert_eq!(ways(add(&g, second.clone())), "let b only read.");
    run(export.set_perm(READ, JEALOUS)).unwrap();
    assert_eq!(ways(add(&g, second)), "let b share, or add node 'second' with read-only=on.");
    // Somebody who knows no way but to end.
    run(export.detach());
    let job = RootOptions { perm: READ, shared: JEALOUS, ..RootOptions::new("job 'j'", false) };
    let _job = run(g.attach("base", job, Rc::new(NoSource))).unwrap();
    assert_eq!(ways(named(&g, "filter", "b", RW, Perm::ALL)), "wait for job 'j' to end, or let b only read.");
}

/// Users of a node and what they hold, as the reference page names them.
const USERS: [(&str, Perm, Perm); 11] = [
    ("guest", RW, JEALOUS),
    ("guest, share-rw", RW, Perm::ALL),
    ("reader", READ, JEALOUS),
    ("reader, share-rw", READ, Perm::ALL),
    ("NBD, writable", RW, Perm::ALL.difference(Perm::RESIZE)),
    ("overlay of a guest", READ, Perm::CONSISTENT_READ.union(Perm::WRITE_UNCHANGED)),
    ("format", RW.union(Perm::RESIZE), Perm::CONSISTENT_READ.union(Perm::WRITE_UNCHANGED)),
    ("commit into it", RW.union(Perm::RESIZE), Perm::CONSISTENT_READ.union(Perm::WRITE_UNCHANGED)),
    ("mirror to it", Perm::WRITE, Perm::WRITE_UNCHANGED),
    ("backup of it", READ, Perm::ALL.difference(Perm::WRITE.union(Perm::RESIZE))),
    ("resize", Perm::RESIZE, Perm::ALL),
];

/// Who may be there together: `+` or `-`, the users in the order of [`USERS`] both ways.
const TOGETHER: [&str; 11] = [
    "- - - + - - - - - - +",
    "- + - + + - - - - - +",
    "- - + + - + - - - + +",
    "+ + + + + + + + - + +",
    "- + - + + - - - - - -",
    "- - + + - + - - - + -",
    "- - - + - - - - - - -",
    "- - - + - - - - - - -",
    "- - - - - - - - - - -",
    "- - + + - + - - - + -",
    "+ + + + - - - - - - +",
];

#[test]
fn every_pair_of_users_is_allowed_or_refused_as_the_table_says() {
    let g = graph();
    mem(&g, "m");
    let mut found = Vec::new();
    for (first, perm, shared) in USERS {
        let (root, _keeper) = user(&g, "m", perm, shared).unwrap();
        let row: Vec<&str> = USERS
            .iter()
            .map(|(second, perm, shared)| match user(&g, "m", *perm, *shared) {
                Ok((other, _)) => {
                    run(other.detach());
                    "+"
                }
                Err(e) => {
                    let text = e.to_string();
                    assert!(text.contains("Way out: wait for"), "{second} beside {first}: {text}");
                    "-"
                }
            })
            .collect();
        run(root.detach());
        found.push(row.join(" "));
    }
    assert_eq!(found, TOGETHER);
}

#[test]
fn the_reference_page_has_the_table() {
    let page = include_str!("../../../docs/reference/permissions.md");
    for ((name, perm, shared), row) in USERS.iter().zip(TOGETHER) {
        let bits = |p: Perm| {
            let all = [("c", READ), ("w", Perm::WRITE), ("u", Perm::WRITE_UNCHANGED), ("r", Perm::RESIZE)];
            all.map(|(letter, bit)| if p.contains(bit) { letter } else { "-" }).concat()
        };
        let line = format!("| {name} | {} | {} | {} |", bits(*perm), bits(*shared), row.replace(' ', " | "));
        assert!(page.contains(&line), "docs/reference/permissions.md lacks the line\n{line}");
    }
}
