//! The plan of a copy: which range comes next, and what is known about it.
//!
//! One for all lanes, behind an asynchronous lock that is held while the status of the next run is looked up (by whichever
//! task needs it). Runs that need nothing are passed over here and never reach a task.

use graph::{BlockStatus, Errno, NodeIo, Result, StatusFlags};
use host::sync::Mutex;

use super::lane::Shared;

/// Longest range of zeroes in one request, bytes: a target that has to write them does so in steps that can be cancelled.
const MAX_ZERO: u64 = 64 << 20;

/// What has to be done about a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read and write it.
    Data,
    /// It reads as zeroes.
    Zero,
    /// The target's backing file has it.
    Below,
}

/// A range for one task.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) kind: Kind,
    /// Its turn, see `order`.
    pub(super) seq: u64,
}

/// One source in the row of all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[derive(Debug)]
struct Cursor {
    at: u64,
    /// The run around `at` that was looked up last.
    kind: Kind,
    run_end: u64,
    seq: u64,
}

/// See the module's words.
pub(super) struct Plan {
    parts: Vec<Part>,
    total: u64,
    cursor: Mutex<Cursor>,
}

impl Plan {
    /// For sources of these sizes.
    pub(super) fn new(sizes: &[u64]) -> Result<Plan> {
        let mut parts = Vec::with_capacity(sizes.len());
        let mut total = 0u64;
        for len in sizes {
            parts.push(Part { start: total, len: *len });
            total = total.checked_add(*len).filter(|t| i64::try_from(*t).is_ok()).ok_or(Errno::EFBIG)?;
        }
        let cursor = Cursor { at: 0, kind: Kind::Data, run_end: 0, seq: 0 };
        Ok(Plan { parts, total, cursor: Mutex::new(cursor) })
    }

    /// Bytes of all sources together.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The source at `offset`: its index, the offset in it, and how far it reaches from there.
    pub(super) fn locate(&self, offset: u64) -> Option<(usize, u64, u64)> {
        let index = self.parts.partition_point(|p| p.start + p.len <= offset);
        let part = self.parts.get(index)?;
        Some((index, offset - part.start, part.start + part.len - offset))
    }

    /// The next range that needs work; `None` at the end.
    pub(super) async fn next(&self, shared: &Shared, sources: &[NodeIo]) -> Result<Option<Range>> {
        let mut cursor = self.cursor.lock().await;
        loop {
            if cursor.at >= self.total {
                return Ok(None);
            }
            if cursor.at >= cursor.run_end {
                let (kind, len) = self.look_up(shared, sources, cursor.at).await?;
                cursor.kind = kind;
                cursor.run_end = cursor.at + len;
            }
            let left = cursor.run_end - cursor.at;
            let needless = match cursor.kind {
                Kind::Data => false,
                Kind::Zero => shared.skips_zeroes(),
                Kind::Below => true,
            };
            if needless {
                cursor.at = cursor.run_end;
                shared.skipped(left);
                continue;
            }
            let len = match cursor.kind {
                Kind::Zero if shared.options.min_sparse > 0 => left.min(MAX_ZERO),
                // Ends at multiples of the buffer: requests stay aligned after an odd run.
                _ => left.min(shared.options.buffer - cursor.at % shared.options.buffer),
            };
            let range = Range { offset: cursor.at, len, kind: cursor.kind, seq: cursor.seq };
            cursor.at += len;
            cursor.seq += 1;
            return Ok(Some(range));
        }
    }

    /// What is known about the run at `at`, and its length.
    async fn look_up(&self, shared: &Shared, sources: &[NodeIo], at: u64) -> Result<(Kind, u64)> {
        let first = self.status(shared, sources, at).await?;
        if !shared.options.compressed {
            return Ok(first);
        }
        // Clusters are written as a whole: one that is not all the same is data.
        let cluster = shared.options.buffer;
        let (kind, len) = first;
        let whole = if at + len >= self.total { len } else { len - (at + len) % cluster.min(at + len) };
        let cluster_len = cluster.min(self.total - at);
        if len >= cluster_len && whole >= cluster_len {
            return Ok((kind, whole));
        }
        Ok((Kind::Data, cluster_len))
    }

    async fn status(&self, shared: &Shared, sources: &[NodeIo], at: u64) -> Result<(Kind, u64)> {
        let Some((index, offset, left)) = self.locate(at) else { return Err(Errno::EIO.into()) };
        let io = sources.get(index).ok_or(Errno::EIO)?;
        let top_only = shared.options.target_backing.is_some();
        let status = match content(io, offset, left, top_only).await {
            Ok(status) => status,
            // What cannot be told apart is read, sector by sector if need be.
            Err(_) if shared.options.salvage => {
                return Ok((Kind::Data, left.min(shared.options.buffer)));
            }
            Err(e) => return Err(e.context(format!("error while reading block status at offset {at}"))),
        };
        let mut len = status.len.min(left);
        let kind = if status.flags.contains(StatusFlags::ZERO) {
            Kind::Zero
        } else if status.flags.contains(StatusFlags::DATA) || !top_only {
            Kind::Data
        } else {
            Kind::Below
        };
        // Behind the end of a shorter backing file the target reads as zeroes by itself.
        if kind == Kind::Zero
            && let Some(backing) = shared.options.target_backing
        {
            if at >= backing {
                return Ok((Kind::Below, len));
            }
            len = len.min(backing - at);
        }
        Ok((kind, len))
    }
}

/// What a source has at a range: with everything below it, or only in its own layer.
async fn content(io: &NodeIo, offset: u64, len: u64, top_only: bool) -> Result<BlockStatus> {
    if top_only {
        return io.block_status(offset, len).await;
    }
    Ok(io.status_above(None, offset, len).await?.status)
}
