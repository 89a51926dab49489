//! How large a file or device is, and changing that.
//!
//! Called when a node is opened, after writes past its end, and by the graph inside a drained section (`truncate`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use graph::{BlockError, Errno, NodeIo, Prealloc, Result, Truncate};
use host::{FallocMode, File, FileKind, IoVecs};

use super::{FileNode, SECTOR};

/// Piece in which new space is written, bytes.
const FILL: u64 = 1 << 20;

/// The two sizes of a file.
pub(super) struct Sizes {
    /// What a user of the node sees, whole sectors.
    pub(super) visible: u64,
    /// What is there.
    pub(super) length: u64,
}

impl Sizes {
    /// From the size of a file.
    pub(super) fn new(length: u64) -> io::Result<Sizes> {
        length
            .checked_next_multiple_of(SECTOR)
            .filter(|v| *v <= i64::MAX as u64)
            .map(|visible| Sizes { visible, length })
            .ok_or_else(|| io::Error::from_raw_os_error(Errno::EFBIG.raw()))
    }

    /// Asks the kernel; may block.
    pub(super) fn of(file: &File) -> io::Result<Sizes> {
        Sizes::new(file.len()?)
    }
}

impl FileNode {
    /// Sets the sizes, in a drained section.
    fn set_sizes(&self, sizes: &Sizes) {
        // No request is in flight that could see one of the two new and the other old.
        self.length.store(sizes.length, Release);
        self.size.store(sizes.visible, Release);
    }

    /// A write ended at `end`: the file reaches at least there.
    pub(super) fn note_end(&self, end: u64) {
        // The usual write changes nothing: don't take the cache line from the other iothreads for that.
        if end > self.length.load(Acquire) {
            let visible = end.next_multiple_of(SECTOR);
            self.size.fetch_max(visible, AcqRel);
            self.length.fetch_max(end, AcqRel);
        }
    }

    /// Changes the size.
    pub(super) async fn resize(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        let file = self.writable()?;
        let (result, sizes) = match file.kind() {
            FileKind::Regular => {
                let result = resize_file(io, file, size, how.prealloc).await;
                let again = Arc::clone(file);
                (result, io.local().blocking(move || Sizes::of(&again)).await)
            }
            FileKind::BlockDevice | FileKind::CharDevice => {
                let again = Arc::clone(file);
                let sizes = io.local().blocking(move || Sizes::of(&again)).await;
                (resize_device(sizes.as_ref().map_or(0, |s| s.length), size, how), sizes)
            }
        };
        // Also after a failure: what is true is true.
        match sizes {
            Ok(sizes) => self.set_sizes(&sizes),
            Err(e) if result.is_ok() => return Err(BlockError::io("Could not get the new size", e)),
            Err(_) => {}
        }
        result
    }
}

/// A device stays as it is; asking for its own size makes the node notice a size that was changed from outside.
fn resize_device(now: u64, size: u64, how: Truncate) -> Result<()> {
    if how.prealloc != Prealloc::Off {
        return Err(BlockError::unsupported(format!(
            "Preallocation mode '{}' unsupported for this non-regular file",
            name(how.prealloc)
        )));
    }
    if how.exact && size != now {
        return Err(BlockError::unsupported("Cannot resize device files"));
    }
    if size > now {
        return Err(BlockError::invalid("Cannot grow device files"));
    }
    Ok(())
}

fn name(prealloc: Prealloc) -> &'static str {
    match prealloc {
        Prealloc::Off => "off",
        Prealloc::Metadata => "metadata",
        Prealloc::Falloc => "falloc",
        Prealloc::Full => "full",
    }
}

/// Sets the length of a regular file. New space reads as zeroes in each mode.
async fn resize_file(io: &NodeIo, file: &Arc<File>, size: u64, prealloc: Prealloc) -> Result<()> {
    let asked = Arc::clone(file);
    let now = io
        .local()
        .blocking(move || asked.len())
        .await
        .map_err(|e| BlockError::io("Could not get the size", e))?;
    if prealloc == Prealloc::Metadata {
        return Err(BlockError::unsupported("Unsupported preallocation mode 'metadata'"));
    }
    if size < now && prealloc != Prealloc::Off {
        return Err(BlockError::unsupported("Preallocation can't be used for shrinking files"));
    }
    let result = match prealloc {
        Prealloc::Falloc if size > now => io
            .local()
            .fallocate(file, FallocMode::Allocate { keep_size: false }, now, size - now)
            .await
            .map_err(|e| BlockError::io("Could not preallocate data", e)),
        Prealloc::Full if size > now => fill(io, file, now, size).await,
        _ => return set_len(io, file, size).await,
    };
    if result.is_err() {
        // Half a growth is of no use to anyone; the space goes back.
        if let Err(e) = set_len(io, file, now).await {
            log::error!("'{}' keeps a part of what it could not grow by: {e}", file.path().display());
        }
    }
    result
}

async fn set_len(io: &NodeIo, file: &Arc<File>, size: u64) -> Result<()> {
    let file = Arc::clone(file);
    io.local()
        .blocking(move || file.set_len(size))
        .await
        .map_err(|e| BlockError::io("Failed to resize the file", e))
}

/// Writes zeroes from `from` to `to` and makes them durable, so that nothing can fail for space later.
async fn fill(io: &NodeIo, file: &Arc<File>, from: u64, to: u64) -> Result<()> {
    let failed = |e| BlockError::io("Could not write zeros for preallocation", e);
    let align = file.alignment();
    let step = u64::from(align.offset.max(1));
    // The block around the old end holds data, hence its tail is left to ftruncate. The last block may reach past `to`.
    let mut at = from.next_multiple_of(step);
    let end = to.next_multiple_of(step);
    let zeroes = IoVecs::alloc(FILL as usize, align.mem.max(1) as usize).map_err(failed)?;
    while at < end {
        let len = (end - at).min(FILL - FILL % step);
        io.local().write(file, &zeroes.slice(0, len as usize), at, false).await.map_err(failed)?;
        at += len;
    }
    set_len(io, file, to).await?;
    io.local().fdatasync(file).await.map_err(failed)
}
