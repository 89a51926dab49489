//! Other options for a null node in use.
//!
//! Called by the graph, drained. The size is the one thing a user relies on, so it stays.

use graph::options::parse_options;
use graph::{Reopen, ReopenContext, Replacement, Result, cannot_change};
use serde_json::Value;

use super::Null;

/// Prepares.
pub(super) async fn reopen(cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
    let name = cx.driver_name();
    let before = Null::new(name, &parse_options(Value::Object(cx.own_before().clone()))?)?;
    let after = Null::new(name, &parse_options(own)?)?;
    if after.size != before.size {
        return Err(cannot_change("size"));
    }
    Ok(Replacement::of(after))
}
