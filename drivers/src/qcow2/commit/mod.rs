//! The order in which an image's changes reach the disk, so that it is consistent at every point of a crash.
//!
//! Called by flushes, by whoever closes or resizes an image, and by requests that find much of the cache dirty. Memory is
//! the truth; a commit copies what is dirty and writes it in stages, two barriers for any number of writers:
//!
//! | stage | what |
//! |---|---|
//! | 0 | what was freed so far is noted; then dirty L2 and L1 entries are copied; then dirty refcounts (in this order: a copied entry has its count copied, a noted cluster is gone from the copies) |
//! | 1 | refcounts are written (increments, and decrements an earlier commit released); the dirty bit instead, with lazy refcounts |
//! | 2 | barrier: image file and data file, guest data included |
//! | 3 | L2 and L1 entries are written |
//! | 4 | barrier: image file; flushes are acknowledged |
//! | 5 | what was freed goes on to wait for requests that may still see it (`alloc/quarantine.rs`) |
//!
//! New L2 tables and refcount blocks were written whole before anything in memory named them, so the first barrier covers
//! them. With nothing dirty a flush is one barrier. A commit runs inside the request of the flush that leads it; others
//! join the one that comes next. Must not know how tables are cached nor where space comes from.

mod group;
mod header;
mod health;
#[cfg(test)]
mod tests;
mod write;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use graph::{BlockError, NodeIo, Result};

use super::alloc::{Kind, Kinds, Space};
use super::format::INCOMPAT_DIRTY;
use super::node::{FILE, Qcow2};
use super::table::Tables;

pub(crate) use header::HeaderIo;
pub(crate) use health::Health;
pub(crate) use write::{META_ALIGN, MetaWrite, write_all};

use group::Group;

/// The commits of one image.
pub(crate) struct Commits {
    group: Group,
    health: Arc<Health>,
    header: Arc<HeaderIo>,
    /// Opened for writing.
    writable: bool,
    /// The image was changed behind our back, by a repair: nothing in memory is true any more.
    left: AtomicBool,
}

/// What a commit works on.
#[derive(Clone, Copy)]
struct Parts<'a> {
    tables: &'a Tables,
    space: &'a Space,
    file: &'a NodeIo,
    data: Option<&'a NodeIo>,
}

impl Commits {
    /// For an image that was opened; `writable`: for writing.
    pub(crate) fn new(health: Arc<Health>, header: Arc<HeaderIo>, writable: bool) -> Commits {
        Commits { group: Group::default(), health, header, writable, left: AtomicBool::new(false) }
    }

    /// The health of the image.
    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Whether this node writes the image at all.
    pub(crate) fn writes(&self) -> bool {
        self.writable && !self.left.load(Relaxed)
    }

    /// From now on nothing is written any more, whatever is in memory: somebody else has changed the image. Drained.
    pub(crate) fn leave(&self) {
        self.left.store(true, Relaxed);
    }

    /// Whether the image takes writes: no inconsistency was found, no barrier failed. Cheap.
    #[inline]
    pub(crate) fn is_fine(&self) -> bool {
        self.health.is_fine()
    }

    /// `EIO` with the reason once [`Commits::is_fine`] is false.
    ///
    /// # Errors
    /// See above.
    pub(crate) fn check(&self) -> Result<()> {
        self.health.check()
    }

    /// Whether a flush has nothing to do but to make completed data writes durable in the file (and the data file).
    pub(crate) fn is_clean(&self, node: &Qcow2) -> bool {
        // In this order: a commit says that it runs before it takes the dirt away.
        !node.tables.has_dirty() && !node.space.has_pending() && !self.group.is_running() && self.is_fine()
    }

    /// Makes everything that was completed before durable: data and the metadata that leads to it.
    ///
    /// # Errors
    /// What the disk says. After a failed barrier this and all later calls fail (`EIO`): what the kernel dropped does not
    /// come back. After a failed write of metadata the next call tries again.
    pub(crate) async fn flush(&self, node: &Qcow2, io: &NodeIo) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        let file = io.child(FILE);
        let data = node.data_file.map(|index| io.child(index));
        let parts = Parts { tables: &node.tables, space: &node.space, file: &file, data: data.as_ref() };
        self.flush_parts(parts).await
    }

    async fn flush_parts(&self, parts: Parts<'_>) -> Result<()> {
        let result = self.group.join(|| self.run(parts)).await;
        if !self.health.is_fine() {
            self.mark(parts.file).await;
        }
        result
    }

    /// One commit; never two at a time.
    async fn run(&self, parts: Parts<'_>) -> Result<()> {
        self.health.check()?;
        let Parts { tables, space, file, data } = parts;
        if let Err(e) = space.release(file).await {
            self.health.check()?;
            // Space that comes back later; nothing of what is to be flushed.
            log::warn!("freed clusters of an image could not be counted down: {e}");
        }
        let freed = space.take_pending();
        let dirty = tables.collect();
        let clean = dirty.writes.is_empty() && freed.is_empty();
        let result = async {
            for w in &dirty.writes {
                // An L2 table that is written belongs to the active side alone, whatever snapshots had before.
                let own = if w.l1 { &[Kind::ActiveL1][..] } else { &[Kind::ActiveL2, Kind::InactiveL2] };
                space.guard(w.offset, w.data.len() as u64, Kinds::of(own))?;
            }
            if space.lazy() {
                // With the bit set, nothing on disk has to agree with the refcounts there.
                if !clean && !self.header.has_incompatible(INCOMPAT_DIRTY) {
                    self.header.set_incompatible(file, INCOMPAT_DIRTY, true).await?;
                }
            } else if !clean || space.wants_writing() {
                space.write_counts(file, None).await?;
            }
            self.health.barrier(file, data).await?;
            if clean {
                return Ok(());
            }
            dirty.tell(file);
            let writes = dirty.writes.iter();
            let writes = writes.map(|w| MetaWrite { offset: w.offset, data: w.data.clone() }).collect();
            write_all(file, writes).await?;
            self.health.barrier(file, None).await
        }
        .await;
        tables.finish(dirty, result.is_ok());
        match result {
            Ok(()) => space.unlinked(freed),
            Err(_) => space.restore(freed),
        }
        result
    }

    /// An inconsistency was found while running: tells, marks the image, takes no more writes. Returns the error to answer with.
    pub(crate) async fn corrupt(
        &self,
        _node: &Qcow2,
        io: &NodeIo,
        message: String,
        offset: Option<u64>,
        size: Option<u64>,
    ) -> BlockError {
        self.health.damaged(&message, offset, size);
        self.mark(&io.child(FILE)).await;
        BlockError::new(graph::Errno::EIO, message)
    }

    /// Writes the corrupt bit if an inconsistency was found and it is not there yet.
    pub(crate) async fn mark(&self, file: &NodeIo) {
        if !self.writes() || !self.health.take_unmarked() {
            return;
        }
        if let Err(e) = self.header.mark_corrupt(file).await {
            log::warn!("an image that was found damaged could not be marked: {e}");
        }
    }

    /// Before the node goes: everything on disk, nothing set aside, refcounts right, the dirty bit off, the file as short as it
    /// may be. No request is in flight.
    ///
    /// # Errors
    /// What the disk says; what is left then are leaks, or the dirty bit.
    pub(crate) async fn close(&self, node: &Qcow2, io: &NodeIo) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        let file = io.child(FILE);
        let data = node.data_file.map(|index| io.child(index));
        let parts = Parts { tables: &node.tables, space: &node.space, file: &file, data: data.as_ref() };
        self.close_parts(parts).await
    }

    async fn close_parts(&self, parts: Parts<'_>) -> Result<()> {
        self.settle_parts(parts).await?;
        parts.space.finish(parts.file).await
    }

    /// As [`Commits::close`], but the image goes on being used, and the file is not cut: for operations that need
    /// refcounts on disk as they are in memory. Drained.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn settle(&self, node: &Qcow2, io: &NodeIo) -> Result<()> {
        let file = io.child(FILE);
        let data = node.data_file.map(|index| io.child(index));
        let parts = Parts { tables: &node.tables, space: &node.space, file: &file, data: data.as_ref() };
        self.settle_parts(parts).await
    }

    async fn settle_parts(&self, parts: Parts<'_>) -> Result<()> {
        self.flush_parts(parts).await?;
        let Parts { space, file, data, .. } = parts;
        space.settle(file).await?;
        if !space.wants_writing() && !self.header.has_incompatible(INCOMPAT_DIRTY) {
            return Ok(());
        }
        space.write_counts(file, None).await?;
        self.health.barrier(file, data).await?;
        if self.header.has_incompatible(INCOMPAT_DIRTY) {
            self.header.set_incompatible(file, INCOMPAT_DIRTY, false).await?;
            self.health.barrier(file, None).await?;
        }
        Ok(())
    }

    /// Durable before anything else: image file and data file.
    ///
    /// # Errors
    /// The barrier failed; the image takes no more writes.
    pub(crate) async fn barrier(&self, node: &Qcow2, io: &NodeIo) -> Result<()> {
        let data = node.data_file.map(|index| io.child(index));
        self.health.barrier(&io.child(FILE), data.as_ref()).await
    }
}
