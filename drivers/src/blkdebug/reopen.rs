//! Reopening a blkdebug node: the child may be another one and common options may change, its own options may not.
//!
//! Called by the graph, drained. Rules and state stay as they are.

use graph::options::parse_options;
use graph::{BlockError, Errno, Reopen, ReopenContext, Result, refuse_changes};
use serde_json::Value;

use super::options::BlkdebugOptions;
use super::{IMAGE, open};

/// Options of its own.
const FIXED: [&str; 11] = [
    "config",
    "align",
    "max-transfer",
    "opt-write-zero",
    "max-write-zero",
    "opt-discard",
    "max-discard",
    "inject-error",
    "set-state",
    "take-child-perms",
    "unshare-child-perms",
];

/// Prepares.
pub(super) fn reopen(cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
    let mut own = own;
    if let Some(own) = own.as_object_mut() {
        refuse_changes(cx.own_before(), own, &FIXED)?;
        // The graph sees to the child; the name does not matter here.
        own.insert("image".into(), Value::String(String::new()));
    }
    let options: BlkdebugOptions = parse_options(own)?;
    let child = cx.child(IMAGE).ok_or_else(|| BlockError::errno_only(Errno::ENODEV))?;
    // The limits stay; another child may have another alignment.
    open::limits(&options, child.driver().limits().request_alignment)?;
    Ok(Box::new(()))
}
