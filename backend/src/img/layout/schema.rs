//! What a driver's schema says about its options: which there are, and what they hold.
//!
//! Called by `layout` alone. Knows schemas, no options.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// What a schema wants, as `-o help` names it. A number is a size as well: a suffix does no harm.
pub fn kind(schema: &Value) -> &'static str {
    let has = |wanted: &str| match schema.get("type") {
        Some(Value::String(kind)) => kind == wanted,
        Some(Value::Array(kinds)) => kinds.iter().any(|k| k == wanted),
        _ => false,
    };
    if has("boolean") {
        "bool (on/off)"
    } else if has("integer") {
        "size"
    } else {
        "str"
    }
}

/// Whether there is a member with a dotted name.
pub fn has_member(schema: &schemars::Schema, name: &str) -> bool {
    member(schema, name).is_some()
}

/// The schema of a member with a dotted name.
pub fn member(schema: &schemars::Schema, name: &str) -> Option<Value> {
    let root = schema.as_value();
    let mut at = root.clone();
    for part in name.split('.') {
        at = properties(root, &at, 0).into_iter().find(|(n, _)| n == part).map(|(_, s)| s)?;
    }
    let shown = resolve(root, &at, 0);
    Some(shown)
}

/// Follows references and choices with null to the schema that says something.
fn resolve(root: &Value, schema: &Value, depth: usize) -> Value {
    if depth > 16 {
        return schema.clone();
    }
    if let Some(path) = schema.get("$ref").and_then(Value::as_str) {
        let found = path.strip_prefix("#").and_then(|p| root.pointer(p));
        return found.map_or_else(|| schema.clone(), |found| resolve(root, found, depth + 1));
    }
    let choice = schema.get("anyOf").and_then(Value::as_array);
    let some = choice.and_then(|list| list.iter().find(|s| s.get("type") != Some(&json!("null"))));
    match some {
        Some(some) if choice.is_some_and(|list| list.len() == 2) => resolve(root, some, depth + 1),
        _ => schema.clone(),
    }
}

/// The members of an object's schema, those of all its variants included.
fn properties(root: &Value, schema: &Value, depth: usize) -> Vec<(String, Value)> {
    let schema = resolve(root, schema, 0);
    let mut all = Vec::new();
    if depth > 16 {
        return all;
    }
    if let Some(own) = schema.get("properties").and_then(Value::as_object) {
        all.extend(own.iter().map(|(name, schema)| (name.clone(), schema.clone())));
    }
    for list in ["oneOf", "anyOf", "allOf"] {
        for variant in schema.get(list).and_then(Value::as_array).into_iter().flatten() {
            all.extend(properties(root, variant, depth + 1));
        }
    }
    all
}

/// Names, kinds and words of all members.
pub fn describe(
    lines: &mut BTreeMap<String, (&'static str, String)>,
    schema: &schemars::Schema,
    prefix: &str,
) {
    let root = schema.as_value();
    let mut todo = vec![(prefix.to_owned(), root.clone(), 0)];
    while let Some((prefix, at, depth)) = todo.pop() {
        for (name, member) in properties(root, &at, 0) {
            let full = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            let shown = resolve(root, &member, 0);
            if !properties(root, &shown, 0).is_empty() && depth < 2 && full != "file" && full != "data-file" {
                todo.push((full, shown, depth + 1));
                continue;
            }
            let words =
                member.get("description").or_else(|| shown.get("description")).and_then(Value::as_str);
            let words = words.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
            lines.entry(full).or_insert((kind(&shown), words));
        }
    }
}
