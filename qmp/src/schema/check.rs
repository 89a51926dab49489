//! Checks a value against a type and types the strings of the command line, with QEMU's words and the full path of the
//! member that is wrong. Called before serde for every command and option; must not know what the value is for.
//!
//! Depth is bounded by [`MAX_DEPTH`], not by the schema, which may be recursive: what handlers do with a nested
//! definition costs them stack as well.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::{IntType, ObjectType, Schema, Shape, TypeRef};
use crate::error::QmpError;

/// Objects and arrays a typed value may be nested in.
pub const MAX_DEPTH: usize = 64;

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// JSON: a number is a number and a string a string.
    Json,
    /// keyval: everything is a string, read as what the type says.
    Keyval,
}

/// One step towards the value being checked; errors walk it upwards.
enum Path<'a> {
    Root,
    Member(&'a Path<'a>, &'a str),
    Element(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn name(&self, syntax: Syntax) -> String {
        let mut out = String::new();
        self.write(syntax, &mut out);
        out
    }

    fn depth(&self) -> usize {
        let mut depth = 0;
        let mut at = self;
        while let Path::Member(parent, _) | Path::Element(parent, _) = at {
            depth += 1;
            at = parent;
        }
        depth
    }

    fn write(&self, syntax: Syntax, out: &mut String) {
        match self {
            Path::Root => {}
            Path::Member(parent, name) => {
                parent.write(syntax, out);
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(name);
            }
            Path::Element(parent, index) => {
                parent.write(syntax, out);
                // Writing to a string cannot fail. Each syntax names an element as its user wrote it.
                let _ = match syntax {
                    Syntax::Json => write!(out, "[{index}]"),
                    Syntax::Keyval => write!(out, ".{index}"),
                };
            }
        }
    }
}

impl Schema {
    /// Checks `value` against `ty` and returns it with every string of keyval syntax turned into what the type says.
    /// Members are not filled in: defaults are serde's business.
    ///
    /// # Errors
    /// The first thing that is wrong: missing before wrong before unexpected, as in QEMU. Unlike QEMU's, the text names the
    /// full path also for values outside an enumeration.
    pub fn check(&self, ty: TypeRef, value: Value, syntax: Syntax) -> Result<Value, QmpError> {
        Checker { schema: self, syntax }.value(ty, value, &Path::Root)
    }
}

struct Checker<'a> {
    schema: &'a Schema,
    syntax: Syntax,
}

impl Checker<'_> {
    fn wrong<T>(&self, path: &Path<'_>, expected: &str) -> Result<T, QmpError> {
        let name = match path {
            Path::Root => "arguments".to_owned(),
            _ => path.name(self.syntax),
        };
        Err(QmpError::invalid_type(&name, expected))
    }

    fn value(&self, ty: TypeRef, value: Value, path: &Path<'_>) -> Result<Value, QmpError> {
        let def = self.schema.get(ty);
        if path.depth() > MAX_DEPTH {
            let text =
                format!("Parameter '{}' is nested more than {MAX_DEPTH} levels deep", path.name(self.syntax));
            return Err(QmpError::generic(text));
        }
        match (&def.shape, value) {
            (Shape::Any | Shape::Undefined, value) => Ok(value),
            (Shape::String, value @ Value::String(_)) => Ok(value),
            (Shape::String, _) => self.wrong(path, "string"),
            (Shape::Bool, Value::Bool(b)) => Ok(Value::Bool(b)),
            (Shape::Bool, Value::String(text)) if self.syntax == Syntax::Keyval => match boolean(&text) {
                Some(b) => Ok(Value::Bool(b)),
                None => Err(QmpError::expects(&path.name(self.syntax), "'on' or 'off'")),
            },
            (Shape::Bool, _) => self.wrong(path, "boolean"),
            (Shape::Null, Value::Null) => Ok(Value::Null),
            // As in QEMU, an empty value is how keyval writes null.
            (Shape::Null, Value::String(text)) if self.syntax == Syntax::Keyval && text.is_empty() => {
                Ok(Value::Null)
            }
            (Shape::Null, _) => self.wrong(path, "null"),
            (Shape::Number, value @ Value::Number(_)) => Ok(value),
            (Shape::Number, Value::String(text)) if self.syntax == Syntax::Keyval => {
                match text.parse::<f64>().ok().and_then(serde_json::Number::from_f64) {
                    Some(number) => Ok(Value::Number(number)),
                    None => Err(QmpError::expects(&path.name(self.syntax), "a number")),
                }
            }
            (Shape::Number, _) => self.wrong(path, "number"),
            (Shape::Int(int), value) => self.int(int, value, path),
            (Shape::Enum(values), Value::String(word)) => {
                if values.iter().any(|v| v.name == word) {
                    Ok(Value::String(word))
                } else {
                    Err(QmpError::not_accepted(&path.name(self.syntax), &word))
                }
            }
            (Shape::Enum(_), _) => self.wrong(path, "string"),
            (Shape::Array(element), Value::Array(list)) => {
                let mut out = Vec::with_capacity(list.len());
                for (index, value) in list.into_iter().enumerate() {
                    out.push(self.value(*element, value, &Path::Element(path, index))?);
                }
                Ok(Value::Array(out))
            }
            (Shape::Array(_), _) => self.wrong(path, "array"),
            (Shape::Object(object), Value::Object(mut given)) => {
                let mut out = Map::new();
                self.members(object, &mut given, &mut out, path)?;
                match given.keys().next() {
                    Some(name) => Err(QmpError::unexpected(&Path::Member(path, name).name(self.syntax))),
                    None => Ok(Value::Object(out)),
                }
            }
            (Shape::Object(_), _) => self.wrong(path, "object"),
            (Shape::Alternate(members), value) => match self.select(members, &value) {
                Some(member) => self.value(member, value, path),
                None => {
                    // A name the user can look up in the reference; QEMU prints its own.
                    let name = if def.name.is_empty() { "another type" } else { &def.name };
                    self.wrong(path, name)
                }
            },
        }
    }

    /// Moves the members of `object` from `given` to `out`; what is left belongs to nobody (yet).
    fn members(
        &self,
        object: &ObjectType,
        given: &mut Map<String, Value>,
        out: &mut Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<(), QmpError> {
        let mut selected = None;
        for member in &object.members {
            let here = Path::Member(path, &member.name);
            match given.shift_remove(&member.name) {
                Some(value) => {
                    let value = self.value(member.ty, value, &here)?;
                    if object.union.as_ref().is_some_and(|u| u.tag == member.name) {
                        selected = value.as_str().map(str::to_owned);
                    }
                    out.insert(member.name.clone(), value);
                }
                None if member.optional => {}
                None => return Err(QmpError::missing(&here.name(self.syntax))),
            }
        }
        let Some(union) = &object.union else { return Ok(()) };
        let variant = union.variants.iter().find(|(case, _, _)| Some(case) == selected.as_ref());
        match variant.map(|(_, ty, _)| &self.schema.get(*ty).shape) {
            Some(Shape::Object(variant)) => self.members(variant, given, out, path),
            _ => Ok(()),
        }
    }

    /// The member of an alternate whose JSON type this value has.
    fn select(&self, members: &[TypeRef], value: &Value) -> Option<TypeRef> {
        let find =
            |ok: &dyn Fn(&Shape) -> bool| members.iter().find(|m| ok(&self.schema.get(**m).shape)).copied();
        let word = |text: &str| {
            find(&|s| matches!(s, Shape::Enum(values) if values.iter().any(|v| v.name == text)))
                .or_else(|| find(&|s| matches!(s, Shape::String)))
        };
        match value {
            Value::String(text) if self.syntax == Syntax::Keyval => word(text)
                .or_else(|| find(&|s| matches!(s, Shape::Bool) && boolean(text).is_some()))
                .or_else(|| find(&|s| matches!(s, Shape::Int(int) if parse_int(int, text).is_some())))
                .or_else(|| find(&|s| matches!(s, Shape::Number) && text.parse::<f64>().is_ok()))
                .or_else(|| find(&|s| matches!(s, Shape::Null) && text.is_empty()))
                .or_else(|| find(&|s| matches!(s, Shape::Enum(_)))),
            Value::String(text) => word(text).or_else(|| find(&|s| matches!(s, Shape::Enum(_)))),
            Value::Bool(_) => find(&|s| matches!(s, Shape::Bool)),
            Value::Null => find(&|s| matches!(s, Shape::Null)),
            Value::Number(number) => find(&|s| matches!(s, Shape::Int(_)) && !number.is_f64())
                .or_else(|| find(&|s| matches!(s, Shape::Number))),
            Value::Array(_) => find(&|s| matches!(s, Shape::Array(_))),
            Value::Object(_) => find(&|s| matches!(s, Shape::Object(_))),
        }
        .or_else(|| find(&|s| matches!(s, Shape::Any | Shape::Undefined)))
        // An alternate may be a member of another.
        .or_else(|| {
            members
                .iter()
                .find(|m| match &self.schema.get(**m).shape {
                    Shape::Alternate(inner) => !inner.contains(m) && self.select(inner, value).is_some(),
                    _ => false,
                })
                .copied()
        })
    }

    fn int(&self, int: &IntType, value: Value, path: &Path<'_>) -> Result<Value, QmpError> {
        let given = match value {
            Value::Number(n) => n.as_i64().map(i128::from).or(n.as_u64().map(i128::from)),
            Value::String(text) if self.syntax == Syntax::Keyval => match parse_int(int, &text) {
                Some(v) => Some(v),
                None if int.size => return Err(QmpError::expects(&path.name(self.syntax), "a size")),
                None => return Err(QmpError::expects(&path.name(self.syntax), "integer")),
            },
            _ => None,
        };
        let Some(given) = given else { return self.wrong(path, "integer") };
        if int.min.is_some_and(|min| given < min) || int.max.is_some_and(|max| given > max) {
            return match int.name.as_str() {
                "integer" => self.wrong(path, "integer"),
                name => Err(QmpError::expects(&path.name(self.syntax), name)),
            };
        }
        // The range is at most that of 64 bits, one way or the other.
        match (i64::try_from(given), u64::try_from(given)) {
            (Ok(v), _) => Ok(v.into()),
            (_, Ok(v)) => Ok(v.into()),
            _ => Err(QmpError::expects(&path.name(self.syntax), &int.name)),
        }
    }
}

/// The words QEMU takes for a boolean on the command line.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// Decimal, `0x` hexadecimal or, for sizes, a decimal number with an optional fraction and suffix. Unlike C's `strtoll`, a
/// leading zero is not octal and leading white space is refused: both have surprised more people than they served.
fn parse_int(int: &IntType, text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let hex = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let magnitude = match hex {
        Some(hex) if !hex.starts_with(['+', '-']) => i128::from(u64::from_str_radix(hex, 16).ok()?),
        Some(_) => return None,
        None if int.size => parse_size(digits)?,
        None => i128::from(digits.parse::<u64>().ok()?),
    };
    Some(if negative { -magnitude } else { magnitude })
}

/// A decimal number of bytes with an optional fraction and suffix (`B`, or `K` to `E` as powers of 1024, either case).
fn parse_size(text: &str) -> Option<i128> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, c)) if c.is_ascii_alphabetic() => {
            let shift = match c.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                'E' => 60,
                _ => return None,
            };
            (text.get(..at)?, 1_i128 << shift)
        }
        _ => (text, 1),
    };
    let Some((whole, fraction)) = number.split_once('.') else {
        return i128::from(number.parse::<u64>().ok()?).checked_mul(unit);
    };
    if fraction.len() > 15 || !fraction.bytes().all(|b| b.is_ascii_digit()) || fraction.is_empty() {
        return None;
    }
    let scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = i128::from(fraction.parse::<u64>().ok()?).checked_mul(unit)?;
    // Rounded down to whole bytes; a fraction of a byte is a mistake.
    if unit == 1 && part != 0 {
        return None;
    }
    i128::from(whole.parse::<u64>().ok()?).checked_mul(unit)?.checked_add(part / scale)
}
