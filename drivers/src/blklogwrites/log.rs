//! The log of a blklogwrites node while it grows: places for entries, which of them are complete, the superblock.
//!
//! Used by `io` on all iothreads. Places are given out in the order of the log and filled at the same time; the superblock
//! counts only what is complete up to there. Must not know what is logged.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use graph::{BlockError, Errno, NodeIo, Result, WriteFlags, ZeroFlags};
use host::IoVecs;
use host::sync::{Mutex as AsyncMutex, WaitQueue};

use super::format::{Entry, Super};

/// Alignment of buffers, bytes: enough for direct I/O on every device.
pub(super) const ALIGN: usize = 4096;

/// Where an entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its number.
    index: u64,
    /// Sector of the log.
    sector: u64,
}

/// What follows an entry.
pub(super) enum Payload {
    /// Nothing.
    None,
    /// The data that was written, whole sectors.
    Data(IoVecs),
    /// Zeroes, bytes.
    Zeroes(u64),
}

struct State {
    /// Sector of the next entry.
    next_sector: u64,
    /// Number of the next entry.
    next_index: u64,
    /// All entries below this one are complete.
    complete: u64,
    /// Entries above it that are complete.
    later: BTreeSet<u64>,
    /// An entry could not be written: there is nothing but the part before it.
    broken: Option<Errno>,
}

/// See the module's page. Lock order: `superblock`, then `state`, which is a leaf.
pub(super) struct Log {
    sector_size: u32,
    /// Entries after which the superblock is written.
    interval: u64,
    state: Mutex<State>,
    /// Waiters for `complete` or `broken`.
    progress: WaitQueue,
    /// What the superblock on disk says; `None`: it is not this log's yet.
    superblock: AsyncMutex<Option<u64>>,
}

/// The error of a change that was not logged. `ENOTSUP` would be taken for a wish to do without: it is no such thing.
fn not_logged(e: BlockError) -> BlockError {
    if e.errno() == Errno::ENOTSUP { BlockError::new(Errno::EIO, "The log").with_source(e) } else { e }
}

impl Log {
    /// A log with `entries` in the sectors before `next_sector`. `there`: the superblock on disk says so.
    pub(super) fn new(sector_size: u32, interval: u64, entries: u64, next_sector: u64, there: bool) -> Log {
        let state = State {
            next_sector,
            next_index: entries,
            complete: entries,
            later: BTreeSet::new(),
            broken: None,
        };
        Log {
            sector_size,
            interval,
            state: Mutex::new(state),
            progress: WaitQueue::new(),
            superblock: AsyncMutex::new(there.then_some(entries)),
        }
    }

    /// Bytes of a sector.
    pub(super) fn sector_size(&self) -> u32 {
        self.sector_size
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before the first change: from now on what is on disk is this log.
    ///
    /// # Errors
    /// The log is broken, or its superblock cannot be written.
    pub(super) async fn start(&self, log: &NodeIo) -> Result<()> {
        if let Some(errno) = self.state().broken {
            return Err(BlockError::new(errno, "A change could not be logged earlier"));
        }
        let mut written = self.superblock.lock().await;
        if written.is_none() {
            let entries = self.state().complete;
            self.write_super(log, entries).await.map_err(not_logged)?;
            *written = Some(entries);
        }
        Ok(())
    }

    /// Gives out the place of an entry. It must be filled.
    ///
    /// # Errors
    /// The log is full: its end is at 2^63.
    pub(super) fn reserve(&self, entry: Entry) -> Result<Place> {
        let state = &mut *self.state();
        let end = entry.place().and_then(|n| n.checked_add(state.next_sector));
        let end =
            end.filter(|end| end.checked_mul(self.sector_size.into()).is_some_and(|b| b <= i64::MAX as u64));
        let place = Place { index: state.next_index, sector: state.next_sector };
        state.next_sector = end.ok_or(Errno::EFBIG)?;
        state.next_index += 1;
        Ok(place)
    }

    /// Fills a place.
    ///
    /// # Errors
    /// It could not be written; the log is broken from now on.
    pub(super) async fn fill(
        &self,
        log: &NodeIo,
        place: Place,
        entry: Entry,
        payload: Payload,
    ) -> Result<()> {
        let result = self.write_entry(log, place, entry, payload).await.map_err(not_logged);
        let due = {
            let state = &mut *self.state();
            match &result {
                Ok(()) => {
                    state.later.insert(place.index);
                    while state.later.remove(&state.complete) {
                        state.complete += 1;
                    }
                }
                Err(e) => state.broken = Some(e.errno()),
            }
            (place.index + 1).is_multiple_of(self.interval)
        };
        self.progress.notify_all();
        result?;
        if due { self.publish(log).await.map_err(not_logged) } else { Ok(()) }
    }

    async fn write_entry(&self, log: &NodeIo, place: Place, entry: Entry, payload: Payload) -> Result<()> {
        let size = self.sector_size as usize;
        let at = place.sector * size as u64;
        let head = IoVecs::alloc(size, ALIGN)?;
        head.copy_from(0, &entry.bytes());
        let none = WriteFlags::empty();
        match payload {
            Payload::None => log.write(at, &head, none).await,
            Payload::Data(data) => log.write(at, &IoVecs::concat(&[head, data]), none).await,
            Payload::Zeroes(len) => {
                log.write_zeroes(at + size as u64, len, ZeroFlags::empty()).await?;
                log.write(at, &head, none).await
            }
        }
    }

    /// Waits until the entry at `place`, which was filled, and all before it are complete, and brings the superblock up to
    /// date.
    ///
    /// # Errors
    /// An earlier entry could not be written, or the superblock cannot be.
    pub(super) async fn publish_up_to(&self, log: &NodeIo, place: Place) -> Result<()> {
        loop {
            // Entered before the look, so that nothing is missed.
            let progress = self.progress.wait();
            {
                let state = self.state();
                if state.complete > place.index {
                    break;
                }
                if let Some(errno) = state.broken {
                    return Err(errno.into());
                }
            }
            progress.await;
        }
        self.publish(log).await
    }

    /// Brings the superblock up to date: durable entries first, then their number.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) async fn publish(&self, log: &NodeIo) -> Result<()> {
        let mut written = self.superblock.lock().await;
        let entries = self.state().complete;
        if *written == Some(entries) {
            return Ok(());
        }
        log.flush().await?;
        self.write_super(log, entries).await?;
        *written = Some(entries);
        Ok(())
    }

    async fn write_super(&self, log: &NodeIo, entries: u64) -> Result<()> {
        let block = IoVecs::alloc(self.sector_size as usize, ALIGN)?;
        block.copy_from(0, &Super { entries, sector_size: self.sector_size }.bytes());
        log.write(0, &block, WriteFlags::FUA).await
    }

    /// Whether what is on disk is this log: it goes on with one, or something was logged.
    pub(super) fn is_started(&self) -> bool {
        self.superblock.try_lock().is_none_or(|written| written.is_some())
    }
}
