//! Checking an image and repairing it, counted as `qemu-img check` counts and told in its words.
//!
//! Called by the node's `check`, by opening an image that was left dirty, by the offline tool and by the crash harness;
//! works on a [`Storage`], so it does not matter where the image is. Must run alone: nobody else may write meanwhile.
//!
//! What happens, in this order (as in QEMU, so that the figures agree): snapshot table read; references counted from
//! header, L1 and L2 tables, snapshots, encryption header, bitmaps, refcount structures; compared with the refcounts on
//! disk; where a refcount block itself is damaged or missing, all refcount structures built anew in free space and switched to by
//! one write; COPIED flags; snapshot table rewritten; dirty and corrupt bits cleared if all is well. Every step writes
//! such that a crash leaves what a further repair puts right.
//!
//! Different from QEMU on purpose: nothing the image names is opened, and no key is needed; a refcount block past the end
//! of the file means that the structures are built anew, the file is not made to reach there; refcount table entries
//! that are unaligned or have reserved bits are repaired, where QEMU marks the image corrupt in passing and then cannot
//! write; new structures never lie where something damaged points to past the end; where the snapshot table was
//! rewritten the COPIED flags are looked at again; bitmaps are counted, not loaded, so one that does not fit the disk is
//! no obstacle. Opening is a little stricter than QEMU's: see `drivers/tests/qcow2_fields.rs`.
//!
//! Memory: L1 table (32 MiB at most), refcount table (8 MiB), snapshot table (at most 64 MiB on disk), one snapshot's
//! L1, the bitmap directory (at most 64 MiB on disk), eight refcount blocks and two L2 tables (2 MiB each at most), 10 000
//! messages; and the counters, 1–4 bytes per host
//! cluster in use, as the image's refcounts are wide, at most [`Limits::counters`] bytes. An image that would need more
//! is reported as not checkable.

mod bitmaps;
mod compare;
mod copied;
mod counts;
mod fixes;
pub(in crate::qcow2) mod online;
mod rebuild;
mod refcounts;
mod references;
mod snapshots;
mod storage;
#[cfg(test)]
mod tests;

use std::fmt;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use graph::{BlockError, CheckFix, CheckReport, Errno};

pub use storage::{Memory, NodeStorage, Storage};

use self::counts::{Counts, Full, PastEnd};
use self::refcounts::Blocks;
use super::format::{Geometry, Header, MAX_HEADER_BYTES, Policy, be64, field};
use super::format::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY, L1Entry, snapshot::Snapshot};

/// Most messages of one report.
const MAX_MESSAGES: usize = 10_000;
/// QEMU's limit of clusters in a file.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// What a check may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory for reference counters, bytes.
    pub counters: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { counters: 1 << 30 }
    }
}

/// A check that could not be finished (`qemu-img check` exits with 1), with what was found until then.
#[derive(Debug)]
pub struct CheckFailed {
    /// What was found and repaired before.
    pub report: CheckReport,
    /// Why it ended.
    pub error: BlockError,
}

impl fmt::Display for CheckFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Check failed: {}", self.error)
    }
}

impl std::error::Error for CheckFailed {}

impl From<CheckFailed> for BlockError {
    fn from(e: CheckFailed) -> BlockError {
        // The last line says more than "Input/output error".
        let why = e.report.messages.last().map(|m| format!(" ({m})")).unwrap_or_default();
        BlockError::new(e.error.errno(), format!("{e}{why}"))
    }
}

/// Checks, and repairs what `fix` allows. After a repair the figures `leaks` and `corruptions` are what is left, as the
/// first run sees it; `qemu-img` runs a second check for its figures, and so should whoever prints them.
///
/// # Errors
/// [`CheckFailed`]: a header that is refused, I/O errors, an image beyond the limits.
pub async fn run<S: Storage>(storage: &S, fix: CheckFix, limits: Limits) -> Result<CheckReport, CheckFailed> {
    let fail = |report: CheckReport, error: BlockError| CheckFailed { report, error };
    let mut first = vec![0; MAX_HEADER_BYTES.min(storage.size() as usize)];
    if let Err(e) = storage.read(0, &mut first).await {
        return Err(fail(CheckReport::default(), e));
    }
    let policy = Policy { writable: fix != CheckFix::NONE, check: true, inspect: true };
    let header = match Header::parse(&first, policy) {
        Ok(header) => header,
        Err(e) => return Err(fail(CheckReport::default(), e.into())),
    };
    drop(first);
    let mut checker = match Checker::new(storage, header, fix, limits).await {
        Ok(checker) => checker,
        Err(e) => return Err(fail(CheckReport::default(), e)),
    };
    match checker.check().await {
        Ok(()) => Ok(checker.finish()),
        Err(e) => Err(fail(checker.finish(), e)),
    }
}

/// [`run`] on an image in memory, at once.
///
/// # Errors
/// As [`run`].
pub fn check_memory(image: &Memory, fix: CheckFix, limits: Limits) -> Result<CheckReport, CheckFailed> {
    let mut cx = Context::from_waker(Waker::noop());
    match pin!(run(image, fix, limits)).poll(&mut cx) {
        Poll::Ready(done) => done,
        // Memory never waits.
        Poll::Pending => Err(CheckFailed { report: CheckReport::default(), error: Errno::EIO.into() }),
    }
}

/// The state of one check.
struct Checker<'a, S: Storage> {
    storage: &'a S,
    header: Header,
    geo: Geometry,
    fix: CheckFix,
    report: CheckReport,
    /// Findings in the snapshot table; they join the report last, when the table has been rewritten.
    snapshot_corruptions: u64,
    suppressed: u64,
    counts: Counts,
    past_end: PastEnd,
    /// How long the file was when the walk began, bytes; 0 where data clusters are not in it.
    walked_file: u64,
    /// The file's length in clusters, or the highest cluster that is referred to.
    clusters: u64,
    l1: Vec<L1Entry>,
    blocks: Blocks,
    snapshots: Vec<Snapshot>,
    /// Bytes of the snapshot table on disk.
    snapshots_bytes: u64,
    /// Something has been written.
    modified: bool,
    /// A refcount block is damaged or missing.
    rebuild: bool,
}

impl<'a, S: Storage> Checker<'a, S> {
    async fn new(storage: &'a S, header: Header, fix: CheckFix, limits: Limits) -> Result<Self, BlockError> {
        let l1 = read_words(storage, header.l1_offset, header.l1_size as usize).await?;
        let reftable =
            read_words(storage, header.reftable_offset, header.reftable_bytes() as usize / 8).await?;
        Ok(Checker::with(storage, header, l1, reftable, fix, limits))
    }

    /// With tables that were read.
    fn with(
        storage: &'a S,
        header: Header,
        l1: Vec<u64>,
        reftable: Vec<u64>,
        fix: CheckFix,
        limits: Limits,
    ) -> Self {
        let geo = header.geometry();
        Checker {
            storage,
            geo,
            fix,
            report: CheckReport::default(),
            snapshot_corruptions: 0,
            suppressed: 0,
            counts: Counts::new(geo.refcount_order(), limits.counters),
            past_end: PastEnd::default(),
            walked_file: 0,
            clusters: 0,
            l1: l1.into_iter().map(L1Entry).collect(),
            blocks: Blocks::new(geo, reftable),
            snapshots: Vec::new(),
            snapshots_bytes: 0,
            modified: false,
            rebuild: false,
            header,
        }
    }

    fn say(&mut self, line: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(line);
        } else {
            self.suppressed += 1;
        }
    }

    fn fixing(&self) -> bool {
        self.fix != CheckFix::NONE
    }

    /// "Repairing" or "ERROR".
    fn verb(&self) -> &'static str {
        if self.fix.errors { "Repairing" } else { "ERROR" }
    }

    async fn check(&mut self) -> Result<(), BlockError> {
        self.read_snapshots().await?;
        self.check_refcounts().await?;
        if self.fix_snapshots().await? {
            // The old table's clusters were given back; something damaged may have used them too.
            self.check_copied().await?;
        }
        if self.fixing() && self.report.check_errors == 0 && self.report.corruptions == 0 {
            self.clear_bits().await?;
        }
        Ok(())
    }

    async fn check_refcounts(&mut self) -> Result<(), BlockError> {
        self.clusters = self.file_clusters();
        if self.clusters > MAX_CLUSTERS {
            self.report.check_errors += 1;
            return Err(BlockError::new(Errno::EFBIG, "The file has too many clusters to be checked"));
        }
        self.report.total_clusters = self.geo.clusters(self.header.virtual_size());
        self.count_references(self.fix).await?;
        let before = self.report.clone();
        let mut highest = self.compare(CheckFix::NONE).await?;
        if self.rebuild && self.fix.errors {
            highest = self.rebuild_and_recount().await?;
        } else if self.fixing() {
            if self.rebuild {
                self.say("ERROR need to rebuild refcount structures".into());
                return Err(Errno::EIO.into());
            }
            if self.report.leaks != 0 || self.report.corruptions != 0 {
                let lines = std::mem::take(&mut self.report.messages);
                self.report = CheckReport { messages: lines, ..before };
                highest = self.compare(self.fix).await?;
            }
        }
        self.check_copied().await?;
        self.report.image_end_offset = (highest + 1) * self.geo.cluster_size();
        Ok(())
    }

    fn file_clusters(&self) -> u64 {
        self.geo.clusters(self.storage.size())
    }

    /// The file's length as QEMU's block layer sees it, whole sectors.
    fn file_len(&self) -> u64 {
        self.storage.size().next_multiple_of(512)
    }

    fn full(&mut self) -> BlockError {
        self.report.check_errors += 1;
        self.say("ERROR more distinct clusters are referred to than the memory for this check allows".into());
        Errno::ENOMEM.into()
    }

    /// Clears the dirty and corrupt bits after all is well.
    async fn clear_bits(&mut self) -> Result<(), BlockError> {
        let bits = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
        if self.modified {
            self.storage.flush().await?;
        }
        if self.header.incompatible & bits == 0 {
            return Ok(());
        }
        self.header.incompatible &= !bits;
        let word = self.header.incompatible.to_be_bytes();
        self.write(field::INCOMPATIBLE, &word).await?;
        self.storage.flush().await
    }

    /// Every write goes through here: what must be durable before the first change is made so.
    async fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        if !self.modified {
            self.modified = true;
            if self.header.version >= 3 && self.header.unknown_autoclear() != 0 {
                let known = self.header.autoclear & super::format::AUTOCLEAR_KNOWN;
                self.storage.write(field::AUTOCLEAR, &known.to_be_bytes()).await?;
                self.storage.flush().await?;
                self.header.autoclear = known;
            }
        }
        self.storage.write(offset, data).await
    }

    fn finish(mut self) -> CheckReport {
        if self.suppressed != 0 {
            let line = format!("({} more messages)", self.suppressed);
            self.report.messages.push(line);
        }
        self.report
    }
}

impl From<Full> for BlockError {
    fn from(_: Full) -> BlockError {
        Errno::ENOMEM.into()
    }
}

/// A table of big-endian words; `n` was validated.
async fn read_words<S: Storage>(storage: &S, offset: u64, n: usize) -> Result<Vec<u64>, BlockError> {
    // In pieces, so that the bytes and the words do not exist twice.
    let mut words = Vec::with_capacity(n);
    let mut piece = vec![0; (n * 8).min(1 << 20)];
    while words.len() < n {
        let len = ((n - words.len()) * 8).min(piece.len());
        storage.read(offset + words.len() as u64 * 8, &mut piece[..len]).await?;
        words.extend((0..len / 8).map(|i| be64(&piece, i * 8).unwrap_or(0)));
    }
    Ok(words)
}
