//! A lane: the tasks of one copy on one iothread, and what all lanes share.
//!
//! Started by `copy::run` for the time between two pauses. A task finishes the range it has taken whatever happens, unless
//! something failed; so a pause leaves no range half done.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use graph::{BlockError, Errno, NodeIo, Result, View, WriteFlags, ZeroFlags};
use host::sync::{Event, WaitQueue};
use host::{IoVecs, Local};

use super::limit::{Limiter, SLICE_NS};
use super::options::{CopyOptions, CopyReport, MAX_REPORTED, MAX_TASKS, TargetZero, Unreadable};
use super::order::Order;
use super::plan::{Kind, Plan, Range};
use super::sparse::spans;
use crate::control::Control;

/// Smallest unit that is tried when reading fails, bytes.
const SECTOR: u64 = 512;
/// A target is zeroed beforehand in pieces of so many bytes.
const ZERO_PIECE: u64 = 1 << 30;

/// How a lane ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// There is nothing left to take.
    Finished,
    /// It was asked to rest, or something failed.
    Stopped,
}

/// What has become of zeroing the target beforehand.
const ZERO_UNTRIED: u8 = 0;
const ZERO_BUSY: u8 = 1;
const ZERO_KNOWN: u8 = 2;
const ZERO_UNKNOWN: u8 = 3;

/// What all lanes share.
pub(super) struct Shared {
    pub(super) options: CopyOptions,
    plan: Plan,
    order: Order,
    limiter: Limiter,
    control: Arc<Control>,
    zero: AtomicU8,
    zero_tried: Event,
    failed: AtomicBool,
    /// The first failure.
    failure: Mutex<Option<BlockError>>,
    written: AtomicU64,
    zeroed: AtomicU64,
    skipped: AtomicU64,
    unreadable: Mutex<(u64, Vec<Unreadable>)>,
}

impl Shared {
    pub(super) fn new(
        mut options: CopyOptions,
        sizes: &[u64],
        target: u64,
        control: Arc<Control>,
    ) -> Result<Shared> {
        let unit = if options.compressed { SECTOR } else { 64 << 10 };
        if options.buffer == 0 || !options.buffer.is_multiple_of(unit) || options.buffer > 64 << 20 {
            return Err(BlockError::invalid(
                "The buffer of a copy must be a multiple of 64 KiB, up to 64 MiB",
            ));
        }
        if options.target_backing.is_some() && sizes.len() != 1 {
            return Err(BlockError::invalid("A target with a backing file takes one source"));
        }
        options.tasks = options.tasks.clamp(1, MAX_TASKS);
        let plan = Plan::new(sizes)?;
        if plan.total() > target {
            return Err(BlockError::new(Errno::ENOSPC, "output file is smaller than input file"));
        }
        control.set_progress(0, plan.total());
        let zero = match options.target_zero {
            TargetZero::Yes => ZERO_KNOWN,
            TargetZero::No => ZERO_UNKNOWN,
            TargetZero::Try => ZERO_UNTRIED,
        };
        Ok(Shared {
            options,
            plan,
            order: Order::default(),
            limiter: Limiter::default(),
            control,
            zero: AtomicU8::new(zero),
            zero_tried: Event::new(),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            written: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            unreadable: Mutex::default(),
        })
    }

    /// Whether ranges that read as zeroes need nothing.
    pub(super) fn skips_zeroes(&self) -> bool {
        self.options.min_sparse > 0 && self.zero.load(SeqCst) == ZERO_KNOWN
    }

    /// Notes a range that needed nothing.
    pub(super) fn skipped(&self, bytes: u64) {
        self.skipped.fetch_add(bytes, Relaxed);
        self.control.advance(bytes);
    }

    /// Ends the copy with this error, unless it has one already.
    pub(super) fn fail(&self, e: BlockError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(e);
        drop(failure);
        self.failed.store(true, SeqCst);
        self.order.open();
        self.zero_tried.set();
    }

    /// # Errors
    /// The first failure, once.
    pub(super) fn check(&self) -> Result<()> {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(e) => Err(e),
            None if self.failed.load(SeqCst) => Err(Errno::EIO.into()),
            None => Ok(()),
        }
    }

    /// What was done.
    pub(super) fn report(&self) -> CopyReport {
        let mut unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list = std::mem::take(&mut unreadable.1);
        list.sort_by_key(|u| u.offset);
        CopyReport {
            written: self.written.load(Relaxed),
            zeroed: self.zeroed.load(Relaxed),
            skipped: self.skipped.load(Relaxed),
            unreadable_bytes: unreadable.0,
            unreadable: list,
        }
    }

    fn note_unreadable(&self, offset: u64, len: u64, errno: Errno) {
        let mut unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        unreadable.0 += len;
        let list = &mut unreadable.1;
        // Neighbours become one entry, as long as they come one after the other.
        let room = list.len() < MAX_REPORTED;
        match list.last_mut() {
            Some(last) if last.offset + last.len == offset && last.errno == errno => last.len += len,
            _ if room => list.push(Unreadable { offset, len, errno }),
            _ => {}
        }
    }

    fn stopping(&self) -> bool {
        self.failed.load(SeqCst) || self.control.stopping()
    }
}

/// Runs the tasks of one iothread; ends when all of them have.
pub(super) async fn run(
    shared: Arc<Shared>,
    sources: Vec<Arc<View>>,
    target: Arc<View>,
    local: Local,
) -> Ended {
    let ends = Rc::new(Ends {
        sources: sources.iter().map(|v| v.io(&local)).collect(),
        target: target.io(&local),
        mem_alignment: sources
            .iter()
            .chain([&target])
            .map(|v| v.limits().mem_alignment.max(v.limits().request_alignment))
            .fold(4096, u32::max) as usize,
        granule: granule(&shared.options, &target),
        shared,
    });
    drop((sources, target));
    if let Err(e) = ends.prepare().await {
        ends.shared.fail(e);
    }
    let crew = Rc::new(Crew { busy: RefCell::new(ends.shared.options.tasks), gone: WaitQueue::new() });
    for _ in 0..ends.shared.options.tasks {
        let (ends, member) = (Rc::clone(&ends), Member(Rc::clone(&crew)));
        local.spawn(async move {
            if let Err(e) = ends.work().await {
                ends.shared.fail(e);
            }
            drop(ends);
            drop(member);
        });
    }
    crew.wait().await;
    if ends.shared.stopping() { Ended::Stopped } else { Ended::Finished }
}

/// Data is looked through for zeroes in units of this many bytes.
fn granule(options: &CopyOptions, target: &View) -> usize {
    let limits = target.limits();
    let wanted = options.min_sparse.clamp(SECTOR, 64 << 10).next_power_of_two();
    // Not above what was asked for by much: a hole that is not found is data that is written.
    let align = u64::from(limits.request_alignment.max(1)).min(64 << 10);
    wanted.min(options.min_sparse.max(SECTOR)).next_power_of_two().max(align) as usize
}

/// Tasks of a lane that have not ended.
struct Crew {
    busy: RefCell<usize>,
    gone: WaitQueue,
}

impl Crew {
    async fn wait(&self) {
        loop {
            let gone = self.gone.wait();
            if *self.busy.borrow() == 0 {
                return;
            }
            gone.await;
        }
    }
}

/// One of them; counts itself out however it ends.
struct Member(Rc<Crew>);

impl Drop for Member {
    fn drop(&mut self) {
        *self.0.busy.borrow_mut() -= 1;
        self.0.gone.notify_all();
    }
}

/// The two ends on this iothread.
struct Ends {
    sources: Vec<NodeIo>,
    target: NodeIo,
    mem_alignment: usize,
    granule: usize,
    shared: Arc<Shared>,
}

impl Ends {
    /// Zeroes the target beforehand, if that was asked for and costs little.
    async fn prepare(&self) -> Result<()> {
        let shared = &self.shared;
        let mine = shared.zero.compare_exchange(ZERO_UNTRIED, ZERO_BUSY, SeqCst, SeqCst).is_ok();
        if !mine {
            if shared.zero.load(SeqCst) == ZERO_BUSY {
                shared.zero_tried.wait().await;
            }
            return Ok(());
        }
        let size = self.target.size();
        let mut at = 0;
        let mut outcome = ZERO_KNOWN;
        while at < size {
            if shared.failed.load(SeqCst) || shared.control.cancelled() {
                outcome = ZERO_UNKNOWN;
                break;
            }
            let len = ZERO_PIECE.min(size - at);
            let flags = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
            match self.target.write_zeroes(at, len, flags).await {
                Ok(()) => at += len,
                Err(e) if e.errno() == Errno::ENOTSUP => {
                    outcome = ZERO_UNKNOWN;
                    break;
                }
                Err(e) => {
                    shared.zero.store(ZERO_UNKNOWN, SeqCst);
                    shared.zero_tried.set();
                    return Err(e.context("error while zeroing the target"));
                }
            }
        }
        shared.zero.store(outcome, SeqCst);
        shared.zero_tried.set();
        Ok(())
    }

    /// One task: takes ranges until there are none.
    async fn work(&self) -> Result<()> {
        let shared = &self.shared;
        let local = self.target.local();
        let mut buffer: Option<IoVecs> = None;
        loop {
            if shared.stopping() {
                return Ok(());
            }
            let pause = shared.limiter.wait_ns(shared.control.rate(), local.now());
            if pause > 0 {
                shared.control.changed_or(local.sleep(pause.min(SLICE_NS))).await;
                continue;
            }
            let Some(range) = shared.plan.next(shared, &self.sources).await? else { break };
            let moved = self.range(range, &mut buffer).await?;
            shared.order.done(range.seq);
            shared.limiter.charge(moved);
            shared.control.advance(range.len);
        }
        Ok(())
    }

    /// Does one range; the bytes that were moved.
    async fn range(&self, range: Range, buffer: &mut Option<IoVecs>) -> Result<u64> {
        let options = &self.shared.options;
        if range.kind == Kind::Zero && options.min_sparse > 0 {
            self.turn(range).await?;
            self.zero(range.offset, range.len).await?;
            return Ok(0);
        }
        let whole = match buffer {
            Some(buffer) => buffer,
            None => buffer.insert(IoVecs::alloc(options.buffer as usize, self.mem_alignment)?),
        };
        let data = whole.slice(0, range.len as usize);
        match range.kind {
            Kind::Zero => data.fill(0),
            _ => self.read(range.offset, &data).await?,
        }
        // Looked through before the turn comes: only the writes go one after the other.
        let parts = if options.min_sparse == 0 {
            None
        } else if options.compressed {
            data.is_zero().then(Vec::new)
        } else {
            Some(spans(&data, range.offset, options.min_sparse as usize, self.granule))
        };
        self.turn(range).await?;
        match parts {
            None => self.write(range.offset, &data).await?,
            // A cluster that is zero from end to end.
            Some(parts) if options.compressed && parts.is_empty() => {
                self.zero_or_skip(range.offset, range.len).await?;
            }
            Some(parts) => {
                for part in parts {
                    let at = range.offset + part.at as u64;
                    if part.zero {
                        self.zero_or_skip(at, part.len as u64).await?;
                    } else {
                        self.write(at, &data.slice(part.at, part.len)).await?;
                    }
                }
            }
        }
        Ok(range.len)
    }

    /// Waits for the range's turn to write.
    async fn turn(&self, range: Range) -> Result<()> {
        if self.shared.options.ordered {
            self.shared.order.wait(range.seq).await;
        }
        // Somebody else's failure: what comes after it is not written.
        if self.shared.failed.load(SeqCst) { Err(Errno::ECANCELED.into()) } else { Ok(()) }
    }

    async fn zero_or_skip(&self, offset: u64, len: u64) -> Result<()> {
        if self.shared.skips_zeroes() {
            self.shared.skipped.fetch_add(len, Relaxed);
            return Ok(());
        }
        self.zero(offset, len).await
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let zeroing = self.target.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await;
        zeroing.map_err(|e| e.context(format!("error while writing at byte {offset}")))?;
        self.shared.zeroed.fetch_add(len, Relaxed);
        Ok(())
    }

    async fn write(&self, offset: u64, data: &IoVecs) -> Result<()> {
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::COMPRESSED, self.shared.options.compressed);
        let writing = self.target.write(offset, data, flags).await;
        writing.map_err(|e| e.context(format!("error while writing at byte {offset}")))?;
        self.shared.written.fetch_add(data.len() as u64, Relaxed);
        Ok(())
    }

    /// Fills `data` from the sources at `offset`.
    async fn read(&self, offset: u64, data: &IoVecs) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let Some((index, from, left)) = self.shared.plan.locate(at) else {
                return Err(Errno::EIO.into());
            };
            let io = self.sources.get(index).ok_or(Errno::EIO)?;
            let len = left.min((data.len() - done) as u64) as usize;
            let part = data.slice(done, len);
            if let Err(e) = io.read(from, &part).await {
                if !self.shared.options.salvage {
                    return Err(e.context(format!("error while reading at byte {at}")));
                }
                self.salvage(io, from, at, &part).await?;
            }
            done += len;
        }
        Ok(())
    }

    /// Reads what can be read, sector by sector; the rest becomes zeroes.
    async fn salvage(&self, io: &NodeIo, from: u64, at: u64, data: &IoVecs) -> Result<()> {
        let unit = u64::from(io.limits().request_alignment).max(SECTOR);
        let mut done = 0;
        while done < data.len() as u64 {
            let len = (unit - (from + done) % unit).min(data.len() as u64 - done);
            let part = data.slice(done as usize, len as usize);
            if let Err(e) = io.read(from + done, &part).await {
                part.fill(0);
                self.shared.note_unreadable(at + done, len, e.errno());
            }
            done += len;
        }
        Ok(())
    }
}
