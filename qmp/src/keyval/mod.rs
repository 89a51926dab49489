//! QEMU's option syntax, `key=value,key2.sub=value`, to a JSON value whose leaves are strings.
//!
//! Used for every command line option with members; [`crate::options`] then types the strings by the schema. Dots
//! nest objects, numbers between dots make arrays, `,,` is a comma inside a value. Must not know any option.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::json;

/// Longest text of one option in bytes.
pub const MAX_TEXT: usize = 1 << 20;
/// Longest part of a key between dots, in bytes, as in QEMU.
pub const MAX_FRAGMENT: usize = 127;
/// Most parts a key may have.
pub const MAX_DEPTH: usize = 64;

/// How a member without `=` is read, if it is not the first one with an implied key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bare {
    /// An error, as everywhere in QAPI.
    #[default]
    Refused,
    /// `server` means `server=on` and `nowait` means `wait=off`: the older syntax `--chardev` keeps.
    Flag,
}

/// The syntax of one option.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dialect<'a> {
    /// The key of a first member without `=`, e.g. `driver` for `--blockdev`.
    pub implied: Option<&'a str>,
    /// How other members without `=` are read.
    pub bare: Bare,
}

impl<'a> Dialect<'a> {
    /// QAPI's syntax with an implied first key.
    pub fn implied(key: &'a str) -> Self {
        Dialect { implied: Some(key), bare: Bare::Refused }
    }
}

/// What an option's text held.
#[derive(Clone, Debug, PartialEq)]
pub enum Parsed {
    /// Options in JSON: strictly typed.
    Json(Value),
    /// Members in keyval syntax: an object whose leaves are strings.
    Keyval(Value),
    /// `help` or `?` was given.
    Help,
}

/// Reads an option's text; one that starts with `{` is JSON.
///
/// # Errors
/// The sentence for the user, in QEMU's words, without the option's name.
pub fn parse(text: &str, dialect: &Dialect<'_>) -> Result<Parsed, QmpError> {
    if text.len() > MAX_TEXT {
        return Err(QmpError::generic(format!("Option is longer than {MAX_TEXT} bytes")));
    }
    if text.starts_with('{') {
        return json::parse(text).map(Parsed::Json).map_err(QmpError::generic);
    }
    let mut root = BTreeMap::new();
    let mut order = 0;
    let mut help = false;
    let mut rest = text;
    while !rest.is_empty() {
        let first = rest.len() == text.len();
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, tail) = rest.split_at(end);
        let (key, value, after) = if let Some(tail) = tail.strip_prefix('=') {
            let (value, after) = value(tail);
            (key.to_owned(), value, after)
        } else if matches!(key, "help" | "?") {
            help = true;
            rest = tail.strip_prefix(',').unwrap_or(tail);
            continue;
        } else if let Some(implied) = dialect.implied.filter(|_| first && !key.is_empty()) {
            let (value, after) = value(rest);
            (implied.to_owned(), value, after)
        } else if dialect.bare == Bare::Flag && !key.is_empty() {
            let after = tail.strip_prefix(',').unwrap_or(tail);
            // `nodelay` is a name of its own, not the opposite of `delay`.
            match key.strip_prefix("no") {
                Some(name) if !name.is_empty() && name != "delay" => {
                    (name.to_owned(), "off".to_owned(), after)
                }
                _ => (key.to_owned(), "on".to_owned(), after),
            }
        } else if fragments(key).is_ok() {
            return Err(QmpError::generic(format!("Expected '=' after parameter '{key}'")));
        } else {
            return Err(invalid(key));
        };
        rest = after;
        let parts = fragments(&key)?;
        order += 1;
        insert(&mut root, &key, &parts, value, order)?;
    }
    if help {
        return Ok(Parsed::Help);
    }
    finish(root, "").map(Parsed::Keyval)
}

/// A value up to the next single comma, and what follows that comma.
fn value(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut rest = text;
    loop {
        let Some((head, tail)) = rest.split_once(',') else {
            out.push_str(rest);
            return (out, "");
        };
        out.push_str(head);
        let Some(tail) = tail.strip_prefix(',') else {
            return (out, tail);
        };
        out.push(',');
        rest = tail;
    }
}

fn invalid(key: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter '{key}'"))
}

/// Splits a key at its dots. Parts are names (`[A-Za-z][A-Za-z0-9_-]*`, or with a vendor prefix `__rfqdn_`, which may
/// hold dots) or, but for the first, numbers.
fn fragments(key: &str) -> Result<Vec<&str>, QmpError> {
    let mut parts = Vec::new();
    let mut rest = key;
    loop {
        let len = fragment_len(rest, !parts.is_empty()).ok_or_else(|| invalid(key))?;
        let (part, tail) = rest.split_at(len);
        if part.len() > MAX_FRAGMENT {
            return Err(QmpError::generic(format!("Parameter '{part}' is too long")));
        }
        parts.push(part);
        if parts.len() > MAX_DEPTH {
            return Err(QmpError::generic(format!(
                "Parameter '{key}' is nested more than {MAX_DEPTH} levels deep"
            )));
        }
        if tail.is_empty() {
            return Ok(parts);
        }
        rest = tail.strip_prefix('.').ok_or_else(|| invalid(key))?;
    }
}

fn fragment_len(text: &str, number_allowed: bool) -> Option<usize> {
    let run = |text: &str, ok: fn(u8) -> bool| text.bytes().position(|b| !ok(b)).unwrap_or(text.len());
    let digits = run(text, |b| b.is_ascii_digit());
    if digits > 0 {
        return number_allowed.then_some(digits);
    }
    let mut start = 0;
    if let Some(vendor) = text.strip_prefix("__") {
        let len = run(vendor, |b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        if len == 0 || vendor.as_bytes().get(len) != Some(&b'_') {
            return None;
        }
        start = 2 + len + 1;
    }
    let name = text.get(start..)?;
    if !name.bytes().next()?.is_ascii_alphabetic() {
        return None;
    }
    Some(start + run(name, |b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'))
}

/// The tree while members arrive; each entry remembers when it first came, so that the result keeps the user's order.
enum Node {
    Leaf(String),
    Inner(BTreeMap<String, (usize, Node)>),
}

fn insert(
    map: &mut BTreeMap<String, (usize, Node)>,
    key: &str,
    parts: &[&str],
    value: String,
    order: usize,
) -> Result<(), QmpError> {
    let mut map = map;
    let mut depth = 0;
    let inconsistent = |depth: usize| {
        let prefix = parts.get(..=depth).unwrap_or(parts).join(".");
        QmpError::generic(format!("Parameters '{prefix}.*' used inconsistently"))
    };
    let Some((last, inner)) = parts.split_last() else {
        return Err(invalid(key));
    };
    for part in inner {
        let entry = map.entry((*part).to_owned()).or_insert_with(|| (order, Node::Inner(BTreeMap::new())));
        match &mut entry.1 {
            Node::Inner(next) => map = next,
            Node::Leaf(_) => return Err(inconsistent(depth)),
        }
        depth += 1;
    }
    match map.get_mut(*last) {
        None => {
            map.insert((*last).to_owned(), (order, Node::Leaf(value)));
        }
        // Given twice: the last one counts, as in QEMU.
        Some((_, Node::Leaf(old))) => *old = value,
        Some((_, Node::Inner(_))) => return Err(inconsistent(depth)),
    }
    Ok(())
}

/// Turns maps whose keys are numbers into arrays. The depth is bounded by [`MAX_DEPTH`]; an array is as long as the number
/// of members that were written down, whatever their indices say.
fn finish(map: BTreeMap<String, (usize, Node)>, path: &str) -> Result<Value, QmpError> {
    let join = |part: &str| if path.is_empty() { part.to_owned() } else { format!("{path}.{part}") };
    let numbers = map.keys().filter(|k| k.starts_with(|c: char| c.is_ascii_digit())).count();
    if numbers != 0 && numbers != map.len() {
        return Err(QmpError::generic(format!("Parameters '{path}.*' used inconsistently")));
    }
    let convert = |node: Node, path: &str| match node {
        Node::Leaf(text) => Ok(Value::String(text)),
        Node::Inner(map) => finish(map, path),
    };
    if numbers == 0 {
        let mut entries: Vec<_> = map.into_iter().collect();
        entries.sort_by_key(|(_, (order, _))| *order);
        let mut object = Map::new();
        for (key, (_, node)) in entries {
            let value = convert(node, &join(&key))?;
            object.insert(key, value);
        }
        return Ok(Value::Object(object));
    }
    let mut elements = BTreeMap::new();
    for (key, (order, node)) in map {
        let index = key.parse::<u64>().map_err(|_| invalid(&join(&key)))?;
        // `0` and `00` are the same element; the later one counts.
        let replace = elements.get(&index).is_none_or(|(o, _)| *o < order);
        if replace {
            elements.insert(index, (order, node));
        }
    }
    let mut list = Vec::with_capacity(elements.len());
    for (expected, (index, (_, node))) in (0_u64..).zip(elements) {
        let here = join(&expected.to_string());
        if index != expected {
            return Err(QmpError::generic(format!("Parameter '{here}' missing")));
        }
        list.push(convert(node, &here)?);
    }
    Ok(Value::Array(list))
}
