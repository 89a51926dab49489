//! Host clusters of an image: which are used, where new ones come from, when freed ones may be used again.
//!
//! Called by the request path, by snapshots and by `commit`. Memory is the truth, disk lags behind: nothing in here makes
//! anything durable but a new refcount block or table; the order in which the rest reaches the disk is `commit`'s.
//!
//! | file | subject |
//! |---|---|
//! | `blocks.rs` | refcount blocks in memory, with dirty sectors |
//! | `counts.rs` | loading blocks, reading and changing refcounts |
//! | `free.rs` | runs of clusters known to be free |
//! | `grow.rs` | new refcount blocks, a larger refcount table, a longer file |
//! | `looked.rs` | what a check beside requests sees of the refcounts |
//! | `extent.rs` | reserved runs per thread, for allocations that must not wait |
//! | `take.rs` | where an allocation comes from |
//! | `bytes.rs` | parts of clusters, for compressed data |
//! | `quarantine.rs` | from "unlinked" to "free" |
//! | `meta.rs` | where metadata lies, against overwriting it |
//!
//! **Order of locks**: `slow` (held across waiting) → `writes` (held across waiting) → `slots[i]` → `state` → `meta`. The last three are
//! std mutexes, held for a few instructions.

mod blocks;
mod bytes;
mod counts;
mod extent;
mod free;
mod grow;
mod looked;
mod meta;
mod quarantine;
mod take;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph::{BlockError, Epochs, Errno, Ticket};

use super::commit::HeaderIo;
use super::commit::Health;
use super::format::{Geometry, Header};

pub(crate) use meta::{Kind, Kinds, MetaMap};

use blocks::Blocks;
use extent::Slot;
use free::FreeMap;
use grow::Spare;

/// How many threads reserve extents of their own; further ones share.
const SLOTS: usize = 16;
/// First reservation of a thread, bytes.
const FIRST_EXTENT: u64 = 1 << 20;
/// Largest reservation of a thread, bytes. What is reserved leaks in a crash.
const LAST_EXTENT: u64 = 16 << 20;

/// Locks a leaf mutex. No code that can panic runs between two changes that belong together.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Host clusters that were allocated: refcount 1 in memory, nothing points to them yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Extent {
    /// Bytes in the file, a multiple of the cluster size.
    pub(crate) offset: u64,
    /// How many, at least 1.
    pub(crate) clusters: u64,
    /// Reads as zeroes, and nothing that was ever visible lies there: a mapping may be published before the data.
    pub(crate) zero: bool,
}

/// Why clusters are given up: decides whether the host is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum FreeKind {
    /// A discard or a write of zeroes (`pass-discard-request`).
    Request,
    /// A snapshot went (`pass-discard-snapshot`).
    Snapshot,
    /// Anything else: copy-on-write, metadata (`pass-discard-other`).
    Other,
    /// Never told.
    Keep,
}

/// Which discards reach the host.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PassDiscard {
    /// `pass-discard-request`.
    pub(crate) request: bool,
    /// `pass-discard-snapshot`.
    pub(crate) snapshot: bool,
    /// `pass-discard-other`.
    pub(crate) other: bool,
}

impl PassDiscard {
    fn passes(self, kind: FreeKind) -> bool {
        match kind {
            FreeKind::Request => self.request,
            FreeKind::Snapshot => self.snapshot,
            FreeKind::Other => self.other,
            FreeKind::Keep => false,
        }
    }
}

/// A reference that went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Freed {
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes; every cluster they touch loses one reference.
    pub(crate) bytes: u64,
    /// See there.
    pub(crate) kind: FreeKind,
}

/// What is fixed when an image is opened.
pub(crate) struct SpaceConfig {
    /// Shape of the image.
    pub(crate) geometry: Geometry,
    /// Entries of the refcount table, as on disk.
    pub(crate) reftable: Vec<u64>,
    /// Where the table lies, bytes.
    pub(crate) reftable_offset: u64,
    /// How long it is, clusters.
    pub(crate) reftable_clusters: u32,
    /// Most memory for refcount blocks that need not be kept, bytes (`refcount-cache-size`).
    pub(crate) cache_bytes: u64,
    /// Which discards reach the host.
    pub(crate) pass_discard: PassDiscard,
    /// Which metadata writes are checked against (`overlap-check`).
    pub(crate) guarded: Kinds,
    /// Refcounts are written at close only; the dirty bit says so (`lazy-refcounts`).
    pub(crate) lazy: bool,
}

/// What the leaf lock guards.
struct State {
    /// The refcount table as on disk, without the reserved bits; 0: no block.
    reftable: Vec<u64>,
    reftable_offset: u64,
    reftable_clusters: u64,
    blocks: Blocks,
    free: FreeMap,
    /// The first cluster past everything used; `None` until it was looked for.
    end: Option<u64>,
    /// Bytes of the file that are surely there.
    file_end: u64,
    /// Bytes of the file when it was first looked at.
    opened: u64,
    /// From this cluster on the file was grown by us and has never been written: it reads as zeroes.
    virgin: u64,
    /// Blocks whose free clusters below `end` are not in `free`.
    unscanned: BTreeSet<u64>,
    /// Gone in memory; perhaps not yet on disk.
    pending: Vec<Freed>,
    /// Gone on disk; perhaps still in use by a request.
    waiting: VecDeque<(Ticket, Vec<Freed>)>,
    /// Where the next compressed cluster goes, bytes; 0: in a fresh cluster.
    partial: u64,
}

impl State {
    /// For a refcount table that was read, and its place (bytes, clusters).
    fn new(blocks: Blocks, reftable: Vec<u64>, place: (u64, u64)) -> State {
        State {
            blocks,
            reftable,
            reftable_offset: place.0,
            reftable_clusters: place.1,
            free: FreeMap::default(),
            end: None,
            file_end: 0,
            opened: 0,
            virgin: u64::MAX,
            unscanned: BTreeSet::new(),
            pending: Vec::new(),
            waiting: VecDeque::new(),
            partial: 0,
        }
    }
}

/// Header, refcount table and refcount blocks.
fn structures(geo: Geometry, reftable: &[u64], offset: u64, clusters: u32) -> MetaMap {
    let mut meta = MetaMap::new(geo.cluster_bits());
    meta.add(Kind::Header, 0, geo.cluster_size());
    meta.add(Kind::RefcountTable, offset, u64::from(clusters) << geo.cluster_bits());
    for block in reftable.iter().filter(|b| **b != 0) {
        meta.add(Kind::RefcountBlock, *block, geo.cluster_size());
    }
    meta
}

/// See the module's page. One per image, used from all iothreads.
pub(crate) struct Space {
    geo: Geometry,
    pass_discard: PassDiscard,
    lazy: bool,
    state: Mutex<State>,
    /// Whoever loads, creates, grows or releases.
    slow: host::sync::Mutex<()>,
    /// Writers of refcount blocks: two copies of one sector must not overtake each other.
    writes: host::sync::Mutex<()>,
    slots: [Mutex<Slot>; SLOTS],
    meta: Mutex<MetaMap>,
    /// Which metadata writes are checked against.
    guarded: Kinds,
    /// See there; touched with `slow` held.
    spare: Mutex<Option<Spare>>,
    epochs: Arc<Epochs>,
    health: Arc<Health>,
    header: Arc<HeaderIo>,
}

impl Space {
    /// The space of an image whose header and refcount table were read and checked.
    pub(crate) fn new(
        config: SpaceConfig,
        epochs: Arc<Epochs>,
        health: Arc<Health>,
        header: Arc<HeaderIo>,
    ) -> Space {
        let geo = config.geometry;
        let meta = structures(geo, &config.reftable, config.reftable_offset, config.reftable_clusters);
        let state = State::new(
            Blocks::new(geo, config.cache_bytes),
            config.reftable,
            (config.reftable_offset, config.reftable_clusters.into()),
        );
        Space {
            geo,
            pass_discard: config.pass_discard,
            lazy: config.lazy,
            state: Mutex::new(state),
            slow: host::sync::Mutex::new(()),
            writes: host::sync::Mutex::new(()),
            slots: std::array::from_fn(|_| Mutex::new(Slot::default())),
            meta: Mutex::new(meta),
            guarded: config.guarded,
            spare: Mutex::new(None),
            epochs,
            health,
            header,
        }
    }

    /// The image was changed behind our back: what was known of it is forgotten. Drained, settled; other metadata than the
    /// refcounts' own has to be placed again.
    pub(crate) fn read_again(&self, header: &Header, reftable: Vec<u64>) {
        let meta = structures(self.geo, &reftable, header.reftable_offset, header.reftable_clusters);
        let place = (header.reftable_offset, header.reftable_clusters.into());
        {
            let mut state = lock(&self.state);
            let blocks = state.blocks.emptied();
            *state = State::new(blocks, reftable, place);
        }
        *lock(&self.meta) = meta;
        *lock(&self.spare) = None;
    }

    /// Whether refcounts stay in memory until the image is closed.
    pub(crate) fn lazy(&self) -> bool {
        self.lazy
    }

    /// Notes that metadata lies somewhere from now on.
    pub(crate) fn add_metadata(&self, kind: Kind, offset: u64, bytes: u64) {
        lock(&self.meta).add(kind, offset, bytes);
    }

    /// Notes that metadata lies there no longer.
    pub(crate) fn remove_metadata(&self, offset: u64, bytes: u64) {
        lock(&self.meta).remove(offset, bytes);
    }

    /// Which metadata lies in a range, as far as it is wanted to be known (`overlap-check`); `own` is what is to be written there.
    pub(crate) fn overlap(&self, offset: u64, bytes: u64, own: Kinds) -> Option<Kind> {
        let kinds = self.guarded.without(own);
        if kinds == Kinds::NONE { None } else { lock(&self.meta).overlap(offset, bytes, kinds) }
    }

    /// Before metadata is written: the image is damaged if other metadata lies there.
    ///
    /// # Errors
    /// `EIO`, and the image takes no more writes.
    pub(crate) fn guard(&self, offset: u64, bytes: u64, own: Kinds) -> Result<(), BlockError> {
        let Some(kind) = self.overlap(offset, bytes, own) else { return Ok(()) };
        let message = format!("Preventing invalid write on metadata (overlaps with {kind})");
        self.health.damaged(&message, Some(offset), Some(bytes));
        Err(BlockError::new(Errno::EIO, message))
    }

    /// Whether a cluster outside of the header is where no metadata lies; otherwise the image is damaged.
    fn check_fresh(&self, first: u64, clusters: u64) -> Result<(), BlockError> {
        let bits = self.geo.cluster_bits();
        // Whatever is wanted: it costs nothing here.
        let hit = match first {
            0 => Some(Kind::Header),
            _ => lock(&self.meta).overlap(first << bits, clusters << bits, Kinds::ALL),
        };
        let Some(kind) = hit else { return Ok(()) };
        let message = format!(
            "Preventing invalid allocation of a cluster at offset {:#x} (overlaps with {kind})",
            first << bits
        );
        self.health.damaged(&message, Some(first << bits), Some(clusters << bits));
        Err(BlockError::new(Errno::EIO, message))
    }
}
