//! Surgery on the graph of a running daemon: what changes while a guest writes, what is refused and leaves no trace.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod load;
mod refusals;
mod reopen;
mod snapshots;
mod stress;
mod transactions;

use std::process::Command;

use client::{Error, qmp};
use serde_json::{Value, json};

/// Runs a command; the words of its refusal.
fn try_command(client: &mut qmp::Client, command: &str, arguments: &Value) -> Result<Value, String> {
    match client.execute(command, arguments.clone()) {
        Ok(value) => Ok(value),
        Err(Error::Qmp { desc, .. }) => Err(desc),
        Err(e) => panic!("{command} {arguments}: {e}"),
    }
}

/// A qcow2 image of `size` bytes.
fn qcow2(path: &std::path::Path, size: u64) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .status()
        .unwrap();
    assert!(made.success());
}

/// Everything a client can see of graph and locks, without what goes by itself (counters, the time).
fn whole_state(client: &mut qmp::Client, pid: u32) -> Value {
    let mut graph = client.execute("query-block-graph", json!({})).unwrap();
    graph["time-ns"] = Value::Null;
    for node in graph["nodes"].as_array_mut().unwrap() {
        node["counters"] = Value::Null;
    }
    let mut nodes = client.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    for node in nodes.as_array_mut().unwrap() {
        // What an image takes on the host changes while it is written.
        node["image"]["actual-size"] = Value::Null;
    }
    let mut exports = client.execute("query-block-exports", json!({})).unwrap();
    for export in exports.as_array_mut().unwrap() {
        export["queue-requests"] = Value::Null;
    }
    let jobs = client.execute("query-jobs", json!({})).unwrap();
    let qcow2: Vec<Value> = vec![graph, nodes, exports, jobs, json!(locks(pid))];
    Value::Array(qcow2)
}

/// The OFD locks on files that this process has open, as the kernel lists them: (inode, kind, first byte, last byte).
fn locks(pid: u32) -> Vec<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        if let Ok(meta) = std::fs::metadata(entry.path()) {
            use std::os::unix::fs::MetadataExt;
            files.push(meta.ino().to_string());
        }
    }
    // The kernel lists them piece by piece: while others lock and unlock, a line may be missing or come twice.
    let mut last = listed(&files);
    for _ in 0..1000 {
        let now = listed(&files);
        if now == last {
            break;
        }
        last = now;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    last
}

/// One look at the kernel's list.
fn listed(files: &[String]) -> Vec<String> {
    let text = std::fs::read_to_string("/proc/locks").unwrap();
    let mut found: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let inode = words.get(5)?.rsplit(':').next()?;
            let ours = words.get(1) == Some(&"OFDLCK") && files.iter().any(|f| f == inode);
            ours.then(|| format!("{inode} {} {}-{}", words[3], words[6], words[7]))
        })
        .collect();
    found.sort();
    found.dedup();
    found
}
