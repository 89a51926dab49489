//! Measures what a request pays for the way through qcow2 images: `View::resolve` over allocated clusters, through empty
//! overlays, and handing out fresh clusters.
//!
//! `cargo run --release -p ringblk-drivers --example map`; needs `qemu-img` and `qemu-io`.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::expect_used)]

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

use graph::{Graph, NoSource, Op, Registry, RootOptions, Target};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions};
use serde_json::json;

fn run(name: &str, args: &[&str]) {
    let output = Command::new(name).args(args).output().expect("QEMU's tools are installed");
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Nanoseconds per answer for random blocks, the best of some rounds.
fn measure(what: &str, path: &Path, size: u64, op: Op) {
    let thread = IoThread::start(IoThreadOptions::default()).unwrap();
    let graph = Graph::new(Registry::new(ringblk_drivers::ALL.iter().copied()), Some(thread.clone()));
    let file = json!({"driver": "file", "filename": path.to_str().unwrap()});
    block_on(graph.blockdev_add(json!({"driver": "qcow2", "node-name": "q", "file": file}))).unwrap();
    let root = block_on(graph.attach("q", RootOptions::new("map", true), Rc::new(NoSource))).unwrap();
    let view = root.view().unwrap();
    let answer = thread
        .call_blocking(move |local| async move {
            let io = view.io(&local);
            // Everything cached.
            let mut at = 0;
            while at < size {
                let _ = io.read(at, &host::IoVecs::from_vec(vec![0; 4096])).await;
                at += 1 << 20;
            }
            if op == Op::Write {
                io.write(0, &host::IoVecs::from_vec(vec![1; 4096]), graph::WriteFlags::empty())
                    .await
                    .unwrap();
            }
            let (mut best, mut x, mut driven) = (f64::MAX, 1u64, 0u64);
            for _ in 0..20 {
                const N: u64 = 200_000;
                let start = Instant::now();
                for _ in 0..N {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let at = (x % (size / 4096)) * 4096;
                    let target = black_box(view.resolve(op, black_box(at), 4096)).target;
                    driven += u64::from(matches!(target, Target::Drive));
                }
                best = best.min(start.elapsed().as_nanos() as f64 / N as f64);
            }
            (best, driven)
        })
        .unwrap();
    println!("{what:40} {:6.1} ns ({} driven)", answer.0, answer.1);
    block_on(root.detach());
    block_on(graph.close_all());
    graph.set_iothread(None);
    thread.stop();
}

fn main() {
    let dir = std::env::temp_dir().join(format!("ringblk-map-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let name = |n: &str| dir.join(n).to_str().unwrap().to_owned();
    let size = 1u64 << 30;
    let base = name("base");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &base, "1G"]);
    measure("allocated, reads", Path::new(&base), size, Op::Read);
    measure("allocated, writes", Path::new(&base), size, Op::Write);
    let mut below = base;
    for level in 1..9 {
        let over = name(&format!("over{level}"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &over]);
        if level == 1 || level == 8 {
            measure(&format!("through {level} empty overlays, reads"), Path::new(&over), size, Op::Read);
        }
        below = over;
    }
    let ext = name("ext");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,extended_l2=on", &ext, "1G"],
    );
    measure("extended L2, allocated, reads", Path::new(&ext), size, Op::Read);
    std::fs::remove_dir_all(&dir).unwrap();
}
