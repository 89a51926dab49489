//! Chains of qcow2 images: which of them decides a range, their backing file's name written anew, and repairing one that is
//! in use. QEMU's tools say what is right.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use common::{registry, tool};
use conformance::request::{Client, Way};
use graph::{CheckFix, CheckReport, Graph, NoSource, NodeIo, Perm, Root, RootOptions, StatusFlags};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions};
use serde_json::{Value, json};

const CLUSTER: u64 = 65536;
const SIZE: u64 = 64 * CLUSTER;

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

struct Open {
    graph: Graph,
    thread: IoThread,
    root: Option<Root>,
}

impl Open {
    fn new(options: Value) -> Open {
        let thread = IoThread::start(IoThreadOptions { name: "t".into(), ..Default::default() }).unwrap();
        let graph = Graph::new(registry(), Some(thread.clone()));
        block_on(graph.blockdev_add(options)).unwrap();
        let options = RootOptions {
            perm: Perm::CONSISTENT_READ | Perm::WRITE,
            shared: Perm::ALL,
            ..RootOptions::new("the test", true)
        };
        let root = block_on(graph.attach("q", options, Rc::new(NoSource))).unwrap();
        Open { graph, thread, root: Some(root) }
    }

    /// Runs on the iothread.
    fn on<R, F, Fut>(&self, f: F) -> R
    where
        R: Send + 'static,
        F: FnOnce(NodeIo) -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
    {
        let view = self.root.as_ref().and_then(Root::view).unwrap();
        self.thread.call_blocking(move |local| f(view.io(&local))).unwrap()
    }

    fn check(&self, fix: CheckFix) -> graph::Result<CheckReport> {
        self.on(move |io| async move { io.node().unwrap().driver().check(&io, fix).await })
    }

    fn write(&self, at: u64, data: Vec<u8>) {
        self.on(move |io| async move {
            Client { io, way: Way::Driven }.write(at, &data, false).await.unwrap();
        });
    }

    fn read(&self, at: u64, len: u64) -> Vec<u8> {
        self.on(move |io| async move { Client { io, way: Way::Driven }.read(at, len).await.unwrap() })
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
        self.thread.clone().stop();
    }
}

fn node(path: &Path) -> Value {
    json!({"driver": "qcow2", "node-name": "q", "discard": "unmap",
           "file": {"driver": "file", "filename": path.to_str().unwrap()}})
}

/// Three images, the middle one shorter; what each has differs.
fn chain(dir: &Path) -> [String; 3] {
    let names = ["base", "middle", "top"].map(|n| dir.join(n).to_str().unwrap().to_owned());
    let [base, middle, top] = names.each_ref();
    run("qemu-img", &["create", "-q", "-f", "qcow2", base, &SIZE.to_string()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 1 2M 2M", base]);
    let short = (SIZE * 3 / 4).to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, &short]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 512k 256k", "-c", "write -z 2560k 128k", middle]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, &SIZE.to_string()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 640k 64k", "-c", "write -P 3 3M 64k", top]);
    names
}

/// Where it begins, its length, how deep the image lies that decides, zero, data.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Piece(u64, u64, u64, bool, bool);

#[test]
fn who_decides_a_range_is_who_qemu_says_it_is() {
    if !have_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [_, _, top] = chain(dir.path());
    let theirs: Value =
        serde_json::from_str(&run("qemu-img", &["map", "-f", "qcow2", "--output=json", &top])).unwrap();
    let open = Open::new(node(Path::new(&top)));
    let ours: Vec<Piece> = open.on(|io| async move {
        let mut all: Vec<Piece> = Vec::new();
        let mut at = 0;
        while at < SIZE {
            let found = io.status_above(None, at, SIZE - at).await.unwrap();
            let flags = found.status.flags;
            let piece = Piece(
                at,
                found.status.len,
                u64::from(found.depth),
                flags.contains(StatusFlags::ZERO),
                flags.contains(StatusFlags::DATA),
            );
            at += found.status.len;
            match all.last_mut() {
                Some(last) if (last.2, last.3, last.4) == (piece.2, piece.3, piece.4) => last.1 += piece.1,
                _ => all.push(piece),
            }
        }
        all
    });
    let mut expected: Vec<Piece> = Vec::new();
    for e in theirs.as_array().unwrap() {
        let word = |name: &str| e[name].as_u64().unwrap();
        let flag = |name: &str| e[name].as_bool().unwrap();
        let piece = Piece(word("start"), word("length"), word("depth"), flag("zero"), flag("data"));
        match expected.last_mut() {
            Some(last) if (last.2, last.3, last.4) == (piece.2, piece.3, piece.4) => last.1 += piece.1,
            _ => expected.push(piece),
        }
    }
    // Where nobody has anything QEMU names the last image and we name none. Past the end of the short one zeroes are that
    // one's, as it is for QEMU's block layer; `qemu-img map` calls them the top's.
    let past = |p: &Piece| p.0 >= SIZE * 3 / 4 && p.3 && !p.4;
    assert_eq!(ours.iter().find(|p| past(p)).unwrap().2, 1);
    let decided = |all: &[Piece]| -> Vec<Piece> {
        let known = all.iter().filter(|p| p.4 || p.2 < 2);
        known.map(|p| if past(p) { Piece { 2: 0, ..*p } } else { *p }).collect()
    };
    assert_eq!(decided(&ours), decided(&expected));
    // Down to a node that is left out.
    let above = open.on(|io| async move {
        let mut out = Vec::new();
        for at in [0, 640 << 10, 512 << 10, 3 << 20] {
            let below = io.below().map(|b| b.node().unwrap().id());
            out.push(io.is_allocated_above(below, at, CLUSTER).await.unwrap());
        }
        out
    });
    assert_eq!(above, [(false, CLUSTER), (true, CLUSTER), (false, CLUSTER), (true, CLUSTER)]);
    open.close();
}

#[test]
fn another_name_of_the_backing_file_is_what_qemu_reads() {
    if !have_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [base, middle, top] = chain(dir.path());
    let told = |name: &str| -> (Value, Value) {
        let text = run("qemu-img", &["info", "-f", "qcow2", "--output=json", name]);
        let info: Value = serde_json::from_str(&text).unwrap();
        (info["backing-filename"].clone(), info["backing-filename-format"].clone())
    };
    assert_eq!(told(&top), (json!(middle), json!("qcow2")));
    let long = format!("{}base", "./".repeat(200));
    for (name, format) in [
        (Some(base.clone()), Some("qcow2".to_owned())),
        (Some(long), Some("raw".to_owned())),
        (Some("base".into()), None),
        (None, None),
        (Some(middle.clone()), Some("qcow2".to_owned())),
    ] {
        let open = Open::new(node(Path::new(&top)));
        let (n, f) = (name.clone(), format.clone());
        open.on(move |io| async move {
            let node = io.node().unwrap().driver();
            node.change_backing_file(&io, n, f).await.unwrap();
        });
        // What is in the image is told at once, without opening it again.
        let info = open.on(|io| async move { io.node().unwrap().driver().info() });
        assert_eq!((info.backing_file, info.backing_format), (name.clone(), format.clone()));
        drop(open);
        assert_eq!(told(&top), (json!(name), json!(format)), "{name:?}");
        if name.as_ref() == Some(&middle) || name.is_none() {
            run("qemu-img", &["check", "-f", "qcow2", &top]);
        }
        // So that ours opens it again: a name that has no format needs `backing`.
        if name.is_some() && name.as_ref() != Some(&middle) {
            run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &top]);
        }
    }
    // It is the middle one's content again.
    assert_eq!(Open::new(node(Path::new(&top))).read(512 << 10, 4096), [2; 4096]);
}

/// Changes bytes of a file behind everybody's back.
fn poke(path: &Path, at: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn word(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn an_image_in_use_is_repaired_and_goes_on_being_used() {
    if !have_tools() {
        return;
    }
    for damage in ["none", "leak", "low", "zero", "flag"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let name = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", name, &SIZE.to_string()]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 2M", name]);
        let open = Open::new(node(&path));
        // Both in memory and ahead of the disk.
        open.write(1 << 20, vec![2; 3 << 19]);
        let all = CheckFix { leaks: true, errors: true };
        let clean = open.check(CheckFix::NONE).unwrap();
        assert_eq!((clean.leaks, clean.corruptions), (0, 0));
        // A cluster of data, its entry and its count; then a free one.
        let table = word(&path, word(&path, 40)) & 0x00ff_ffff_ffff_fe00;
        let entry = word(&path, table);
        let block = word(&path, word(&path, 48));
        let count = block + (entry & 0x00ff_ffff_ffff_fe00) / CLUSTER * 2;
        match damage {
            "leak" => poke(&path, count, &3u16.to_be_bytes()),
            "low" => {
                // Referred to twice, counted once.
                poke(&path, table + 8, &entry.to_be_bytes());
            }
            "zero" => poke(&path, count, &0u16.to_be_bytes()),
            "flag" => poke(&path, table, &(entry & !(1 << 63)).to_be_bytes()),
            _ => {}
        }
        let found = open.check(CheckFix::NONE).unwrap();
        assert_eq!(found.leaks + found.corruptions == 0, damage == "none", "{damage}: {found:?}");
        let fixed = open.check(all).unwrap();
        assert_eq!((fixed.leaks, fixed.corruptions, fixed.check_errors), (0, 0, 0), "{damage}: {fixed:?}");
        assert_eq!(fixed.leaks_fixed + fixed.corruptions_fixed == 0, damage == "none", "{damage}: {fixed:?}");
        // Memory knows of it: what is written now goes where nothing else is.
        for round in 3..6u8 {
            open.write(u64::from(round) << 19, vec![round; 1 << 20]);
        }
        assert_eq!(open.read(2 << 20, 4096), [4; 4096], "{damage}");
        assert_eq!(open.read((3 << 20) - 4096, 4096), [5; 4096], "{damage}");
        assert_eq!(open.read(512 << 10, 4096), [1; 4096], "{damage}");
        let report = open.check(CheckFix::NONE).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{damage}: {report:?}");
        open.close();
        run("qemu-img", &["check", "-f", "qcow2", name]);
        run("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 5 2560k 1M", "-c", "read -P 4 2M 512k", name]);
    }
}

#[test]
fn an_image_that_takes_no_writes_is_not_repaired_in_use() {
    if !have_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
    run("qemu-img", &["snapshot", "-c", "then", path.to_str().unwrap()]);
    let leaks = CheckFix { leaks: true, errors: false };
    let options = json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "node-name": "f",
                         "filename": path.to_str().unwrap()}});
    let open = Open::new(options);
    block_on(open.graph.blockdev_add(json!({"driver": "qcow2", "node-name": "then", "read-only": true,
                                            "snapshot": "then", "file": "f"})))
    .unwrap();
    let refused = open.check(leaks).unwrap_err().to_string();
    assert!(refused.contains("A snapshot of the image is being read"), "{refused}");
    block_on(open.graph.blockdev_del("then")).unwrap();
    open.check(leaks).unwrap();
    open.close();
}
