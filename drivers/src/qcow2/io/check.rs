//! Checking the image of a node, and repairing it.
//!
//! Called through the driver while the node is drained; `check/online/` is the check that goes on while requests do. An image
//! in use is checked as it is on disk after everything in memory was written and what was set aside was given back, so
//! that nothing counts as a leak that is none. After a repair memory is read anew.

use graph::options::Purpose;
use graph::{BlockError, CheckFix, CheckReport, Errno, NodeIo, Result};

use crate::qcow2::check::{self, NodeStorage};
use crate::qcow2::node::{FILE, Qcow2};

impl Qcow2 {
    /// Checks, and repairs what `fix` allows.
    ///
    /// # Errors
    /// What the disk says, an image that cannot be checked. For the repair of an image in use: `EACCES` on a read-only node,
    /// `EBUSY` while somebody reads a snapshot of it or after damage was found by a request, since what memory
    /// had is lost then.
    pub(crate) async fn check_image(&self, io: &NodeIo, fix: CheckFix) -> Result<CheckReport> {
        let file = io.child(FILE);
        let in_use = io.node()?.options().purpose == Purpose::Use;
        let repairs = fix != CheckFix::NONE;
        if in_use && repairs {
            if self.settings.read_only {
                return Err(BlockError::new(Errno::EACCES, "A read-only image cannot be repaired"));
            }
            if file.node()?.pins().any() {
                let text = "A snapshot of the image is being read; it cannot be repaired meanwhile";
                return Err(BlockError::new(Errno::EBUSY, text));
            }
            self.commits.check().map_err(|e| {
                BlockError::new(
                    Errno::EBUSY,
                    format!("The image takes no more writes: {e}. Close it, and repair it then"),
                )
            })?;
            self.tables.watch().upheaval();
        }
        if in_use && self.commits.writes() && self.commits.is_fine() {
            self.commits.settle(self, io).await?;
        } else if repairs {
            // What the node knows of the image is not true any more: its close must not write it.
            self.commits.leave();
        }
        let storage = NodeStorage::new(file);
        let report = check::run(&storage, fix, check::Limits::default()).await;
        if in_use && repairs {
            self.read_again(io).await?;
        }
        report.map_err(BlockError::from)
    }
}
