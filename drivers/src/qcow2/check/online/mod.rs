//! A check that goes on while requests do. QEMU has none.
//!
//! Called through the driver by the check job, piece by piece; see `docs/decisions`, "checking an image in use".
//!
//! | phase | what | requests |
//! |---|---|---|
//! | snapshots | what does not change while it exists: snapshots, bitmaps, header | go on |
//! | tables | the active L1 and L2 tables, counted along with every change (`table/watch.rs`), compared with the disk | go on |
//! | blocks | refcount blocks against what was counted; those that agree and do not change any more are done | go on |
//! | end | everything in memory is written; refcount blocks that are not done, and tables in which something was odd | wait |
//!
//! So what requests wait for is the commit of what is dirty, and the part of the refcount blocks that is being allocated
//! from or freed to right then. Whatever is reported was seen at the end, when nothing moved: a find is never an accident
//! of timing. What is judged is the disk, after everything was written, and that memory says the same.
//!
//! Where snapshots are made or deleted, or the size changes, the check begins again.
//!
//! Memory: four bytes per host cluster in use, and 1–4 more per host cluster that snapshots or bitmaps refer to, as wide as the image's
//! refcounts; at most 512 MiB of each, an image that needs more is reported as not checkable. Besides, what every check needs.

mod blocks;
pub(in crate::qcow2) mod cells;
mod end;
mod walk;

use graph::options::Purpose;
use graph::{BlockError, CheckFix, CheckStep, Errno, NodeIo, OnlineCheck, Result};

use self::blocks::Verified;
use super::{Checker, Limits, NodeStorage, Storage};
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::table::watch::Turn;

/// Memory for the counters of what changes, and for those of what does not, bytes each.
const BUDGET: u64 = 512 << 20;

/// Where a checker is kept between two pieces: there is no way to the file then.
struct Nowhere;

static NOWHERE: Nowhere = Nowhere;

impl Storage for Nowhere {
    fn size(&self) -> u64 {
        0
    }

    async fn read(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        Err(Errno::EIO.into())
    }

    async fn write(&self, _offset: u64, _data: &[u8]) -> Result<()> {
        Err(Errno::EIO.into())
    }

    async fn flush(&self) -> Result<()> {
        Err(Errno::EIO.into())
    }

    async fn grow(&self, _size: u64) -> Result<()> {
        Err(Errno::EIO.into())
    }

    async fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Errno::EIO.into())
    }
}

impl<S: Storage> Checker<'_, S> {
    /// The same check on another storage.
    fn on<'b, T: Storage>(self, storage: &'b T) -> Checker<'b, T> {
        Checker {
            storage,
            header: self.header,
            geo: self.geo,
            fix: self.fix,
            report: self.report,
            snapshot_corruptions: self.snapshot_corruptions,
            suppressed: self.suppressed,
            counts: self.counts,
            past_end: self.past_end,
            walked_file: self.walked_file,
            clusters: self.clusters,
            l1: self.l1,
            blocks: self.blocks,
            snapshots: self.snapshots,
            snapshots_bytes: self.snapshots_bytes,
            modified: self.modified,
            rebuild: self.rebuild,
        }
    }
}

/// What is being looked at.
enum Phase {
    /// A snapshot's L1 table, from an entry on; `None`: it was not read yet.
    Snapshots { which: usize, table: Option<(Vec<u64>, usize)> },
    /// The table of this L1 entry.
    Tables(u64),
    /// This refcount block, in this round.
    Blocks { index: u64, round: u32 },
    /// All that is left.
    End,
}

/// A check between two pieces.
struct Online {
    checker: Option<Checker<'static, Nowhere>>,
    phase: Phase,
    generation: u64,
    /// L1 entries whose tables have to be looked at again.
    odd: Vec<u64>,
    verified: Verified,
    done: u64,
    total: u64,
    turn: Turn,
}

impl Qcow2 {
    /// See [`graph::Driver::check_online`].
    pub(in crate::qcow2) async fn check_piece(
        &self,
        io: &NodeIo,
        check: &mut OnlineCheck,
        drained: bool,
    ) -> Result<CheckStep> {
        if self.reading.is_some() {
            let text = "A node that reads a snapshot is not checked; the node that writes the image is";
            return Err(BlockError::invalid(text));
        }
        if io.node()?.options().purpose != Purpose::Use || !self.commits.is_fine() {
            // Nothing is written any more, or nobody else is there: the image as it is on disk.
            check.state = None;
            if !drained {
                return Ok(CheckStep::Drained);
            }
            return self.check_image(io, CheckFix::NONE).await.map(CheckStep::Done);
        }
        let kept = check.state.take().and_then(|s| s.downcast::<Online>().ok());
        let mut online = match kept {
            Some(online) if online.is_of(self) => online,
            old => {
                drop(old);
                Box::new(self.begin_online(io).await?)
            }
        };
        let storage = NodeStorage::new(io.child(FILE));
        let Some(kept) = online.checker.take() else { return Err(Errno::EIO.into()) };
        let mut checker = kept.on(&storage);
        let ended = online.piece(self, io, &mut checker, drained).await;
        let failed = |e: BlockError, checker: Checker<'_, NodeStorage>| {
            BlockError::from(super::CheckFailed { report: checker.finish(), error: e })
        };
        match ended {
            Err(e) => Err(failed(e, checker)),
            Ok(true) => {
                self.space.watch_counts(false);
                Ok(CheckStep::Done(checker.finish()))
            }
            Ok(false) => {
                (check.done, check.total) = (online.done, online.total.max(online.done));
                let step =
                    if matches!(online.phase, Phase::End) { CheckStep::Drained } else { CheckStep::More };
                online.checker = Some(checker.on(&NOWHERE));
                check.state = Some(online);
                Ok(step)
            }
        }
    }

    async fn begin_online(&self, io: &NodeIo) -> Result<Online> {
        let watch = self.tables.watch();
        let generation = watch.generation();
        let turn = watch.begin(self.geo, BUDGET);
        let turn = turn.ok_or_else(|| BlockError::new(Errno::EBUSY, "The image is being checked already"))?;
        let storage = NodeStorage::new(io.child(FILE));
        let limits = Limits { counters: BUDGET };
        let header = self.header().clone();
        let mut checker = Checker::with(&storage, header, Vec::new(), Vec::new(), CheckFix::NONE, limits);
        checker.read_snapshots().await?;
        checker.walked_file = if self.geo.data_file() { 0 } else { storage.size() };
        checker.clusters = checker.file_clusters();
        if checker.clusters > super::MAX_CLUSTERS {
            return Err(BlockError::new(Errno::EFBIG, "The file has too many clusters to be checked"));
        }
        checker.report.total_clusters = self.geo.clusters(self.size());
        checker.judge_snapshots();
        let entries = checker.snapshots.iter().map(|s| u64::from(s.l1_size)).sum::<u64>()
            + u64::from(self.tables.l1_len())
            + self.space.structures().table.iter().filter(|e| **e != 0).count() as u64;
        Ok(Online {
            checker: Some(checker.on(&NOWHERE)),
            phase: Phase::Snapshots { which: 0, table: None },
            generation,
            odd: Vec::new(),
            verified: Verified::default(),
            done: 0,
            total: entries * self.geo.cluster_size(),
            turn,
        })
    }
}

impl Online {
    /// Whether it is about this image as it is now: it may have been opened again with other options meanwhile.
    fn is_of(&self, node: &Qcow2) -> bool {
        let watch = node.tables.watch();
        self.turn.is_of(watch) && self.generation == watch.generation()
    }

    /// One piece; whether it was the last.
    async fn piece(
        &mut self,
        node: &Qcow2,
        io: &NodeIo,
        checker: &mut Checker<'_, NodeStorage>,
        drained: bool,
    ) -> Result<bool> {
        match &mut self.phase {
            Phase::Snapshots { .. } => self.snapshots(node, checker).await?,
            Phase::Tables(_) => self.tables(node, io, checker).await?,
            Phase::Blocks { .. } => self.blocks(node, io, checker).await?,
            Phase::End if !drained => {}
            Phase::End => {
                self.end(node, io, checker).await?;
                return Ok(true);
            }
        }
        if node.tables.watch().census().as_ref().is_some_and(|c| c.cells.is_full()) {
            return Err(checker.full());
        }
        Ok(false)
    }
}
