//! One command line option with members, to a struct: keyval or JSON, checked by the same schema as a command.
//!
//! Called by the command line for options that are not commands (`--monitor`, `--nbd-server`, ...); those that are
//! (`--blockdev`, `--export`, `--object`) go through [`crate::command::CommandTable::call_option`]. Must not know any option.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::QmpError;
use crate::keyval::{self, Dialect, Parsed};
use crate::schema::{Schema, SchemaBuilder, Syntax, TypeRef};

/// Parses an option's text into `T`.
///
/// # Errors
/// A sentence in QEMU's words, to be put behind the option's name.
pub fn parse<T: DeserializeOwned + JsonSchema>(text: &str, dialect: &Dialect<'_>) -> Result<T, QmpError> {
    let mut builder = SchemaBuilder::new();
    let ty = builder.object_from::<T>();
    let value = parse_as(builder.schema(), ty, text, dialect)?;
    from_checked(value)
}

/// Parses an option's text into a checked value of a type.
///
/// # Errors
/// As [`parse`].
pub fn parse_as(schema: &Schema, ty: TypeRef, text: &str, dialect: &Dialect<'_>) -> Result<Value, QmpError> {
    match keyval::parse(text, dialect)? {
        Parsed::Json(value) => schema.check(ty, value, Syntax::Json),
        Parsed::Keyval(value) => schema.check(ty, value, Syntax::Keyval),
        Parsed::Help => Err(QmpError::generic("Help is not available for this option")),
    }
}

/// A value that passed [`Schema::check`] to its struct. What serde still refuses is a rule the schema cannot express.
pub(crate) fn from_checked<T: DeserializeOwned>(value: Value) -> Result<T, QmpError> {
    serde_json::from_value(value).map_err(|e| QmpError::generic(format!("Invalid parameters: {e}")))
}
