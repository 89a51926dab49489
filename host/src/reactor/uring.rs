//! The io_uring reactor: one ring per iothread, created, used and dropped on that thread.
//!
//! It makes one system call per turn at most, registers files on first use, and never fails an operation because a queue is
//! full: what the submission queue cannot take waits in a backlog, and completions beyond the completion queue are kept by
//! the kernel (`IORING_FEAT_NODROP`) and fetched with the next enter.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::pins::{self, Pins};
use super::{Kind, Op, Reactor, Token, Wait};
use crate::Engine;
use crate::file::{Descriptor, File};

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;

/// Submission queue entries: what one enter can take. More are sent with a further enter.
const SQ: u32 = 256;
/// Completion queue entries; its pages become resident only as they are used.
const CQ: u32 = 4096;
/// Slots in the table of registered files; files beyond it use their descriptor.
const FILES: u32 = 256;
/// Kernel worker threads per ring: for operations on files, and for everything else.
const WORKERS: [u32; 2] = [32, 16];
/// How many operations on an O_DIRECT file gather before they are handed over within a turn. A disk starts on the first
/// of them while the rest are still being built, where one long batch leaves it idle and then floods it. Seen at depth
/// 32: 8 gave 1.05 x the operations of whole batches at 0.95 x the processor time; fewer ring the disk too often.
const DIRECT_BATCH: u32 = 8;
/// What the kernel moves in one operation at most (`MAX_RW_COUNT`); longer ones come out short.
const MAX_LEN: usize = 0x7fff_f000;

/// A set of set-up flags, from the best to what every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Linux 6.1: completions are worked off only when we ask, by the only thread that may submit.
    Deferred,
    /// Linux 5.19: no interrupt to run completions.
    Cooperative,
    /// Anything.
    Plain,
}

const FLAVOURS: [Flavour; 3] = [Flavour::Deferred, Flavour::Cooperative, Flavour::Plain];

impl Flavour {
    fn build(self) -> io::Result<IoUring> {
        let mut b = IoUring::builder();
        b.dontfork().setup_clamp().setup_cqsize(CQ);
        match self {
            // The ring is created on the thread that uses it, so that SINGLE_ISSUER binds to the right one without
            // R_DISABLED.
            Flavour::Deferred => {
                b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
            }
            Flavour::Cooperative => {
                b.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
            }
            Flavour::Plain => {}
        }
        b.build(SQ)
    }
}

/// Tries the flavours in order, from the one that worked before in this process.
pub(crate) fn set_up(
    known: &AtomicUsize,
    mut build: impl FnMut(Flavour) -> io::Result<IoUring>,
) -> io::Result<(Flavour, IoUring)> {
    let first = known.load(Ordering::Relaxed).min(FLAVOURS.len() - 1);
    let mut last = io::Error::from_raw_os_error(libc::ENOSYS);
    for (i, f) in FLAVOURS.iter().enumerate().skip(first) {
        match build(*f) {
            // Completions must not be lost on overflow (Linux 5.5), and timeouts go with the enter (5.11).
            Ok(r) if r.params().is_feature_nodrop() && r.params().is_feature_ext_arg() => {
                known.store(i, Ordering::Relaxed);
                return Ok((*f, r));
            }
            Ok(_) => last = io::Error::from_raw_os_error(libc::ENOSYS),
            // Flags that this kernel does not know; everything else will not get better.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Table {
    /// Nothing was registered yet.
    Untried,
    Ready,
    /// The kernel said no: descriptors are used.
    Refused,
}

/// See the module's page.
pub(crate) struct Uring {
    ring: IoUring,
    /// Entries pushed and not taken by the kernel yet.
    queued: u32,
    /// Of these, how many came in a row for O_DIRECT files.
    direct: u32,
    backlog: VecDeque<squeue::Entry>,
    table: Table,
    registered: Vec<bool>,
    polls: Vec<(Token, RawFd)>,
    buffers: Table,
    pins: Pins,
    enters: u64,
    flavour: Flavour,
    complained: bool,
}

impl Uring {
    /// A ring of the calling thread. Fails with what `io_uring_setup` says.
    pub(crate) fn new() -> io::Result<Uring> {
        static KNOWN: AtomicUsize = AtomicUsize::new(0);
        let (flavour, ring) = set_up(&KNOWN, Flavour::build)?;
        // Refused by old kernels: then their defaults bound the workers.
        let _ = ring.submitter().register_iowq_max_workers(&mut WORKERS.clone());
        Ok(Uring {
            ring,
            queued: 0,
            direct: 0,
            backlog: VecDeque::new(),
            table: Table::Untried,
            registered: Vec::new(),
            polls: Vec::new(),
            buffers: Table::Untried,
            pins: Pins::default(),
            enters: 0,
            flavour,
            complained: false,
        })
    }

    /// The slot of `file` in the table, registering it if that is still to do.
    fn fixed(&mut self, file: &File) -> Option<u32> {
        let id = file.id();
        if self.registered.get(id as usize) == Some(&true) {
            return Some(id);
        }
        self.register(id, file.raw_fd())
    }

    #[cold]
    fn register(&mut self, id: u32, fd: RawFd) -> Option<u32> {
        if self.table == Table::Untried {
            self.table = match self.ring.submitter().register_files_sparse(FILES) {
                Ok(()) => {
                    self.registered = vec![false; FILES as usize];
                    Table::Ready
                }
                Err(e) => {
                    log::debug!("io_uring does not register files: {e}");
                    Table::Refused
                }
            };
        }
        let slot = self.registered.get_mut(id as usize)?;
        match self.ring.submitter().register_files_update(id, &[fd]) {
            Ok(1) => {
                *slot = true;
                Some(id)
            }
            _ => None,
        }
    }

    /// Puts buffers (null ones: nothing) into the kernel's table.
    fn set_buffers(&mut self, buffers: &[(u16, usize, usize)]) -> io::Result<()> {
        for &(slot, start, len) in buffers {
            let iov = libc::iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: len };
            // SAFETY: the kernel takes hold of the pages now; that the addresses keep meaning them is the contract of `pin`.
            unsafe { self.ring.submitter().register_buffers_update(slot.into(), &[iov], None) }?;
        }
        Ok(())
    }

    /// Has the kernel take all that was pushed.
    fn submit_all(&mut self) {
        while self.queued > 0 || !self.backlog.is_empty() {
            let before = self.queued as usize + self.backlog.len();
            self.drain_backlog();
            if self.call(0, GETEVENTS, None).is_err() || self.queued as usize + self.backlog.len() >= before {
                break;
            }
        }
    }

    /// The operation on registered memory, if it is one.
    fn fixed_entry(&self, op: &Op, target: types::Fd) -> Option<squeue::Entry> {
        match *op {
            Op::Readv { iov, n: 1, off } => {
                // SAFETY: one iovec is readable there (contract of `Reactor::submit`).
                let v = unsafe { *iov };
                let slot = self.pins.find(v.iov_base.addr(), v.iov_len)?;
                Some(
                    opcode::ReadFixed::new(target, v.iov_base.cast(), v.iov_len as u32, slot)
                        .offset(off)
                        .build(),
                )
            }
            Op::Writev { iov, n: 1, off, dsync } => {
                // SAFETY: as above.
                let v = unsafe { *iov };
                let slot = self.pins.find(v.iov_base.addr(), v.iov_len)?;
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                let write = opcode::WriteFixed::new(target, v.iov_base.cast(), v.iov_len as u32, slot);
                Some(write.offset(off).rw_flags(flags).build())
            }
            _ => None,
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() && self.try_push(&entry) {
            return;
        }
        self.backlog.push_back(entry);
        self.drain_backlog();
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        let mut sq = self.ring.submission();
        // SAFETY: what the entry points to stays valid until its completion (contract of `Reactor::submit`; polls and
        // cancellations point to nothing).
        let ok = unsafe { sq.push(entry) }.is_ok();
        self.queued += u32::from(ok);
        ok
    }

    fn drain_backlog(&mut self) {
        while let Some(e) = self.backlog.pop_front() {
            if self.try_push(&e) {
                continue;
            }
            // Full: have the kernel take what is there, then go on. If it does not, the rest waits for the next turn.
            let before = self.queued;
            if self.call(0, 0, None).is_err() || self.queued == before || !self.try_push(&e) {
                self.backlog.push_front(e);
                return;
            }
        }
    }

    /// One io_uring_enter.
    fn call(&mut self, min: u32, flags: u32, timeout: Option<u64>) -> io::Result<()> {
        self.enters += 1;
        self.direct = 0;
        let ts;
        let mut args = types::SubmitArgs::new();
        let taken = match timeout {
            None => {
                // SAFETY: the count is what was pushed; no argument is passed.
                unsafe { self.ring.submitter().enter::<libc::sigset_t>(self.queued, min, flags, None) }
            }
            Some(ns) => {
                ts = types::Timespec::new().sec(ns / 1_000_000_000).nsec((ns % 1_000_000_000) as u32);
                args = args.timespec(&ts);
                // SAFETY: SubmitArgs is io_uring_getevents_arg (repr(transparent)), as EXT_ARG says; `ts` lives on.
                unsafe { self.ring.submitter().enter(self.queued, min, flags | EXT_ARG, Some(&args)) }
            }
        };
        match taken {
            Ok(n) => {
                self.queued = self.queued.saturating_sub(n as u32);
                Ok(())
            }
            Err(e) => match e.raw_os_error() {
                // The entries were taken, and the time is over or a signal came. How many were taken only the queue knows.
                Some(libc::ETIME | libc::EINTR) => {
                    self.queued = self.ring.submission().len() as u32;
                    Ok(())
                }
                // Short of memory or of completion room: reap, then try again.
                Some(libc::EAGAIN | libc::EBUSY) => {
                    self.queued = self.ring.submission().len() as u32;
                    Ok(())
                }
                _ => Err(e),
            },
        }
    }

    fn arm(&mut self, fd: RawFd, token: Token) {
        let e = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        self.push(e.user_data(token.0));
    }
}

const GETEVENTS: u32 = 1;
const EXT_ARG: u32 = 8;

fn entry(op: Op, target: types::Fd) -> squeue::Entry {
    match op {
        // One buffer: the kernel need not fetch the vector.
        Op::Readv { iov, n: 1, off } => {
            // SAFETY: one iovec is readable there (contract of `Reactor::submit`).
            let v = unsafe { *iov };
            opcode::Read::new(target, v.iov_base.cast(), v.iov_len.min(MAX_LEN) as u32).offset(off).build()
        }
        Op::Writev { iov, n: 1, off, dsync } => {
            // SAFETY: as above.
            let v = unsafe { *iov };
            opcode::Write::new(target, v.iov_base.cast(), v.iov_len.min(MAX_LEN) as u32)
                .offset(off)
                .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
                .build()
        }
        Op::Readv { iov, n, off } => opcode::Readv::new(target, iov, n).offset(off).build(),
        Op::Writev { iov, n, off, dsync } => opcode::Writev::new(target, iov, n)
            .offset(off)
            .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
            .build(),
        Op::Sync => opcode::Fsync::new(target).flags(types::FsyncFlags::DATASYNC).build(),
        Op::Fallocate { mode, off, len } => {
            opcode::Fallocate::new(target, len).offset(off).mode(mode).build()
        }
        // Filtered by `submit`.
        Op::DeviceDiscard { .. } | Op::DeviceZero { .. } => opcode::Nop::new().build(),
    }
}

impl Reactor for Uring {
    unsafe fn submit(&mut self, file: &Arc<File>, op: Op, token: Token) -> bool {
        if file.engine() == Engine::Threads || op.needs_thread() {
            return false;
        }
        let (target, flags) = match self.fixed(file) {
            // The crate's `Fixed` cannot be named generically; the flag says the same.
            Some(slot) => (types::Fd(slot as i32), squeue::Flags::FIXED_FILE),
            None => (types::Fd(file.raw_fd()), squeue::Flags::empty()),
        };
        let pinned = if file.direct() { self.fixed_entry(&op, target) } else { None };
        let e = pinned.unwrap_or_else(|| entry(op, target)).flags(flags);
        self.push(e.user_data(token.0));
        if file.direct() {
            self.direct += 1;
            // What fails here stays queued, and the end of the turn says so.
            if self.direct >= DIRECT_BATCH && self.call(0, 0, None).is_err() {
                log::debug!("io_uring took nothing before the end of the turn");
            }
        }
        true
    }

    fn poll(&mut self, fd: RawFd, token: Token) {
        self.polls.push((token, fd));
        self.arm(fd, token);
    }

    fn unpoll(&mut self, token: Token) {
        self.polls.retain(|(t, _)| *t != token);
        let e = opcode::PollRemove::new(token.0).build();
        self.push(e.user_data(Token::new(Kind::Ignored, 0, 0).0));
        // The entry that names the descriptor must not be looked at after the descriptor was closed.
        self.submit_all();
    }

    unsafe fn pin(&mut self, id: u64, ranges: &[(usize, usize)]) -> io::Result<()> {
        if self.pins.again(id) {
            return Ok(());
        }
        if self.buffers == Table::Untried {
            self.ring.submitter().register_buffers_sparse(pins::SLOTS)?;
            self.buffers = Table::Ready;
        }
        let buffers = self.pins.add(id, ranges)?;
        let result = self.set_buffers(&buffers);
        if result.is_err() {
            self.unpin(id);
        }
        result
    }

    fn unpin(&mut self, id: u64) {
        let gone = self.pins.remove(id);
        if gone.is_empty() {
            return;
        }
        // An entry that names a slot finds its buffer when the kernel takes it.
        self.submit_all();
        let nothing: Vec<_> = gone.into_iter().map(|slot| (slot, 0, 0)).collect();
        if let Err(e) = self.set_buffers(&nothing) {
            log::error!("cannot let go of pinned memory: {e}");
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        if !self.backlog.is_empty() {
            self.drain_backlog();
        }
        let idle = {
            let cq = self.ring.completion();
            cq.is_empty()
        };
        // Never waits while something is ready, or while the kernel has not taken everything.
        let wait = if idle && self.backlog.is_empty() { wait } else { Wait::No };
        match wait {
            Wait::No => {
                let sq = self.ring.submission();
                let due = sq.taskrun() || sq.cq_overflow();
                drop(sq);
                if self.queued == 0 && !due {
                    return Ok(());
                }
                self.call(0, GETEVENTS, None)
            }
            Wait::For(ns) => self.call(1, GETEVENTS, Some(ns)),
            Wait::Forever => self.call(1, GETEVENTS, None),
        }
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>, max: usize) {
        let mut again: Option<Token> = None;
        for c in self.ring.completion().take(max) {
            let (token, res) = (Token(c.user_data()), c.result());
            match token.kind() {
                Kind::Ignored => continue,
                Kind::Kick | Kind::Bell if !cqueue::more(c.flags()) => again = Some(token),
                _ => {}
            }
            out.push((token, res));
            if again.is_some() {
                // Rare; handled one at a time, so that nothing has to be collected.
                break;
            }
        }
        let Some(token) = again else { return };
        let failed = out.last().map_or(0, |(_, res)| *res);
        if let Some((_, fd)) = self.polls.iter().find(|(t, _)| *t == token).copied() {
            if failed >= 0 {
                self.arm(fd, token);
            } else if !self.complained {
                self.complained = true;
                log::error!("cannot watch a descriptor: {}", io::Error::from_raw_os_error(-failed));
            }
        }
    }

    fn has_events(&mut self) -> bool {
        if !self.ring.completion().is_empty() {
            return true;
        }
        let sq = self.ring.submission();
        sq.taskrun() || sq.cq_overflow()
    }

    fn forget(&mut self, fd: &Descriptor) {
        let id = fd.id();
        if let Some(slot) = self.registered.get_mut(id as usize)
            && std::mem::take(slot)
            && let Err(e) = self.ring.submitter().register_files_update(id, &[-1])
        {
            log::error!("cannot unregister a file: {e}");
        }
    }

    fn enters(&self) -> u64 {
        self.enters
    }

    fn name(&self) -> &'static str {
        match self.flavour {
            Flavour::Deferred => "io_uring",
            Flavour::Cooperative => "io_uring (cooperative)",
            Flavour::Plain => "io_uring (plain)",
        }
    }
}
