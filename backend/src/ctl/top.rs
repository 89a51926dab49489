//! `ringblk ctl top`: what exports, nodes and iothreads do, as rates between two samples, with percentiles of latency.
//!
//! Called by [`super::main`]. Everything is counted by the daemon; here differences are taken. What a daemon does not count
//! (QEMU keeps no histograms unless told to) is left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cli::TopArgs;
use super::client::Client;
use super::failure::{Failure, Outcome};
use super::graph::model::{Counters, Rates, count, size};
use super::output::{self, clean};

/// Time between two samples, seconds.
const INTERVAL: f64 = 1.0;
/// Least time, seconds.
const LEAST: f64 = 0.05;
/// Back to the top left, and away with what is below.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// A histogram of latencies: how many requests below each boundary, ns (and above the one before it).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram(BTreeMap<u64, u64>);

impl Histogram {
    /// From `BlockLatencyHistogramInfo`.
    fn read(value: Option<&Value>) -> Option<Histogram> {
        let value = value?;
        let numbers = |name: &str| -> Vec<u64> {
            value
                .get(name)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .collect()
        };
        let (boundaries, bins) = (numbers("boundaries"), numbers("bins"));
        let ends = boundaries.iter().copied().chain([u64::MAX]);
        Some(Histogram(ends.zip(bins).filter(|(_, n)| *n > 0).collect()))
    }

    /// Adds another one.
    fn add(&mut self, other: &Histogram) {
        for (end, n) in &other.0 {
            let here = self.0.entry(*end).or_default();
            *here = here.saturating_add(*n);
        }
    }

    /// What has come since `before`.
    fn since(&self, before: Option<&Histogram>) -> Histogram {
        let old = |end: &u64| before.and_then(|b| b.0.get(end)).copied().unwrap_or(0);
        let fresh = self.0.iter().map(|(end, n)| (*end, n.saturating_sub(old(end))));
        Histogram(fresh.filter(|(_, n)| *n > 0).collect())
    }

    /// The latency that this share of the requests stays below, ns: the upper boundary of the bin it falls into.
    fn percentile(&self, share: f64) -> Option<u64> {
        let total: u64 = self.0.values().sum();
        let wanted = ((total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        self.0.iter().find_map(|(end, n)| {
            seen += n;
            (seen >= wanted).then_some(*end)
        })
    }
}

/// Counters of an iothread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Thread {
    requests: u64,
    operations: u64,
    enters: u64,
    sleeps: u64,
    poll_hits: u64,
}

/// What has been counted at one moment.
struct Sample {
    time: Instant,
    /// Nodes in the order of the answer.
    nodes: Vec<(String, Counters, Histogram)>,
    threads: Vec<(String, Thread)>,
    /// Exports, each with its node, the iothreads of its queues and what these have taken.
    exports: Vec<(String, String, Vec<String>, Vec<u64>)>,
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

fn text(value: &Value, name: &str) -> String {
    clean(value.get(name).and_then(Value::as_str).unwrap_or_default())
}

/// A question that older daemons do not know; they have nothing to tell then.
fn ask(client: &mut Client, name: &str, arguments: Option<Value>) -> Result<Value, Failure> {
    match client.execute(name, arguments) {
        Err(Failure::Refused { class, .. }) if class == "CommandNotFound" => Ok(Value::Null),
        other => other,
    }
}

impl Sample {
    fn take(client: &mut Client) -> Result<Sample, Failure> {
        let time = Instant::now();
        let stats = client.execute("query-blockstats", Some(json!({"query-nodes": true})))?;
        let threads = ask(client, "query-iothreads", None)?;
        let exports = ask(client, "query-block-exports", None)?;
        let nodes = list(&stats).map(|entry| {
            let none = Value::Null;
            let s = entry.get("stats").unwrap_or(&none);
            let counters = Counters {
                read_ops: number(s, "rd_operations"),
                read_bytes: number(s, "rd_bytes"),
                write_ops: number(s, "wr_operations"),
                write_bytes: number(s, "wr_bytes"),
                other_ops: number(s, "unmap_operations").saturating_add(number(s, "flush_operations")),
            };
            let mut latency = Histogram::default();
            for name in ["rd_latency_histogram", "wr_latency_histogram"] {
                if let Some(part) = Histogram::read(s.get(name)) {
                    latency.add(&part);
                }
            }
            (text(entry, "node-name"), counters, latency)
        });
        let threads = list(&threads).map(|t| {
            let thread = Thread {
                requests: number(t, "requests"),
                operations: number(t, "operations"),
                enters: number(t, "enters"),
                sleeps: number(t, "sleeps"),
                poll_hits: number(t, "poll-hits"),
            };
            (text(t, "id"), thread)
        });
        let exports = list(&exports).map(|e| {
            let names = e.get("iothreads").map(list).into_iter().flatten();
            let names = names.filter_map(Value::as_str).map(clean).collect();
            let taken = e.get("queue-requests").map(list).into_iter().flatten();
            (text(e, "id"), text(e, "node-name"), names, taken.filter_map(Value::as_u64).collect())
        });
        Ok(Sample { time, nodes: nodes.collect(), threads: threads.collect(), exports: exports.collect() })
    }
}

/// One line about a node.
#[derive(Debug, PartialEq)]
struct NodeRow {
    name: String,
    rates: Rates,
    /// p50, p99, p99.9, ns.
    latency: Option<[u64; 3]>,
}

/// One line about a queue.
#[derive(Debug, PartialEq)]
struct QueueRow {
    export: String,
    node: String,
    queue: usize,
    iothread: String,
    /// Requests each second; `None` where they are not counted.
    requests: Option<f64>,
}

/// One line about an iothread.
#[derive(Debug, PartialEq)]
struct ThreadRow {
    id: String,
    requests: f64,
    operations: f64,
    enters: f64,
    sleeps: f64,
    /// Of the times it ran out of work: how often polling found some before it slept. `None`: it never did, or slept all
    /// along.
    polling: Option<f64>,
}

/// What happened between two samples.
struct Report {
    seconds: f64,
    nodes: Vec<NodeRow>,
    queues: Vec<QueueRow>,
    threads: Vec<ThreadRow>,
}

impl Report {
    fn between(before: &Sample, now: &Sample) -> Report {
        let seconds = now.time.saturating_duration_since(before.time).as_secs_f64();
        let rate = |a: u64, b: u64| if seconds > 0.0 { b.saturating_sub(a) as f64 / seconds } else { 0.0 };
        let nodes = now.nodes.iter().map(|(name, counters, latency)| {
            let old = before.nodes.iter().find(|(n, ..)| n == name);
            // A node that was not there before has done everything since.
            let (was, had) = old.map(|(_, c, l)| (*c, Some(l))).unwrap_or_default();
            let fresh = latency.since(had);
            let at = |share: f64| fresh.percentile(share);
            let latency = match (at(0.5), at(0.99), at(0.999)) {
                (Some(a), Some(b), Some(c)) => Some([a, b, c]),
                _ => None,
            };
            NodeRow { name: name.clone(), rates: Rates::between(was, *counters, seconds), latency }
        });
        let threads = now.threads.iter().map(|(id, t)| {
            let was = before.threads.iter().find(|(i, _)| i == id).map(|(_, t)| *t).unwrap_or_default();
            let hits = t.poll_hits.saturating_sub(was.poll_hits);
            let ends = hits + t.sleeps.saturating_sub(was.sleeps);
            ThreadRow {
                id: id.clone(),
                requests: rate(was.requests, t.requests),
                operations: rate(was.operations, t.operations),
                enters: rate(was.enters, t.enters),
                sleeps: rate(was.sleeps, t.sleeps),
                polling: (ends > 0).then(|| hits as f64 / ends as f64),
            }
        });
        let queues = now.exports.iter().flat_map(|(export, node, iothreads, taken)| {
            let old = before.exports.iter().find(|(e, ..)| e == export).map(|(.., t)| t);
            iothreads.iter().enumerate().map(move |(queue, iothread)| QueueRow {
                export: export.clone(),
                node: node.clone(),
                queue,
                iothread: iothread.clone(),
                requests: taken
                    .get(queue)
                    .map(|n| rate(old.and_then(|o| o.get(queue)).copied().unwrap_or(0), *n)),
            })
        });
        Report { seconds, nodes: nodes.collect(), queues: queues.collect(), threads: threads.collect() }
    }

    fn json(&self) -> Value {
        let nodes: Vec<Value> = self
            .nodes
            .iter()
            .map(|n| {
                json!({
                    "node-name": n.name,
                    "read-iops": n.rates.read_ops, "read-bytes-per-second": n.rates.read_bytes,
                    "write-iops": n.rates.write_ops, "write-bytes-per-second": n.rates.write_bytes,
                    "other-iops": n.rates.other_ops,
                    "latency-ns": n.latency.map(|[a, b, c]| json!({"p50": a, "p99": b, "p99.9": c})),
                })
            })
            .collect();
        let queues: Vec<Value> = self
            .queues
            .iter()
            .map(|q| {
                json!({
                    "export": q.export, "node-name": q.node, "queue": q.queue, "iothread": q.iothread,
                    "requests-per-second": q.requests,
                })
            })
            .collect();
        let threads: Vec<Value> = self
            .threads
            .iter()
            .map(|t| {
                json!({
                    "id": t.id, "requests-per-second": t.requests, "operations-per-second": t.operations,
                    "enters-per-second": t.enters, "sleeps-per-second": t.sleeps, "polling-share": t.polling,
                })
            })
            .collect();
        json!({"seconds": self.seconds, "nodes": nodes, "queues": queues, "iothreads": threads})
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let mut table = |head: &[&str], rows: Vec<Vec<String>>| {
            if rows.is_empty() {
                return;
            }
            let width = |at: usize| {
                let cells = rows.iter().filter_map(|r| r.get(at)).map(|c| c.chars().count());
                cells.chain(head.get(at).map(|h| h.chars().count())).max().unwrap_or(0)
            };
            let widths: Vec<usize> = (0..head.len()).map(width).collect();
            let mut line = |cells: Vec<&str>| {
                let mut text = String::new();
                for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                    // Names to the left, figures to the right.
                    let _ = if at == 0 {
                        write!(text, "{cell:<width$}")
                    } else {
                        write!(text, "  {cell:>width$}")
                    };
                }
                let _ = writeln!(out, "{}", text.trim_end());
            };
            line(head.to_vec());
            rows.iter().for_each(|r| line(r.iter().map(String::as_str).collect()));
            out.push('\n');
        };
        let rows = self.nodes.iter().map(|n| {
            let r = &n.rates;
            let mut row = vec![
                n.name.clone(),
                count(r.read_ops),
                size(r.read_bytes),
                count(r.write_ops),
                size(r.write_bytes),
            ];
            row.push(count(r.other_ops));
            row.extend(match n.latency {
                Some(all) => all.map(time),
                None => [(); 3].map(|()| "-".to_owned()),
            });
            row
        });
        let head = ["NODE", "READ/s", "BYTES/s", "WRITE/s", "BYTES/s", "OTHER/s", "P50", "P99", "P99.9"];
        table(&head, rows.collect());
        let rows = self.queues.iter().map(|q| {
            let rate = q.requests.map_or_else(|| "-".to_owned(), count);
            vec![q.export.clone(), q.queue.to_string(), q.iothread.clone(), q.node.clone(), rate]
        });
        table(&["EXPORT", "QUEUE", "IOTHREAD", "NODE", "REQUESTS/s"], rows.collect());
        let rows = self.threads.iter().map(|t| {
            let polling = t.polling.map_or_else(|| "-".to_owned(), |p| format!("{:.0} %", p * 100.0));
            vec![
                t.id.clone(),
                count(t.requests),
                count(t.operations),
                count(t.enters),
                count(t.sleeps),
                polling,
            ]
        });
        table(&["IOTHREAD", "REQUESTS/s", "OPERATIONS/s", "ENTERS/s", "SLEEPS/s", "POLLING"], rows.collect());
        if out.is_empty() {
            out.push_str("There are no nodes.\n");
        }
        out
    }
}

/// A time, ns, with a unit; it is a boundary, so that it stays below.
fn time(ns: u64) -> String {
    match ns {
        u64::MAX => "more".to_owned(),
        ns if ns >= 1_000_000_000 => format!("<{:.1} s", ns as f64 / 1e9),
        ns if ns >= 1_000_000 => format!("<{:.1} ms", ns as f64 / 1e6),
        ns if ns >= 1000 => format!("<{:.1} µs", ns as f64 / 1e3),
        ns => format!("<{ns} ns"),
    }
}

/// Shows.
///
/// # Errors
/// The daemon does not say, or nobody reads.
pub fn run(client: &mut Client, args: &TopArgs, json: bool) -> Outcome {
    let interval = Duration::from_secs_f64(args.interval.unwrap_or(INTERVAL).max(LEAST));
    let terminal = std::io::stdout().is_terminal();
    let mut before = Sample::take(client)?;
    loop {
        std::thread::sleep(interval);
        let now = Sample::take(client)?;
        let report = Report::between(&before, &now);
        if json {
            output::bytes(format!("{}\n", report.json()).as_bytes())?;
        } else {
            let clear = if terminal && !args.once { CLEAR } else { "" };
            output::bytes(format!("{clear}{}", report.text()).as_bytes())?;
        }
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn percentiles_are_of_what_came_between() {
        let read = |boundaries: &[u64], bins: &[u64]| {
            Histogram::read(Some(&json!({"boundaries": boundaries, "bins": bins}))).unwrap()
        };
        // The daemon cuts empty bins off at both ends: the second answer begins lower.
        let before = read(&[2048, 4096], &[10, 5, 0]);
        let now = read(&[1024, 2048, 4096, 8192], &[90, 10, 14, 1, 0]);
        let fresh = now.since(Some(&before));
        assert_eq!(fresh, read(&[1024, 2048, 4096, 8192], &[90, 0, 9, 1, 0]));
        assert_eq!(fresh.percentile(0.5), Some(1024));
        assert_eq!(fresh.percentile(0.99), Some(4096));
        assert_eq!(fresh.percentile(0.999), Some(8192));
        assert_eq!(now.since(Some(&now)).percentile(0.5), None);
        assert_eq!(read(&[1000], &[0, 3]).percentile(0.5).map(time), Some("more".to_owned()));
    }
}
