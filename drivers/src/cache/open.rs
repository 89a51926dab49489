//! Opening a cache node: its children and its memory.
//!
//! Called by the graph on the main thread. Memory is taken as blocks come, not before.

use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};

use graph::options::parse_options;
use graph::{OpenContext, Opened, Result, Roles};
use serde_json::Value;

use super::layout::{Layout, SHARDS};
use super::options::{CacheOptions, Settings};
use super::table::{Filter, Shard};
use super::{Cache, CacheNode, Counters, FILE, SWAP};

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: CacheOptions = parse_options(value)?;
    let settings = Settings::new(options.mode, options.reads, options.size, options.block_size)?;
    let index = cx.open_child("file", Roles::FILTER, options.file).await?;
    debug_assert_eq!(index, FILE);
    let (mut swap, mut swap_size) = (None, 0);
    if let Some(reference) = options.swap {
        let index = cx.open_child("swap", Roles::DATA, reference).await?;
        debug_assert_eq!(index, SWAP);
        let node = cx.child(SWAP)?;
        swap = Some(node.name().to_owned());
        swap_size = node.size();
    }
    let layout = Layout::new(&settings, swap_size)?;
    let file = cx.child(FILE)?;
    let cache = Cache {
        block: settings.block,
        swap,
        swap_size,
        settings: Mutex::new(settings),
        back: AtomicBool::new(false),
        bypass: AtomicBool::new(false),
        off: AtomicBool::new(false),
        writable: AtomicBool::new(!cx.options().read_only),
        planned: Mutex::new(None),
        shards: (0..SHARDS).map(|_| Shard::new()).collect(),
        shard_mask: AtomicUsize::new(0),
        slots: super::room::Slots::default(),
        filter: Filter::new(),
        unsaved: AtomicUsize::new(0),
        resident: AtomicUsize::new(0),
        file_size: file.size().into(),
        file_id: Mutex::new(Some(file.id())),
        counters: Counters::default(),
    };
    cache.configure(settings, layout);
    Ok(Opened::new(CacheNode { cache: Arc::new(cache) }))
}
