//! A schema as `query-qmp-schema` answers it (QEMU qapi/introspect.json). Called once, when the command table is
//! closed. Type names are numbers there, as in QEMU, so that nobody depends on ours; commands, events and members keep
//! their names.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{Schema, Shape, TypeRef};

/// A command as introspection shows it.
#[derive(Clone, Debug)]
pub struct CommandInfo {
    /// Name.
    pub name: String,
    /// What it does, for the reference.
    pub doc: String,
    /// Type of `arguments`.
    pub args: TypeRef,
    /// Type of `return`.
    pub returns: TypeRef,
}

/// An event as introspection shows it.
#[derive(Clone, Debug)]
pub struct EventInfo {
    /// Name.
    pub name: String,
    /// When it is sent, for the reference.
    pub doc: String,
    /// Type of `data`.
    pub data: TypeRef,
}

/// The array of `SchemaInfo`.
pub(crate) fn introspect(schema: &Schema, commands: &[CommandInfo], events: &[EventInfo]) -> Value {
    let mut names = Names { schema, numbers: HashMap::new(), order: Vec::new() };
    let mut out = Vec::new();
    for c in commands {
        let mut info = json!({
            "name": c.name,
            "meta-type": "command",
            "arg-type": names.of(c.args),
            "ret-type": names.of(c.returns),
        });
        unstable(&mut info, &c.name);
        out.push(info);
    }
    for e in events {
        out.push(json!({"name": e.name, "meta-type": "event", "arg-type": names.of(e.data)}));
    }
    // Describing a type names further ones: the list grows while it is walked.
    let mut at = 0;
    while let Some(ty) = names.order.get(at).copied() {
        at += 1;
        let mut info = describe(schema, ty, &mut names);
        if let Some(map) = info.as_object_mut() {
            map.insert("name".to_owned(), Value::String(names.of(ty)));
        }
        out.push(info);
    }
    Value::Array(out)
}

/// QEMU's mark for what may change without notice.
fn unstable(info: &mut Value, name: &str) {
    if name.starts_with("x-")
        && let Some(map) = info.as_object_mut()
    {
        map.insert("features".to_owned(), json!(["unstable"]));
    }
}

fn describe(schema: &Schema, ty: TypeRef, names: &mut Names<'_>) -> Value {
    match &schema.get(ty).shape {
        Shape::String => json!({"meta-type": "builtin", "json-type": "string"}),
        Shape::Int(_) => json!({"meta-type": "builtin", "json-type": "int"}),
        Shape::Number => json!({"meta-type": "builtin", "json-type": "number"}),
        Shape::Bool => json!({"meta-type": "builtin", "json-type": "boolean"}),
        Shape::Null => json!({"meta-type": "builtin", "json-type": "null"}),
        Shape::Any | Shape::Undefined => json!({"meta-type": "builtin", "json-type": "value"}),
        Shape::Enum(values) => {
            let members: Vec<Value> = values.iter().map(|v| json!({"name": v.name})).collect();
            let words: Vec<&str> = values.iter().map(|v| v.name.as_str()).collect();
            json!({"meta-type": "enum", "members": members, "values": words})
        }
        Shape::Array(element) => json!({"meta-type": "array", "element-type": names.of(*element)}),
        Shape::Alternate(members) => {
            let members: Vec<Value> = members.iter().map(|m| json!({"type": names.of(*m)})).collect();
            json!({"meta-type": "alternate", "members": members})
        }
        Shape::Object(object) => {
            let mut members = Vec::new();
            for m in &object.members {
                let mut info = json!({"name": m.name, "type": names.of(m.ty)});
                if m.optional
                    && let Some(map) = info.as_object_mut()
                {
                    // The key says "optional"; its value is null by QEMU's rules.
                    map.insert("default".to_owned(), Value::Null);
                }
                unstable(&mut info, &m.name);
                members.push(info);
            }
            let mut info = json!({"meta-type": "object", "members": members});
            if let (Some(union), Some(map)) = (&object.union, info.as_object_mut()) {
                let variants: Vec<Value> = union
                    .variants
                    .iter()
                    .map(|(case, ty, _)| json!({"case": case, "type": names.of(*ty)}))
                    .collect();
                map.insert("tag".to_owned(), json!(union.tag));
                map.insert("variants".to_owned(), Value::Array(variants));
            }
            info
        }
    }
}

struct Names<'a> {
    schema: &'a Schema,
    numbers: HashMap<String, usize>,
    order: Vec<TypeRef>,
}

impl Names<'_> {
    /// The name on the wire; the first use puts the type on the list.
    fn of(&mut self, ty: TypeRef) -> String {
        let (key, name) = match &self.schema.get(ty).shape {
            Shape::String => ("str".to_owned(), Some("str".to_owned())),
            Shape::Int(_) => ("int".to_owned(), Some("int".to_owned())),
            Shape::Number => ("number".to_owned(), Some("number".to_owned())),
            Shape::Bool => ("bool".to_owned(), Some("bool".to_owned())),
            Shape::Null => ("null".to_owned(), Some("null".to_owned())),
            Shape::Any | Shape::Undefined => ("any".to_owned(), Some("any".to_owned())),
            Shape::Array(element) => {
                let name = format!("[{}]", self.of(*element));
                (name.clone(), Some(name))
            }
            _ => (format!("#{}", ty.0), None),
        };
        let next = self.order.len();
        let number = *self.numbers.entry(key).or_insert(next);
        if number == next {
            self.order.push(ty);
        }
        name.unwrap_or_else(|| number.to_string())
    }
}
