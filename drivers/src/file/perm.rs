//! Permissions of a file: lock bytes, and the descriptor for writing.
//!
//! Called by the graph on the main thread, as prepare, commit and abort of one change. What is opened here stays open (see
//! `mod.rs`), so that there is nothing to close on abort.

use std::sync::Arc;

use graph::{BlockError, Errno, Perm, Result};
use host::File;

use super::FileNode;
use super::open::{could_not, open_file};

impl FileNode {
    /// Prepares for users with `perm` and `shared`: locks first, so that a conflict leaves nothing opened.
    pub(super) fn prepare_perm(&self, perm: Perm, shared: Perm) -> Result<()> {
        self.locks.prepare(perm, shared, &self.filename)?;
        if perm.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE)
            && let Err(e) = self.open_writer()
        {
            self.locks.abort();
            return Err(e);
        }
        Ok(())
    }

    /// Sees to it that there is a writable descriptor.
    pub(super) fn open_writer(&self) -> Result<()> {
        if self.first.writable() || self.writer.get().is_some() {
            return Ok(());
        }
        let Some(how) = &self.reopen else {
            return Err(BlockError::new(Errno::EPERM, format!("'{}' was opened read-only", self.filename)));
        };
        let file = open_file(self.wanted, &self.filename, how)?;
        let same = |a: &File, b: &File| Ok(a.identity()? == b.identity()?);
        match same(&self.first, &file) {
            Ok(true) => {}
            // The locks are on the file that was opened first: writing to another one would be unprotected.
            Ok(false) => {
                return Err(BlockError::new(
                    Errno::ENOENT,
                    format!("'{}' is another file by now; delete the node and add it again", self.filename),
                ));
            }
            Err(e) => return Err(could_not("look at", &self.filename, e)),
        }
        // Only the main thread sets it.
        let _ = self.writer.set(file);
        Ok(())
    }

    /// The descriptor for reads: the writable one as soon as there is one, so that an iothread keeps one file registered.
    #[inline]
    pub(super) fn current(&self) -> &Arc<File> {
        self.writer.get().unwrap_or(&self.first)
    }

    /// The descriptor for writes.
    #[inline]
    pub(super) fn writable(&self) -> Result<&Arc<File>> {
        let file = self.current();
        if file.writable() { Ok(file) } else { Err(Errno::EPERM.into()) }
    }
}
