//! Which operations are tried on the iothread itself before the ring is asked.
//!
//! * A file in tmpfs or ramfs: always, and blocking, since it only moves memory. The kernel has no non-blocking reads there,
//!   so that io_uring would hand each one to a worker thread.
//! * Another buffered file: reads, with `RWF_NOWAIT`. In the page cache that costs less than an entry in the ring. After
//!   [`STREAK`] misses in a row the next reads are not tried (16, then 32, up to 4096 of them as misses go on), so that
//!   a file that is not cached pays next to nothing; one hit forgets all that.
//! * Direct I/O: never.

use crate::file::{File, Inline};
use crate::reactor::{Attempt, Op};

/// Misses in a row after which trying pauses.
pub(crate) const STREAK: u32 = 4;
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
    pub(crate) fn plan(&mut self, f: &File, op: &Op) -> Option<Attempt> {
        match f.inline() {
            Inline::Always => Some(Attempt::Memory),
            Inline::Try if matches!(op, Op::Readv { .. }) => {
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
