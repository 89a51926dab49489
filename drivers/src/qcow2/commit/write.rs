//! Writes of metadata: several at a time, neighbours as one.
//!
//! Used by commits, and by the allocator for what it makes durable itself.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use graph::{NodeIo, Result, WriteFlags};
use host::IoVecs;

/// Alignment of buffers for metadata; enough for direct I/O on every device.
pub(crate) const META_ALIGN: usize = 4096;
/// Writes under way at a time.
const WINDOW: usize = 32;
/// Longest write, bytes.
const LONGEST: usize = 1 << 20;

/// A piece of metadata and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MetaWrite {
    /// Bytes from the start of the image file.
    pub(crate) offset: u64,
    /// What to write.
    pub(crate) data: Vec<u8>,
}

/// Writes everything, in no order. All writes have ended when this does.
///
/// # Errors
/// The first error; anything may have been written then.
pub(crate) async fn write_all(file: &NodeIo, mut writes: Vec<MetaWrite>) -> Result<()> {
    writes.sort_by_key(|w| w.offset);
    let mut merged: Vec<MetaWrite> = Vec::new();
    for write in writes {
        match merged.last_mut() {
            Some(last)
                if last.offset + last.data.len() as u64 == write.offset
                    && last.data.len() + write.data.len() <= LONGEST =>
            {
                last.data.extend_from_slice(&write.data);
            }
            _ => merged.push(write),
        }
    }
    let one = |w: MetaWrite| async move {
        let buffer = IoVecs::alloc(w.data.len(), META_ALIGN)?;
        buffer.copy_from(0, &w.data);
        file.write(w.offset, &buffer, WriteFlags::empty()).await
    };
    let mut rest = merged.into_iter();
    let mut running: Vec<Pin<Box<dyn Future<Output = Result<()>> + '_>>> = Vec::new();
    let mut result = Ok(());
    loop {
        // After a failure nothing new begins; what runs is waited for.
        while running.len() < WINDOW && result.is_ok() {
            let Some(next) = rest.next() else { break };
            running.push(Box::pin(one(next)));
        }
        if running.is_empty() {
            return result;
        }
        let ended: Vec<Result<()>> = poll_fn(|cx| {
            let mut ended = Vec::new();
            running.retain_mut(|f| match f.as_mut().poll(cx) {
                Poll::Ready(r) => {
                    ended.push(r);
                    false
                }
                Poll::Pending => true,
            });
            if ended.is_empty() { Poll::Pending } else { Poll::Ready(ended) }
        })
        .await;
        for r in ended {
            if result.is_ok() {
                result = r;
            }
        }
    }
}

/// Both results, when both have ended.
pub(super) async fn both<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> (A, B) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut ra, mut rb) = (None, None);
    poll_fn(|cx| {
        if ra.is_none()
            && let Poll::Ready(r) = a.as_mut().poll(cx)
        {
            ra = Some(r);
        }
        if rb.is_none()
            && let Poll::Ready(r) = b.as_mut().poll(cx)
        {
            rb = Some(r);
        }
        match (ra.take(), rb.take()) {
            (Some(x), Some(y)) => Poll::Ready((x, y)),
            (x, y) => {
                (ra, rb) = (x, y);
                Poll::Pending
            }
        }
    })
    .await
}
