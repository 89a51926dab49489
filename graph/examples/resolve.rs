//! Measures `View::resolve` and the accounting of a request: what the fast path pays the graph per request.
//!
//! `cargo run --release -p ringblk-graph --example resolve`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use graph::*;
use host::{File, IoThread, IoThreadOptions, IoVecs, OpenOptions};
use ringblk_graph as graph;
use serde_json::json;

struct Leaf(Arc<File>);
struct Filter;

macro_rules! driven {
    () => {
        fn size(&self) -> u64 {
            1 << 30
        }
        fn limits(&self) -> Limits {
            Limits { request_alignment: 512, ..Limits::default() }
        }
        fn read<'a>(&'a self, _: &'a NodeIo, _: u64, _: &'a IoVecs) -> BoxFut<'a, ()> {
            not_supported()
        }
        fn write<'a>(&'a self, _: &'a NodeIo, _: u64, _: &'a IoVecs, _: WriteFlags) -> BoxFut<'a, ()> {
            not_supported()
        }
        fn flush<'a>(&'a self, _: &'a NodeIo) -> BoxFut<'a, ()> {
            Box::pin(async { Ok(()) })
        }
        fn block_status<'a>(&'a self, _: &'a NodeIo, _: u64, _: u64) -> BoxFut<'a, BlockStatus> {
            not_supported()
        }
        fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
            default_child_perm(role, perm, shared, true)
        }
    };
}

impl Driver for Leaf {
    fn map(&self, _: Op, offset: u64, len: u64) -> Map<'_> {
        Map::File { file: &self.0, offset, len }
    }
    driven!();
}

impl Driver for Filter {
    fn map(&self, _: Op, offset: u64, len: u64) -> Map<'_> {
        Map::Child { child: 0, offset, len }
    }
    driven!();
}

fn main() {
    let leaf = DriverDef {
        name: "leaf",
        kind: DriverKind::Protocol,
        schema: || schemars::schema_for!(bool),
        open: |context, _| {
            Box::pin(async move {
                // Counts the requests that reach it, as qcow2 does.
                let _ = context.epochs();
                let file = File::open(std::path::Path::new("/dev/null"), &OpenOptions::default())?;
                Ok(Opened::new(Leaf(file)))
            })
        },
        create: None,
    };
    let filter = DriverDef {
        name: "filter",
        kind: DriverKind::Filter,
        schema: || schemars::schema_for!(bool),
        open: |context, options| {
            Box::pin(async move {
                let file: BlockdevRef = serde_json::from_value(options["file"].clone()).unwrap();
                context.open_child("file", Roles::FILTER, file).await?;
                Ok(Opened::new(Filter))
            })
        },
        create: None,
    };
    let iothread =
        IoThread::start(IoThreadOptions { name: "bench".to_owned(), ..IoThreadOptions::default() });
    let iothread = iothread.unwrap();
    let graph = Graph::new(Registry::new([leaf, filter]), Some(iothread.clone()));
    let run = |f| host::exec::block_on(f);
    run(graph.blockdev_add(json!({"driver": "leaf", "node-name": "n1"}))).unwrap();
    for depth in 2..=16 {
        let below = format!("n{}", depth - 1);
        run(graph.blockdev_add(json!({"driver": "filter", "node-name": format!("n{depth}"), "file": below})))
            .unwrap();
    }
    for depth in [1, 2, 3, 4, 8, 16] {
        let options = RootOptions { granularity: 512, ..RootOptions::new("bench", true) };
        let name = format!("n{depth}");
        let root = host::exec::block_on(graph.attach(&name, options, Rc::new(NoSource))).unwrap();
        let view = root.view().unwrap();
        let call = iothread.call(move |local| async move {
            let shards = Rc::clone(view.io(&local).shards());
            let n = 500_000u64;
            let mut best = [f64::MAX; 2];
            for _ in 0..40 {
                let start = Instant::now();
                for i in 0..n {
                    let r = view.resolve(black_box(Op::Read), black_box((i % 4096) * 4096), black_box(4096));
                    black_box(matches!(r.target, Target::File { .. }));
                }
                best[0] = best[0].min(start.elapsed().as_secs_f64() / n as f64 * 1e9);
                let path = view.resolve(Op::Read, 0, 4096).path;
                let start = Instant::now();
                for i in 0..n {
                    shards.account(black_box(&path), Op::Read, 4096, black_box(i), true);
                }
                best[1] = best[1].min(start.elapsed().as_secs_f64() / n as f64 * 1e9);
            }
            best
        });
        let best = host::exec::block_on(call).ok().unwrap();
        println!("depth {depth:2}: resolve {:5.1} ns, account {:5.1} ns", best[0], best[1]);
        host::exec::block_on(root.detach());
    }
    let root = host::exec::block_on(graph.attach("n1", RootOptions::new("bench", true), Rc::new(NoSource)));
    let view = root.unwrap().view().unwrap();
    let call = iothread.call(move |local| async move {
        let io = view.io(&local);
        let stays = io.stays().unwrap();
        [1u64, 4, 32].map(|batch| {
            // What a queue does beside a batch: the whole of it is under way at once.
            let rounds = 500_000 / batch;
            let mut best = f64::MAX;
            for _ in 0..40 {
                let start = Instant::now();
                for _ in 0..rounds {
                    let under = black_box(stays).enter();
                    for _ in 0..batch {
                        stays.join(black_box(under));
                    }
                    stays.leave(under);
                    for _ in 0..batch {
                        stays.leave(black_box(under));
                    }
                }
                best = best.min(start.elapsed().as_secs_f64() / (rounds * batch) as f64 * 1e9);
            }
            (batch, best)
        })
    });
    for (batch, best) in host::exec::block_on(call).ok().unwrap() {
        println!("counting for grace periods, {batch:2} at once: {best:5.2} ns a request");
    }
}
