//! Another window, or another child, for a raw node in use.
//!
//! Called by the graph, drained. Checks the window against the child as it will be.

use std::sync::Arc;

use graph::options::parse_options;
use graph::{BlockError, Driver, Errno, Reopen, ReopenContext, Result, Roles};
use serde_json::Value;

use super::options::RawOptions;
use super::{FILE, Raw, Window};

/// The node with its new window.
struct Moved {
    raw: Arc<Raw>,
    roles: Roles,
}

impl Reopen for Moved {
    fn replacement(&self) -> Option<Arc<dyn Driver>> {
        let raw: Arc<dyn Driver> = self.raw.clone();
        Some(raw)
    }

    fn roles(&self) -> Vec<(usize, Roles)> {
        // With an offset or a size the child is not the same thing any more.
        vec![(FILE, self.roles)]
    }

    fn commit(self: Box<Self>) {}
}

/// Prepares.
pub(super) async fn reopen(cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
    let mut own = own;
    if let Some(own) = own.as_object_mut() {
        // The graph sees to the child; the name does not matter here.
        own.insert("file".into(), Value::String(String::new()));
    }
    let options: RawOptions = parse_options(own)?;
    let window = Window::new(&options)?;
    let child = cx.child(FILE).ok_or_else(|| BlockError::errno_only(Errno::ENODEV))?;
    let file_size = child.size();
    window.check(file_size)?;
    let roles = window.roles();
    Ok(Box::new(Moved { raw: Arc::new(Raw { window, file_size: file_size.into() }), roles }))
}
