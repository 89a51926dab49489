//! What a daemon is made of at one moment, as far as its clients can see: for tests that nothing has changed.

use client::qmp;
use serde_json::{Value, json};

/// Nodes, edges with permissions, exports, objects with their settings. Counters are left out: they move by themselves.
pub fn snapshot(client: &mut qmp::Client) -> Value {
    let mut ask = |command: &str| client.execute(command, json!({})).unwrap();
    let mut iothreads = ask("query-iothreads");
    // The process's own thread is no object: it starts when it is first needed, and stays.
    iothreads.as_array_mut().unwrap().retain(|thread| thread["id"] != "#main");
    for thread in iothreads.as_array_mut().unwrap() {
        let kept = ["id", "thread-id", "poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"];
        thread.as_object_mut().unwrap().retain(|name, _| kept.contains(&name.as_str()));
    }
    let mut exports = ask("query-block-exports");
    for export in exports.as_array_mut().unwrap() {
        export.as_object_mut().unwrap().remove("queue-requests");
    }
    json!({
        "graph": ask("x-debug-query-block-graph"),
        "nodes": ask("query-named-block-nodes"),
        "exports": exports,
        "iothreads": iothreads,
    })
}
