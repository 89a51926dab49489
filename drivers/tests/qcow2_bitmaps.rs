//! Persistent dirty bitmaps in qcow2 images: kept over closing and opening, read and written by QEMU's tools as well,
//! inconsistent after a crash.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};

use common::{registry, tool};
use graph::{
    Bitmap, BitmapRef, CreateContext, Graph, JobControl, NewBitmap, NodeIo, Perm, PermPair, WriteFlags,
};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions, IoVecs};
use serde_json::{Value, json};

const SIZE: u64 = 64 << 20;
const CLUSTER: u64 = 65536;

fn run(name: &str, args: &[&str]) -> String {
    let output = tool(name, args).expect("QEMU's tools are installed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?}: {text}");
    text
}

struct Image(tempfile::TempDir);

impl Image {
    /// `None` without QEMU's tools.
    fn new(options: &str) -> Option<Image> {
        tool("qemu-img", &["--version"])?;
        tool("qemu-io", &["--version"])?;
        let image = Image(tempfile::tempdir().unwrap());
        let path = image.name();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &path, &SIZE.to_string()]);
        Some(image)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("image")
    }

    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn check(&self) {
        run("qemu-img", &["check", "-q", "-f", "qcow2", &self.name()]);
    }

    /// Name and flags of the bitmaps, as QEMU finds them.
    fn listed(&self) -> Vec<(String, Vec<String>)> {
        let text = run("qemu-img", &["info", "--output=json", "-f", "qcow2", &self.name()]);
        let info: Value = serde_json::from_str(&text).unwrap();
        let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let flags = |v: &Value| v["flags"].as_array().unwrap().iter().map(text).collect();
        list.iter().map(|b| (text(&b["name"]), flags(b))).collect()
    }

    fn open(&self) -> Open {
        self.try_open(&json!({})).unwrap()
    }

    fn try_open(&self, extra: &Value) -> Result<Open, graph::BlockError> {
        let options = IoThreadOptions { name: "bitmaps".to_owned(), ..IoThreadOptions::default() };
        let thread = IoThread::start(options).unwrap();
        let graph = Graph::new(registry(), Some(thread.clone()));
        let mut node = json!({"driver": "qcow2", "node-name": "q", "discard": "unmap",
                              "file": {"driver": "file", "filename": self.name()}});
        node.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let added = block_on(graph.blockdev_add(node));
        let open = Open { graph, thread: Some(thread) };
        added.map(|()| open)
    }
}

struct Open {
    graph: Graph,
    thread: Option<IoThread>,
}

impl Open {
    fn add(&self, name: &str, granularity: u32) {
        let new = NewBitmap {
            name: name.into(),
            granularity: Some(granularity),
            persistent: true,
            disabled: false,
        };
        block_on(self.graph.bitmap_add("q", new)).unwrap();
    }

    fn bitmap(&self, name: &str) -> std::sync::Arc<Bitmap> {
        self.graph.node("q").unwrap().bitmaps().find(name).unwrap()
    }

    fn on_node(&self, work: impl AsyncFnOnce(NodeIo) -> graph::Result<()> + Send + 'static) {
        let mut context = CreateContext::new(self.graph.clone(), std::sync::Arc::new(JobControl::default()));
        let hold = PermPair { perm: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::ALL };
        block_on(async {
            let index = context.open(graph::BlockdevRef::Reference("q".into()), hold).await.unwrap();
            context.child_io(index, move |io| async move { work(io).await }).await.unwrap();
            context.close().await;
        });
    }

    fn write(&self, offset: u64, len: u64) {
        self.on_node(async move |io| {
            io.write(offset, &IoVecs::from_vec(vec![7; len as usize]), WriteFlags::empty()).await
        });
    }

    fn close(mut self) {
        block_on(self.graph.blockdev_del("q")).unwrap();
        self.graph.set_iothread(None);
        self.thread.take().unwrap().stop();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // A crash: nothing is stored.
        self.graph.set_iothread(None);
        if let Some(thread) = self.thread.take() {
            thread.stop();
        }
    }
}

/// All marked ranges.
fn marks(bitmap: &Bitmap) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Some((offset, len)) = bitmap.next_dirty(at, u64::MAX, u64::MAX) {
        all.push((offset, len));
        at = offset + len;
    }
    all
}

#[test]
fn bitmaps_are_kept_over_closing_and_opening() {
    for options in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "lazy_refcounts=on", "extended_l2=on"]
    {
        let Some(image) = Image::new(options) else { return };
        let open = image.open();
        open.add("fine", 512);
        open.add("coarse", 1 << 20);
        open.write(0, 1000);
        open.write(10 << 20, 3 << 20);
        open.write(SIZE - 512, 512);
        let seen = (marks(&open.bitmap("fine")), marks(&open.bitmap("coarse")));
        assert_eq!(seen.0, [(0, 1024), (10 << 20, 3 << 20), (SIZE - 512, 512)], "{options}");
        open.close();
        image.check();
        let auto = |name: &str| (name.to_owned(), vec!["auto".to_owned()]);
        assert_eq!(image.listed(), [auto("fine"), auto("coarse")], "{options}");
        // Opened again, it goes on from there; and stored again, nothing of the old leaks.
        let open = image.open();
        assert_eq!((marks(&open.bitmap("fine")), marks(&open.bitmap("coarse"))), seen, "{options}");
        open.write(1 << 20, 512);
        block_on(open.graph.bitmap_set_recording("q", "coarse", false)).unwrap();
        open.write(5 << 20, 512);
        open.close();
        image.check();
        assert_eq!(image.listed(), [auto("fine"), ("coarse".to_owned(), vec![])], "{options}");
        let open = image.open();
        assert!(open.bitmap("fine").is_dirty(5 << 20) && !open.bitmap("coarse").is_dirty(5 << 20));
        assert!(open.bitmap("fine").recording() && !open.bitmap("coarse").recording());
        // Removing one leaves the other; removing both leaves nothing.
        block_on(open.graph.bitmap_remove("q", "fine")).unwrap();
        open.close();
        image.check();
        assert_eq!(image.listed(), [("coarse".to_owned(), vec![])], "{options}");
        let open = image.open();
        block_on(open.graph.bitmap_remove("q", "coarse")).unwrap();
        open.close();
        image.check();
        assert_eq!(image.listed(), [], "{options}");
    }
}

#[test]
fn qemu_reads_our_bitmaps_and_we_read_its() {
    let Some(image) = Image::new("cluster_size=64k") else { return };
    let name = image.name();
    // QEMU records what qemu-io writes.
    run("qemu-img", &["bitmap", "--add", "-g", "64k", "-f", "qcow2", &name, "theirs"]);
    let writes = ["write 0 4k", "write 1M 130k", "discard 32M 1M", "write -z 63M 64k"];
    run(
        "qemu-io",
        &["-f", "qcow2", &name, "-c", writes[0], "-c", writes[1], "-c", writes[2], "-c", writes[3]],
    );
    let open = image.open();
    let expected = [(0, CLUSTER), (1 << 20, 3 * CLUSTER), (32 << 20, 1 << 20), (63 << 20, CLUSTER)];
    assert_eq!(marks(&open.bitmap("theirs")), expected);
    open.add("ours", 4096);
    open.write(48 << 20, 5000);
    let ours = marks(&open.bitmap("ours"));
    open.close();
    image.check();
    // QEMU takes our marks into a bitmap of its own, which we read.
    run("qemu-img", &["bitmap", "--add", "-g", "4k", "-f", "qcow2", &name, "copy"]);
    run("qemu-img", &["bitmap", "--merge", "ours", "-f", "qcow2", &name, "copy"]);
    let open = image.open();
    assert_eq!(marks(&open.bitmap("copy")), ours);
    assert_eq!(open.bitmap("theirs").count(), (1 + 3 + 16 + 1 + 1) * CLUSTER);
    let from = BitmapRef { node: None, name: "theirs".into() };
    block_on(open.graph.bitmap_merge("q", "ours", &[from])).unwrap();
    let merged = marks(&open.bitmap("ours"));
    open.close();
    run("qemu-img", &["bitmap", "--merge", "ours", "-f", "qcow2", &name, "copy"]);
    image.check();
    assert_eq!(marks(&image.open().bitmap("copy")), merged);
}

#[test]
fn a_crash_leaves_bitmaps_that_can_only_be_removed() {
    let Some(image) = Image::new("cluster_size=64k") else { return };
    let open = image.open();
    open.add("b", 65536);
    open.close();
    let open = image.open();
    let in_use = || vec!["in-use".to_owned(), "auto".to_owned()];
    // Somebody who looks now is told not to trust it.
    let copy = image.0.path().join("copy");
    std::fs::copy(image.path(), &copy).unwrap();
    drop(open);
    std::fs::rename(&copy, image.path()).unwrap();
    assert_eq!(image.listed(), [("b".to_owned(), in_use())]);
    image.check();
    let open = image.open();
    assert!(open.bitmap("b").inconsistent() && !open.bitmap("b").recording());
    let refused = |r: graph::Result<()>| r.unwrap_err().to_string();
    let words = "Bitmap 'b' is inconsistent and cannot be used";
    assert_eq!(refused(block_on(open.graph.bitmap_clear("q", "b"))), words);
    assert_eq!(refused(block_on(open.graph.block_resize("q", 2 * SIZE))), words);
    open.add("other", 65536);
    open.close();
    // It stays, named.
    let listed = image.listed();
    assert_eq!(listed, [("b".to_owned(), in_use()), ("other".to_owned(), vec!["auto".to_owned()])]);
    let open = image.open();
    block_on(open.graph.bitmap_remove("q", "b")).unwrap();
    block_on(open.graph.block_resize("q", 2 * SIZE)).unwrap();
    assert_eq!(open.bitmap("other").size(), 2 * SIZE);
    open.write(2 * SIZE - CLUSTER, CLUSTER);
    open.close();
    image.check();
    let open = image.open();
    assert_eq!(marks(&open.bitmap("other")), [(2 * SIZE - CLUSTER, CLUSTER)]);
}

#[test]
fn a_read_only_image_keeps_its_bitmaps_as_they_are() {
    let Some(image) = Image::new("cluster_size=64k") else { return };
    let open = image.open();
    open.add("b", 65536);
    open.write(0, 512);
    open.close();
    let before = std::fs::read(image.path()).unwrap();
    let open = image.try_open(&json!({"read-only": true})).unwrap();
    assert_eq!(marks(&open.bitmap("b")), [(0, CLUSTER)]);
    let words = block_on(open.graph.bitmap_clear("q", "b")).unwrap_err().to_string();
    assert_eq!(words, "Bitmap 'b' is readonly and cannot be modified");
    open.close();
    assert!(before == std::fs::read(image.path()).unwrap());
}

/// Overwrites bytes of the image.
fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn damaged_directories_are_refused_as_qemu_refuses_them() {
    let Some(image) = Image::new("cluster_size=64k") else { return };
    let open = image.open();
    open.add("b", 65536);
    open.write(0, 512);
    open.close();
    let good = std::fs::read(image.path()).unwrap();
    let magic = 0x2385_2875u32.to_be_bytes();
    let at = good.windows(4).position(|w| w == magic).unwrap() as u64 + 8;
    let be64 = |at: u64| u64::from_be_bytes(good[at as usize..at as usize + 8].try_into().unwrap());
    let directory = be64(at + 16);
    let table = be64(directory);
    let cases: [(&str, u64, &[u8]); 9] = [
        ("count", at + 3, &[2]),
        ("directory size", at + 15, &[25]),
        ("directory offset", at + 23, &[1]),
        ("table offset", directory + 7, &[1]),
        ("table size", directory + 11, &[2]),
        ("flags", directory + 12, &[0x80]),
        ("type", directory + 16, &[2]),
        ("granularity", directory + 17, &[40]),
        ("table entry", table, &[0xff]),
    ];
    for (what, offset, bytes) in cases {
        std::fs::write(image.path(), &good).unwrap();
        poke(&image.path(), offset, bytes);
        let theirs = tool("qemu-io", &["-f", "qcow2", "-c", "read 0 512", &image.name()]).unwrap();
        let theirs_refuse = String::from_utf8_lossy(&theirs.stderr).contains("can't open");
        let ours = image.try_open(&json!({}));
        assert_eq!(ours.is_err(), theirs_refuse, "{what}: {:?}", String::from_utf8_lossy(&theirs.stderr));
        drop(ours);
    }
}
