//! Opening a copy-on-read node: its child, and the chain down to `bottom`, which stays as it is from then on.
//!
//! Called by the graph on the main thread.

use graph::options::parse_options;
use graph::{BlockError, DriverKind, Errno, OpenContext, Opened, Result, Roles};
use serde_json::Value;

use super::CopyOnRead;
use super::options::CopyOnReadOptions;
use crate::filter::{FILE, Shown};

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: CopyOnReadOptions = parse_options(value)?;
    cx.open_child("file", Roles::FILTER, options.file).await?;
    if let Some(bottom) = &options.bottom {
        let node = cx.freeze_chain(bottom).map_err(|e| match e.errno() {
            Errno::ENOENT => BlockError::new(Errno::ENOENT, format!("Bottom node '{bottom}' not found")),
            _ => e,
        })?;
        if node.kind() == DriverKind::Filter {
            return Err(BlockError::invalid(format!("Bottom node '{bottom}' is a filter")));
        }
    }
    Ok(Opened::new(CopyOnRead { child: Shown::new(&*cx.child(FILE)?), bottom: options.bottom }))
}
