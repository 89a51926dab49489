//! Other common options for a LUKS node in use; its own stay.
//!
//! Called by the graph, drained. The key was derived when the node was opened, at the cost of seconds: it is not again.

use graph::options::parse_options;
use graph::{Reopen, ReopenContext, Result, refuse_changes};
use serde_json::Value;

use super::options::LuksOptions;

/// Prepares.
pub(super) async fn reopen(cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
    let mut own = own;
    if let Some(own) = own.as_object_mut() {
        refuse_changes(cx.own_before(), own, &["key-secret", "header"])?;
        // The graph sees to the child; the name does not matter here.
        own.insert("file".into(), Value::String(String::new()));
    }
    parse_options::<LuksOptions>(own)?;
    Ok(Box::new(()))
}
