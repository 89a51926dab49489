//! Which operations are tried on the iothread itself before the ring is asked.
//!
//! * A file in tmpfs or ramfs: always, and blocking, since it only moves memory. The kernel has no non-blocking reads there,
//!   so that io_uring would hand each one to a worker thread.
//! * Another buffered file: reads, with `RWF_NOWAIT`, while turns start few operations. A read from the page cache costs
//!   less in the ring than as a system call of its own, but the ring's `enter` must be shared: `examples/bare.rs` measures
//!   0.94 µs for `preadv2`, 0.77 µs for one of 32 in the ring, 1.26 µs for a single one. From [`RING_FROM`] operations a turn
//!   on the ring is cheaper. After [`STREAK`] misses in a row the next reads are not tried (16, then 32, up to 4096 of them as misses go on), so that
//!   a file that is not cached pays next to nothing; one hit forgets all that.
//! * Direct I/O: never.

use crate::file::{File, Inline};
use crate::reactor::{Attempt, Op};

/// Misses in a row after which trying pauses.
pub(crate) const STREAK: u32 = 4;
/// Operations in the turn before, from which on reads go to the ring.
pub(crate) const RING_FROM: u32 = 3;
/// Length of the first pause, in operations.
pub(crate) const FIRST_PAUSE: u32 = 16;
/// Doublings of the pause.
const DOUBLINGS: u32 = 8;

/// What a thread knows about a file.
#[derive(Default)]
pub(crate) struct FileState {
    /// The file knows about this thread.
    pub(crate) known: bool,
    misses: u32,
    pause: u32,
}

impl FileState {
    /// Whether and how to try an operation.
    #[inline]
    pub(crate) fn plan(&mut self, f: &File, op: &Op, turn_ops: u32) -> Option<Attempt> {
        match f.inline() {
            Inline::Always => Some(Attempt::Memory),
            Inline::Try if matches!(op, Op::Readv { .. }) => {
                if turn_ops >= RING_FROM {
                    return None;
                }
                if self.pause > 0 {
                    self.pause -= 1;
                    return None;
                }
                Some(Attempt::NoWait)
            }
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn hit(&mut self) {
        self.misses = 0;
    }

    #[cold]
    pub(crate) fn miss(&mut self) {
        self.misses = self.misses.saturating_add(1);
        if self.misses >= STREAK {
            self.pause = FIRST_PAUSE << (self.misses - STREAK).min(DOUBLINGS);
        }
    }
}
