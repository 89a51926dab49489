//! Random surgery on a daemon's graph, below an export that is in use: one cut at a time, each of which must succeed.
//!
//! Called by the tests that put a load on the export, in process or in a guest. What is served is an image `image` on a quorum
//! `file` of three copies ([`Surgeon::prepare`]). It does not look at data: the load does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use client::{Error, qmp};
use serde_json::{Value, json};

use crate::Rng;

/// Most overlays: nothing merges them here.
const MAX_OVERLAYS: usize = 6;

/// A number out of the environment.
#[must_use]
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |n| n.parse().expect("a number"))
}

/// Runs a command; the words of its refusal.
///
/// # Errors
/// The description of the QMP error.
pub fn try_command(client: &mut qmp::Client, command: &str, arguments: &Value) -> Result<Value, String> {
    match client.execute(command, arguments.clone()) {
        Ok(value) => Ok(value),
        Err(Error::Qmp { desc, .. }) => Err(desc),
        Err(e) => panic!("{command} {arguments}: {e}"),
    }
}

/// The graph as it is, and what can be done to it.
#[derive(Debug)]
pub struct Surgeon<'a> {
    qmp: &'a mut qmp::Client,
    folder: &'a Path,
    size: u64,
    rng: Rng,
    made: u64,
    overlays: usize,
    counts: BTreeMap<&'static str, u64>,
    times: Vec<Duration>,
}

/// The filters that come and go: their options, and what their child is called.
fn filters() -> [(Value, &'static str); 4] {
    [
        (json!({"driver": "raw"}), "file"),
        (json!({"driver": "throttle", "throttle-group": "group"}), "file"),
        (json!({"driver": "copy-on-read"}), "file"),
        (json!({"driver": "blkdebug"}), "image"),
    ]
}

impl<'a> Surgeon<'a> {
    /// Makes three copies of an empty qcow2 image of `size` bytes in `folder`, the nodes, and what the filters need.
    ///
    /// # Panics
    /// Where the daemon cannot have them.
    pub fn prepare(qmp: &mut qmp::Client, folder: &Path, empty: &Path, size: u64) {
        for at in 0..3 {
            let copy = folder.join(format!("copy{at}"));
            std::fs::copy(empty, &copy).unwrap();
            // A quorum does not grow: room for the format, as on a device.
            std::fs::File::options().write(true).open(&copy).unwrap().set_len(size + (8 << 20)).unwrap();
            let node = json!({
                "driver": "file", "node-name": format!("copy{at}"), "filename": copy.display().to_string(), "discard": "unmap",
            });
            qmp.execute("blockdev-add", node).unwrap();
        }
        let quorum = json!({
            "driver": "quorum", "node-name": "file", "children": ["copy0", "copy1", "copy2"], "vote-threshold": 2,
            "rewrite-corrupted": true,
        });
        qmp.execute("blockdev-add", quorum).unwrap();
        qmp.execute("blockdev-add", json!({"driver": "qcow2", "node-name": "image", "file": "file"}))
            .unwrap();
        qmp.execute("object-add", json!({"qom-type": "throttle-group", "id": "group"})).unwrap();
    }

    /// Cuts below the one export, `disk`, of `size` bytes; overlays are made in `folder`.
    pub fn new(qmp: &'a mut qmp::Client, folder: &'a Path, size: u64, seed: u64) -> Self {
        Self {
            qmp,
            folder,
            size,
            rng: Rng::new(seed),
            made: 0,
            overlays: 0,
            counts: BTreeMap::new(),
            times: Vec::new(),
        }
    }

    /// How many of each kind there have been.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<&'static str, u64> {
        &self.counts
    }

    /// How long each operation took, answer included: the disk stood still for a part of it at most.
    #[must_use]
    pub fn times(&self) -> &[Duration] {
        &self.times
    }

    /// The image at the top of the chain, and all that are in it. The last copy may have stood aside and counts for nothing.
    #[must_use]
    pub fn images(&mut self) -> (PathBuf, Vec<PathBuf>) {
        let mut at = self.top();
        loop {
            let node = self.qmp.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
            let node = node.as_array().unwrap().iter().find(|n| n["node-name"] == at).cloned().unwrap();
            if node["drv"] == "qcow2" {
                break;
            }
            let (_, _, below) = self.edges("filtered").into_iter().find(|(p, ..)| *p == at).unwrap();
            at = below;
        }
        let top = if at == "image" { "copy0".to_owned() } else { at };
        let mut all: Vec<PathBuf> = ["copy0", "copy1"].iter().map(|n| self.folder.join(n)).collect();
        let overlays = std::fs::read_dir(self.folder).unwrap().map(|e| e.unwrap().path());
        all.extend(overlays.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("ov")));
        (self.folder.join(top), all)
    }

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
        let known = filters();
        let (mut options, child) = known[self.rng.below(known.len() as u64) as usize].clone();
        options["node-name"] = json!(self.name("flt"));
        options[child] = json!(over);
        options
    }

    fn filters_there(&mut self) -> Vec<String> {
        let edges = self.edges("filtered");
        edges.into_iter().map(|(parent, ..)| parent).filter(|p| p.starts_with("flt")).collect()
    }

    /// One cut: what it was, and what went wrong.
    pub fn cut(&mut self) -> (&'static str, Result<Value, String>) {
        let (what, result) = self.random();
        *self.counts.entry(what).or_default() += 1;
        (what, result)
    }

    /// An operation, timed.
    fn operate(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let begun = Instant::now();
        let result = try_command(self.qmp, command, arguments);
        self.times.push(begun.elapsed());
        result
    }

    fn random(&mut self) -> (&'static str, Result<Value, String>) {
        match self.rng.below(100) {
            // A filter comes, above all or somewhere below.
            0..=19 if self.filters_there().len() < 10 => {
                let top = self.top();
                let node = self.filter(&top);
                let arguments = json!({"node": node, "parent": "disk", "child": "root"});
                ("insert at the top", self.operate("blockdev-insert-node", &arguments))
            }
            20..=34 if self.filters_there().len() < 10 => {
                let edges = self.edges("primary");
                let at = self.rng.below(edges.len() as u64) as usize;
                let (parent, child, below) = edges[at].clone();
                let mut node = self.filter(&below);
                // It writes, and some nodes below an overlay are read-only.
                if node["driver"] == "copy-on-read" {
                    node["driver"] = json!("raw");
                }
                let arguments = json!({"node": node, "parent": parent, "child": child});
                ("insert below", self.operate("blockdev-insert-node", &arguments))
            }
            // And goes.
            35..=54 => {
                let filters = self.filters_there();
                let Some(filter) = self.pick(&filters) else { return ("nothing", Ok(Value::Null)) };
                ("remove", self.operate("blockdev-remove-node", &json!({"node-name": filter})))
            }
            // All users go over to a filter that was made before, and back.
            55..=64 => {
                let top = self.top();
                let node = self.filter(&top);
                let name = node["node-name"].clone();
                self.qmp.execute("blockdev-add", node).unwrap();
                let there = json!({"node-name": top, "replacement": name});
                let result = self.operate("blockdev-replace-node", &there);
                let back = json!({"node-name": name, "replacement": top, "parent": "disk"});
                let result = result.and_then(|_| self.operate("blockdev-replace-node", &back));
                self.qmp.execute("blockdev-del", json!({"node-name": name})).unwrap();
                ("replace and back", result)
            }
            65..=67 if self.overlays < MAX_OVERLAYS => {
                self.overlays += 1;
                let data = self.overlay("ov");
                ("snapshot", self.operate("blockdev-snapshot-sync", &data))
            }
            // A snapshot that comes to nothing.
            68..=74 => {
                let data = self.overlay("no");
                let actions =
                    json!([{"type": "blockdev-snapshot-sync", "data": data}, {"type": "abort", "data": {}}]);
                let result = self.operate("transaction", &json!({"actions": actions}));
                assert_eq!(result, Err("Transaction aborted using Abort action".into()));
                std::fs::remove_file(data["snapshot-file"].as_str().unwrap()).unwrap();
                ("snapshot taken back", Ok(Value::Null))
            }
            // A copy comes or goes; the two others are right.
            75..=78 => {
                let third = self.children("file").into_iter().find(|(_, node)| node == "copy2");
                let arguments = match third {
                    Some((child, _)) => json!({"parent": "file", "child": child}),
                    None => json!({"parent": "file", "node": "copy2"}),
                };
                ("change of a quorum", self.operate("x-blockdev-change", &arguments))
            }
            79..=94 => {
                let list = self.reopening();
                ("reopen", self.operate("blockdev-reopen", &json!({"options": list})))
            }
            _ => {
                let mut list = self.reopening();
                list.push(json!({"driver": "file", "node-name": "file", "filename": "elsewhere"}));
                let result = self.operate("blockdev-reopen", &json!({"options": list}));
                assert!(result.is_err(), "{list:?}");
                ("reopen refused", Ok(Value::Null))
            }
        }
    }

    /// An overlay's image, made by `qemu-img`, and the arguments that put it above the disk. A quorum has no path that could be
    /// written into it: the first of the copies stands for all.
    fn overlay(&mut self, prefix: &str) -> Value {
        let (top, name) = (self.top(), self.name(prefix));
        let (below, _) = self.images();
        let file = self.folder.join(&name);
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&below, &file])
            .arg(self.size.to_string())
            .status();
        assert!(made.unwrap().success());
        json!({
            "node-name": top, "snapshot-file": file.display().to_string(), "snapshot-node-name": name, "mode": "existing",
        })
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
