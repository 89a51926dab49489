//! What goes to stdout: results as text for people or as JSON, and bytes.
//!
//! Names in images and of files come from others: on the text side nothing of them reaches a terminal that is not printable.

use std::fmt::Write as _;
use std::io::Write as _;

use serde_json::Value;

use super::failure::Outcome;
use crate::process::logging;

/// Writes bytes as they are.
///
/// # Errors
/// They cannot be written.
pub fn bytes(bytes: &[u8]) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Writes a result: nothing where a command returns nothing.
///
/// # Errors
/// It cannot be written.
pub fn value(value: &Value, json: bool) -> Outcome {
    bytes(if json { format!("{value}\n") } else { text(value) }.as_bytes())
}

/// Text without anything a terminal would act on.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Writing to a string cannot fail.
    let _ = logging::escape(text, &mut out);
    out
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("null".to_owned()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Number(n) => Some(n.to_string()),
        Value::String(s) => Some(clean(s)),
        Value::Array(a) if a.is_empty() => Some("[]".to_owned()),
        Value::Object(o) if o.is_empty() => Some("{}".to_owned()),
        // A list of plain things fits on a line.
        Value::Array(a) if a.iter().all(|v| !v.is_array() && !v.is_object()) => {
            Some(a.iter().filter_map(scalar).collect::<Vec<_>>().join(", "))
        }
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// A result as indented lines `name: value`; list elements begin with a dash.
pub fn text(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Null => {}
        Value::Object(o) if o.is_empty() => {}
        Value::Array(a) if a.is_empty() => {}
        Value::Array(a) if !a.iter().any(|v| v.is_array() || v.is_object()) => {
            a.iter().filter_map(scalar).for_each(|s| {
                let _ = writeln!(out, "{s}");
            });
        }
        other => match scalar(other) {
            Some(s) => {
                let _ = writeln!(out, "{s}");
            }
            None => block(other, 0, &mut out),
        },
    }
    out
}

fn block(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                let name = clean(name);
                match scalar(value) {
                    Some(s) => {
                        let _ = writeln!(out, "{indent}{name}: {s}");
                    }
                    None => {
                        let _ = writeln!(out, "{indent}{name}:");
                        block(value, depth + 1, out);
                    }
                }
            }
        }
        Value::Array(elements) => {
            for element in elements {
                let mut inner = String::new();
                match scalar(element) {
                    Some(s) => {
                        let _ = writeln!(inner, "{s}");
                    }
                    None => block(element, 0, &mut inner),
                }
                for (at, line) in inner.lines().enumerate() {
                    let _ = writeln!(out, "{indent}{} {line}", if at == 0 { "-" } else { " " });
                }
            }
        }
        _ => {}
    }
}
