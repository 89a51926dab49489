//! `transaction`: actions of several families at one point in time. What they do is the graph's.

use graph::{
    AbortAction, Action, BitmapAddAction, BitmapClearAction, BitmapMergeAction, BitmapRecordAction,
    BitmapRef, BitmapRemoveAction, InternalSnapshotAction, SnapshotAction,
};
use qmp::{Commands, QmpError};
use schemars::JsonSchema;
use serde::Deserialize;

use super::State;
use super::bitmap::{BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge};
use super::snapshot::BlockdevSnapshotInternal;
use super::surgery::{BlockdevSnapshot, BlockdevSnapshotSync};
use crate::daemon::errors::block;

/// Nothing.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Abort {}

/// An action of a transaction.
#[derive(Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum TransactionAction {
    /// Fails, for tests of whoever relies on "all or none".
    Abort(Abort),
    /// As the command of this name.
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
    /// As the command of this name.
    BlockDirtyBitmapRemove(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapClear(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapEnable(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapDisable(BlockDirtyBitmap),
    /// As the command of this name.
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
    /// As the command of this name.
    BlockdevSnapshot(BlockdevSnapshot),
    /// As the command of this name.
    BlockdevSnapshotSync(BlockdevSnapshotSync),
    /// As the command of this name.
    BlockdevSnapshotInternalSync(BlockdevSnapshotInternal),
}

/// What happens to jobs of one transaction when one of them fails.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum ActionCompletionMode {
    /// Nothing: each ends by itself.
    #[default]
    Individual,
    /// All fail.
    Grouped,
}

/// Properties of a transaction.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct TransactionProperties {
    /// What happens to jobs of one transaction when one of them fails. Default: individual.
    completion_mode: Option<ActionCompletionMode>,
}

/// `transaction`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Transaction {
    /// What is done, all or nothing.
    actions: Vec<TransactionAction>,
    /// How jobs among the actions end.
    properties: Option<TransactionProperties>,
}

impl TransactionAction {
    fn name(&self) -> &'static str {
        match self {
            TransactionAction::Abort(_) => "abort",
            TransactionAction::BlockDirtyBitmapAdd(_) => "block-dirty-bitmap-add",
            TransactionAction::BlockDirtyBitmapRemove(_) => "block-dirty-bitmap-remove",
            TransactionAction::BlockDirtyBitmapClear(_) => "block-dirty-bitmap-clear",
            TransactionAction::BlockDirtyBitmapEnable(_) => "block-dirty-bitmap-enable",
            TransactionAction::BlockDirtyBitmapDisable(_) => "block-dirty-bitmap-disable",
            TransactionAction::BlockDirtyBitmapMerge(_) => "block-dirty-bitmap-merge",
            TransactionAction::BlockdevSnapshot(_) => "blockdev-snapshot",
            TransactionAction::BlockdevSnapshotSync(_) => "blockdev-snapshot-sync",
            TransactionAction::BlockdevSnapshotInternalSync(_) => "blockdev-snapshot-internal-sync",
        }
    }

    fn action(self, daemon: &State) -> Result<Box<dyn Action>, QmpError> {
        Ok(match self {
            TransactionAction::Abort(_) => Box::new(AbortAction),
            TransactionAction::BlockDirtyBitmapAdd(a) => {
                let (node, new) = a.split();
                Box::new(BitmapAddAction::new(node, new))
            }
            TransactionAction::BlockDirtyBitmapRemove(a) => Box::new(BitmapRemoveAction::new(a.node, a.name)),
            TransactionAction::BlockDirtyBitmapClear(a) => Box::new(BitmapClearAction::new(a.node, a.name)),
            TransactionAction::BlockDirtyBitmapEnable(a) => {
                Box::new(BitmapRecordAction::new(a.node, a.name, true))
            }
            TransactionAction::BlockDirtyBitmapDisable(a) => {
                Box::new(BitmapRecordAction::new(a.node, a.name, false))
            }
            TransactionAction::BlockDirtyBitmapMerge(a) => {
                let sources = a.bitmaps.into_iter().map(BitmapRef::from).collect();
                Box::new(BitmapMergeAction::new(a.node, a.target, sources))
            }
            TransactionAction::BlockdevSnapshot(a) => Box::new(SnapshotAction::new(a.node, a.overlay)),
            TransactionAction::BlockdevSnapshotSync(a) => Box::new(a.action(daemon)?),
            TransactionAction::BlockdevSnapshotInternalSync(a) => {
                let (device, new) = a.split();
                Box::new(InternalSnapshotAction::new(device, new))
            }
        })
    }
}

pub fn register(commands: &mut Commands<State>) {
    commands.register(
        "transaction",
        "Carries out several actions at one point in time for all the disks they are about: all, or, if one is refused, none. \
         Requests of these disks wait meanwhile; others do not.",
        |daemon: State, a: Transaction| async move {
            let grouped = a.properties.unwrap_or_default().completion_mode == Some(ActionCompletionMode::Grouped);
            if let Some(action) = a.actions.first().filter(|_| grouped) {
                // There are no jobs among them.
                return Err(QmpError::generic(format!(
                    "Action '{}' does not support transaction property completion-mode = grouped",
                    action.name()
                )));
            }
            let actions: Result<Vec<_>, _> = a.actions.into_iter().map(|x| x.action(&daemon)).collect();
            let actions = actions?;
            daemon.ready_graph()?;
            daemon.graph.transaction(actions).await.map_err(block)
        },
    );
}
