//! Assembles a schema: from structs ([`SchemaBuilder::object_from`]), from schemas that come as values from a registry
//! ([`SchemaBuilder::from_schema`]), and by hand for what exists at run time only ([`SchemaBuilder::union`]).
//!
//! # What a struct may use
//!
//! `#[derive(Deserialize, JsonSchema)]`, `#[serde(rename_all = "kebab-case", deny_unknown_fields)]`, doc comments (they
//! become the reference), and:
//!
//! | Rust | QAPI |
//! |---|---|
//! | `Option<T>`, `#[serde(default)]` | optional member; `null` is refused unless `T` itself is an alternate with null |
//! | `String`, integers, `f64`, `bool`, `Vec<T>` | `str`, `int` with the type's range, `number`, `bool`, array |
//! | `u64` with `#[schemars(extend("format" = "size"))]` | `int`; on the command line with suffixes |
//! | enum of unit variants | enum |
//! | `#[serde(tag = "type")]`, also with `content = "data"` | union |
//! | struct with `#[serde(flatten)]` on a tagged enum or a struct | union with base members |
//! | `#[serde(untagged)]` with variants of different JSON types | alternate |
//! | `serde_json::Value`, maps | any |
//!
//! Objects are closed whether or not serde is told so. A type named in a `$ref` without a definition is filled in by the
//! one who knows it: [`SchemaBuilder::union`] and its neighbours define by name and win over a body of the same name.
//! Enums in serde's default (externally tagged) form have no counterpart and end up in
//! [`Schema::problems`](super::Schema::problems).

use std::collections::HashMap;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::{EnumValue, IntType, Member, ObjectType, Schema, Shape, TypeDef, TypeRef, Union};

/// Types under construction.
#[derive(Clone, Debug, Default)]
pub struct SchemaBuilder {
    pub(super) schema: Schema,
    /// Types by name, the explicit ones and those somebody referred to.
    pub(super) names: HashMap<String, TypeRef>,
    /// Types that were converted, by everything that defines them.
    pub(super) converted: HashMap<String, TypeRef>,
    /// Names given by hand.
    pub(super) explicit: Vec<String>,
    /// Arrays by element, so that each exists once.
    arrays: HashMap<TypeRef, TypeRef>,
    /// Builtins by name.
    builtins: HashMap<&'static str, TypeRef>,
    /// The one text that is going to be checked, where it is known.
    text: Option<String>,
    /// Something was left out because the text does not mention it.
    narrowed: std::cell::Cell<bool>,
}

impl SchemaBuilder {
    /// An empty schema.
    pub fn new() -> Self {
        SchemaBuilder::default()
    }

    /// An empty schema for types that one text alone will be checked against: who makes a large union may leave out
    /// variants that [`SchemaBuilder::concerns`] denies. A text that does not fit is checked again with everything, so that
    /// the error names all there is.
    pub fn about(text: &str) -> Self {
        SchemaBuilder { text: Some(text.to_owned()), ..SchemaBuilder::default() }
    }

    /// Whether the variant of this name may be meant: conversions of what nobody asks for are most of a process's start.
    pub fn concerns(&self, name: &str) -> bool {
        let concerned = self.text.as_ref().is_none_or(|t| t.contains(name));
        if !concerned {
            self.narrowed.set(true);
        }
        concerned
    }

    /// Whether something was left out.
    pub fn is_narrowed(&self) -> bool {
        self.narrowed.get()
    }

    /// The type a serde struct parses.
    pub fn object_from<T: JsonSchema>(&mut self) -> TypeRef {
        let schema =
            SchemaSettings::draft2020_12().for_deserialize().into_generator().into_root_schema_for::<T>();
        self.convert(&T::schema_name(), schema.as_value())
    }

    /// The type a serde struct is written as; `()` and other nulls are the empty object, as QMP wants it.
    pub fn returns<T: JsonSchema>(&mut self) -> TypeRef {
        let schema =
            SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<T>();
        let ty = self.convert(&T::schema_name(), schema.as_value());
        match self.schema.get(ty).shape {
            Shape::Null => self.empty(),
            _ => ty,
        }
    }

    /// A type whose JSON schema comes as a value, e.g. a driver's options out of a registry.
    pub fn from_schema(&mut self, name: &str, schema: &schemars::Schema) -> TypeRef {
        self.convert(name, schema.as_value())
    }

    fn convert(&mut self, name: &str, schema: &Value) -> TypeRef {
        super::convert::root(self, name, schema)
    }

    /// The type of that name, defined already or later.
    pub fn named(&mut self, name: &str) -> TypeRef {
        if let Some(ty) = self.names.get(name) {
            return *ty;
        }
        let ty = self.push(name, "", Shape::Undefined);
        self.names.insert(name.to_owned(), ty);
        ty
    }

    /// Defines a type by name; whoever referred to the name gets this definition.
    pub fn define(&mut self, name: &str, doc: &str, shape: Shape) -> TypeRef {
        let ty = self.named(name);
        if let Some(def) = self.schema.types.get_mut(ty.0) {
            *def = TypeDef { name: name.to_owned(), doc: doc.to_owned(), shape };
        }
        self.explicit.push(name.to_owned());
        ty
    }

    /// Defines a tagged union: the members of `base`, among them the tag (added if it is not), and per value of the tag
    /// those of a variant (value, object type, what it is for).
    pub fn union(
        &mut self,
        name: &str,
        doc: &str,
        tag: &str,
        base: TypeRef,
        variants: Vec<(String, TypeRef, String)>,
    ) -> TypeRef {
        let values = variants
            .iter()
            .map(|(name, _, doc)| EnumValue { name: name.clone(), doc: doc.clone() })
            .collect();
        let tag_type = self.define(&format!("{name}-{tag}"), "", Shape::Enum(values));
        let mut members = match &self.schema.get(base).shape {
            Shape::Object(object) => object.members.clone(),
            _ => {
                let base = self.schema.get(base).name.clone();
                self.problem(format!("{name}: the base {base} is not an object"));
                Vec::new()
            }
        };
        match members.iter_mut().find(|m| m.name == tag) {
            Some(member) => member.ty = tag_type,
            None => members.insert(
                0,
                Member {
                    name: tag.to_owned(),
                    ty: tag_type,
                    optional: false,
                    default: None,
                    doc: String::new(),
                },
            ),
        }
        let union = Some(Union { tag: tag.to_owned(), variants });
        self.define(name, doc, Shape::Object(ObjectType { members, union }))
    }

    /// Defines an alternate: a value is one of these types, told apart by its JSON type.
    pub fn alternate(&mut self, name: &str, doc: &str, members: Vec<TypeRef>) -> TypeRef {
        self.define(name, doc, Shape::Alternate(members))
    }

    /// Defines an enumeration.
    pub fn enumeration(&mut self, name: &str, doc: &str, values: &[(&str, &str)]) -> TypeRef {
        let values =
            values.iter().map(|(n, d)| EnumValue { name: (*n).to_owned(), doc: (*d).to_owned() }).collect();
        self.define(name, doc, Shape::Enum(values))
    }

    /// An array of a type.
    pub fn array(&mut self, of: TypeRef) -> TypeRef {
        if let Some(ty) = self.arrays.get(&of) {
            return *ty;
        }
        let ty = self.push("", "", Shape::Array(of));
        self.arrays.insert(of, ty);
        ty
    }

    /// `str`
    pub fn string(&mut self) -> TypeRef {
        self.builtin("str", Shape::String)
    }

    /// `int` of 64 bits
    pub fn int(&mut self) -> TypeRef {
        let (min, max) = (Some(i64::MIN.into()), Some(i64::MAX.into()));
        self.builtin("int", Shape::Int(IntType { min, max, name: "integer".to_owned(), size: false }))
    }

    /// `number`
    pub fn number(&mut self) -> TypeRef {
        self.builtin("number", Shape::Number)
    }

    /// `bool`
    pub fn bool(&mut self) -> TypeRef {
        self.builtin("bool", Shape::Bool)
    }

    /// `null`
    pub fn null(&mut self) -> TypeRef {
        self.builtin("null", Shape::Null)
    }

    /// `any`
    pub fn any(&mut self) -> TypeRef {
        self.builtin("any", Shape::Any)
    }

    /// The object without members.
    pub fn empty(&mut self) -> TypeRef {
        self.builtin("", Shape::Object(ObjectType::default()))
    }

    fn builtin(&mut self, name: &'static str, shape: Shape) -> TypeRef {
        if let Some(ty) = self.builtins.get(name) {
            return *ty;
        }
        let ty = self.push(name, "", shape);
        self.builtins.insert(name, ty);
        ty
    }

    /// The types so far.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Closes the schema; names that nobody defined become problems.
    pub fn finish(mut self) -> Schema {
        let mut undefined: Vec<String> = self
            .schema
            .types
            .iter()
            .filter(|t| t.shape == Shape::Undefined)
            .map(|t| format!("type {} is referred to and not defined", t.name))
            .collect();
        undefined.sort();
        self.schema.problems.extend(undefined);
        self.schema
    }

    pub(super) fn push(&mut self, name: &str, doc: &str, shape: Shape) -> TypeRef {
        self.schema.types.push(TypeDef { name: name.to_owned(), doc: doc.to_owned(), shape });
        TypeRef(self.schema.types.len() - 1)
    }

    pub(super) fn problem(&mut self, what: String) {
        log::error!("schema: {what}");
        self.schema.problems.push(what);
    }
}
