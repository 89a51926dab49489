//! Filling caches before a guest asks: `block-cache-warm`.

use jobs::warm::{self, WarmOptions};
use qmp::{Commands, QmpError};
use schemars::JsonSchema;
use serde::Deserialize;

use super::State;
use crate::daemon::errors::block;

/// `block-cache-warm`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockCacheWarm {
    /// The job's id.
    job_id: String,
    /// The cache node, or one above it: it is read, and what it reads stays in the caches on the way.
    node_name: String,
    /// The dirty bitmap that marks what is worth having.
    bitmap: String,
    /// The node that has the bitmap. Default: `node-name`.
    bitmap_node: Option<String>,
    /// Bytes per second, 0 (the default) for no limit.
    #[schemars(extend("format" = "size"))]
    speed: Option<i64>,
}

pub fn register(commands: &mut Commands<State>) {
    commands.register(
        "block-cache-warm",
        "Reads what a dirty bitmap marks, as a job, so that caches hold it before a guest asks: a cache with `reads=bypass` \
         takes nothing in. The bitmap stays as it is. QEMU has no such command.",
        |daemon: State, a: BlockCacheWarm| async move {
            let speed = u64::try_from(a.speed.unwrap_or(0))
                .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
            daemon.ready_graph()?;
            let thread = daemon.own_iothread()?;
            let bitmap_node = a.bitmap_node.unwrap_or_else(|| a.node_name.clone());
            let options = WarmOptions { node: a.node_name, bitmap_node, bitmap: a.bitmap, speed };
            warm::start(&daemon.jobs, &daemon.graph, thread, &a.job_id, options).map_err(block)?;
            Ok(())
        },
    );
}
