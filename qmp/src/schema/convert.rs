//! JSON schema, as schemars derives it, to QAPI types. Called by the builder; knows the forms schemars writes for the
//! attributes listed there and reports every other form as a problem.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::builder::SchemaBuilder;
use super::{EnumValue, IntType, Member, ObjectType, Shape, TypeRef, Union};

/// The document a schema's references point into.
struct Document<'a> {
    root: &'a Value,
    root_name: &'a str,
    defs: Option<&'a Map<String, Value>>,
}

/// Converts a document with its `$defs`.
pub(super) fn root(b: &mut SchemaBuilder, name: &str, schema: &Value) -> TypeRef {
    let doc =
        Document { root: schema, root_name: name, defs: schema.get("$defs").and_then(Value::as_object) };
    named(b, &doc, name, schema)
}

/// Converts a schema that has a name; the same definition is converted once, a different one of the same name is another
/// type.
fn named(b: &mut SchemaBuilder, doc: &Document<'_>, name: &str, schema: &Value) -> TypeRef {
    if b.explicit.iter().any(|n| n == name) {
        return b.named(name);
    }
    let key = closure(doc, name, schema);
    if let Some(ty) = b.converted.get(&key) {
        return *ty;
    }
    // Reserve the place first: the definition may refer to itself.
    let place = match b.names.get(name) {
        Some(ty) if b.schema.get(*ty).shape == Shape::Undefined && !b.converted.values().any(|t| t == ty) => {
            *ty
        }
        Some(_) => b.push(name, "", Shape::Undefined),
        None => b.named(name),
    };
    b.converted.insert(key.clone(), place);
    let ty = convert(b, doc, name, schema);
    if ty == place {
        return place;
    }
    let def = b.schema.get(ty).clone();
    // A name for something that needs none (a newtype of a string): whoever asks gets the thing itself.
    let is_own = def.name == name;
    let text = description(schema);
    if !is_own {
        b.converted.insert(key, ty);
    }
    if let Some(slot) = b.schema.types.get_mut(place.0) {
        slot.shape = def.shape;
        slot.doc = if text.is_empty() { def.doc } else { text };
    }
    if is_own { place } else { ty }
}

/// Everything that decides what a definition means: its body and the bodies of what it reaches.
fn closure(doc: &Document<'_>, name: &str, schema: &Value) -> String {
    fn refs<'a>(value: &'a Value, out: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match value {
                        Value::String(target) if key == "$ref" => out.push(target),
                        _ if key == "$defs" => {}
                        _ => refs(value, out),
                    }
                }
            }
            Value::Array(list) => list.iter().for_each(|v| refs(v, out)),
            _ => {}
        }
    }
    let mut body = schema.clone();
    if let Value::Object(map) = &mut body {
        // The frame of a root document is not part of the type.
        for key in ["$defs", "$schema", "title"] {
            map.remove(key);
        }
    }
    let mut found: BTreeMap<&str, &Value> = BTreeMap::new();
    let mut todo = Vec::new();
    refs(schema, &mut todo);
    while let Some(target) = todo.pop() {
        let Some(name) = target.strip_prefix("#/$defs/") else { continue };
        if let Some(def) = doc.defs.and_then(|d| d.get(name))
            && found.insert(name, def).is_none()
        {
            refs(def, &mut todo);
        }
    }
    format!("{name}\n{body}\n{found:?}")
}

fn description(schema: &Value) -> String {
    // rustdoc wraps lines; a paragraph is one line here.
    let text = schema.get("description").and_then(Value::as_str).unwrap_or("");
    text.split("\n\n")
        .map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("\n\n")
}

fn is_null(schema: &Value) -> bool {
    schema.get("type").and_then(Value::as_str) == Some("null")
}

/// The schema without its null alternative, and whether it had one.
fn without_null(schema: &Value) -> (Value, bool) {
    let mut out = schema.clone();
    let mut nullable = false;
    if let Value::Object(map) = &mut out {
        if let Some(Value::Array(types)) = map.get_mut("type") {
            let before = types.len();
            types.retain(|t| t != "null");
            nullable = types.len() != before;
            if let [one] = types.as_slice() {
                let one = one.clone();
                map.insert("type".to_owned(), one);
            }
        }
        if let Some(Value::Array(values)) = map.get_mut("enum") {
            let before = values.len();
            values.retain(|v| !v.is_null());
            nullable |= values.len() != before;
        }
        for key in ["anyOf", "oneOf"] {
            let Some(Value::Array(list)) = map.get_mut(key) else { continue };
            let before = list.len();
            list.retain(|s| !is_null(s));
            nullable |= list.len() != before;
            if list.len() == 1 && nullable {
                let one = list.pop();
                map.remove(key);
                if let Some(Value::Object(one)) = one {
                    for (k, v) in one {
                        map.entry(k).or_insert(v);
                    }
                }
            }
            break;
        }
    }
    (out, nullable)
}

/// Converts a schema at a place that may have a name of its own (`hint`).
fn convert(b: &mut SchemaBuilder, doc: &Document<'_>, hint: &str, schema: &Value) -> TypeRef {
    let Value::Object(map) = schema else {
        if schema == &Value::Bool(false) {
            b.problem(format!("{hint}: accepts nothing"));
        }
        return b.any();
    };
    if let Some(target) = map.get("$ref").and_then(Value::as_str) {
        return reference(b, doc, target);
    }
    if map.contains_key("properties") {
        return object(b, doc, hint, map, schema);
    }
    if let Some(values) = enumeration(schema) {
        return b.push(hint, &description(schema), Shape::Enum(values));
    }
    if let Some(list) = map.get("oneOf").or_else(|| map.get("anyOf")).and_then(Value::as_array) {
        if list.iter().all(|s| s.get("properties").is_some()) {
            return object(b, doc, hint, map, schema);
        }
        return alternate(b, doc, hint, schema, list);
    }
    if let Some([one]) = map.get("allOf").and_then(Value::as_array).map(Vec::as_slice) {
        return convert(b, doc, hint, one);
    }
    match map.get("type") {
        Some(Value::String(name)) => match name.as_str() {
            "string" => b.string(),
            "boolean" => b.bool(),
            "number" => b.number(),
            "null" => b.null(),
            "integer" => integer(b, hint, map),
            "array" => {
                let element = match map.get("items") {
                    Some(items) => convert(b, doc, &format!("{hint}-element"), items),
                    None => b.any(),
                };
                b.array(element)
            }
            "object" if map.contains_key("additionalProperties") && map["additionalProperties"] != false => {
                b.any()
            }
            "object" => b.empty(),
            other => {
                b.problem(format!("{hint}: type {other}"));
                b.any()
            }
        },
        Some(Value::Array(_)) => {
            let (inner, nullable) = without_null(schema);
            if !nullable || inner.get("type").is_some_and(Value::is_array) {
                b.problem(format!("{hint}: several types at once"));
                return b.any();
            }
            let ty = convert(b, doc, hint, &inner);
            let null = b.null();
            b.push(&format!("{hint}OrNull"), "", Shape::Alternate(vec![ty, null]))
        }
        None if map.contains_key("allOf") || map.contains_key("not") || map.contains_key("if") => {
            b.problem(format!("{hint}: a combination of schemas"));
            b.any()
        }
        _ => b.any(),
    }
}

fn reference(b: &mut SchemaBuilder, doc: &Document<'_>, target: &str) -> TypeRef {
    if target == "#" {
        return named(b, doc, doc.root_name, doc.root);
    }
    let name = target.strip_prefix("#/$defs/").unwrap_or(target);
    match doc.defs.and_then(|d| d.get(name)) {
        Some(def) => named(b, doc, name, def),
        None => b.named(name),
    }
}

fn integer(b: &mut SchemaBuilder, hint: &str, map: &Map<String, Value>) -> TypeRef {
    let format = map.get("format").and_then(Value::as_str).unwrap_or("");
    let limit =
        |key: &str| map.get(key).and_then(|v| v.as_i64().map(i128::from).or(v.as_u64().map(i128::from)));
    let unsigned = format.starts_with("uint") || format == "size";
    let (min, max) = match format {
        "int8" => (-128, 127),
        "int16" => (-32768, 32767),
        "int32" => (i128::from(i32::MIN), i128::from(i32::MAX)),
        "uint8" => (0, 255),
        "uint16" => (0, 65535),
        "uint32" => (0, i128::from(u32::MAX)),
        _ if unsigned => (0, i128::from(u64::MAX)),
        _ => (i128::from(i64::MIN), i128::from(i64::MAX)),
    };
    let (low, high) =
        (limit("minimum").map_or(min, |v| v.max(min)), limit("maximum").map_or(max, |v| v.min(max)));
    let name = match format {
        _ if (low, high) != (min, max) => format!("an integer from {low} to {high}"),
        "size" => "a size".to_owned(),
        "int8" | "int16" | "int32" | "uint8" | "uint16" | "uint32" | "uint64" => format!("{format}_t"),
        "uint" => "uint64_t".to_owned(),
        _ => "integer".to_owned(),
    };
    let int = IntType { min: Some(low), max: Some(high), name, size: format == "size" };
    b.push(hint, "", Shape::Int(int))
}

/// The values, if the schema is nothing but a choice of words.
fn enumeration(schema: &Value) -> Option<Vec<EnumValue>> {
    if let Some(word) = schema.get("const") {
        let name = word.as_str()?.to_owned();
        return Some(vec![EnumValue { name, doc: description(schema) }]);
    }
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        let words = words.iter().map(|w| w.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()?;
        return Some(words.into_iter().map(|name| EnumValue { name, doc: String::new() }).collect());
    }
    let list = schema.get("oneOf").or_else(|| schema.get("anyOf"))?.as_array()?;
    if list.is_empty() || schema.get("properties").is_some() {
        return None;
    }
    let parts = list.iter().map(enumeration).collect::<Option<Vec<_>>>()?;
    Some(parts.into_iter().flatten().collect())
}

fn alternate(
    b: &mut SchemaBuilder,
    doc: &Document<'_>,
    hint: &str,
    schema: &Value,
    list: &[Value],
) -> TypeRef {
    let mut members: Vec<TypeRef> = Vec::new();
    for (index, branch) in list.iter().enumerate() {
        let member = convert(b, doc, &format!("{hint}-{index}"), branch);
        if !members.contains(&member) {
            members.push(member);
        }
    }
    if let [one] = members.as_slice() {
        return *one;
    }
    b.push(hint, &description(schema), Shape::Alternate(members))
}

/// An object, a union (tagged enum), or a union with base members (a struct that flattens a tagged enum).
fn object(
    b: &mut SchemaBuilder,
    doc: &Document<'_>,
    hint: &str,
    map: &Map<String, Value>,
    schema: &Value,
) -> TypeRef {
    let mut members = members(b, doc, hint, map, None);
    let union = match map.get("oneOf").or_else(|| map.get("anyOf")).and_then(Value::as_array) {
        None => None,
        Some(branches) => {
            let Some(tag) = tag_of(branches) else {
                b.problem(format!("{hint}: an enum without #[serde(tag = ...)]"));
                return b.any();
            };
            let mut variants = Vec::new();
            for branch in branches {
                let Some(branch_map) = branch.as_object() else { continue };
                let case =
                    branch.pointer(&format!("/properties/{tag}/const")).and_then(Value::as_str).unwrap_or("");
                let name = format!("{hint}-{case}");
                let inner = object_without(b, doc, &name, branch_map, &tag);
                variants.push((case.to_owned(), inner, description(branch)));
            }
            let values =
                variants.iter().map(|(n, _, d)| EnumValue { name: n.clone(), doc: d.clone() }).collect();
            let tag_type = b.push(&format!("{hint}-{tag}"), "", Shape::Enum(values));
            let position = members.iter().position(|m| m.name == tag);
            let member = Member {
                name: tag.clone(),
                ty: tag_type,
                optional: false,
                default: None,
                doc: String::new(),
            };
            match position.and_then(|p| members.get_mut(p)) {
                Some(slot) => slot.ty = tag_type,
                None => members.insert(0, member),
            }
            Some(Union { tag, variants })
        }
    };
    if map.contains_key("allOf") {
        b.problem(format!("{hint}: more than one flattened enum"));
    }
    if members.is_empty() && union.is_none() {
        return b.empty();
    }
    b.push(hint, &description(schema), Shape::Object(ObjectType { members, union }))
}

fn object_without(
    b: &mut SchemaBuilder,
    doc: &Document<'_>,
    hint: &str,
    map: &Map<String, Value>,
    tag: &str,
) -> TypeRef {
    if map.contains_key("oneOf") || map.contains_key("anyOf") {
        // A variant that is a union itself.
        let mut inner = map.clone();
        if let Some(Value::Object(properties)) = inner.get_mut("properties") {
            properties.shift_remove(tag);
        }
        let schema = Value::Object(inner.clone());
        return object(b, doc, hint, &inner, &schema);
    }
    let members = members(b, doc, hint, map, Some(tag));
    if members.is_empty() {
        return b.empty();
    }
    b.push(hint, "", Shape::Object(ObjectType { members, union: None }))
}

fn members(
    b: &mut SchemaBuilder,
    doc: &Document<'_>,
    hint: &str,
    map: &Map<String, Value>,
    skip: Option<&str>,
) -> Vec<Member> {
    let mut out = Vec::new();
    let Some(properties) = map.get("properties").and_then(Value::as_object) else { return out };
    // A variant whose struct was left as a reference.
    if let Some(def) = map
        .get("$ref")
        .and_then(Value::as_str)
        .and_then(|r| r.strip_prefix("#/$defs/"))
        .and_then(|name| doc.defs.and_then(|d| d.get(name)))
        .and_then(Value::as_object)
    {
        out = members(b, doc, hint, def, skip);
    }
    let required = |name: &str| {
        map.get("required").and_then(Value::as_array).is_some_and(|list| list.iter().any(|r| r == name))
    };
    for (name, schema) in properties {
        if skip == Some(name.as_str()) || out.iter().any(|m: &Member| m.name == *name) {
            continue;
        }
        let (inner, nullable) = without_null(schema);
        if nullable && required(name) {
            b.problem(format!(
                "{hint}.{name}: is written as null when absent; skip it with skip_serializing_if"
            ));
        }
        let ty = convert(b, doc, &format!("{hint}-{name}"), &inner);
        out.push(Member {
            name: name.clone(),
            ty,
            optional: nullable || !required(name),
            default: schema.get("default").filter(|d| !d.is_null()).cloned(),
            doc: description(schema),
        });
    }
    out
}

/// The property that is a constant in every branch.
fn tag_of(branches: &[Value]) -> Option<String> {
    let first = branches.first()?.get("properties")?.as_object()?;
    first
        .keys()
        .find(|name| {
            branches.iter().all(|branch| {
                branch
                    .get("properties")
                    .and_then(|p| p.get(name.as_str()))
                    .and_then(|p| p.get("const"))
                    .is_some()
            })
        })
        .cloned()
}
