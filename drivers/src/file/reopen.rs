//! Other options for a file in use: a node of the same file with descriptors of its own takes its place.
//!
//! Called by the graph on the main thread, drained. The lock bytes go over from descriptor to descriptor before permissions
//! are prepared, and back if these are refused; the old descriptors are closed with the last view that knows them.

use std::sync::Arc;

use graph::options::parse_options;
use graph::{BlockError, Driver, Errno, Reopen, ReopenContext, Result, refuse_changes};
use host::File;
use serde_json::Value;

use super::FileNode;
use super::lock::Locks;
use super::open::{could_not, open_blocking};

/// What cannot be another one while the file is the same.
const FIXED: [&str; 2] = ["filename", "locking"];

/// The node that takes over.
struct TakeOver {
    old: Arc<Locks<Arc<File>>>,
    new: Arc<FileNode>,
}

impl Reopen for TakeOver {
    fn replacement(&self) -> Option<Arc<dyn Driver>> {
        let new: Arc<dyn Driver> = self.new.clone();
        Some(new)
    }

    fn apply(&mut self) -> Result<()> {
        self.old.hand_over(&self.new.locks)
    }

    fn unapply(&mut self) {
        if let Err(e) = self.new.locks.hand_over(&self.old) {
            log::error!("lock bytes of '{}' could not be handed back: {e}", self.new.filename);
        }
    }

    fn commit(self: Box<Self>) {}
}

impl FileNode {
    pub(super) async fn reopen_with(&self, cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
        if let Some(own) = own.as_object() {
            refuse_changes(cx.own_before(), own, &FIXED)?;
        }
        let options = parse_options(own)?;
        let (wanted, after) = (self.wanted, cx.after());
        let mut new = host::pool::run(move || open_blocking(wanted, &options, &after)).await?;
        let failed = |e| could_not("look at", &self.filename, e);
        if new.first.identity().map_err(failed)? != self.first.identity().map_err(failed)? {
            return Err(BlockError::new(
                Errno::ENOENT,
                format!("'{}' is another file by now; delete the node and add it again", self.filename),
            ));
        }
        // Whoever writes now goes on writing without being asked again.
        if self.current().writable() && !after.read_only {
            new.open_writer()?;
        }
        new.counters = Arc::clone(&self.counters);
        Ok(Box::new(TakeOver { old: Arc::clone(&self.locks), new: Arc::new(new) }))
    }
}
