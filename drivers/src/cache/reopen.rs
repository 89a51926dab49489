//! Other options for a cache that is in use: `blockdev-reopen`.
//!
//! Called by the graph on the main thread, drained. Preparing writes everything back, so that nothing can fail later.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use graph::options::parse_options;
use graph::{BlockError, Reopen, ReopenContext, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::layout::Layout;
use super::options::{CacheMode, CacheReads, Settings};
use super::table::lock;
use super::{Cache, FILE};

/// The options without the child that the graph sees to.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Given {
    mode: Option<CacheMode>,
    reads: Option<CacheReads>,
    size: Option<i64>,
    block_size: Option<i64>,
    /// By name: what is defined in place would be another node.
    swap: Option<Value>,
}

/// A prepared change.
struct Prepared {
    cache: Arc<Cache>,
    settings: Settings,
    layout: Layout,
    writable: bool,
}

/// Gets ready to run with other options.
pub(super) async fn prepare(cache: &Arc<Cache>, cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
    let given: Given = parse_options(own)?;
    let cannot = |name: &str| BlockError::invalid(format!("Cannot change the option '{name}'"));
    if given.swap.as_ref().and_then(Value::as_str) != cache.swap.as_deref() {
        return Err(cannot("swap"));
    }
    let settings = Settings::new(given.mode, given.reads, given.size, given.block_size)?;
    if settings.block != cache.block {
        return Err(cannot("block-size"));
    }
    let layout = Layout::new(&settings, cache.swap_size)?;
    if !cache.nothing_unsaved() {
        let work = Arc::clone(cache);
        cx.on_io(move |io| async move {
            work.write_back_all(&io).await?;
            io.child(FILE).flush().await
        })
        .await?;
    }
    let writable = !cx.after().read_only;
    *lock(&cache.planned) = Some((settings, writable));
    Ok(Box::new(Prepared { cache: Arc::clone(cache), settings, layout, writable }))
}

impl Reopen for Prepared {
    fn commit(self: Box<Self>) {
        let cache = &*self.cache;
        cache.writable.store(self.writable, Relaxed);
        let before = *lock(&cache.settings);
        if before.size != self.settings.size {
            // Nothing is dirty, and no request is in flight.
            cache.forget(0, true);
            cache.configure(self.settings, self.layout);
        } else {
            cache.reconfigure(self.settings);
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        *lock(&self.cache.planned) = None;
    }
}
