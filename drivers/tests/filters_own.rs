//! What each filter is for: data that moves up, writes that are compressed, space set aside and given back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use common::{registry, tool};
use conformance::request::{Client, Way};
use conformance::rng::Rng;
use graph::{Change, Graph, NoSource, NodeIo, Op, Perm, Root, RootOptions, Target, WriteFlags, ZeroFlags};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions, IoVecs};
use serde_json::{Value, json};

const CLUSTER: u64 = 65536;
const SIZE: u64 = 32 * CLUSTER;

/// A graph with threads of its own; closed when dropped.
struct Rig {
    graph: Graph,
    threads: Vec<IoThread>,
    dir: tempfile::TempDir,
}

impl Rig {
    /// `None`, with a word, without QEMU's tools.
    fn new() -> Option<Rig> {
        tool("qemu-img", &["--version"])?;
        let start = |name: &str| {
            IoThread::start(IoThreadOptions { name: name.to_owned(), ..IoThreadOptions::default() }).unwrap()
        };
        let threads = vec![start("one"), start("two")];
        let graph = Graph::new(registry(), threads.first().cloned());
        Some(Rig { graph, threads, dir: tempfile::tempdir().unwrap() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str) -> Value {
        json!({"driver": "file", "filename": self.text(name)})
    }

    fn add(&self, options: Value) {
        block_on(self.graph.blockdev_add(options)).unwrap();
    }

    fn refused(&self, options: Value) -> String {
        block_on(self.graph.blockdev_add(options)).unwrap_err().to_string()
    }

    fn del(&self, node: &str) {
        block_on(self.graph.blockdev_del(node)).unwrap();
    }

    fn attach(&self, node: &str, options: RootOptions) -> Result<Root, String> {
        block_on(self.graph.attach(node, options, Rc::new(NoSource))).map_err(|e| e.to_string())
    }

    fn writer(&self, node: &str) -> Root {
        self.attach(node, RootOptions::new("a writer", true)).unwrap()
    }

    fn on<T, F, Fut>(&self, thread: usize, root: &Root, work: F) -> T
    where
        T: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let view = root.view().unwrap();
        self.threads[thread].call_blocking(move |local| work(view.io(&local))).unwrap()
    }

    fn read(&self, root: &Root, offset: u64, len: u64) -> Vec<u8> {
        self.on(
            1,
            root,
            move |io| async move { Client { io, way: Way::Mapped }.read(offset, len).await.unwrap() },
        )
    }

    fn write(&self, root: &Root, offset: u64, data: Vec<u8>) {
        self.on(1, root, move |io| async move {
            Client { io, way: Way::Mapped }.write(offset, &data, false).await.unwrap();
        });
    }

    fn length(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().len()
    }

    fn perms(&self, node: &str) -> Result<(), String> {
        let alone = RootOptions {
            perm: Perm::WRITE | Perm::RESIZE,
            shared: Perm::CONSISTENT_READ,
            ..RootOptions::new("somebody else", true)
        };
        self.attach(node, alone).map(|root| block_on(root.detach()))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        block_on(self.graph.close_all());
        self.graph.set_iothread(None);
        self.threads.drain(..).for_each(IoThread::stop);
    }
}

fn img(args: &[&str]) -> String {
    let output = tool("qemu-img", args).unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What an image is known to hold: pairs of first byte and whether the image itself decides, by cluster.
fn depths(image: &Path) -> Vec<i64> {
    let text = img(&["map", "--output=json", "-f", "qcow2", image.to_str().unwrap()]);
    let runs: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut depths = vec![-1; (SIZE / CLUSTER) as usize];
    for run in runs {
        let start = run["start"].as_u64().unwrap() / CLUSTER;
        let end = (run["start"].as_u64().unwrap() + run["length"].as_u64().unwrap()).div_ceil(CLUSTER);
        for cluster in start..end {
            // Unallocated everywhere: QEMU says so by `present`.
            let present = run["present"].as_bool().unwrap_or(true);
            depths[cluster as usize] = if present { run["depth"].as_i64().unwrap() } else { -1 };
        }
    }
    depths
}

/// `top` over `mid` over `base`. `base` holds the byte of each cluster's number, from 1; `mid` has clusters 4 to 7 of its own,
/// holding 0x80 more. `base` ends in the middle of cluster 30.
fn chain(rig: &Rig) {
    let length = 30 * CLUSTER + 1000;
    let mut data: Vec<u8> = (0..length).map(|at| (at / CLUSTER) as u8 + 1).collect();
    // A cluster of zeroes, too.
    data[9 * CLUSTER as usize..10 * CLUSTER as usize].fill(0);
    data.resize(length.next_multiple_of(512) as usize, 0);
    std::fs::write(rig.path("base"), &data).unwrap();
    let size = SIZE.to_string();
    let (base, mid, top) = (rig.text("base"), rig.text("mid"), rig.text("top"));
    img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &mid, &size]);
    for cluster in 4..8 {
        let command = format!("write -P {} {}k 64k", 0x80 + cluster + 1, cluster * 64);
        let args = ["-f", "qcow2", "-c", command.as_str(), mid.as_str()];
        assert!(tool("qemu-io", &args).unwrap().status.success());
    }
    img(&["create", "-q", "-f", "qcow2", "-b", &mid, "-F", "qcow2", &top, &size]);
}

fn content() -> Vec<u8> {
    (0..SIZE)
        .map(|at| match at / CLUSTER {
            4..=7 => (at / CLUSTER) as u8 + 0x81,
            9 => 0,
            cluster if at < 30 * CLUSTER + 1000 => cluster as u8 + 1,
            _ => 0,
        })
        .collect()
}

fn copy_on_read(rig: &Rig, more: Value) {
    let base = json!({"driver": "raw", "node-name": "base", "file": rig.file("base")});
    let mid = json!({"driver": "qcow2", "node-name": "mid", "file": rig.file("mid"), "backing": base});
    let top = json!({"driver": "qcow2", "node-name": "top", "file": rig.file("top"), "backing": mid});
    let mut options = json!({"driver": "copy-on-read", "node-name": "cor", "file": top});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    rig.add(options);
}

#[test]
fn what_is_read_is_copied_and_nothing_else() {
    let Some(rig) = Rig::new() else { return };
    chain(&rig);
    copy_on_read(&rig, json!({}));
    let root = rig.writer("cor");
    let content = content();
    // A piece inside of a cluster, one over three, zeroes, and the end of the backing file.
    for (offset, len) in
        [(5000, 512), (3 * CLUSTER + 100, 2 * CLUSTER), (9 * CLUSTER, 10), (30 * CLUSTER, 2 * CLUSTER)]
    {
        let before = root.view().unwrap();
        assert!(matches!(before.resolve(Op::Read, offset, len.min(CLUSTER)).target, Target::Drive));
        let data = rig.read(&root, offset, len);
        assert!(data == content[offset as usize..(offset + len) as usize], "{offset}+{len}");
    }
    // From now on it is read like anything else, without a look at what is below.
    let view = root.view().unwrap();
    assert!(matches!(view.resolve(Op::Read, 5000, 512).target, Target::File { .. }));
    assert!(matches!(view.resolve(Op::Read, 9 * CLUSTER, 4096).target, Target::Zero));
    assert!(matches!(view.resolve(Op::Read, 11 * CLUSTER, 512).target, Target::Drive));
    // Writes are nobody's business here.
    rig.write(&root, 12 * CLUSTER + 5, vec![9; 3]);
    drop(view);
    block_on(root.detach());
    rig.del("cor");
    let own: Vec<usize> =
        depths(&rig.path("top")).iter().enumerate().filter(|(_, d)| **d == 0).map(|(n, _)| n).collect();
    assert_eq!(own, [0, 3, 4, 5, 9, 12, 30, 31]);
    img(&["check", "-q", "-f", "qcow2", &rig.text("top")]);
    // What was copied is what was below.
    let mut expected = content;
    expected[12 * CLUSTER as usize + 5..][..3].fill(9);
    img(&["convert", "-f", "qcow2", "-O", "raw", &rig.text("top"), &rig.text("flat")]);
    assert!(std::fs::read(rig.path("flat")).unwrap() == expected);
}

#[test]
fn below_the_bottom_nothing_is_copied_from() {
    let Some(rig) = Rig::new() else { return };
    chain(&rig);
    copy_on_read(&rig, json!({"bottom": "mid"}));
    let root = rig.writer("cor");
    assert!(rig.read(&root, 0, SIZE) == content());
    // The chain down to it stays as it is, and the rest does not have to.
    let detach = |parent: &str| {
        let change = Change::DetachChild { parent: parent.to_owned(), child: "backing".to_owned() };
        block_on(rig.graph.change(&[change])).map_err(|e| e.to_string())
    };
    let refusal = detach("top").unwrap_err();
    assert!(refusal.contains("frozen 'backing' link from 'top' to 'mid'"), "{refusal}");
    block_on(root.detach());
    rig.del("cor");
    let depths = depths(&rig.path("top"));
    let own: Vec<usize> = depths.iter().enumerate().filter(|(_, d)| **d == 0).map(|(n, _)| n).collect();
    assert_eq!(own, [4, 5, 6, 7]);
}

#[test]
fn bottoms_and_images_that_cannot_be_are_refused_in_qemus_words() {
    let Some(rig) = Rig::new() else { return };
    chain(&rig);
    let raw = |more: Value| {
        let mut node = json!({"driver": "raw", "file": rig.file("base")});
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        node
    };
    let add = |file: Value, more: Value| {
        let mut options = json!({"driver": "copy-on-read", "node-name": "cor", "file": file});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    assert_eq!(rig.refused(add(raw(json!({})), json!({"bottom": "nope"}))), "Bottom node 'nope' not found");
    for (below, own) in [(json!({"read-only": true}), json!({})), (json!({}), json!({"read-only": true}))] {
        let words = rig.refused(add(raw(below), own));
        assert!(words.starts_with("Block node is read-only"), "{words}");
    }
    let filter = json!({"driver": "copy-on-read", "node-name": "flt", "file": raw(json!({}))});
    assert_eq!(rig.refused(add(filter, json!({"bottom": "flt"}))), "Bottom node 'flt' is a filter");
    rig.add(raw(json!({"node-name": "other"})));
    let refusal = rig.refused(add(rig.file("mid"), json!({"bottom": "other"})));
    assert!(refusal.contains("'other' is not in the backing chain"), "{refusal}");
    assert_eq!(
        rig.refused(json!({"driver": "compress", "node-name": "c", "file": "other"})),
        "Compression is not supported for underlying format: raw"
    );
    let below = json!({"driver": "preallocate", "file": raw(json!({}))});
    assert_eq!(
        rig.refused(json!({"driver": "compress", "node-name": "c", "file": below})),
        "Compression is not supported for underlying format: preallocate"
    );
}

/// Readers all over the disk and writers, each with blocks of its own, while everything is being copied up.
#[test]
fn no_write_is_lost_to_a_copy() {
    let Some(rig) = Rig::new() else { return };
    for round in 0..3u64 {
        chain(&rig);
        copy_on_read(&rig, if round == 1 { json!({"bottom": "mid"}) } else { json!({}) });
        let root = rig.writer("cor");
        let view = root.view().unwrap();
        let calls: Vec<_> = (0..2u64)
            .map(|n| {
                let view = std::sync::Arc::clone(&view);
                rig.threads[n as usize].call(move |local| async move {
                    let io = view.io(&local);
                    let tasks =
                        (0..6u64).map(|task| worker(io.clone(), round * 100 + n * 10 + task, n * 6 + task));
                    conformance::request::join_all(&io, tasks).await
                })
            })
            .collect();
        let mut written = Vec::new();
        for call in calls {
            written.extend(block_on(call).unwrap().into_iter().map(|w| w.unwrap()));
        }
        drop(view);
        let mut expected = content();
        for (offset, data) in written.into_iter().flatten() {
            expected[offset as usize..][..data.len()].copy_from_slice(&data);
        }
        assert!(rig.read(&root, 0, SIZE) == expected, "round {round}");
        block_on(root.detach());
        rig.del("cor");
        img(&["check", "-q", "-f", "qcow2", &rig.text("top")]);
        img(&["convert", "-f", "qcow2", "-O", "raw", &rig.text("top"), &rig.text("flat")]);
        assert!(std::fs::read(rig.path("flat")).unwrap() == expected, "round {round}, closed");
        for name in ["base", "mid", "top"] {
            std::fs::remove_file(rig.path(name)).unwrap();
        }
    }
}

/// Reads anywhere, and writes blocks `lane`, `lane + 12`, ... of 1 KiB in turn; what was written last, in order.
async fn worker(io: NodeIo, seed: u64, lane: u64) -> Vec<(u64, Vec<u8>)> {
    const BLOCK: u64 = 1024;
    let mut rng = Rng::new(seed);
    let mut written = Vec::new();
    for step in 0..150 {
        let way = if rng.one_in(2) { Way::Driven } else { Way::Mapped };
        let client = Client { io: io.clone(), way };
        if rng.one_in(2) {
            let (offset, len) = rng.range(SIZE);
            client.read(offset, len.min(3 * CLUSTER)).await.unwrap();
            continue;
        }
        let offset = (rng.below(SIZE / BLOCK / 12) * 12 + lane) * BLOCK;
        let data = rng.data(BLOCK);
        client.write(offset, &data, false).await.unwrap();
        // It is there at once, whoever is copying the cluster.
        let seen = Client { io: io.clone(), way: Way::Mapped }.read(offset, BLOCK).await.unwrap();
        assert!(seen == data, "step {step} at {offset}");
        written.push((offset, data));
    }
    written
}

#[test]
fn writes_arrive_compressed() {
    let Some(rig) = Rig::new() else { return };
    img(&["create", "-q", "-f", "qcow2", &rig.text("image"), &SIZE.to_string()]);
    rig.add(json!({"driver": "compress", "node-name": "c",
                   "file": {"driver": "qcow2", "node-name": "q", "file": rig.file("image")}}));
    let root = rig.writer("c");
    rig.write(&root, 0, vec![1; 3 * CLUSTER as usize]);
    // Parts of clusters, written and not.
    rig.write(&root, CLUSTER + 700, vec![2; 100]);
    rig.write(&root, 9 * CLUSTER - 10, vec![3; 20]);
    // What cannot be compressed is written as it is, and again.
    let mut rng = Rng::new(1);
    let mut noise = || -> Vec<u8> { (0..CLUSTER).map(|_| rng.below(256) as u8).collect() };
    let random = noise();
    rig.write(&root, 20 * CLUSTER, random.clone());
    rig.write(&root, 20 * CLUSTER, noise());
    rig.write(&root, 20 * CLUSTER, random.clone());
    rig.on(1, &root, |io| async move {
        Client { io, way: Way::Driven }.zero(2 * CLUSTER, CLUSTER, ZeroFlags::empty()).await.unwrap();
    });
    let mut expected = vec![0; SIZE as usize];
    expected[..2 * CLUSTER as usize].fill(1);
    expected[CLUSTER as usize + 700..][..100].fill(2);
    expected[9 * CLUSTER as usize - 10..][..20].fill(3);
    expected[20 * CLUSTER as usize..21 * CLUSTER as usize].copy_from_slice(&random);
    assert!(rig.read(&root, 0, SIZE) == expected);
    block_on(root.detach());
    rig.del("c");
    let report: Value =
        serde_json::from_str(&img(&["check", "--output=json", "-f", "qcow2", &rig.text("image")])).unwrap();
    assert_eq!(
        (&report["compressed-clusters"], &report["allocated-clusters"]),
        (&json!(4), &json!(5)),
        "{report}"
    );
    img(&["convert", "-f", "qcow2", "-O", "raw", &rig.text("image"), &rig.text("flat")]);
    assert!(std::fs::read(rig.path("flat")).unwrap() == expected);
}

#[test]
fn a_growing_file_gets_space_ahead_and_gives_it_back() {
    const STEP: u64 = 4 << 20;
    let Some(rig) = Rig::new() else { return };
    img(&["create", "-q", "-f", "qcow2", &rig.text("image"), "64M"]);
    let fresh = rig.length("image");
    rig.add(json!({"driver": "file", "node-name": "f", "filename": rig.text("image")}));
    rig.add(json!({"driver": "preallocate", "node-name": "p", "file": "f", "prealloc-size": STEP}));
    rig.add(json!({"driver": "qcow2", "node-name": "q", "file": "p"}));
    assert_eq!(rig.length("image"), fresh, "nothing has been written");
    let root = rig.writer("q");
    rig.write(&root, 0, vec![1; 100_000]);
    let data_end = rig.graph.node("p").unwrap().size();
    let ahead = rig.length("image");
    assert!(ahead >= data_end + STEP - (1 << 20) && ahead.is_multiple_of(1 << 20), "{ahead} for {data_end}");
    // Further writes stay inside of what is set aside.
    for n in 1..20 {
        rig.write(&root, n * 100_000, vec![2; 100_000]);
    }
    assert_eq!(rig.length("image"), ahead);
    rig.write(&root, 30 << 20, vec![3; 16 << 20]);
    assert!(rig.graph.node("p").unwrap().size() > data_end);
    assert!(rig.length("image") > ahead);
    // Somebody else would write where it is cut off.
    let refusal = rig.perms("f").unwrap_err();
    assert!(refusal.contains("node 'p'"), "{refusal}");
    block_on(root.detach());
    // The format goes, the filter stays, and gives back all but the data.
    rig.del("q");
    let end = rig.length("image");
    assert_eq!(end, rig.graph.node("p").unwrap().size());
    assert!(end < ahead + (17 << 20), "{end}");
    rig.perms("f").unwrap();
    // And again, with the end of the filter itself.
    rig.add(json!({"driver": "qcow2", "node-name": "q", "file": "p"}));
    let root = rig.writer("q");
    rig.write(&root, 50 << 20, vec![4; 100_000]);
    assert!(rig.length("image") > end + STEP - (1 << 20));
    block_on(root.detach());
    rig.del("q");
    rig.del("p");
    assert!(rig.length("image") < end + (1 << 20));
    img(&["check", "-q", "-f", "qcow2", &rig.text("image")]);
}

#[test]
fn the_filter_can_be_put_in_and_taken_out_under_a_format() {
    let Some(rig) = Rig::new() else { return };
    img(&["create", "-q", "-f", "qcow2", &rig.text("image"), "64M"]);
    rig.add(json!({"driver": "file", "node-name": "f", "filename": rig.text("image")}));
    rig.add(json!({"driver": "qcow2", "node-name": "q", "file": "f"}));
    let root = rig.writer("q");
    rig.write(&root, 0, vec![1; 100_000]);
    rig.add(json!({"driver": "preallocate", "node-name": "p", "file": "f"}));
    let lead = |node: &str| {
        let change =
            Change::ReplaceChild { parent: "q".to_owned(), child: "file".to_owned(), node: node.to_owned() };
        block_on(rig.graph.change(&[change])).unwrap();
    };
    lead("p");
    rig.write(&root, 1 << 20, vec![2; 30 << 20]);
    assert!(rig.length("image") >= 128 << 20);
    lead("f");
    assert!(rig.length("image") < 64 << 20);
    rig.write(&root, 40 << 20, vec![3; 100_000]);
    assert!(rig.length("image") < 64 << 20);
    assert_eq!(rig.read(&root, (31 << 20) - 1, 2), [2, 0]);
    block_on(root.detach());
    rig.del("p");
    rig.del("q");
    img(&["check", "-q", "-f", "qcow2", &rig.text("image")]);
}

#[test]
fn zeroes_behind_the_end_are_only_taken_for_granted_where_they_are() {
    let Some(rig) = Rig::new() else { return };
    std::fs::write(rig.path("image"), [7; 4096]).unwrap();
    rig.add(json!({"driver": "preallocate", "node-name": "p", "file": {"driver": "file", "node-name": "f",
                   "filename": rig.text("image")}, "prealloc-size": 1 << 20}));
    // A parent that may write past the end.
    let options = RootOptions {
        perm: Perm::WRITE | Perm::RESIZE | Perm::CONSISTENT_READ,
        ..RootOptions::new("a parent", true)
    };
    rig.add(json!({"driver": "raw", "node-name": "r", "file": "p"}));
    let root = rig.attach("r", options).unwrap();
    let write = |at: u64, byte: u8, len: usize| {
        rig.on(1, &root, move |io| async move {
            let bufs = IoVecs::from_vec(vec![byte; len]);
            io.child(0).write(at, &bufs, WriteFlags::empty()).await.unwrap();
        });
    };
    let zero = |at: u64, len: u64, flags: ZeroFlags| {
        rig.on(1, &root, move |io| async move { io.child(0).write_zeroes(at, len, flags).await.unwrap() });
    };
    let size = || rig.graph.node("p").unwrap().size();
    zero(8192, 100_000, ZeroFlags::empty());
    assert_eq!(size(), 108_192);
    let file = rig.length("image");
    assert!(file > 1 << 20);
    // Data in the midst of the zeroes, and zeroes over its second half that go on behind the end.
    write(50_000, 9, 1000);
    zero(50_500, 100_000, ZeroFlags::empty());
    assert_eq!((size(), rig.length("image")), (150_500, file));
    // Granted without a write; then there is data in it, and zeroes over that are none of those.
    zero(150_500, 10_000, ZeroFlags::empty());
    write(152_000, 6, 1000);
    zero(152_500, 20_000, ZeroFlags::NO_FALLBACK);
    assert_eq!((size(), rig.length("image")), (172_500, file));
    // Past everything that is set aside.
    zero(3 << 20, 1 << 20, ZeroFlags::empty());
    write(5 << 20, 8, 10);
    zero((5 << 20) + 5, 100, ZeroFlags::MAY_UNMAP);
    assert_eq!(size(), (5 << 20) + 105);
    let mut expected = vec![0; (5 << 20) + 105];
    expected[..4096].fill(7);
    expected[50_000..50_500].fill(9);
    expected[152_000..152_500].fill(6);
    expected[5 << 20..(5 << 20) + 5].fill(8);
    let seen = rig.on(1, &root, |io| async move {
        let bufs = IoVecs::from_vec(vec![1; (5 << 20) + 105]);
        io.child(0).read(0, &bufs).await.unwrap();
        bufs.to_vec()
    });
    assert!(seen == expected);
    block_on(root.detach());
    rig.del("r");
    assert!(std::fs::read(rig.path("image")).unwrap() == expected);
    rig.del("p");
    assert!(std::fs::read(rig.path("image")).unwrap() == expected);
}

#[test]
fn a_filter_tells_the_size_of_clusters_below_it() {
    let Some(rig) = Rig::new() else { return };
    img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", &rig.text("image"), "1M"]);
    let image = json!({"driver": "qcow2", "file": rig.file("image")});
    rig.add(json!({"driver": "compress", "node-name": "c",
                   "file": {"driver": "copy-on-read", "node-name": "cor", "file": image}}));
    for node in ["c", "cor"] {
        let node = rig.graph.node(node).unwrap();
        assert_eq!(node.driver().info().cluster_size, Some(8192), "{node:?}");
    }
    assert_eq!(rig.graph.node("c").unwrap().driver().limits().request_alignment, 8192);
}
