//! What is drawn: nodes, users and edges at one moment, and what went through them since another.
//!
//! Filled by `fetch`, read by everything that draws. Knows no command.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

/// Letters of the four permissions, in the order of [`Perms`].
const LETTERS: [(&str, char); 4] =
    [("consistent-read", 'r'), ("write", 'w'), ("write-unchanged", 'u'), ("resize", 'z')];

/// A set of permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Perms(u8);

impl Perms {
    /// From the names on the wire.
    pub fn new<'a>(names: impl Iterator<Item = &'a str>) -> Perms {
        let bit = |name: &str| LETTERS.iter().position(|(n, _)| *n == name).map_or(0, |at| 1 << at);
        Perms(names.map(bit).fold(0, |all, bit| all | bit))
    }

    /// Four letters, a dash for what is not in it.
    pub fn letters(self) -> String {
        let letter = |(at, (_, c)): (usize, &(&str, char))| if self.0 & (1 << at) == 0 { '-' } else { *c };
        LETTERS.iter().enumerate().map(letter).collect()
    }
}

/// Sums of what has gone through a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub read_ops: u64,
    pub read_bytes: u64,
    pub write_ops: u64,
    pub write_bytes: u64,
    pub other_ops: u64,
}

/// What goes through a node, each second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    pub read_ops: f64,
    pub read_bytes: f64,
    pub write_ops: f64,
    pub write_bytes: f64,
    pub other_ops: f64,
}

impl Rates {
    /// From two sums, `seconds` apart.
    pub fn between(before: Counters, now: Counters, seconds: f64) -> Rates {
        let rate = |a: u64, b: u64| if seconds > 0.0 { b.saturating_sub(a) as f64 / seconds } else { 0.0 };
        Rates {
            read_ops: rate(before.read_ops, now.read_ops),
            read_bytes: rate(before.read_bytes, now.read_bytes),
            write_ops: rate(before.write_ops, now.write_ops),
            write_bytes: rate(before.write_bytes, now.write_bytes),
            other_ops: rate(before.other_ops, now.other_ops),
        }
    }

    /// A few words; `None` where nothing happens.
    pub fn words(&self) -> Option<String> {
        let mut parts = Vec::new();
        for (what, ops, bytes) in
            [("read", self.read_ops, self.read_bytes), ("write", self.write_ops, self.write_bytes)]
        {
            if ops > 0.0 {
                parts.push(format!("{what} {}/s {}/s", count(ops), size(bytes)));
            }
        }
        if self.other_ops > 0.0 {
            parts.push(format!("other {}/s", count(self.other_ops)));
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// A box: a node, or somebody who uses one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    pub id: u64,
    /// Its name, or who it is.
    pub name: String,
    /// Empty for users.
    pub driver: String,
    /// Bytes; not of users.
    pub size: Option<u64>,
    pub read_only: bool,
    pub drained: bool,
    pub counters: Option<Counters>,
    pub rates: Option<Rates>,
}

impl Node {
    /// Whether it is somebody from outside.
    pub fn is_user(&self) -> bool {
        self.driver.is_empty()
    }

    /// What is said of it, line by line; the first is its name.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.name.clone()];
        let mut about = Vec::new();
        if !self.driver.is_empty() {
            about.push(self.driver.clone());
        }
        about.extend(self.size.map(|s| size(s as f64)));
        if self.read_only {
            about.push("read-only".to_owned());
        }
        if self.drained {
            about.push("drained".to_owned());
        }
        if !about.is_empty() {
            lines.push(about.join(", "));
        }
        lines.extend(self.rates.and_then(|r| r.words()));
        lines
    }
}

/// A line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edge {
    pub parent: u64,
    pub child: u64,
    pub name: String,
    pub roles: Vec<String>,
    pub perm: Perms,
    pub shared: Perms,
    /// Who relies on it.
    pub frozen_by: Vec<String>,
    /// Requests over it are held back.
    pub drained: bool,
}

impl Edge {
    /// Its name and what is used and shared.
    pub fn label(&self) -> String {
        format!("{} {}/{}", self.name, self.perm.letters(), self.shared.letters())
    }
}

/// The graph.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Picture {
    pub nodes: Vec<Node>,
    pub edges: Vec<Edge>,
    /// When it was, ns of some clock.
    pub time_ns: u64,
}

impl Picture {
    /// The node with this number.
    pub fn node(&self, id: u64) -> Option<&Node> {
        self.nodes.iter().find(|n| n.id == id)
    }

    /// The edges below a node, in their order.
    pub fn below(&self, id: u64) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |e| e.parent == id)
    }

    /// Whoever nobody is above: users first, then nodes without any. Where all go in circles, the first one.
    pub fn tops(&self) -> Vec<u64> {
        let has_parent: BTreeSet<u64> =
            self.edges.iter().filter(|e| self.node(e.parent).is_some()).map(|e| e.child).collect();
        let mut tops: Vec<&Node> = self.nodes.iter().filter(|n| !has_parent.contains(&n.id)).collect();
        tops.sort_by_key(|n| !n.is_user());
        match (tops.is_empty(), self.nodes.first()) {
            (true, Some(first)) => vec![first.id],
            _ => tops.into_iter().map(|n| n.id).collect(),
        }
    }

    /// Notes what has happened since `before`.
    pub fn rate(&mut self, before: &Picture) {
        let seconds = self.time_ns.saturating_sub(before.time_ns) as f64 / 1e9;
        let old: BTreeMap<u64, Counters> =
            before.nodes.iter().filter_map(|n| Some((n.id, n.counters?))).collect();
        for node in &mut self.nodes {
            if let (Some(now), Some(before)) = (node.counters, old.get(&node.id)) {
                node.rates = Some(Rates::between(*before, now, seconds));
            }
        }
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let rates = |r: &Rates| {
            json!({
                "read-iops": r.read_ops, "read-bytes-per-second": r.read_bytes,
                "write-iops": r.write_ops, "write-bytes-per-second": r.write_bytes,
                "other-iops": r.other_ops,
            })
        };
        let nodes: Vec<Value> = self
            .nodes
            .iter()
            .map(|n| {
                json!({
                    "id": n.id, "name": n.name, "driver": n.driver, "size": n.size, "read-only": n.read_only,
                    "drained": n.drained, "user": n.is_user(), "rates": n.rates.as_ref().map(rates),
                })
            })
            .collect();
        let edges: Vec<Value> = self
            .edges
            .iter()
            .map(|e| {
                json!({
                    "parent": e.parent, "child": e.child, "name": e.name, "roles": e.roles,
                    "perm": e.perm.letters(), "shared-perm": e.shared.letters(), "frozen-by": e.frozen_by,
                    "drained": e.drained,
                })
            })
            .collect();
        json!({"nodes": nodes, "edges": edges})
    }
}

/// Bytes with a unit (powers of 1024), three digits or so.
pub fn size(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 || value.fract() == 0.0 { 0 } else { 1 };
    format!("{value:.digits$} {}", UNITS.get(unit).unwrap_or(&""))
}

/// A number of things: 950, 12.3k, 1.2M.
pub fn count(n: f64) -> String {
    match n {
        n if n >= 1e6 => format!("{:.2}M", n / 1e6),
        n if n >= 1e4 => format!("{:.1}k", n / 1e3),
        n if n >= 10.0 || n.fract() == 0.0 => format!("{n:.0}"),
        n => format!("{n:.1}"),
    }
}
