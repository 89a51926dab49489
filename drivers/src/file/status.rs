//! What is known about ranges of a file: where it has holes.
//!
//! Called by the graph for jobs and queries, never on the hot path. Asks the kernel each time: a cache would have to know of
//! every write, those of other processes included.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use graph::{BlockError, BlockStatus, Location, NodeIo, Result, StatusFlags};
use host::{File, FileKind};

use super::FileNode;

/// Content of the first part of a range: (whether it is data, length).
type Extent = (bool, u64);

impl FileNode {
    /// What is known about the first part of a range inside the node.
    pub(super) async fn status(&self, io: &NodeIo, offset: u64, len: u64) -> Result<BlockStatus> {
        let file = Arc::clone(self.current());
        let (data, len) = match file.kind() {
            FileKind::Regular => {
                let align = u64::from(file.alignment().offset.max(1));
                io.local()
                    .blocking(move || extent(&file, offset, len, align))
                    .await
                    .map_err(|e| BlockError::io("Could not look for holes", e))?
            }
            // Devices know allocation, and yet have no call to ask for it.
            FileKind::BlockDevice | FileKind::CharDevice => (true, len),
        };
        let content = if data { StatusFlags::DATA } else { StatusFlags::ZERO };
        let mut flags = content | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        flags.set(StatusFlags::EOF, offset + len >= self.size.load(Acquire));
        Ok(BlockStatus { flags, len, location: Some(Location::File { offset }) })
    }
}

/// The extent at `offset`, cut to `len` and to whole units of `align`; a unit with any data counts as data. Blocks.
fn extent(file: &File, offset: u64, len: u64, align: u64) -> io::Result<Extent> {
    let end = offset + len;
    let data = file.seek_data(offset)?.unwrap_or(end).clamp(offset, end);
    // The unit the data begins in.
    let data = if data == end { end } else { data - data % align };
    if data > offset {
        return Ok((false, data - offset));
    }
    // The file may have changed between the two calls; in doubt it is data.
    let hole = file.seek_hole(offset)?.unwrap_or(end).next_multiple_of(align).clamp(offset, end);
    Ok((true, if hole > offset { hole - offset } else { align.min(len) }))
}
