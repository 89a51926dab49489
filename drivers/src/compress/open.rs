//! Opening a compress node: a child that can do it.
//!
//! Called by the graph on the main thread.

use graph::options::parse_options;
use graph::{BlockError, OpenContext, Opened, Result, Roles};
use serde_json::Value;

use super::Compress;
use super::options::CompressOptions;
use crate::filter::{FILE, Shown};

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: CompressOptions = parse_options(value)?;
    cx.open_child("file", Roles::FILTER, options.file).await?;
    let node = cx.child(FILE)?;
    let child = Shown::new(&node);
    // Unlike in QEMU also asked of what lies below filters, where a write would fail otherwise.
    if !child.compresses() || child.cluster_size().is_none() {
        return Err(BlockError::unsupported(format!(
            "Compression is not supported for underlying format: {}",
            node.driver_name()
        )));
    }
    Ok(Opened::new(Compress { child }))
}
