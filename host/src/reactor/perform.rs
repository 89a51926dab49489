//! Operations as blocking system calls: tried inline, done by the worker pool, done by the simulation.
//!
//! Results look like io_uring's: a count, or minus an errno.

use std::os::fd::RawFd;
use std::sync::Arc;

use libc::iovec;

use crate::file::File;

/// `BLKDISCARD` from linux/fs.h: `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// `BLKZEROOUT` from linux/fs.h: `_IO(0x12, 127)`.
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// One raw operation.
#[derive(Clone, Copy)]
pub(crate) enum Op {
    Readv {
        iov: *const iovec,
        n: u32,
        off: u64,
    },
    Writev {
        iov: *const iovec,
        n: u32,
        off: u64,
        dsync: bool,
    },
    /// fdatasync.
    Sync,
    Fallocate {
        mode: i32,
        off: u64,
        len: u64,
    },
    /// Block device ioctl; no ring operation.
    DeviceDiscard {
        off: u64,
        len: u64,
    },
    /// Block device ioctl; no ring operation.
    DeviceZero {
        off: u64,
        len: u64,
    },
}

fn result(r: isize) -> i32 {
    if r >= 0 {
        return i32::try_from(r).unwrap_or(i32::MAX);
    }
    -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Does the operation, blocking.
///
/// # Safety
/// `op`'s memory is valid for the duration of the call; `fd` is open.
pub(crate) unsafe fn perform(fd: RawFd, op: &Op, flags: i32) -> i32 {
    // Offsets are checked where they come in; io_uring takes them as u64 and the kernel refuses negative ones as EINVAL.
    let r = match *op {
        Op::Readv { iov, n, off } => {
            // SAFETY: the caller's contract.
            unsafe { libc::preadv2(fd, iov, n as libc::c_int, off as i64, flags) }
        }
        Op::Writev { iov, n, off, dsync } => {
            let flags = flags | if dsync { libc::RWF_DSYNC } else { 0 };
            // SAFETY: the caller's contract.
            unsafe { libc::pwritev2(fd, iov, n as libc::c_int, off as i64, flags) }
        }
        // SAFETY: no memory involved.
        Op::Sync => unsafe { libc::fdatasync(fd) as isize },
        Op::Fallocate { mode, off, len } => {
            // SAFETY: no memory involved.
            unsafe { libc::fallocate(fd, mode, off as i64, len as i64) as isize }
        }
        Op::DeviceDiscard { off, len } => {
            let range = [off, len];
            // SAFETY: BLKDISCARD reads two u64.
            unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize }
        }
        Op::DeviceZero { off, len } => {
            let range = [off, len];
            // SAFETY: BLKZEROOUT reads two u64.
            unsafe { libc::ioctl(fd, BLKZEROOUT, range.as_ptr()) as isize }
        }
    };
    result(r)
}

/// The way to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// Blocking: the file is memory.
    Memory,
    /// Only what needs no waiting.
    NoWait,
}

/// Tries the operation on the calling thread. `None`: it would wait (or came out short), the ring must do it.
///
/// # Safety
/// As [`perform`].
#[inline]
pub(crate) unsafe fn inline(fd: RawFd, op: &Op, how: Attempt) -> Option<i32> {
    match (how, op) {
        (Attempt::Memory, _) => {
            // SAFETY: the caller's contract.
            let r = unsafe { perform(fd, op, 0) };
            Some(r)
        }
        (Attempt::NoWait, Op::Readv { iov, n, .. }) => {
            // SAFETY: the caller's contract.
            let r = unsafe { perform(fd, op, libc::RWF_NOWAIT) };
            // SAFETY: iov[0..n] is readable by the caller's contract.
            let want = unsafe { std::slice::from_raw_parts(*iov, *n as usize) }
                .iter()
                .fold(0usize, |a, v| a.saturating_add(v.iov_len));
            // Short: the rest is not in the cache, or the file ends here; the ring finds out.
            (r >= 0 && r as usize == want).then_some(r)
        }
        _ => None,
    }
}

/// An operation on its way to a worker thread.
pub(crate) struct Shipped {
    file: Arc<File>,
    op: Op,
}

// SAFETY: the pointers in `op` lead to memory that stays valid and in place until the completion is delivered, whoever
// uses it (the contract of `Reactor::submit`); the worker is done with it before it sends the completion.
unsafe impl Send for Shipped {}

impl Shipped {
    /// # Safety
    /// As `Reactor::submit`: the memory stays until the completion.
    pub(crate) unsafe fn new(file: Arc<File>, op: Op) -> Shipped {
        Shipped { file, op }
    }

    /// Does it, blocking.
    pub(crate) fn run(self) -> i32 {
        // SAFETY: valid by `new`'s contract; the Arc keeps the descriptor open.
        unsafe { perform(self.file.raw_fd(), &self.op, 0) }
    }
}

impl Op {
    /// True if only a worker thread can do it.
    pub(crate) fn needs_thread(&self) -> bool {
        matches!(self, Op::DeviceDiscard { .. } | Op::DeviceZero { .. })
    }
}
