//! The name of the backing file in the image.
//!
//! Called by the graph and by jobs, drained. Changes what the image says, not what is open.

use graph::{BlockError, NodeIo, Result};

use crate::qcow2::format::{MAX_BACKING_FORMAT, MAX_BACKING_NAME};
use crate::qcow2::node::{FILE, Qcow2};

impl Qcow2 {
    /// Writes another name and format into the header; a reader sees the old or the new ones at every point of a crash.
    ///
    /// # Errors
    /// A name or format that cannot be stored, a format without a name, a data file that is to stand alone; what the disk says.
    pub(super) async fn rename_backing(
        &self,
        io: &NodeIo,
        name: Option<String>,
        format: Option<String>,
    ) -> Result<()> {
        self.commits.check()?;
        let name = name.filter(|n| !n.is_empty()).map(String::into_bytes);
        let format = format.filter(|f| !f.is_empty()).map(String::into_bytes);
        if format.is_some() && name.is_none() {
            return Err(BlockError::invalid("Backing format cannot be used without backing file"));
        }
        if name.is_some() && self.settings.data_file_raw {
            return Err(BlockError::invalid(
                "Backing file and data-file-raw cannot be used at the same time",
            ));
        }
        if name.as_ref().is_some_and(|n| n.len() > MAX_BACKING_NAME as usize) {
            return Err(BlockError::invalid("Backing file name too long"));
        }
        if format.as_ref().is_some_and(|f| f.len() > MAX_BACKING_FORMAT as usize) {
            return Err(BlockError::invalid("Backing format name too long"));
        }
        let change = |header: &mut crate::qcow2::format::Header| {
            header.backing_file = name;
            header.backing_format = format;
        };
        self.header.rewrite(&io.child(FILE), change).await
    }
}
