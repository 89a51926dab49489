//! Exports: adding, removing, and the query about them.

use qmp::Commands;
use qmp::event::{BlockExportDeleted, BlockIoError};
use schemars::JsonSchema;
use serde::Deserialize;

use super::State;
use crate::export::BlockExportInfo;
use crate::export::options::{ExportOptions, RemoveMode};

/// `block-export-del`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockExportDel {
    /// The export.
    id: String,
    /// What to do when it is in use. Default: safe.
    mode: Option<RemoveMode>,
}

pub fn register(commands: &mut Commands<State>) {
    commands.register(
        "block-export-add",
        "Makes a node available to a front end.",
        |daemon: State, options: ExportOptions| async move { daemon.export_add(options).await },
    );
    commands.register(
        "block-export-del",
        "Asks an export to end; BLOCK_EXPORT_DELETED tells when it has, and its id is free then.",
        |daemon: State, a: BlockExportDel| async move {
            daemon.export_del(&a.id, a.mode.unwrap_or_default()).await
        },
    );
    commands
        .register_query("query-block-exports", "Tells of all exports.", |daemon: State| async move {
            let mut exports: Vec<BlockExportInfo> =
                daemon.exports.borrow().values().map(|e| e.info()).collect();
            exports.sort_by(|a, b| a.id.cmp(&b.id));
            Ok(exports)
        })
        .concurrent();
    commands.event::<BlockExportDeleted>();
    commands.event::<BlockIoError>();
}
