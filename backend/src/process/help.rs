//! Help for an option's members, made from the schema of the struct that parses them.
//!
//! `main.rs` answers [`HelpTopic`](super::cli::HelpTopic) with it: it knows where the drivers, exports and objects
//! are listed and hands their JSON schemas over. The text cannot go stale, since there is no text.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// Deepest nesting of members shown; schemas of nodes contain themselves.
const MAX_DEPTH: usize = 4;

/// A list of names with one line about each, under a headline.
#[must_use]
pub fn list<'a>(headline: &str, entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut out = format!("{headline}:\n");
    for (name, about) in entries {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(out, "{}", format!("  {name:<20} {about}").trim_end());
    }
    out
}

/// The members of `subject`, one a line, from the JSON Schema of its options. Nested objects come as dotted keys.
#[must_use]
pub fn members(subject: &str, schema: &Value) -> String {
    let mut rows = Vec::new();
    collect(schema, schema, "", 0, &mut rows);
    rows.sort_by(|a, b| (a.optional, &a.key).cmp(&(b.optional, &b.key)));
    rows.dedup_by(|a, b| a.key == b.key);
    let mut out = format!("{subject} options:\n");
    for row in rows {
        let left = format!("  {}=<{}>", row.key, row.kind);
        let default = row.default.map(|d| format!(" (default {d})")).unwrap_or_default();
        let must = if row.optional { "" } else { " (required)" };
        let _ = writeln!(out, "{}", format!("{left:<38} {}{must}{default}", row.about).trim_end());
    }
    out
}

struct Row {
    key: String,
    kind: String,
    about: String,
    optional: bool,
    default: Option<String>,
}

fn collect(root: &Value, schema: &Value, prefix: &str, depth: usize, rows: &mut Vec<Row>) {
    let schema = follow(root, schema);
    // Flattened structs and tagged unions.
    for part in ["allOf", "oneOf", "anyOf"].iter().filter_map(|k| schema.get(k)?.as_array()).flatten() {
        if depth < MAX_DEPTH {
            collect(root, part, prefix, depth + 1, rows);
        }
    }
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    for (name, property) in properties {
        let key = format!("{prefix}{name}");
        let target = without_null(root, property);
        if target.get("properties").is_some() && depth < MAX_DEPTH {
            collect(root, target, &format!("{key}."), depth + 1, rows);
            continue;
        }
        let about = text(property, "description").or_else(|| text(target, "description")).unwrap_or_default();
        rows.push(Row {
            key,
            kind: kind(root, target, 0),
            about: first_paragraph(about),
            optional: !prefix.is_empty() || !requires(schema, name),
            default: property.get("default").filter(|d| !d.is_null()).map(spell),
        });
    }
}

/// The text up to its first empty line, in one line.
fn first_paragraph(text: &str) -> String {
    text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect::<Vec<_>>().join(" ")
}

fn requires(schema: &Value, name: &str) -> bool {
    let required = schema.get("required").and_then(Value::as_array);
    required.is_some_and(|names| names.iter().any(|n| n.as_str() == Some(name)))
}

/// Follows `$ref` within the document; a chain longer than any real one ends where it is.
fn follow<'a>(root: &'a Value, mut schema: &'a Value) -> &'a Value {
    for _ in 0..16 {
        let target =
            schema.get("$ref").and_then(Value::as_str).and_then(|r| root.pointer(r.strip_prefix('#')?));
        match target {
            Some(next) => schema = next,
            None => break,
        }
    }
    schema
}

/// The schema itself, or what is left of "this or null".
fn without_null<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let schema = follow(root, schema);
    let Some(options) = schema.get("anyOf").and_then(Value::as_array) else { return schema };
    let mut left = options.iter().filter(|o| o.get("type").and_then(Value::as_str) != Some("null"));
    match (left.next(), left.next()) {
        (Some(only), None) => follow(root, only),
        _ => schema,
    }
}

/// How a value is written on the command line.
fn kind(root: &Value, schema: &Value, depth: usize) -> String {
    if depth > MAX_DEPTH {
        return "any".to_owned();
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return values.iter().filter(|v| !v.is_null()).map(spell).collect::<Vec<_>>().join("|");
    }
    if let Some(value) = schema.get("const") {
        return spell(value);
    }
    if let Some(options) = ["oneOf", "anyOf"].iter().find_map(|k| schema.get(k)?.as_array()) {
        let kinds = options.iter().map(|o| kind(root, follow(root, o), depth + 1)).filter(|k| k != "null");
        let mut kinds = kinds.collect::<Vec<_>>();
        kinds.dedup();
        return kinds.join("|");
    }
    let name = match schema.get("type") {
        Some(Value::String(name)) => name.as_str(),
        // ["integer", "null"]: an optional integer.
        Some(Value::Array(names)) => {
            names.iter().filter_map(Value::as_str).find(|n| *n != "null").unwrap_or("any")
        }
        _ if is_object(schema) => "object",
        _ => "any",
    };
    match name {
        "boolean" => "on|off".to_owned(),
        "integer" => "int".to_owned(),
        "array" => "list".to_owned(),
        other => other.to_owned(),
    }
}

fn is_object(schema: &Value) -> bool {
    schema.get("properties").map(Value::is_object).unwrap_or_default()
}

fn spell(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => other.to_string(),
    }
}

fn text<'a>(schema: &'a Value, key: &str) -> Option<&'a str> {
    let map: &Map<String, Value> = schema.as_object()?;
    map.get(key)?.as_str()
}

#[cfg(test)]
mod tests;
