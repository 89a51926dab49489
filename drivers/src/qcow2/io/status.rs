//! What is known about ranges of a qcow2 node.
//!
//! Called by the graph for jobs and queries. Runs of one kind are joined as far as they go within what was asked.

use graph::{BlockStatus, Location, NodeIo, Result, StatusFlags};

use crate::qcow2::node::Qcow2;
use crate::qcow2::table::Kind;

impl Qcow2 {
    /// What is known about the first part of a range inside the node.
    pub(super) async fn status(&self, io: &NodeIo, offset: u64, len: u64) -> Result<BlockStatus> {
        let mut status: Option<BlockStatus> = None;
        let mut done = 0;
        while done < len {
            let part = self.status_once(io, offset + done, len - done).await?;
            match &mut status {
                None => status = Some(part),
                Some(s) if joins(s, &part) => s.len += part.len,
                Some(_) => break,
            }
            done += part.len;
        }
        let status = status.unwrap_or(BlockStatus { flags: StatusFlags::empty(), len, location: None });
        Ok(status)
    }

    async fn status_once(&self, io: &NodeIo, at: u64, len: u64) -> Result<BlockStatus> {
        let run = self.tables.find(self, io, at, len).await?;
        let own = StatusFlags::ALLOCATED;
        let answer = |flags, len, location| Ok(BlockStatus { flags, len, location });
        match (run.kind, run.host) {
            (Kind::Normal, Some(host)) if self.crypt.is_none() => answer(
                StatusFlags::DATA | StatusFlags::OFFSET_VALID | own,
                run.len,
                Some(Location::Child { child: self.data, offset: host }),
            ),
            (Kind::Normal, _) => answer(StatusFlags::DATA | own, run.len, None),
            (Kind::Compressed, _) => answer(StatusFlags::DATA | StatusFlags::COMPRESSED | own, run.len, None),
            (Kind::Zero, _) => answer(StatusFlags::ZERO | own, run.len, None),
            (Kind::Unallocated, _) => match self.backing_size() {
                Some(size) if at < size => answer(StatusFlags::empty(), run.len.min(size - at), None),
                _ => answer(StatusFlags::ZERO, run.len, None),
            },
            (Kind::Invalid, _) => Err(self.invalid_entry(io, at, run.entry).await),
        }
    }
}

fn joins(a: &BlockStatus, b: &BlockStatus) -> bool {
    a.flags == b.flags
        && match (a.location, b.location) {
            (None, None) => true,
            (Some(Location::Child { offset, .. }), Some(Location::Child { offset: next, .. })) => {
                offset.checked_add(a.len) == Some(next)
            }
            _ => false,
        }
}
