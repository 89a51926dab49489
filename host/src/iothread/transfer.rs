//! Positional I/O with the semantics that callers want: whole requests, zeroes past the end, aligned memory for direct I/O.

use std::io;
use std::sync::Arc;

use super::local::Local;
use super::ops::{Keep, OpFuture};
use crate::buf::IoVecs;
use crate::file::{File, FileKind};
use crate::reactor::Op;

/// What the kernel takes in one vector (`IOV_MAX`).
const IOV_MAX: usize = 1024;
/// Memory of one bounce buffer.
const BOUNCE: usize = 1 << 20;
/// After so many EAGAIN in a row a worker thread does the operation, blocking.
const PATIENCE: u32 = 3;

/// What to do with a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallocMode {
    /// Back it with storage; `keep_size`: also past the end, without moving the end.
    Allocate {
        /// See above.
        keep_size: bool,
    },
    /// Release the storage; it reads as zeroes. Block devices: only if the device guarantees the zeroes, else `EOPNOTSUPP`.
    PunchHole,
    /// It reads as zeroes and stays allocated where possible. Block devices: `BLKZEROOUT`.
    ZeroRange {
        /// Do not move the end of the file.
        keep_size: bool,
    },
    /// The content is not needed; nothing is said about what is read afterwards. Block devices: `BLKDISCARD`.
    Discard,
}

fn errno(e: i32) -> io::Error {
    io::Error::from_raw_os_error(e)
}

/// Offsets are `off_t` in the kernel.
fn check_range(off: u64, len: u64) -> io::Result<()> {
    match off.checked_add(len) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}

impl Local {
    /// Reads all of `bufs` from `off`; past the end of the file there are zeroes. With direct I/O memory is bounced where
    /// it is not aligned.
    ///
    /// Errors: the kernel's; `EINVAL` if offset or length break [`File::alignment`].
    pub async fn read(&self, f: &Arc<File>, bufs: &IoVecs, off: u64) -> io::Result<()> {
        self.check(f, bufs, off)?;
        if !aligned(f, bufs) {
            return self.bounced(f, bufs, off, None).await;
        }
        let mut done = 0;
        let mut eagain = 0;
        while done < bufs.len() {
            let part = bufs.slice(done, bufs.len() - done);
            let res = self.transfer(f, &part, off + done as u64, None, eagain >= PATIENCE).await;
            match res {
                0 => {
                    part.fill(0);
                    return Ok(());
                }
                n if n > 0 => {
                    eagain = 0;
                    done += n as usize;
                    let a = f.alignment().offset.max(1) as usize;
                    if !done.is_multiple_of(a) {
                        // Direct reads end at an odd place only at the end of the file; they cannot go on from there.
                        bufs.slice(done, bufs.len() - done).fill(0);
                        return Ok(());
                    }
                }
                e => self.retry(-e, &mut eagain).await?,
            }
        }
        Ok(())
    }

    /// Writes all of `bufs` at `off`; `fua`: durable when it returns (`RWF_DSYNC`).
    ///
    /// Errors: the kernel's; `ENOSPC` also when nothing more is taken; `EINVAL` if offset or length break
    /// [`File::alignment`]. After an error any part of the range may hold old or new data.
    pub async fn write(&self, f: &Arc<File>, bufs: &IoVecs, off: u64, fua: bool) -> io::Result<()> {
        self.check(f, bufs, off)?;
        if !aligned(f, bufs) {
            return self.bounced(f, bufs, off, Some(fua)).await;
        }
        let mut done = 0;
        let mut eagain = 0;
        while done < bufs.len() {
            let part = bufs.slice(done, bufs.len() - done);
            let res = self.transfer(f, &part, off + done as u64, Some(fua), eagain >= PATIENCE).await;
            match res {
                0 => return Err(errno(libc::ENOSPC)),
                n if n > 0 => {
                    eagain = 0;
                    done += n as usize;
                    if !done.is_multiple_of(f.alignment().offset.max(1) as usize) {
                        // A direct write that stops at an odd place cannot go on; it stopped for lack of room.
                        return Err(errno(libc::ENOSPC));
                    }
                }
                e => self.retry(-e, &mut eagain).await?,
            }
        }
        Ok(())
    }

    /// Makes everything that was written, by anybody, durable.
    ///
    /// Errors: the kernel's. It reports a failed write-back once: the caller must remember it.
    pub async fn fdatasync(&self, f: &Arc<File>) -> io::Result<()> {
        self.plain(f, Op::Sync).await
    }

    /// Changes the allocation of a range.
    ///
    /// Errors: the kernel's, above all `EOPNOTSUPP`; `EINVAL` for an empty or impossible range.
    pub async fn fallocate(&self, f: &Arc<File>, mode: FallocMode, off: u64, len: u64) -> io::Result<()> {
        check_range(off, len)?;
        let keep = |k: bool| if k { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let op = match (f.kind(), mode) {
            (FileKind::CharDevice, _) => return Err(errno(libc::EOPNOTSUPP)),
            (FileKind::BlockDevice, FallocMode::Discard) => Op::DeviceDiscard { off, len },
            (FileKind::BlockDevice, FallocMode::ZeroRange { .. }) => Op::DeviceZero { off, len },
            // A device has all the room it will ever have.
            (FileKind::BlockDevice, FallocMode::Allocate { .. }) => return Ok(()),
            (_, FallocMode::PunchHole | FallocMode::Discard) => Op::Fallocate { mode: punch, off, len },
            (_, FallocMode::Allocate { keep_size }) => Op::Fallocate { mode: keep(keep_size), off, len },
            (_, FallocMode::ZeroRange { keep_size }) => {
                Op::Fallocate { mode: libc::FALLOC_FL_ZERO_RANGE | keep(keep_size), off, len }
            }
        };
        self.plain(f, op).await
    }

    /// An operation without memory.
    async fn plain(&self, f: &Arc<File>, op: Op) -> io::Result<()> {
        let mut eagain = 0;
        loop {
            // SAFETY: there is no memory to keep.
            let res = unsafe { self.run(f, op, Keep::default(), eagain >= PATIENCE) }.await;
            if res >= 0 {
                return Ok(());
            }
            self.retry(-res, &mut eagain).await?;
        }
    }

    fn check(&self, f: &File, bufs: &IoVecs, off: u64) -> io::Result<()> {
        let len = bufs.len() as u64;
        check_range(off, len)?;
        let a = u64::from(f.alignment().offset.max(1));
        if !off.is_multiple_of(a) || !len.is_multiple_of(a) {
            return Err(errno(libc::EINVAL));
        }
        Ok(())
    }

    /// Returns if the operation should be tried again.
    async fn retry(&self, e: i32, eagain: &mut u32) -> io::Result<()> {
        match e {
            libc::EINTR => Ok(()),
            libc::EAGAIN if *eagain < PATIENCE => {
                *eagain += 1;
                self.yield_now().await;
                Ok(())
            }
            e => Err(errno(e)),
        }
    }

    /// One read (`write` = None) or write, as much of `bufs` as one operation takes.
    async fn transfer(
        &self,
        f: &Arc<File>,
        bufs: &IoVecs,
        off: u64,
        write: Option<bool>,
        on_worker: bool,
    ) -> i32 {
        let mut keep = Keep { _bufs: Some(bufs.clone()), ..Keep::default() };
        let (iov, n) = match bufs.raw() {
            Some(raw) if raw.len() <= IOV_MAX => (raw.as_ptr(), raw.len()),
            _ => {
                let total = bufs.gather(IOV_MAX, &mut keep.iov);
                trim(&mut keep.iov, total, f.alignment().offset.max(1) as usize);
                (keep.iov.as_ptr(), keep.iov.len())
            }
        };
        let n = n as u32;
        let op = match write {
            None => Op::Readv { iov, n, off },
            Some(dsync) => Op::Writev { iov, n, off, dsync },
        };
        // SAFETY: the iovecs are the list's own (kept by `keep._bufs`) or `keep.iov`'s, whose heap memory does not move with
        // it; the memory behind them is kept by `keep._bufs`. `keep` goes to the slab and stays until the completion.
        unsafe { self.run(f, op, keep, on_worker) }.await
    }

    /// Runs one operation; the future yields its raw result.
    ///
    /// # Safety
    /// `keep` keeps everything that `op` points to valid and in place.
    unsafe fn run(&self, f: &Arc<File>, op: Op, mut keep: Keep, on_worker: bool) -> Running {
        if !on_worker {
            // SAFETY: `keep` lives through the call.
            if let Some(r) = unsafe { self.try_inline(f, &op) } {
                return Running::Ready(r);
            }
        }
        keep._file = Some(Arc::clone(f));
        let token = self.inner().ops.borrow_mut().insert(keep);
        if on_worker && !self.is_virtual() {
            // SAFETY: the slab keeps the memory and the file until the completion.
            unsafe { self.ship(f, op, token) };
        } else {
            // SAFETY: as above.
            unsafe { self.start(f, op, token) };
        }
        Running::Op(OpFuture::new(self.clone(), token))
    }

    /// Through aligned memory, piece by piece.
    async fn bounced(&self, f: &Arc<File>, bufs: &IoVecs, off: u64, write: Option<bool>) -> io::Result<()> {
        let a = f.alignment();
        let align = a.mem.max(a.offset).max(1) as usize;
        let bounce = IoVecs::alloc(bufs.len().min(BOUNCE.next_multiple_of(align)), align)?;
        let mut done = 0;
        while done < bufs.len() {
            let piece = bufs.slice(done, bounce.len());
            let b = bounce.slice(0, piece.len());
            let at = off + done as u64;
            match write {
                None => {
                    Box::pin(self.read(f, &b, at)).await?;
                    piece.copy_iov(&b);
                }
                Some(fua) => {
                    b.copy_iov(&piece);
                    Box::pin(self.write(f, &b, at, fua)).await?;
                }
            }
            done += piece.len();
        }
        Ok(())
    }
}

/// An operation that is done, or one to wait for.
enum Running {
    Ready(i32),
    Op(OpFuture),
}

impl std::future::Future for Running {
    type Output = i32;
    fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<i32> {
        match &mut *self {
            Running::Ready(r) => std::task::Poll::Ready(*r),
            Running::Op(o) => std::pin::Pin::new(o).poll(cx),
        }
    }
}

/// True if the memory suits the file.
fn aligned(f: &File, bufs: &IoVecs) -> bool {
    let a = f.alignment();
    (a.mem <= 1 && a.offset <= 1) || bufs.fits(a.mem as usize, a.offset as usize)
}

/// Cuts a vector of `total` bytes to a multiple of `a`.
fn trim(iov: &mut Vec<libc::iovec>, total: usize, a: usize) {
    let mut over = total % a;
    while over > 0 {
        let Some(last) = iov.last_mut() else { return };
        if last.iov_len > over {
            last.iov_len -= over;
            return;
        }
        over -= last.iov_len;
        iov.pop();
    }
}
