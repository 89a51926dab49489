//! What commands, events and options look like: the one description that parsing, introspection and the reference page
//! are made from.
//!
//! [`SchemaBuilder`] turns the serde structs' JSON schemas (and unions that only exist at run time) into QAPI's type
//! system; [`Schema`] is the finished result. A value is checked against it *before* serde sees it ([`Schema::check`]), so
//! what introspection says is what the parser does. Must not know any command.
//!
//! What a struct may use: see [`builder`].

pub mod builder;
mod check;
mod convert;
pub(crate) mod introspect;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

pub use builder::SchemaBuilder;
pub use check::{MAX_DEPTH, Syntax};
pub use introspect::{CommandInfo, EventInfo};

/// A type of one schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeRef(pub(crate) usize);

/// An integer's range and how it is written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IntType {
    /// Smallest value.
    pub min: Option<i128>,
    /// Largest value.
    pub max: Option<i128>,
    /// The name used in errors: `uint16_t`, `a size`, ...
    pub name: String,
    /// On the command line a number of bytes with a suffix (`K`, `M`, `G`, `T`, `P`, `E`, powers of 1024).
    pub size: bool,
}

/// One value of an enumeration.
#[derive(Clone, Debug, PartialEq)]
pub struct EnumValue {
    /// The word on the wire.
    pub name: String,
    /// What it means.
    pub doc: String,
}

/// One member of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// The name on the wire.
    pub name: String,
    /// Its type.
    pub ty: TypeRef,
    /// Whether it may be left out.
    pub optional: bool,
    /// The value used when it is left out, if the struct says it.
    pub default: Option<serde_json::Value>,
    /// What it means.
    pub doc: String,
}

/// An object: fixed members, and more that depend on the value of one of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObjectType {
    /// Members that are always there, the tag of a union among them.
    pub members: Vec<Member>,
    /// The variable part.
    pub union: Option<Union>,
}

/// The variable part of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Union {
    /// The member that selects the variant.
    pub tag: String,
    /// Value of the tag, type of the further members (an object), and what it is for.
    pub variants: Vec<(String, TypeRef, String)>,
}

/// The shape of a type.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// Named somewhere, described nowhere (yet).
    Undefined,
    /// `str`
    String,
    /// `int`
    Int(IntType),
    /// `number`
    Number,
    /// `bool`
    Bool,
    /// `null`
    Null,
    /// `any`
    Any,
    /// `enum`
    Enum(Vec<EnumValue>),
    /// `array`
    Array(TypeRef),
    /// `object`
    Object(ObjectType),
    /// `alternate`: the members have different JSON types
    Alternate(Vec<TypeRef>),
}

/// A type.
#[derive(Clone, Debug, PartialEq)]
pub struct TypeDef {
    /// The name in errors and in the reference; introspection masks it.
    pub name: String,
    /// What it is.
    pub doc: String,
    /// Its shape.
    pub shape: Shape,
}

/// A finished set of types.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    pub(crate) types: Vec<TypeDef>,
    pub(crate) problems: Vec<String>,
}

impl Schema {
    /// The description of a type of this schema.
    pub fn get(&self, ty: TypeRef) -> &TypeDef {
        const MISSING: &TypeDef =
            &TypeDef { name: String::new(), doc: String::new(), shape: Shape::Undefined };
        self.types.get(ty.0).unwrap_or(MISSING)
    }

    /// What could not be expressed: constructs QAPI has no word for, names without a definition. Each accepts any value
    /// until it is mended; a test of the assembled process asserts that there are none.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}
