//! Reopening a blkdebug node: the child may be another one and common options may change, its own options may not.
//!
//! Called by the graph on the main thread.

use graph::{BlockError, Reopen, Result};
use serde_json::{Map, Value};

/// Whether the options are the ones the node was opened with.
///
/// # Errors
/// One that is not, in QEMU's words.
pub(super) fn prepare(before: &Value, after: &Value) -> Result<Box<dyn Reopen>> {
    let empty = Map::new();
    let members = |value: &'_ Value| value.as_object().cloned().unwrap_or_else(|| empty.clone());
    let (before, after) = (members(before), members(after));
    let changed = before.keys().chain(after.keys()).find(|name| before.get(*name) != after.get(*name));
    match changed {
        Some(name) => Err(BlockError::invalid(format!("Cannot change the option '{name}'"))),
        None => Ok(Box::new(())),
    }
}
