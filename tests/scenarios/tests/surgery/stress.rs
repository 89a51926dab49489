//! Random surgery under full load: nothing fails for the guest, nothing is lost, nothing hangs.
//!
//! `RINGBLK_SURGERIES` sets how many; the default suits a run per change, 10000 a night. `RINGBLK_SEED` repeats a run. The
//! pauses the guest saw are printed, not judged: other programs run on the same processors.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use client::{Setup, qmp};
use ringblk_scenarios::{Rig, Rng};
use serde_json::{Value, json};

use crate::load::Load;
use crate::{qcow2, try_command};

/// Bytes of the disk.
const SIZE: u64 = 16 << 20;
/// Most overlays: nothing merges them here.
const MAX_OVERLAYS: usize = 6;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// The graph as it is, and what can be done to it.
struct Surgeon<'a> {
    qmp: &'a mut qmp::Client,
    folder: &'a Path,
    rng: Rng,
    made: u64,
    overlays: usize,
    /// Filters that can be had: their options, and what their child is called.
    filters: Vec<(Value, &'static str)>,
    /// The image lies on a quorum, whose last child may come and go.
    quorum: bool,
    counts: std::collections::BTreeMap<&'static str, (u64, u64)>,
}

impl Surgeon<'_> {
    fn graph(&mut self) -> Value {
        self.qmp.execute("query-block-graph", json!({})).unwrap()
    }

    fn name(&mut self, prefix: &str) -> String {
        self.made += 1;
        format!("{prefix}{}", self.made)
    }

    fn pick(&mut self, list: &[String]) -> Option<String> {
        (!list.is_empty()).then(|| list[self.rng.below(list.len() as u64) as usize].clone())
    }

    /// Nodes below the guest with this edge role, by name.
    fn edges(&mut self, role: &str) -> Vec<(String, String, String)> {
        let graph = self.graph();
        let name = |id: &Value| {
            let node = graph["nodes"].as_array().unwrap().iter().find(|n| n["id"] == *id);
            node.map(|n| n["node-name"].as_str().unwrap().to_owned())
        };
        let mut out = Vec::new();
        for edge in graph["edges"].as_array().unwrap() {
            let roles = edge["roles"].as_array().unwrap();
            let (Some(parent), Some(child)) = (name(&edge["parent"]), name(&edge["child"])) else { continue };
            if roles.iter().any(|r| r == role) {
                out.push((parent, edge["name"].as_str().unwrap().to_owned(), child));
            }
        }
        out
    }

    /// The children of a node: the name of the edge, and the node.
    fn children(&mut self, parent: &str) -> Vec<(String, String)> {
        let edges = self.edges("data").into_iter();
        edges.filter(|(p, ..)| p == parent).map(|(_, child, node)| (child, node)).collect()
    }

    /// The node the guest's export is attached to.
    fn top(&mut self) -> String {
        let graph = self.graph();
        let user = graph["users"].as_array().unwrap()[0]["id"].clone();
        let edge = graph["edges"].as_array().unwrap().iter().find(|e| e["parent"] == user).unwrap();
        let node = graph["nodes"].as_array().unwrap().iter().find(|n| n["id"] == edge["child"]).unwrap();
        node["node-name"].as_str().unwrap().to_owned()
    }

    fn filter(&mut self, over: &str) -> Value {
        let at = self.rng.below(self.filters.len() as u64) as usize;
        let (mut options, child) = self.filters[at].clone();
        options["node-name"] = json!(self.name("flt"));
        options[child] = json!(over);
        options
    }

    fn filters_there(&mut self) -> Vec<String> {
        let edges = self.edges("filtered");
        edges.into_iter().map(|(parent, ..)| parent).filter(|p| p.starts_with("flt")).collect()
    }

    /// One cut; what it was, and whether it had to work.
    fn cut(&mut self) -> (&'static str, Result<Value, String>, bool) {
        match self.rng.below(100) {
            // A filter comes, above all or somewhere below.
            0..=19 if self.filters_there().len() < 10 => {
                let top = self.top();
                let node = self.filter(&top);
                let arguments = json!({"node": node, "parent": "disk", "child": "root"});
                ("insert at the top", try_command(self.qmp, "blockdev-insert-node", &arguments), true)
            }
            20..=34 if self.filters_there().len() < 10 => {
                let edges = self.edges("primary");
                let at = self.rng.below(edges.len() as u64) as usize;
                let (parent, child, below) = edges[at].clone();
                let node = self.filter(&below);
                let arguments = json!({"node": node, "parent": parent, "child": child});
                ("insert below", try_command(self.qmp, "blockdev-insert-node", &arguments), true)
            }
            // And goes.
            35..=54 => {
                let filters = self.filters_there();
                let Some(filter) = self.pick(&filters) else { return ("nothing", Ok(Value::Null), true) };
                ("remove", try_command(self.qmp, "blockdev-remove-node", &json!({"node-name": filter})), true)
            }
            // All users go over to a filter that was made before, and back.
            55..=64 => {
                let top = self.top();
                let node = self.filter(&top);
                let name = node["node-name"].clone();
                self.qmp.execute("blockdev-add", node).unwrap();
                let there = json!({"node-name": top, "replacement": name});
                let result = try_command(self.qmp, "blockdev-replace-node", &there);
                let back = json!({"node-name": name, "replacement": top, "parent": "disk"});
                let result = result.and_then(|_| try_command(self.qmp, "blockdev-replace-node", &back));
                self.qmp.execute("blockdev-del", json!({"node-name": name})).unwrap();
                ("replace and back", result, true)
            }
            65..=67 if self.overlays < MAX_OVERLAYS => {
                self.overlays += 1;
                let (top, name) = (self.top(), self.name("ov"));
                let file = self.folder.join(&name).display().to_string();
                let arguments = json!({"node-name": top, "snapshot-file": file, "snapshot-node-name": name});
                ("snapshot", try_command(self.qmp, "blockdev-snapshot-sync", &arguments), true)
            }
            // A snapshot that comes to nothing.
            68..=74 => {
                let (top, name) = (self.top(), self.name("no"));
                let file = self.folder.join(&name).display().to_string();
                let data = json!({"node-name": top, "snapshot-file": file, "snapshot-node-name": name});
                let actions =
                    json!([{"type": "blockdev-snapshot-sync", "data": data}, {"type": "abort", "data": {}}]);
                let result = try_command(self.qmp, "transaction", &json!({"actions": actions}));
                assert_eq!(result, Err("Transaction aborted using Abort action".into()));
                assert!(!self.folder.join(&name).exists());
                ("snapshot taken back", Ok(Value::Null), true)
            }
            // A copy comes or goes; the two others are right.
            75..=78 if self.quorum => {
                let third = self.children("file").into_iter().find(|(_, node)| node == "copy2");
                let arguments = match third {
                    Some((child, _)) => json!({"parent": "file", "child": child}),
                    None => json!({"parent": "file", "node": "copy2"}),
                };
                ("change of a quorum", try_command(self.qmp, "x-blockdev-change", &arguments), true)
            }
            75..=94 => {
                let list = self.reopening();
                ("reopen", try_command(self.qmp, "blockdev-reopen", &json!({"options": list})), true)
            }
            _ => {
                let mut list = self.reopening();
                list.push(json!({"driver": "file", "node-name": "file", "filename": "elsewhere"}));
                let result = try_command(self.qmp, "blockdev-reopen", &json!({"options": list}));
                assert!(result.is_err(), "{list:?}");
                ("reopen refused", Ok(Value::Null), true)
            }
        }
    }

    /// Other options for the images: what they hold stays the same.
    fn reopening(&mut self) -> Vec<Value> {
        let mut images: Vec<(String, String, Option<String>)> = Vec::new();
        let (files, backings) = (self.edges("metadata"), self.edges("cow"));
        for (parent, _, child) in files {
            let backing = backings.iter().find(|(p, ..)| *p == parent).map(|(.., b)| b.clone());
            images.push((parent, child, backing));
        }
        let at = self.rng.below(images.len() as u64) as usize;
        let (node, file, backing) = images.swap_remove(at);
        let used = backings.iter().any(|(.., b)| *b == node);
        let mut image = json!({
            "driver": "qcow2",
            "node-name": node,
            "file": file,
            "backing": backing,
            "l2-cache-size": 65536 << self.rng.below(5),
            "lazy-refcounts": self.rng.below(2) == 0,
            "discard": if self.rng.below(2) == 0 { "unmap" } else { "ignore" },
            "detect-zeroes": if self.rng.below(2) == 0 { "on" } else { "off" },
        });
        if used {
            image["read-only"] = json!(true);
        }
        vec![image]
    }
}

/// What the image lies on, as node `file`: three copies, where there is a quorum, else the file itself.
fn storage(qmp: &mut qmp::Client, image: &Path) -> bool {
    let copies: Vec<_> = ["copy0", "copy1", "copy2"].map(|n| image.with_file_name(n)).into();
    for (at, copy) in copies.iter().enumerate() {
        std::fs::copy(image, copy).unwrap();
        let node = json!({
            "driver": "file", "node-name": format!("copy{at}"), "filename": copy.display().to_string(), "discard": "unmap",
        });
        qmp.execute("blockdev-add", node).unwrap();
    }
    let quorum = json!({
        "driver": "quorum", "node-name": "file", "children": ["copy0", "copy1", "copy2"], "vote-threshold": 2,
        "rewrite-corrupted": true,
    });
    if try_command(qmp, "blockdev-add", &quorum).is_ok() {
        std::fs::remove_file(image).unwrap();
        return true;
    }
    for copy in copies {
        let name = copy.file_name().unwrap().to_str().unwrap();
        qmp.execute("blockdev-del", json!({"node-name": name})).unwrap();
        std::fs::remove_file(copy).unwrap();
    }
    let file = json!({
        "driver": "file", "node-name": "file", "filename": image.display().to_string(), "discard": "unmap",
    });
    qmp.execute("blockdev-add", file).unwrap();
    false
}

/// Which filters there are in this build: their options, and what their child is called.
fn filters(qmp: &mut qmp::Client) -> Vec<(Value, &'static str)> {
    let _ = try_command(qmp, "object-add", &json!({"qom-type": "throttle-group", "id": "group"}));
    let known = [
        (json!({"driver": "raw"}), "file"),
        (json!({"driver": "throttle", "throttle-group": "group"}), "file"),
        (json!({"driver": "copy-on-read"}), "file"),
        (json!({"driver": "blkdebug"}), "image"),
    ];
    let probe = json!({"driver": "null-co", "node-name": "probed", "size": 1 << 20, "read-zeroes": true});
    qmp.execute("blockdev-add", probe).unwrap();
    let mut found = Vec::new();
    for (options, child) in known {
        let mut node = options.clone();
        node["node-name"] = json!("probe");
        node[child] = json!("probed");
        if try_command(qmp, "blockdev-add", &node).is_ok() {
            qmp.execute("blockdev-del", json!({"node-name": "probe"})).unwrap();
            found.push((options, child));
        }
    }
    qmp.execute("blockdev-del", json!({"node-name": "probed"})).unwrap();
    found
}

#[test]
fn random_surgery_under_load() {
    let count = number("RINGBLK_SURGERIES", 300);
    let seed = number("RINGBLK_SEED", 1);
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    qcow2(&image, SIZE);
    let mut rig = Rig::start_with(&[], &["--object", "iothread,id=t0", "--object", "iothread,id=t1"]);
    let quorum = storage(&mut rig.qmp, &image);
    rig.command("blockdev-add", json!({"driver": "qcow2", "node-name": "image", "file": "file"}));
    let mapping = json!([{"iothread": "t0"}, {"iothread": "t1"}]);
    let options = json!({"writable": true, "num-queues": 2, "iothread-vq-mapping": mapping});
    rig.add_export("disk", "image", &options).unwrap();
    let mut load = Load::start(rig.disk("disk", &Setup { queues: 2, ..Setup::default() }), SIZE, seed);
    let mut pauses = Vec::new();
    let filters = filters(&mut rig.qmp);
    let mut surgeon = Surgeon {
        qmp: &mut rig.qmp,
        folder: folder.path(),
        rng: Rng::new(seed),
        made: 0,
        overlays: 0,
        filters,
        quorum,
        counts: Default::default(),
    };
    for n in 0..count {
        let before = load.done();
        let _ = load.take_longest();
        let (what, result, must) = surgeon.cut();
        assert!(!must || result.is_ok(), "surgery {n} (seed {seed}), {what}: {result:?}");
        surgeon.counts.entry(what).or_default().0 += 1;
        // The guest goes on after each.
        let deadline = Instant::now() + Duration::from_secs(60);
        while load.done() < before + 20 {
            load.check();
            assert!(Instant::now() < deadline, "surgery {n} (seed {seed}), {what}: the guest stands");
            std::thread::sleep(Duration::from_micros(100));
        }
        pauses.push(load.take_longest());
    }
    let counts = surgeon.counts.clone();
    let (disk, _) = load.end();
    drop(disk);
    pauses.sort_unstable();
    let at = |share: usize| pauses[(pauses.len() - 1) * share / 100] as f64 / 1e6;
    eprintln!("{count} surgeries, seed {seed}: {counts:?}");
    eprintln!(
        "longest request around each: p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms, most {:.2} ms",
        at(50),
        at(90),
        at(99),
        at(100)
    );
    rig.command("quit", json!({}));
    assert!(rig.daemon.wait(Duration::from_secs(60)).unwrap().success());
    let mut images: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    images.sort();
    // The last copy may have stood aside.
    for image in images.iter().filter(|i| !i.ends_with("copy2")) {
        let check =
            Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(image).output().unwrap();
        assert!(check.status.success(), "{}: {}", image.display(), String::from_utf8_lossy(&check.stderr));
    }
}
