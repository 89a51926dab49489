//! An open image: everything a request needs to find, and what ties the parts together.
//!
//! Made by `open`, used by `io` (requests), `table` (mapping), `alloc` (space), `commit` (order on disk), and by
//! snapshots, bitmaps and checks. What a part owns is behind its methods; nothing here is locked across waiting.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph::{BlockError, NodeIo, Pin};

use super::alloc::{Kinds, Space};
use super::bitmap::Bitmaps;
use super::cleaning::Cleaning;
use super::commit::{Commits, HeaderIo};
use super::format::snapshot::Snapshot;
use super::format::{Geometry, Header};
use super::io::decoded::Decoded;
use super::table::Tables;

/// Index of the child with the image file.
pub(crate) const FILE: usize = 0;

/// What was decided when the node was opened.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The node takes no writes.
    pub(crate) read_only: bool,
    /// Refcounts may be written late.
    pub(crate) lazy_refcounts: bool,
    /// Discards reach the image file.
    pub(crate) pass_discard_request: bool,
    /// What a deleted snapshot held is discarded.
    pub(crate) pass_discard_snapshot: bool,
    /// Other freed space is discarded.
    pub(crate) pass_discard_other: bool,
    /// A discarded cluster keeps its place.
    pub(crate) discard_no_unref: bool,
    /// Which metadata writes are checked against.
    pub(crate) guarded: Kinds,
    /// Memory for L2 slices, bytes.
    pub(crate) l2_cache_size: u64,
    /// Size of a slice, bytes.
    pub(crate) l2_slice_size: u64,
    /// Memory for clean refcount blocks, bytes.
    pub(crate) refcount_cache_size: u64,
    /// After how many seconds what was not used leaves the caches; 0: never.
    pub(crate) cache_clean_interval: u64,
    /// The data file is to be right on its own (`data_file_raw`).
    pub(crate) data_file_raw: bool,
}

/// Encryption of guest data.
#[derive(Clone)]
pub(crate) struct Crypt {
    /// The unlocked keys.
    pub(crate) volume: Arc<crate::luks::Volume>,
    /// Sectors are numbered by their place on the disk the guest sees (AES of long ago), not by that on the host.
    pub(crate) by_guest: bool,
}

impl Crypt {
    /// The number a sector of 512 bytes is enciphered under.
    pub(crate) fn sector(&self, guest: u64, host: u64) -> u64 {
        if self.by_guest { guest / 512 } else { host / 512 }
    }
}

/// A qcow2 node.
pub(crate) struct Qcow2 {
    /// Shape of the image.
    pub(crate) geo: Geometry,
    /// Virtual size, bytes.
    pub(crate) size: AtomicU64,
    /// The first cluster: what it says, and how it is changed.
    pub(crate) header: Arc<HeaderIo>,
    /// Where guest data lies.
    pub(crate) tables: Arc<Tables>,
    /// Host clusters.
    pub(crate) space: Arc<Space>,
    /// The order of things on disk.
    pub(crate) commits: Commits,
    /// Index of the child guest data lies in: [`FILE`] or the data file.
    pub(crate) data: usize,
    /// Index of the child with the external data file.
    pub(crate) data_file: Option<usize>,
    /// Index of the backing file; there may be no child.
    pub(crate) backing: Option<usize>,
    /// Size of the backing file, bytes; `NO_BACKING` if there is none now.
    pub(crate) backing_size: AtomicU64,
    /// What was decided at opening.
    pub(crate) settings: Settings,
    /// Encryption, where there is one.
    pub(crate) crypt: Option<Crypt>,
    /// Gives memory of the caches back.
    pub(crate) cleaning: Arc<Cleaning>,
    /// Compressed clusters that were decoded lately.
    pub(crate) decoded: Decoded,
    /// What the queries are told of the encryption.
    pub(crate) crypt_info: serde_json::Map<String, serde_json::Value>,
    /// The snapshot table.
    pub(crate) snapshots: Mutex<Vec<Snapshot>>,
    /// Dirty bitmaps, those in the image and those of the node.
    pub(crate) bitmaps: Bitmaps,
    /// The claim on the snapshot that is shown, where it is not the disk as it is now.
    pub(crate) reading: Option<Pin>,
    /// Such a node, on a file node that another one may be writing through.
    pub(crate) beside_writer: bool,
}

/// No backing file.
pub(crate) const NO_BACKING: u64 = u64::MAX;

impl Qcow2 {
    /// The header. Not to be held across waiting.
    pub(crate) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.header()
    }

    /// The snapshot table. Not to be held across waiting.
    pub(crate) fn snapshots(&self) -> MutexGuard<'_, Vec<Snapshot>> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Virtual size, bytes.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    /// Sets the virtual size; drained.
    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Release);
    }

    /// Size of the backing file, bytes; `None` if there is none.
    #[inline]
    pub(crate) fn backing_size(&self) -> Option<u64> {
        match self.backing_size.load(Acquire) {
            NO_BACKING => None,
            size => Some(size),
        }
    }

    /// Marks the image corrupt; the error to answer with.
    pub(crate) async fn corrupt(
        &self,
        io: &NodeIo,
        message: String,
        offset: Option<u64>,
        size: Option<u64>,
    ) -> BlockError {
        self.commits.corrupt(self, io, message, offset, size).await
    }
}
