//! Opening a blkverify node: its two children.
//!
//! Called by the graph on the main thread.

use std::sync::Arc;

use graph::options::parse_options;
use graph::{OpenContext, Opened, Result, Roles};
use host::sync::Ranges;
use serde_json::Value;

use super::options::BlkverifyOptions;
use super::{Blkverify, BlkverifyNode, RAW, TEST};
use crate::child_size::ChildSize;

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: BlkverifyOptions = parse_options(value)?;
    let raw = cx.open_child("raw", Roles::FILTER, options.raw).await?;
    let test = cx.open_child("test", Roles::DATA, options.test).await?;
    debug_assert_eq!((raw, test), (RAW, TEST));
    Ok(Opened::new(BlkverifyNode(Arc::new(Blkverify {
        name: cx.node_name().to_owned(),
        size: ChildSize::new(cx.child(TEST)?.size()),
        read_only: cx.options().read_only,
        ranges: Ranges::new(),
    }))))
}
