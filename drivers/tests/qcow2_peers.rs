//! qcow2 images written by several iothreads at once: afterwards `qemu-img check` finds nothing, and QEMU reads what was
//! written; and the other way round, what QEMU writes is what we read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use common::{registry, tool};
use conformance::request::{Client, Way, join_all};
use conformance::rng::Rng;
use graph::{Graph, NoSource, NodeIo, Root, RootOptions, Secret, View, ZeroFlags};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions};
use serde_json::{Value, json};

const KEY: &str = "open sesame";
/// Unit of ownership, bytes.
const BLOCK: u64 = 4096;

/// Runs a tool that must succeed; what it printed.
fn run(name: &str, args: &[&str]) -> String {
    let output = tool(name, args).expect("QEMU's tools are installed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?}: {text}");
    text
}

fn have_tools() -> bool {
    tool("qemu-img", &["--version"]).is_some() && tool("qemu-io", &["--version"]).is_some()
}

fn seed() -> u64 {
    std::env::var("RINGBLK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7)
}

/// An image in a directory of its own.
struct Image {
    dir: tempfile::TempDir,
    encrypted: bool,
    size: u64,
}

impl Image {
    fn new(options: &str, size: u64) -> Image {
        Image::with(options, size, &[])
    }

    fn with(options: &str, size: u64, extra: &[&str]) -> Image {
        let image = Image { dir: tempfile::tempdir().unwrap(), encrypted: options.contains("encrypt"), size };
        let secret = format!("secret,id=s0,data={KEY}");
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "--object", &secret];
        let data = image.dir.path().join("data");
        let options = options.replace("DATA", data.to_str().unwrap());
        if !options.is_empty() {
            args.extend(["-o", options.as_str()]);
        }
        args.extend(extra);
        let path = image.path();
        args.extend([path.to_str().unwrap(), &size]);
        run("qemu-img", &args);
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// The image for QEMU's tools.
    fn opts(&self) -> String {
        let encrypt = if self.encrypted { ",encrypt.key-secret=s0" } else { "" };
        format!("driver=qcow2,file.filename={}{encrypt}", self.path().display())
    }

    /// What QEMU reads.
    fn content(&self) -> Vec<u8> {
        let raw = self.dir.path().join("raw");
        let secret = format!("secret,id=s0,data={KEY}");
        let opts = self.opts();
        run(
            "qemu-img",
            &["convert", "--object", &secret, "--image-opts", &opts, "-O", "raw", raw.to_str().unwrap()],
        );
        let content = std::fs::read(&raw).unwrap();
        assert_eq!(content.len() as u64, self.size);
        content
    }

    fn check(&self) {
        let secret = format!("secret,id=s0,data={KEY}");
        let opts = self.opts();
        run("qemu-img", &["check", "--object", &secret, "--image-opts", &opts]);
    }

    fn io(&self, command: &str) {
        let secret = format!("secret,id=s0,data={KEY}");
        let opts = self.opts();
        let text = run("qemu-io", &["--object", &secret, "--image-opts", &opts, "-c", command]);
        assert!(!text.contains("failed"), "{command}: {text}");
    }

    /// Options of the node.
    fn node(&self, extra: &Value) -> Value {
        let mut all = json!({"driver": "qcow2", "node-name": "q", "discard": "unmap",
                             "file": {"driver": "file", "filename": self.path().to_str().unwrap()}});
        if self.encrypted {
            all["encrypt"] = json!({"format": "luks", "key-secret": "s0"});
        }
        all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        all
    }
}

/// A graph with the image, and iothreads.
struct Open {
    graph: Graph,
    threads: Vec<IoThread>,
    root: Option<Root>,
}

impl Open {
    fn new(options: Value, threads: usize) -> Open {
        let threads: Vec<IoThread> = (0..threads)
            .map(|n| {
                IoThread::start(IoThreadOptions { name: format!("t{n}"), ..Default::default() }).unwrap()
            })
            .collect();
        let graph = Graph::new(registry(), threads.first().cloned());
        graph.secrets().add("s0", Secret::new(KEY.into())).unwrap();
        block_on(graph.blockdev_add(options)).unwrap();
        let root =
            block_on(graph.attach("q", RootOptions::new("the test", true), Rc::new(NoSource))).unwrap();
        Open { graph, threads, root: Some(root) }
    }

    fn view(&self) -> Arc<View> {
        self.root.as_ref().and_then(Root::view).unwrap()
    }

    fn close(mut self) {
        block_on(self.root.take().unwrap().detach());
        block_on(self.graph.blockdev_del("q")).unwrap();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(root) = self.root.take() {
            block_on(root.detach());
        }
        block_on(self.graph.close_all());
        self.graph.set_iothread(None);
        self.threads.drain(..).for_each(IoThread::stop);
    }
}

/// One task: writes in stretches of its own, keeps what they must hold.
struct Task {
    client: Client,
    rng: Rng,
    /// (start, content) of each stretch.
    stretches: Vec<(u64, Vec<u8>)>,
    unit: u64,
}

impl Task {
    async fn step(&mut self) {
        let which = self.rng.below(self.stretches.len() as u64) as usize;
        let len = self.stretches[which].1.len() as u64;
        let unit = self.unit;
        let from = self.rng.below(len / unit) * unit;
        let room = (len - from) / unit;
        let most = if self.rng.one_in(4) { room } else { room.min(4) };
        let count = (1 + self.rng.below(most)) * unit;
        if self.rng.one_in(3) {
            self.client = self.client.other();
        }
        let start = self.stretches[which].0;
        let mut data = vec![0; count as usize];
        let what = self.rng.below(12);
        match what {
            0..=5 => {
                data = self.rng.data(count);
                self.client.write(start + from, &data, self.rng.one_in(20)).await.unwrap();
            }
            6 => self.client.zero(start + from, count, ZeroFlags::empty()).await.unwrap(),
            7 => self.client.zero(start + from, count, ZeroFlags::MAY_UNMAP).await.unwrap(),
            8 => {
                self.client.discard(start + from, count).await.unwrap();
                // Whole clusters may have become zero.
                data = self.client.read(start + from, count).await.unwrap();
                let old = &self.stretches[which].1[from as usize..][..count as usize];
                for (new, old) in data.chunks(512).zip(old.chunks(512)) {
                    assert!(new == old || new.iter().all(|b| *b == 0), "a discard at {}", start + from);
                }
            }
            9 => return self.client.flush().await.unwrap(),
            _ => {
                let seen = self.client.read(start + from, count).await.unwrap();
                let old = &self.stretches[which].1[from as usize..][..count as usize];
                assert!(seen == old, "read {}+{count} ({:?})", start + from, self.client.way);
                return;
            }
        }
        self.stretches[which].1[from as usize..][..count as usize].copy_from_slice(&data);
    }
}

/// Writes at random from all threads, eight tasks each, with stretches of `stretch` bytes dealt out in turns.
fn scribble(open: &Open, model: &mut [u8], stretch: u64, unit: u64, steps: u32, seed: u64) {
    const TASKS: usize = 8;
    let all = open.threads.len() * TASKS;
    let mut dealt: Vec<Vec<(u64, Vec<u8>)>> = vec![Vec::new(); all];
    for (n, piece) in model.chunks(stretch as usize).enumerate() {
        if piece.len() as u64 >= unit {
            let len = piece.len() as u64 / unit * unit;
            dealt[n % all].push((n as u64 * stretch, piece[..len as usize].to_vec()));
        }
    }
    let view = open.view();
    let results: Vec<Vec<(u64, Vec<u8>)>> = std::thread::scope(|scope| {
        let handles: Vec<_> = open
            .threads
            .iter()
            .zip(dealt.chunks(TASKS).map(<[_]>::to_vec))
            .enumerate()
            .map(|(t, (thread, hands))| {
                let view = Arc::clone(&view);
                scope.spawn(move || {
                    thread.call_blocking(move |local| async move {
                        let io: NodeIo = view.io(&local);
                        let tasks =
                            hands.into_iter().enumerate().filter(|(_, h)| !h.is_empty()).map(|(k, hand)| {
                                let way = if k % 2 == 0 { Way::Mapped } else { Way::Driven };
                                let mut task = Task {
                                    client: Client { io: io.clone(), way },
                                    rng: Rng::new(seed * 1000 + (t * TASKS + k) as u64),
                                    stretches: hand,
                                    unit,
                                };
                                async move {
                                    for _ in 0..steps {
                                        task.step().await;
                                    }
                                    task.stretches
                                }
                            });
                        let done = join_all(&io, tasks).await;
                        done.into_iter().flat_map(|d| d.expect("a task panicked")).collect::<Vec<_>>()
                    })
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap().expect("the thread panicked")).collect()
    });
    for (start, content) in results.into_iter().flatten() {
        model[start as usize..][..content.len()].copy_from_slice(&content);
    }
}

/// What we read.
fn ours(open: &Open, size: u64) -> Vec<u8> {
    let view = open.view();
    open.threads[0]
        .call_blocking(move |local| async move {
            let client = Client { io: view.io(&local), way: Way::Driven };
            let mut all = Vec::new();
            while (all.len() as u64) < size {
                let len = (size - all.len() as u64).min(1 << 20);
                all.extend(client.read(all.len() as u64, len).await.unwrap());
            }
            all
        })
        .unwrap()
}

fn same(a: &[u8], b: &[u8], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
        let end = a.iter().zip(b).rposition(|(a, b)| a != b).unwrap();
        panic!(
            "{what}: differs from {at:#x} to {end:#x}: {:02x?} / {:02x?}",
            &a[at..][..8.min(a.len() - at)],
            &b[at..][..8.min(b.len() - at)]
        );
    }
}

/// The whole round over one image.
fn round(image: &Image, extra: &Value, stretch: u64, steps: u32) {
    let unit = if image.encrypted { 512 } else { BLOCK / 4 };
    let mut model = image.content();
    for turn in 0..2 {
        let open = Open::new(image.node(extra), 2);
        scribble(&open, &mut model, stretch, unit, steps, seed() + turn);
        same(&ours(&open, image.size), &model, "ours before closing");
        open.close();
        image.check();
        same(&image.content(), &model, "QEMU's");
        let open = Open::new(image.node(extra), 1);
        same(&ours(&open, image.size), &model, "ours after opening again");
        open.close();
        image.check();
    }
    // And the other way round.
    let mut rng = Rng::new(seed() + 99);
    for _ in 0..12 {
        let (at, len) = rng.range(image.size - 1024);
        let (at, len) = (at & !511, len.next_multiple_of(512).min(image.size - (at & !511)));
        match rng.below(4) {
            0 => image.io(&format!("write -z -u {at} {len}")),
            1 => image.io(&format!("discard {at} {len}")),
            _ => image.io(&format!("write -P {} {at} {len}", rng.below(255) + 1)),
        }
    }
    let model = image.content();
    let open = Open::new(image.node(extra), 1);
    same(&ours(&open, image.size), &model, "ours of what QEMU wrote");
    open.close();
    image.check();
}

fn shape(options: &str, size: u64, extra: Value, stretch: u64, steps: u32) {
    if have_tools() {
        round(&Image::new(options, size), &extra, stretch, steps);
    }
}

const M: u64 = 1 << 20;

#[test]
fn plain() {
    shape("", 8 * M, json!({}), 12 * 1024, 150);
}

#[test]
fn plain_whole_clusters() {
    shape("", 64 * M, json!({}), 3 * 65536, 150);
}

#[test]
fn tiny_clusters() {
    shape("cluster_size=512", 2 * M + 512, json!({"l2-cache-size": 4096}), 12 * 1024, 150);
}

#[test]
fn huge_clusters() {
    shape("cluster_size=2M", 33 * M, json!({}), 64 * 1024, 100);
}

#[test]
fn version_2() {
    shape("compat=0.10,cluster_size=4k", 6 * M + 512, json!({}), 28 * 1024, 150);
}

#[test]
fn subclusters() {
    shape("extended_l2=on,cluster_size=16k", 8 * M, json!({}), 20 * 1024, 150);
    shape("extended_l2=on", 24 * M, json!({}), 96 * 1024, 150);
}

#[test]
fn lazy() {
    shape("lazy_refcounts=on,cluster_size=4k", 8 * M, json!({}), 20 * 1024, 150);
}

#[test]
fn one_bit_refcounts() {
    shape("refcount_bits=1,cluster_size=4k", 8 * M, json!({}), 20 * 1024, 150);
}

#[test]
fn wide_refcounts() {
    shape("refcount_bits=64,cluster_size=512", 3 * M, json!({}), 4 * 1024, 150);
}

#[test]
fn preallocated() {
    shape("preallocation=metadata,cluster_size=8k", 8 * M, json!({}), 20 * 1024, 150);
    shape("preallocation=full,cluster_size=8k", 4 * M, json!({"discard-no-unref": true}), 20 * 1024, 150);
}

#[test]
fn external_data() {
    shape("data_file=DATA,cluster_size=8k", 8 * M, json!({}), 20 * 1024, 150);
}

#[test]
fn external_data_that_stands_alone() {
    if !have_tools() {
        return;
    }
    let image = Image::new("data_file=DATA,data_file_raw=on,cluster_size=8k", 8 * M);
    round(&image, &json!({}), 20 * 1024, 150);
    let raw = std::fs::read(image.dir.path().join("data")).unwrap();
    same(&raw[..image.size as usize], &image.content(), "the data file on its own");
}

#[test]
fn encrypted() {
    shape(
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,cluster_size=8k",
        8 * M,
        json!({}),
        20 * 1024,
        150,
    );
    shape(
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,extended_l2=on,cluster_size=16k",
        8 * M,
        json!({}),
        20 * 1024,
        100,
    );
}

#[test]
fn past_the_page_cache() {
    shape("", 8 * M, json!({"cache": {"direct": true}}), 12 * 1024, 100);
}

/// A backing file with content, of another size.
fn overlay(options: &str, size: u64, backing: u64, format: &str) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    run("qemu-img", &["create", "-q", "-f", format, base.to_str().unwrap(), &backing.to_string()]);
    let mut rng = Rng::new(seed());
    for _ in 0..30 {
        let (at, len) = rng.range(backing - 1024);
        let command = format!(
            "write -P {} {} {}",
            rng.below(255) + 1,
            at & !511,
            (len.next_multiple_of(512)).min(backing - (at & !511))
        );
        run("qemu-io", &["-f", format, "-c", &command, base.to_str().unwrap()]);
    }
    let moved = |image: Image| {
        std::fs::rename(&base, image.dir.path().join("base")).unwrap();
        image
    };
    let name = base.to_str().unwrap();
    let image = Image::with(options, size, &["-b", name, "-F", format]);
    let path = image.path();
    let image = moved(image);
    // Relative to the image, as people have it.
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "base", "-F", format, path.to_str().unwrap()]);
    image
}

#[test]
fn over_backing_files() {
    if !have_tools() {
        return;
    }
    round(&overlay("", 8 * M, 8 * M, "qcow2"), &json!({}), 12 * 1024, 150);
    round(&overlay("cluster_size=8k", 8 * M, 3 * M + 512, "raw"), &json!({}), 20 * 1024, 150);
    round(
        &overlay("extended_l2=on,cluster_size=16k", 5 * M + 512, 8 * M, "qcow2"),
        &json!({}),
        20 * 1024,
        150,
    );
    round(&overlay("compat=0.10,cluster_size=8k", 6 * M, 8 * M, "qcow2"), &json!({}), 20 * 1024, 150);
}

/// An image whose clusters are all compressed.
fn compressed(options: &str) {
    if !have_tools() {
        return;
    }
    let image = Image::new(options, 8 * M);
    let raw = image.dir.path().join("source");
    let mut data = Vec::new();
    let mut rng = Rng::new(seed());
    while data.len() < 8 * M as usize {
        // Compressible, and not all of it.
        let n = rng.below(40_000) as usize;
        if rng.one_in(4) {
            data.extend(rng.data(n as u64))
        } else {
            data.extend(std::iter::repeat_n(rng.below(256) as u8, n))
        }
    }
    data.truncate(8 * M as usize);
    std::fs::write(&raw, &data).unwrap();
    let path = image.path();
    run(
        "qemu-img",
        &[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            raw.to_str().unwrap(),
            path.to_str().unwrap(),
        ],
    );
    round(&image, &json!({}), 20 * 1024, 150);
}

#[test]
fn compressed_clusters() {
    compressed("cluster_size=64k");
    compressed("cluster_size=4k,compression_type=zstd");
    compressed("extended_l2=on,cluster_size=16k");
}

#[test]
fn compressed_writes() {
    if !have_tools() {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=8k,compression_type=zstd"] {
        let image = Image::new(options, 4 * M + 512);
        let mut model = vec![0; image.size as usize];
        let open = Open::new(image.node(&json!({})), 2);
        let view = open.view();
        let cluster: usize = if options.contains("64k") { 65536 } else { 8192 };
        for (n, piece) in model.chunks_mut(cluster).enumerate() {
            if n % 3 != 0 {
                piece.fill(n as u8);
                piece[..100].copy_from_slice(&Rng::new(n as u64).data(100));
            }
        }
        let all = model.clone();
        open.threads[1]
            .call_blocking(move |local| async move {
                let io = view.io(&local);
                for (n, piece) in all.chunks(cluster).enumerate().filter(|(n, _)| n % 3 != 0) {
                    let bufs = host::IoVecs::from_vec(piece.to_vec());
                    io.write((n * cluster) as u64, &bufs, graph::WriteFlags::COMPRESSED).await.unwrap();
                }
                io.flush().await.unwrap();
            })
            .unwrap();
        same(&ours(&open, image.size), &model, "ours");
        scribble(&open, &mut model, 20 * 1024, 512, 60, seed());
        open.close();
        image.check();
        same(&image.content(), &model, "QEMU's");
    }
}

#[test]
fn sizes_change() {
    if !have_tools() {
        return;
    }
    for options in ["cluster_size=512", "", "extended_l2=on,cluster_size=16k", "compat=0.10"] {
        let mut image = Image::new(options, 2 * M);
        let mut model = vec![0; image.size as usize];
        let open = Open::new(image.node(&json!({})), 2);
        let mut rng = Rng::new(seed());
        for _ in 0..10 {
            scribble(&open, &mut model, 20 * 1024, 512, 20, rng.bits() % 1000);
            let size = (1 + rng.below(12_000)) * 512;
            block_on(open.graph.block_resize("q", size)).unwrap();
            model.resize(size as usize, 0);
            same(&ours(&open, size), &model, "ours after a change of size");
            image.size = size;
        }
        open.close();
        image.check();
        same(&image.content(), &model, "QEMU's");
    }
}

#[test]
fn an_overlay_grows_over_a_longer_backing_file() {
    if !have_tools() {
        return;
    }
    for options in ["", "extended_l2=on,cluster_size=16k", "compat=0.10"] {
        let mut image = overlay(options, 2 * M + 512, 6 * M, "raw");
        let mut model = image.content();
        let open = Open::new(image.node(&json!({})), 1);
        block_on(open.graph.block_resize("q", 8 * M)).unwrap();
        model.resize(8 * M as usize, 0);
        same(&ours(&open, 8 * M), &model, "new space is zero");
        open.close();
        image.size = 8 * M;
        image.check();
        same(&image.content(), &model, "QEMU's");
    }
}

#[test]
fn chains_and_circles() {
    if !have_tools() {
        return;
    }
    let image = overlay("", 4 * M, 4 * M, "qcow2");
    let path = image.path();
    let add = |path: &Path| {
        let graph = Graph::new(registry(), Some(IoThread::start(IoThreadOptions::default()).unwrap()));
        let file = json!({"driver": "file", "filename": path.to_str().unwrap()});
        let result = block_on(graph.blockdev_add(json!({"driver": "qcow2", "node-name": "q", "file": file})));
        block_on(graph.close_all());
        result.map_err(|e| e.to_string())
    };
    // Nine deep.
    let mut top = path.clone();
    for n in 0..9 {
        let next = image.dir.path().join(format!("over{n}"));
        let name = top.file_name().unwrap().to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", next.to_str().unwrap()]);
        top = next;
    }
    add(&top).unwrap();
    // Without a format.
    let top_name = top.to_str().unwrap();
    // The type of the extension that says it, made one that nobody knows.
    let mut bytes = std::fs::read(&top).unwrap();
    let at = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] = 0x12;
    std::fs::write(&top, bytes).unwrap();
    let refused = add(&top).unwrap_err();
    assert!(refused.contains("in which format") && refused.contains("'backing'"), "{refused}");
    // The first one on the last one.
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "image", "-F", "qcow2", top_name]);
    let base = image.dir.path().join("base");
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", top_name, "-F", "qcow2", base.to_str().unwrap()]);
    let refused = add(&top).unwrap_err();
    assert!(refused.contains("infinite loop"), "{refused}");
    run(
        "qemu-img",
        &["rebase", "-u", "-f", "qcow2", "-b", "nbd://localhost", "-F", "raw", base.to_str().unwrap()],
    );
    let refused = add(&top).unwrap_err();
    assert!(refused.contains("not a file of this host"), "{refused}");
}

#[test]
fn a_chain_has_an_end() {
    if !have_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |n: usize| dir.path().join(format!("level{n}"));
    let lowest = path(0);
    run("qemu-img", &["create", "-q", "-f", "qcow2", lowest.to_str().unwrap(), "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 64k 64k", lowest.to_str().unwrap()]);
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", "level0", "-F", "qcow2", path(1).to_str().unwrap()],
    );
    // The others are copies with another name inside, of the same length.
    let first = std::fs::read(path(1)).unwrap();
    let rename = |to: &str| {
        let mut bytes = first.clone();
        let at = bytes.windows(6).position(|w| w == b"level0").unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes[16..20].copy_from_slice(&(to.len() as u32).to_be_bytes());
        bytes
    };
    for n in 2..=70 {
        std::fs::write(path(n), rename(&format!("level{}", n - 1))).unwrap();
    }
    let options = |n: usize| {
        json!({"driver": "qcow2", "node-name": "q", "discard": "unmap", "detect-zeroes": "unmap",
               "file": {"driver": "file", "filename": path(n).to_str().unwrap()}})
    };
    let open = Open::new(options(59), 2);
    let mut model = vec![0; M as usize];
    model[65536..131072].fill(5);
    same(&ours(&open, M), &model, "through sixty images");
    open.close();
    let graph = Graph::new(registry(), Some(IoThread::start(IoThreadOptions::default()).unwrap()));
    let refused = block_on(graph.blockdev_add(options(70))).unwrap_err().to_string();
    assert!(refused.contains("more than 62"), "{}", &refused[refused.len() - 100..]);
    block_on(graph.close_all());
}
