//! Asking for the graph: `query-block-graph` where there is one, else three questions that QEMU's daemons answer.
//!
//! Called by `graph`. Names and words are cleaned here, once: what draws may put them on a terminal.

use std::collections::HashMap;
use std::time::Instant;

use serde_json::{Value, json};

use super::model::{Counters, Edge, Node, Perms, Picture};
use crate::ctl::client::Client;
use crate::ctl::failure::Failure;
use crate::ctl::output::clean;

fn list<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value.get(name).and_then(Value::as_array).into_iter().flatten()
}

fn text(value: &Value, name: &str) -> String {
    clean(value.get(name).and_then(Value::as_str).unwrap_or_default())
}

fn texts(value: &Value, name: &str) -> Vec<String> {
    list(value, name).filter_map(Value::as_str).map(clean).collect()
}

fn perms(value: &Value, name: &str) -> Perms {
    Perms::new(list(value, name).filter_map(Value::as_str))
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

fn flag(value: &Value, name: &str) -> bool {
    value.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// The graph as it is now.
///
/// # Errors
/// The daemon does not say.
pub fn picture(client: &mut Client) -> Result<Picture, Failure> {
    match client.execute("query-block-graph", None) {
        Ok(answer) => Ok(whole(&answer)),
        Err(Failure::Refused { class, .. }) if class == "CommandNotFound" => {
            let graph = client.execute("x-debug-query-block-graph", None)?;
            let nodes = client.execute("query-named-block-nodes", Some(json!({"flat": true})))?;
            let time = monotonic();
            let stats = client.execute("query-blockstats", Some(json!({"query-nodes": true})))?;
            Ok(assembled(&graph, &nodes, &stats, time))
        }
        Err(e) => Err(e),
    }
}

/// Nanoseconds since the first call.
fn monotonic() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn edge(value: &Value) -> Edge {
    Edge {
        parent: number(value, "parent"),
        child: number(value, "child"),
        name: text(value, "name"),
        roles: texts(value, "roles"),
        perm: perms(value, "perm"),
        shared: perms(value, "shared-perm"),
        frozen_by: texts(value, "frozen-by"),
        drained: false,
    }
}

/// From the answer of `query-block-graph`.
pub fn whole(answer: &Value) -> Picture {
    let mut nodes: Vec<Node> = list(answer, "users")
        .map(|u| Node {
            id: number(u, "id"),
            name: text(u, "description"),
            drained: flag(u, "drained"),
            ..Node::default()
        })
        .collect();
    nodes.extend(list(answer, "nodes").map(|n| {
        let counters = n.get("counters").map(|c| Counters {
            read_ops: number(c, "rd-operations"),
            read_bytes: number(c, "rd-bytes"),
            write_ops: number(c, "wr-operations"),
            write_bytes: number(c, "wr-bytes"),
            other_ops: number(c, "unmap-operations").saturating_add(number(c, "flush-operations")),
        });
        Node {
            id: number(n, "id"),
            name: text(n, "node-name"),
            driver: text(n, "driver"),
            size: n.get("size").and_then(Value::as_u64),
            read_only: flag(n, "read-only"),
            drained: flag(n, "drained"),
            counters,
            rates: None,
        }
    }));
    let drained: HashMap<u64, bool> = nodes.iter().map(|n| (n.id, n.drained)).collect();
    let edges = list(answer, "edges").map(|e| {
        let mut edge = edge(e);
        edge.drained = drained.get(&edge.parent).copied().unwrap_or(false);
        edge
    });
    Picture { edges: edges.collect(), nodes, time_ns: number(answer, "time-ns") }
}

/// From the answers of `x-debug-query-block-graph`, `query-named-block-nodes` and `query-blockstats`.
pub fn assembled(graph: &Value, named: &Value, stats: &Value, time_ns: u64) -> Picture {
    let by_name = |all: &Value| -> HashMap<String, Value> {
        let all = all.as_array().into_iter().flatten();
        all.map(|n| (text(n, "node-name"), n.clone())).collect()
    };
    let (named, stats) = (by_name(named), by_name(stats));
    let nodes = list(graph, "nodes").map(|n| {
        let name = text(n, "name");
        let kind = text(n, "type");
        let about = (kind == "block-driver").then(|| named.get(&name)).flatten();
        let counters =
            (kind == "block-driver").then(|| stats.get(&name)).flatten().and_then(|s| s.get("stats"));
        Node {
            id: number(n, "id"),
            // QEMU's users have no names of their own.
            name: match (name.is_empty(), kind.as_str()) {
                (true, "block-driver") => format!("#{}", number(n, "id")),
                (true, kind) => kind.to_owned(),
                (false, "block-job") => format!("job '{name}'"),
                (false, _) => name,
            },
            driver: match (kind.as_str(), about) {
                (_, Some(about)) => text(about, "drv"),
                ("block-driver", None) => "?".to_owned(),
                _ => String::new(),
            },
            size: about.and_then(|a| a.pointer("/image/virtual-size")).and_then(Value::as_u64),
            read_only: about.is_some_and(|a| flag(a, "ro")),
            drained: false,
            counters: counters.map(|c| Counters {
                read_ops: number(c, "rd_operations"),
                read_bytes: number(c, "rd_bytes"),
                write_ops: number(c, "wr_operations"),
                write_bytes: number(c, "wr_bytes"),
                other_ops: number(c, "unmap_operations").saturating_add(number(c, "flush_operations")),
            }),
            rates: None,
        }
    });
    Picture { nodes: nodes.collect(), edges: list(graph, "edges").map(edge).collect(), time_ns }
}
