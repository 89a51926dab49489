//! The one table of QMP errors: classes, and the fixed words QEMU's clients know.
//!
//! Every command, parser and session builds its errors here. It must not know what failed: modules that have errors of
//! their own convert them at the edge.

use std::fmt;

use serde_json::{Value, json};

/// Class of an error, for programs (QEMU qapi/error.json, `QapiErrorClass`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Nothing a program could act on beyond the text.
    GenericError,
    /// The command does not exist, or not in this phase of the session.
    CommandNotFound,
    /// The named device does not exist.
    DeviceNotFound,
    /// The named device or job is not in a state that allows the command.
    DeviceNotActive,
    /// Kept for completeness of the enumeration: a block backend has no KVM.
    KVMMissingCap,
}

impl ErrorClass {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::KVMMissingCap => "KVMMissingCap",
        }
    }
}

/// What a command fails with: a class for programs and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// Class.
    pub class: ErrorClass,
    /// One sentence without a final full stop; never a secret, since clients log it.
    pub desc: String,
}

impl QmpError {
    /// An error of any class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        QmpError { class, desc: desc.into() }
    }

    /// `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        QmpError::new(ErrorClass::GenericError, desc)
    }

    /// `CommandNotFound` for a name that is not registered.
    pub fn command_not_found(name: &str) -> Self {
        QmpError::new(ErrorClass::CommandNotFound, format!("The command {name} has not been found"))
    }

    /// `CommandNotFound` for anything sent before `qmp_capabilities`.
    pub fn expecting_negotiation() -> Self {
        QmpError::new(
            ErrorClass::CommandNotFound,
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        )
    }

    /// `CommandNotFound` for a second `qmp_capabilities`.
    pub fn negotiation_complete() -> Self {
        QmpError::new(
            ErrorClass::CommandNotFound,
            "Capabilities negotiation is already complete, command ignored",
        )
    }

    /// `DeviceNotFound` in QEMU's words for a name that is neither a device nor a node.
    pub fn device_not_found(name: &str) -> Self {
        QmpError::new(ErrorClass::DeviceNotFound, format!("Device '{name}' not found"))
    }

    /// `DeviceNotActive` in QEMU's words.
    pub fn device_not_active(name: &str) -> Self {
        QmpError::new(ErrorClass::DeviceNotActive, format!("No active block job on device '{name}'"))
    }

    /// A required parameter was not given.
    pub fn missing(path: &str) -> Self {
        QmpError::generic(format!("Parameter '{path}' is missing"))
    }

    /// A parameter that does not exist was given.
    pub fn unexpected(path: &str) -> Self {
        QmpError::generic(format!("Parameter '{path}' is unexpected"))
    }

    /// A parameter of the wrong JSON type; `expected` is QEMU's word: string, integer, boolean, number, array, object,
    /// null or the name of an alternate.
    pub fn invalid_type(path: &str, expected: &str) -> Self {
        QmpError::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
    }

    /// A parameter whose type is right and whose value is not; `expected` continues "expects".
    pub fn expects(path: &str, expected: &str) -> Self {
        QmpError::generic(format!("Parameter '{path}' expects {expected}"))
    }

    /// A value outside an enumeration.
    pub fn not_accepted(path: &str, value: &str) -> Self {
        QmpError::generic(format!("Parameter '{path}' does not accept value '{value}'"))
    }

    /// The `error` member of a response.
    pub fn to_value(&self) -> Value {
        json!({"class": self.class.as_str(), "desc": self.desc})
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}

impl From<std::io::Error> for QmpError {
    fn from(e: std::io::Error) -> Self {
        QmpError::generic(e.to_string())
    }
}
