//! Results on stdout: JSON as qemu-img lays it out, and the tree of names and values for people.
//!
//! Called by the commands that report. Members come in the order in which qemu-img prints them, so that the two can be
//! compared as text; a member it does not have comes last.

use std::fmt::Write as _;
use std::io::Write as _;

use serde_json::{Map, Value};

/// Deepest nesting that is written; nothing we print comes near.
const MAX_DEPTH: usize = 64;

/// The order of members in qemu-img's output. It follows from how QEMU keeps them and is the same for all objects.
const ORDER: &[&str] = &[
    "ivgen-alg",
    "compat",
    "icount",
    "flags",
    "vm-clock-nsec",
    "detached-header",
    "image-end-offset",
    "name",
    "active",
    "compressed-clusters",
    "hash-alg",
    "iters",
    "compression-type",
    "lazy-refcounts",
    "date-sec",
    "bitmaps",
    "cipher-alg",
    "refcount-bits",
    "uuid",
    "total-clusters",
    "offset",
    "extent-size-hint",
    "corruptions",
    "data-file",
    "ivgen-hash-alg",
    "backing",
    "corruptions-fixed",
    "check-errors",
    "children",
    "backing-filename-format",
    "node-name",
    "date-nsec",
    "driver",
    "granularity",
    "required",
    "leaks",
    "snapshots",
    "key-offset",
    "leaks-fixed",
    "allocated-clusters",
    "virtual-size",
    "filename",
    "cluster-size",
    "size",
    "fully-allocated",
    "format",
    "encrypt",
    "read-only",
    "actual-size",
    "format-specific",
    "data-file-raw",
    "full-backing-filename",
    "cipher-mode",
    "stripes",
    "slots",
    "vm-clock-sec",
    "payload-offset",
    "encrypted",
    "type",
    "master-key-iters",
    "file",
    "backing-filename",
    "corrupt",
    "fragmented-clusters",
    "id",
    "vm-state-size",
    "info",
    "key-secret",
    "dirty-flag",
    "extended-l2",
    "data",
];

/// Writes text to stdout.
///
/// # Errors
/// Nobody reads it any more, or the disk it goes to is full.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Members in qemu-img's order.
fn ordered(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let rank = |key: &str| ORDER.iter().position(|k| *k == key).unwrap_or(ORDER.len());
    let mut members: Vec<_> = map.iter().collect();
    members.sort_by_key(|(key, _)| rank(key));
    members
}

/// JSON with four spaces a level and a line break at the end.
pub fn json(value: &Value) -> String {
    let mut out = String::new();
    write_json(&mut out, value, 0);
    out.push('\n');
    out
}

/// JSON on one line, with a space after colons and commas: how file names made of options are written.
pub fn json_line(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let member = |(k, v): (&String, &Value)| format!("{}: {}", Value::from(k.as_str()), json_line(v));
            let members: Vec<_> = ordered(map).into_iter().map(member).collect();
            format!("{{{}}}", members.join(", "))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(json_line).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

fn write_json(out: &mut String, value: &Value, depth: usize) {
    let inner = " ".repeat(4 * (depth + 1));
    let outer = " ".repeat(4 * depth);
    match value {
        _ if depth > MAX_DEPTH => out.push_str("null"),
        Value::Object(map) => {
            out.push('{');
            for (index, (key, value)) in ordered(map).into_iter().enumerate() {
                let comma = if index > 0 { "," } else { "" };
                // Writing into a string cannot fail.
                let _ = write!(out, "{comma}\n{inner}{}: ", Value::from(key.as_str()));
                write_json(out, value, depth + 1);
            }
            let _ = write!(out, "\n{outer}}}");
        }
        Value::Array(list) => {
            out.push('[');
            for (index, value) in list.iter().enumerate() {
                let comma = if index > 0 { "," } else { "" };
                let _ = write!(out, "{comma}\n{inner}");
                write_json(out, value, depth + 1);
            }
            let _ = write!(out, "\n{outer}]");
        }
        other => {
            let _ = write!(out, "{other}");
        }
    }
}

/// A tree of names and values for people, `indent` levels in: `compat: 1.1`, lists as `[0]:`.
pub fn tree(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) => {
            for (key, value) in ordered(map) {
                branch(out, &key.replace('-', " "), value, indent);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                branch(out, &format!("[{index}]"), value, indent);
            }
        }
        leaf => {
            let _ = writeln!(out, "{}{}", " ".repeat(4 * indent), scalar(leaf));
        }
    }
}

fn branch(out: &mut String, name: &str, value: &Value, indent: usize) {
    let pad = " ".repeat(4 * indent);
    let _ = match value {
        Value::Object(_) | Value::Array(_) if indent < MAX_DEPTH => {
            let _ = writeln!(out, "{pad}{name}:");
            tree(out, value, indent + 1);
            return;
        }
        leaf => writeln!(out, "{pad}{name}: {}", scalar(leaf)),
    };
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
