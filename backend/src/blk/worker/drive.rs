//! Requests that cannot be one raw operation, run as futures: flushes, zeroes, discards, and whatever a node must see, wait
//! for or repeat.
//!
//! Part of `worker`, which takes and completes the requests. May allocate; must not block.

use graph::{Path, WriteFlags, ZeroFlags};
use ring::Part;

use super::QueueWorker;
use crate::blk::device::IoErrorReport;
use crate::blk::request::{self, Kind, Range, Status};

/// A request that is being driven. Should a driver panic, it fails the request: without an answer the driver of the
/// guest would wait, and so would whoever stops the queue.
struct Unanswered<'a> {
    worker: &'a QueueWorker,
    slot: u32,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        // Also dropped when the thread ends with requests under way; then nobody is there to be answered.
        if std::thread::panicking()
            && let Ok(mut inner) = self.worker.inner.try_borrow_mut()
        {
            self.worker.complete_in(&mut inner, self.slot, Status::IoErr, 0);
        }
    }
}

impl QueueWorker {
    /// Runs the request as a future.
    #[cold]
    pub(super) fn drive(&self, slot: u32) {
        let Some(me) = self.me.upgrade() else { return };
        self.local.spawn(async move {
            let guard = Unanswered { worker: &me, slot };
            let (status, filled) = me.driven(slot).await;
            std::mem::forget(guard);
            let mut inner = me.inner.borrow_mut();
            me.complete_in(&mut inner, slot, status, filled);
        });
    }

    async fn driven(&self, slot: u32) -> (Status, u64) {
        let (kind, io, fua) = {
            let mut inner = self.inner.borrow_mut();
            let fua = !self.device.config().write_cache(inner.features);
            let io = inner.io.clone();
            let Some((_, data)) = inner.slots.get_mut(slot) else { return (Status::IoErr, 0) };
            // The nodes account for what they are asked from here on.
            data.path = Path::default();
            (data.kind, io, fua)
        };
        let bufs = |part| self.inner.borrow().slots.io_vecs(slot, part);
        let (result, read, filled) = match kind {
            Some(Kind::Read { offset, len }) => match bufs(Part::Writable) {
                Some(b) => (io.read(offset, &b).await, true, len),
                None => return (Status::IoErr, 0),
            },
            Some(Kind::Write { offset, .. }) => match bufs(Part::Readable) {
                Some(b) => {
                    let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                    (io.write(offset, &b, flags).await, false, 0)
                }
                None => return (Status::IoErr, 0),
            },
            Some(Kind::Flush) => (io.flush().await, false, 0),
            Some(kind @ (Kind::Discard | Kind::WriteZeroes)) => {
                let ranges = match self.ranges(slot, kind) {
                    Ok(r) => r,
                    Err(status) => return (status, 0),
                };
                let mut result = Ok(());
                for r in ranges.into_iter().filter(|r| r.len > 0) {
                    result = match kind {
                        Kind::Discard => io.discard(r.offset, r.len).await,
                        _ => {
                            let mut flags = ZeroFlags::empty();
                            flags.set(ZeroFlags::MAY_UNMAP, r.unmap);
                            flags.set(ZeroFlags::FUA, fua);
                            io.write_zeroes(r.offset, r.len, flags).await
                        }
                    };
                    if result.is_err() {
                        break;
                    }
                }
                if result.is_ok() && fua && kind == Kind::Discard {
                    result = io.flush().await;
                }
                (result, false, 0)
            }
            Some(Kind::GetId) | None => return (Status::IoErr, 0),
        };
        match result {
            Ok(()) => (Status::Ok, filled),
            Err(e) => {
                self.device.report(self.local.now(), || IoErrorReport {
                    read,
                    nospace: e.errno() == graph::Errno::ENOSPC,
                    reason: e.to_string(),
                });
                (if e.errno() == graph::Errno::ENOTSUP { Status::Unsupported } else { Status::IoErr }, 0)
            }
        }
    }

    /// Copies the ranges of a discard or write-zeroes request, once, and checks all before any is acted on.
    fn ranges(&self, slot: u32, kind: Kind) -> Result<Vec<Range>, Status> {
        let inner = self.inner.borrow();
        let (Some(s), Some(memory)) = (inner.slots.get(slot), inner.slots.epoch_of(slot)) else {
            return Err(Status::IoErr);
        };
        let count = request::range_count(s.chain().readable_len())?;
        let mut bytes = vec![0u8; count * request::RANGE_LEN];
        s.chain().read_at(memory, 0, &mut bytes).map_err(|_| Status::IoErr)?;
        let (list, _) = bytes.as_chunks::<{ request::RANGE_LEN }>();
        list.iter().map(|r| request::parse_range(*r, kind, self.device.config())).collect()
    }
}
