//! What a backing chain costs a read before it reaches the kernel: ns per `View::resolve` through raw and through chains of
//! qcow2 images, at random places.
//!
//! For people: `cargo run --release -p ringblk-drivers --example chain [GiB] [share of clusters in each overlay, percent]`.
//! Needs `qemu-img` and `qemu-io` to make the images. Judges nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Instant;

use graph::{Graph, NoSource, Op, Registry, RootOptions, Target};
use host::{IoThread, IoThreadOptions, IoVecs};
use serde_json::json;

/// Longest chain.
const DEPTH: usize = 9;
const BLOCK: u64 = 4096;

fn tool(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes some clusters of an image, all of one content.
fn scatter(image: &str, size: u64, percent: u64, seed: u64) {
    let mut state = seed * 0x9e37_79b9 + 1;
    let mut script = String::new();
    for cluster in 0..size >> 16 {
        if random(&mut state) % 100 < percent {
            writeln!(script, "write -q -P {seed} {} 64k", cluster << 16).unwrap();
        }
    }
    let mut child = Command::new("qemu-io")
        .args(["-f", "qcow2", image])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), script.as_bytes()).unwrap();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

fn images(folder: &Path, size: u64, percent: u64) {
    let at = |n: usize| folder.join(format!("{n}.qcow2")).display().to_string();
    let raw = folder.join("raw").display().to_string();
    let bytes = size.to_string();
    std::fs::File::create(&raw).unwrap().set_len(size).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &at(1), &bytes]);
    for n in 2..=DEPTH {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &at(n - 1), "-F", "qcow2", &at(n)]);
        if percent > 0 {
            scatter(&at(n), size, percent, n as u64);
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<u64>().expect("a number"));
    let size = arguments.next().unwrap_or(1) << 30;
    let percent = arguments.next().unwrap_or(0);
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    images(folder.path(), size, percent);
    let options = IoThreadOptions { name: "chain".to_owned(), ..IoThreadOptions::default() };
    let iothread = IoThread::start(options).unwrap();
    let graph = Graph::new(Registry::new(ringblk_drivers::ALL.iter().copied()), Some(iothread.clone()));
    let run = |f| host::exec::block_on(f);
    let file =
        |name: &str| json!({"driver": "file", "filename": folder.path().join(name), "read-only": true});
    let add = |options| run(graph.blockdev_add(options)).unwrap();
    add(json!({"driver": "raw", "node-name": "n0", "read-only": true, "file": file("raw")}));
    for n in 1..=DEPTH {
        let backing = if n == 1 { json!(null) } else { json!(format!("n{}", n - 1)) };
        let mut options = json!({"driver": "qcow2", "node-name": format!("n{n}"), "read-only": true,
            "file": file(&format!("{n}.qcow2"))});
        if n > 1 {
            options["backing"] = backing;
        }
        add(options);
    }
    for depth in [0, 1, 2, 3, 5, DEPTH] {
        let options = RootOptions { granularity: 512, ..RootOptions::new("bench", false) };
        let root = run_attach(&graph, &format!("n{depth}"), options);
        let view = root.view().unwrap();
        let call = iothread.call(move |local| async move {
            let io = view.io(&local);
            let blocks = size / BLOCK;
            // Once through everything, so that all tables are in memory.
            for cluster in 0..size >> 16 {
                io.read(cluster << 16, &IoVecs::from_vec(vec![0; 512])).await.unwrap();
            }
            let n = 200_000u64;
            let (mut best, mut driven) = (f64::MAX, 0);
            for round in 0..10u64 {
                let mut state = round + 1;
                driven = 0;
                let start = Instant::now();
                for _ in 0..n {
                    let offset = random(&mut state) % blocks * BLOCK;
                    let r = view.resolve(black_box(Op::Read), black_box(offset), black_box(BLOCK));
                    driven += u64::from(matches!(r.target, Target::Drive));
                }
                best = best.min(start.elapsed().as_secs_f64() / n as f64 * 1e9);
            }
            (best, driven * 100 / n)
        });
        let (best, driven) = run_call(call);
        println!("depth {depth}: {best:6.1} ns, {driven} % driven");
        drop(root);
    }
}

fn run_attach(graph: &Graph, node: &str, options: RootOptions) -> graph::Root {
    host::exec::block_on(graph.attach(node, options, Rc::new(NoSource))).unwrap()
}

fn run_call<F, T, E: std::fmt::Debug>(call: F) -> T
where
    F: Future<Output = Result<T, E>>,
{
    host::exec::block_on(call).unwrap()
}
