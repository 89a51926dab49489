//! The one table from the graph's errors to QMP's classes. Used by every command; must not add words of its own.

use graph::{BlockError, ErrorKind};
use qmp::QmpError;

/// A failed graph operation as its client is told.
pub fn block(e: BlockError) -> QmpError {
    let text = e.to_string();
    match e.kind() {
        ErrorKind::DeviceNotFound => QmpError::new(qmp::ErrorClass::DeviceNotFound, text),
        ErrorKind::DeviceNotActive => QmpError::new(qmp::ErrorClass::DeviceNotActive, text),
        _ => QmpError::generic(text),
    }
}
