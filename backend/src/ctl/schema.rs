//! What the other side understands, as its `query-qmp-schema` says: giving words their types, and completing them.
//!
//! Used for arguments given as words, by the prompt and by `help`. The schema comes from outside: references that lead
//! nowhere or in circles end somewhere.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value};

use super::client::Client;
use super::failure::Failure;

/// Deepest nesting that is followed.
const MAX_DEPTH: usize = 64;

/// A member of an object.
#[derive(Clone, Debug)]
struct Member {
    name: String,
    ty: String,
    optional: bool,
}

/// A type.
#[derive(Clone, Debug)]
enum Type {
    /// `string`, `int`, `number`, `boolean`, `null`, `value`.
    Plain(String),
    Enum(Vec<String>),
    Array(String),
    Alternate(Vec<String>),
    Object {
        members: Vec<Member>,
        /// Name of the member that decides, and for each of its values the type with further members.
        tag: Option<(String, Vec<(String, String)>)>,
    },
}

/// A schema.
#[derive(Debug, Default)]
pub struct Schema {
    /// Commands and the types of their arguments.
    commands: BTreeMap<String, String>,
    types: HashMap<String, Type>,
}

fn word(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn list<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value.get(name).and_then(Value::as_array).into_iter().flatten()
}

impl Schema {
    /// Asks the other side.
    ///
    /// # Errors
    /// It does not say.
    pub fn ask(client: &mut Client) -> Result<Schema, Failure> {
        let answer = client.execute("query-qmp-schema", None)?;
        Ok(Schema::read(&answer))
    }

    /// Reads the answer; what makes no sense is left out.
    pub fn read(answer: &Value) -> Schema {
        let mut schema = Schema::default();
        for entity in answer.as_array().into_iter().flatten() {
            let name = word(entity, "name");
            let ty = match word(entity, "meta-type").as_str() {
                "command" => {
                    schema.commands.insert(name, word(entity, "arg-type"));
                    continue;
                }
                "builtin" => Type::Plain(word(entity, "json-type")),
                "enum" => {
                    let values =
                        list(entity, "values").filter_map(|v| v.as_str().map(str::to_owned)).collect();
                    Type::Enum(values)
                }
                "array" => Type::Array(word(entity, "element-type")),
                "alternate" => Type::Alternate(list(entity, "members").map(|m| word(m, "type")).collect()),
                "object" => {
                    let members = list(entity, "members").map(|m| Member {
                        name: word(m, "name"),
                        ty: word(m, "type"),
                        optional: m.get("default").is_some(),
                    });
                    let variants = list(entity, "variants").map(|v| (word(v, "case"), word(v, "type")));
                    let tag = entity.get("tag").and_then(Value::as_str);
                    Type::Object {
                        members: members.collect(),
                        tag: tag.map(|t| (t.to_owned(), variants.collect())),
                    }
                }
                _ => continue,
            };
            schema.types.insert(name, ty);
        }
        schema
    }

    /// All commands.
    pub fn commands(&self) -> impl Iterator<Item = &str> {
        self.commands.keys().map(String::as_str)
    }

    /// The members of an object type, with those that its tag brings in; `tag` tells the tag's value.
    fn members(&self, ty: &str, tag: impl Fn(&str) -> Option<String>) -> Vec<Member> {
        let Some(Type::Object { members, tag: union }) = self.types.get(ty) else { return Vec::new() };
        let mut all = members.clone();
        if let Some((name, variants)) = union
            && let Some(value) = tag(name)
            && let Some((_, more)) = variants.iter().find(|(case, _)| *case == value)
            && let Some(Type::Object { members, .. }) = self.types.get(more)
        {
            all.extend(members.iter().cloned());
        }
        all
    }

    /// Gives the strings of a tree the types that the arguments of this command have.
    ///
    /// # Errors
    /// No such command, no such member, a value that does not fit: in words that say what would.
    pub fn arguments(&self, command: &str, tree: Value) -> Result<Value, String> {
        let ty = self.commands.get(command).ok_or_else(|| self.unknown(command))?;
        self.convert(ty, tree, "", 0)
    }

    /// What to say about a command that is not there.
    fn unknown(&self, command: &str) -> String {
        let near: Vec<&str> = self.commands().filter(|c| distance(c, command) <= 3).take(3).collect();
        match near.is_empty() {
            true => format!("The command {command} has not been found"),
            false => format!("The command {command} has not been found; did you mean {}?", near.join(" or ")),
        }
    }

    fn convert(&self, ty: &str, value: Value, path: &str, depth: usize) -> Result<Value, String> {
        let expects = |what: &str| Err(format!("Parameter '{path}' expects {what}"));
        if depth > MAX_DEPTH {
            return Err(format!("Parameter '{path}' is nested too deeply"));
        }
        let join = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        match (self.types.get(ty), value) {
            (None, value) => Ok(value),
            (Some(Type::Plain(plain)), Value::String(text)) => match plain.as_str() {
                "string" => Ok(Value::String(text)),
                "int" => integer(&text).map_or_else(|| expects("an integer, or a size like 10G"), Ok),
                "number" => match text.parse::<f64>().ok().and_then(serde_json::Number::from_f64) {
                    Some(n) => Ok(Value::Number(n)),
                    None => expects("a number"),
                },
                "boolean" => boolean(&text).map_or_else(|| expects("on or off"), |b| Ok(Value::Bool(b))),
                "null" => match text.is_empty() || text == "null" {
                    true => Ok(Value::Null),
                    false => expects("null"),
                },
                // Anything: what reads as JSON is meant so.
                _ => Ok(serde_json::from_str(&text).unwrap_or(Value::String(text))),
            },
            // Anything, with a tree below.
            (Some(Type::Plain(plain)), value) if plain == "value" => Ok(value),
            (Some(Type::Plain(plain)), _) => expects(&format!("one value ({plain}), not members")),
            (Some(Type::Enum(values)), Value::String(text)) => match values.contains(&text) {
                true => Ok(Value::String(text)),
                false => Err(format!(
                    "Parameter '{path}' does not accept value '{text}': one of {}",
                    values.join(", ")
                )),
            },
            (Some(Type::Enum(_)), _) => expects("one value, not members"),
            (Some(Type::Array(element)), Value::Array(elements)) => {
                let typed = elements.into_iter().enumerate();
                let typed = typed.map(|(at, v)| self.convert(element, v, &join(&at.to_string()), depth + 1));
                Ok(Value::Array(typed.collect::<Result<_, _>>()?))
            }
            (Some(Type::Array(_)), _) => expects(&format!("a list: {}=..., {}=...", join("0"), join("1"))),
            (Some(Type::Alternate(members)), value) => {
                // In this order a string becomes what it most likely means.
                let rank = |ty: &String| match self.types.get(ty) {
                    Some(Type::Object { .. }) => 0,
                    Some(Type::Array(_)) => 1,
                    Some(Type::Enum(_)) => 2,
                    Some(Type::Plain(p)) if p == "int" => 3,
                    Some(Type::Plain(p)) if p == "boolean" => 4,
                    Some(Type::Plain(p)) if p == "null" => 6,
                    _ => 5,
                };
                let mut members = members.clone();
                members.sort_by_key(rank);
                let mut error = None;
                for member in &members {
                    let fits = match self.types.get(member) {
                        Some(Type::Object { .. }) => value.is_object(),
                        Some(Type::Array(_)) => value.is_array(),
                        _ => value.is_string(),
                    };
                    match fits.then(|| self.convert(member, value.clone(), path, depth + 1)) {
                        Some(Ok(typed)) => return Ok(typed),
                        Some(Err(e)) => error = error.or(Some(e)),
                        None => {}
                    }
                }
                error.map_or_else(|| expects("something else"), Err)
            }
            (Some(Type::Object { .. }), Value::Object(tree)) => {
                let tag = |name: &str| tree.get(name).and_then(Value::as_str).map(str::to_owned);
                let members = self.members(ty, tag);
                let mut typed = Map::new();
                for (name, value) in tree {
                    let path = join(&name);
                    let Some(member) = members.iter().find(|m| m.name == name) else {
                        return Err(format!("Parameter '{path}' is unexpected{}", known(&members)));
                    };
                    let value = self.convert(&member.ty, value, &path, depth + 1)?;
                    typed.insert(name, value);
                }
                Ok(Value::Object(typed))
            }
            (Some(Type::Object { .. }), _) => expects(&format!("members: {}=...", join("NAME"))),
        }
    }

    /// What a word of a command's arguments may become: keys with `=` or `.` behind them, or whole `key=value` words.
    /// `others` are the other words of the line.
    pub fn complete(&self, command: &str, others: &[String], partial: &str) -> Vec<String> {
        let Some(top) = self.commands.get(command) else { return Vec::new() };
        let given: HashMap<&str, &str> = others.iter().filter_map(|w| w.split_once('=')).collect();
        let (key, value) = match partial.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (partial, None),
        };
        let mut parts: Vec<&str> = key.split('.').collect();
        let last = parts.pop().unwrap_or_default();
        let mut ty = top.clone();
        let mut prefix = String::new();
        for part in parts {
            let Some(next) = self.step(&ty, &prefix, part, &given) else { return Vec::new() };
            ty = next;
            prefix = format!("{prefix}{part}.");
        }
        match value {
            Some(value) => {
                let Some(leaf) = self.step(&ty, &prefix, last, &given) else { return Vec::new() };
                let values = self.values(&leaf, 0);
                values.into_iter().filter(|v| v.starts_with(value)).map(|v| format!("{key}={v}")).collect()
            }
            None => {
                if let Some(Type::Array(element)) = self.types.get(&self.inner(&ty)) {
                    let count = (0..).find(|n| !given.keys().any(|k| starts(k, &format!("{prefix}{n}"))));
                    let end = if self.is_leaf(element) { '=' } else { '.' };
                    return count.map(|n: u32| format!("{prefix}{n}{end}")).into_iter().collect();
                }
                let tag = |name: &str| given.get(format!("{prefix}{name}").as_str()).map(|v| (*v).to_owned());
                let members = self.members(&self.inner(&ty), tag);
                let fresh = members.iter().filter(|m| {
                    m.name.starts_with(last) && !given.contains_key(format!("{prefix}{}", m.name).as_str())
                });
                let mut found: Vec<String> = fresh
                    .map(|m| format!("{prefix}{}{}", m.name, if self.is_leaf(&m.ty) { '=' } else { '.' }))
                    .collect();
                found.sort();
                found
            }
        }
    }

    /// The type that keys with dots behind them reach into: of an alternate, its object.
    fn inner(&self, ty: &str) -> String {
        match self.types.get(ty) {
            Some(Type::Alternate(members)) => {
                let reaches =
                    |m: &&String| matches!(self.types.get(*m), Some(Type::Object { .. } | Type::Array(_)));
                members.iter().find(reaches).cloned().unwrap_or_default()
            }
            _ => ty.to_owned(),
        }
    }

    /// Whether a word of this type ends with a value.
    fn is_leaf(&self, ty: &str) -> bool {
        !matches!(self.types.get(&self.inner(ty)), Some(Type::Object { .. } | Type::Array(_)))
    }

    fn step(&self, ty: &str, prefix: &str, part: &str, given: &HashMap<&str, &str>) -> Option<String> {
        let ty = self.inner(ty);
        match self.types.get(&ty)? {
            Type::Array(element) => part.parse::<u32>().ok().map(|_| element.clone()),
            Type::Object { .. } => {
                let tag = |name: &str| given.get(format!("{prefix}{name}").as_str()).map(|v| (*v).to_owned());
                self.members(&ty, tag).into_iter().find(|m| m.name == part).map(|m| m.ty)
            }
            _ => None,
        }
    }

    /// The values of a type that has few.
    fn values(&self, ty: &str, depth: usize) -> Vec<String> {
        match self.types.get(ty) {
            Some(Type::Enum(values)) => values.clone(),
            Some(Type::Plain(plain)) if plain == "boolean" => vec!["on".to_owned(), "off".to_owned()],
            Some(Type::Alternate(members)) if depth < MAX_DEPTH => {
                members.iter().flat_map(|m| self.values(m, depth + 1)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// What there is to say about a command: its arguments with their types.
    ///
    /// # Errors
    /// No such command.
    pub fn help(&self, command: &str) -> Result<String, String> {
        let ty = self.commands.get(command).ok_or_else(|| self.unknown(command))?;
        let mut out = format!("{command}\n");
        for member in self.members(ty, |_| None) {
            let (open, close) = if member.optional { ("[", "]") } else { ("", "") };
            out.push_str(&format!("  {open}{}={}{close}\n", member.name, self.describe(&member.ty, 0)));
        }
        if let Some(Type::Object { tag: Some((tag, variants)), .. }) = self.types.get(ty) {
            for (case, ty) in variants {
                let Some(Type::Object { members, .. }) = self.types.get(ty) else { continue };
                if !members.is_empty() {
                    let names = members.iter().map(|m| match m.optional {
                        true => format!("[{}]", m.name),
                        false => m.name.clone(),
                    });
                    out.push_str(&format!("  with {tag}={case}: {}\n", names.collect::<Vec<_>>().join(" ")));
                }
            }
        }
        Ok(out)
    }

    fn describe(&self, ty: &str, depth: usize) -> String {
        match self.types.get(ty) {
            Some(Type::Plain(plain)) if plain == "value" => "ANY".to_owned(),
            Some(Type::Plain(plain)) => plain.to_uppercase(),
            Some(Type::Enum(values)) => values.join("|"),
            Some(Type::Array(element)) if depth < 3 => {
                format!("[{}, ...]", self.describe(element, depth + 1))
            }
            Some(Type::Alternate(members)) if depth < 3 => {
                members.iter().map(|m| self.describe(m, depth + 1)).collect::<Vec<_>>().join(" or ")
            }
            Some(Type::Object { .. }) => "{...}".to_owned(),
            _ => "...".to_owned(),
        }
    }
}

/// Whether a key is this one or lies below it.
fn starts(key: &str, prefix: &str) -> bool {
    key.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn known(members: &[Member]) -> String {
    if members.is_empty() {
        return ": there are none here".to_owned();
    }
    let names = members.iter().map(|m| if m.optional { format!("[{}]", m.name) } else { m.name.clone() });
    format!(": there are {}", names.collect::<Vec<_>>().join(", "))
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A whole number: decimal, hexadecimal, or with a suffix of bkKMGTPE (powers of 1024).
fn integer(text: &str) -> Option<Value> {
    if let Ok(n) = text.parse::<i64>() {
        return Some(Value::from(n));
    }
    if let Ok(n) = text.parse::<u64>() {
        return Some(Value::from(n));
    }
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok().map(Value::from);
    }
    let suffix = text.chars().next_back()?;
    let shift = match suffix.to_ascii_uppercase() {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        'P' => 50,
        'E' => 60,
        _ => return None,
    };
    let number = text.strip_suffix(suffix)?;
    if let Ok(n) = number.parse::<u64>() {
        return n.checked_mul(1 << shift).map(Value::from);
    }
    let fraction = number.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0)?;
    let bytes = fraction * (1u64 << shift) as f64;
    (bytes < i64::MAX as f64).then(|| Value::from(bytes as u64))
}

/// How many letters apart two names are (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(128).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(128).enumerate() {
        let mut diagonal = i;
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        for (j, y) in b.iter().enumerate() {
            let (left, up) = (row.get(j).copied().unwrap_or(0), row.get(j + 1).copied().unwrap_or(0));
            let best = (diagonal + usize::from(x != *y)).min(left + 1).min(up + 1);
            diagonal = up;
            if let Some(cell) = row.get_mut(j + 1) {
                *cell = best;
            }
        }
    }
    row.last().copied().unwrap_or(0)
}
