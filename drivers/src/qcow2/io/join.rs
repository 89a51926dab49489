//! Several futures of one request at the same time.
//!
//! Used by driven requests that fall into pieces. The first error is the answer; the others run to their end all the same,
//! since what they have in flight must not be left behind.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use graph::Result;

/// Most pieces of one request under way at a time, as QEMU has it.
pub(crate) const MAX_PIECES: usize = 8;

/// A piece of work.
pub(crate) type Piece<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// Pieces under way.
#[derive(Default)]
pub(crate) struct Pieces<'a> {
    running: Vec<Piece<'a>>,
    failed: Option<graph::BlockError>,
}

impl<'a> Pieces<'a> {
    /// Whether a piece has failed: no use in starting more.
    pub(crate) fn failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Whether nothing is under way and nothing has failed: what comes last may then run alone, and its result is the
    /// request's.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.failed.is_none()
    }

    /// Runs `work` with the pieces going on beside it: it may have to wait for one of them.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            self.poll(cx);
            // A piece may have ended what the work waits for; its waker was called then.
            Poll::Pending
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        let Pieces { running, failed } = self;
        running.retain_mut(|piece| match piece.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(result) => {
                if let Err(e) = result {
                    failed.get_or_insert(e);
                }
                false
            }
        });
    }

    /// Starts a piece, after another one has ended if there are too many.
    pub(crate) async fn add(&mut self, piece: Piece<'a>) {
        while self.running.len() >= MAX_PIECES {
            self.turn(MAX_PIECES - 1).await;
        }
        self.running.push(piece);
    }

    /// Runs until at most `most` are left.
    async fn turn(&mut self, most: usize) {
        poll_fn(|cx| {
            self.poll(cx);
            if self.running.len() <= most { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Waits for all of them.
    ///
    /// # Errors
    /// The first one's.
    pub(crate) async fn finish(mut self) -> Result<()> {
        self.turn(0).await;
        self.failed.map_or(Ok(()), Err)
    }
}
