//! Checking the image of a node, and repairing one that was opened for that alone.
//!
//! Called through the driver while the node is drained. An image in use is checked as it is on disk after everything in
//! memory was written and what was set aside was given back, so that nothing counts as a leak that is none.

use graph::options::Purpose;
use graph::{BlockError, CheckFix, CheckReport, Errno, NodeIo, Result};

use crate::qcow2::check::{self, NodeStorage};
use crate::qcow2::node::{FILE, Qcow2};

impl Qcow2 {
    /// Checks, and repairs what `fix` allows.
    ///
    /// # Errors
    /// What the disk says, an image that cannot be checked; `EBUSY` for the repair of an image in use.
    pub(crate) async fn check_image(&self, io: &NodeIo, fix: CheckFix) -> Result<CheckReport> {
        if io.node()?.options().purpose == Purpose::Use {
            if fix != CheckFix::NONE {
                return Err(BlockError::new(Errno::EBUSY, "An image in use cannot be repaired"));
            }
            if self.commits.writes() {
                self.commits.settle(self, io).await?;
            }
        } else if fix != CheckFix::NONE {
            // What the node knows of the image is not true any more: its close must not write it.
            self.commits.leave();
        }
        let storage = NodeStorage::new(io.child(FILE));
        check::run(&storage, fix, check::Limits::default()).await.map_err(BlockError::from)
    }
}
