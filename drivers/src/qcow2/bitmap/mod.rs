//! Persistent dirty bitmaps: loaded when the image is opened, marked as in use while it is, stored when it is closed.
//!
//! Called by `open` and by the driver's face inside drained sections. In between, bitmaps are the graph's
//! ([`graph::BitmapSet`]), and the image holds what they were, marked as in use: whoever finds that mark knows that the
//! content cannot be trusted. So a crash makes bitmaps inconsistent and never silently stale.
//!
//! | step | order on disk |
//! |---|---|
//! | mark as in use | autoclear bit off, barrier, directory in place, barrier, autoclear bit on, barrier |
//! | store, remove | new data, tables and directory in new clusters with their refcounts, barrier, header, barrier, old ones given up |
//!
//! Bitmaps found in use are kept and named; they can only be removed. Must not change what the graph records.

mod load;
mod store;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graph::{Bitmap, BitmapSet, BlockError, Errno, NodeIo, Result};
use serde_json::{Value, json};

use super::format::bitmap::{
    self, DirEntry, FLAG_AUTO, FLAG_IN_USE, GRANULARITY_BITS, MAX_BITMAPS, MAX_DATA_BYTES,
    MAX_DIRECTORY_BYTES, MAX_NAME, MAX_TABLE_ENTRIES,
};
use super::node::{FILE, Qcow2};

pub(super) use load::{mark_in_use, read};

/// The bitmaps of an image.
pub(crate) struct Bitmaps {
    /// Those of the node.
    set: Arc<BitmapSet>,
    /// The directory as it is in the image.
    directory: Mutex<Vec<DirEntry>>,
}

impl Bitmaps {
    /// `directory`: as it is in the image now.
    pub(super) fn new(set: Arc<BitmapSet>, directory: Vec<DirEntry>) -> Bitmaps {
        Bitmaps { set, directory: Mutex::new(directory) }
    }

    fn directory(&self) -> MutexGuard<'_, Vec<DirEntry>> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `bitmaps` of the image information; `None` without any.
    pub(super) fn info(&self) -> Option<Value> {
        let directory = self.directory();
        let flags = |flags: u32| {
            let names = [(FLAG_IN_USE, "in-use"), (FLAG_AUTO, "auto")];
            names.into_iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| name).collect::<Vec<_>>()
        };
        let list: Vec<Value> = directory
            .iter()
            .map(|e| {
                json!({
                    "name": String::from_utf8_lossy(&e.name),
                    "granularity": 1u64 << e.granularity_bits,
                    "flags": flags(e.flags),
                })
            })
            .collect();
        (!list.is_empty()).then_some(Value::Array(list))
    }
}

impl Qcow2 {
    /// The directory as it is in the image.
    pub(super) fn bitmap_directory(&self) -> Vec<DirEntry> {
        self.bitmaps.directory().clone()
    }

    /// Says in the image that what it holds of the bitmaps does not count from now on.
    ///
    /// # Errors
    /// What the disk says; the image must not be written then.
    pub(super) async fn bitmaps_in_use(&self, io: &NodeIo) -> Result<()> {
        let mut directory = self.bitmap_directory();
        let file = io.child(FILE);
        mark_in_use(&file, &self.header, self.commits.health(), &mut directory).await?;
        *self.bitmaps.directory() = directory;
        Ok(())
    }

    /// Lets the node's stored bitmaps change, or not.
    pub(super) fn set_bitmaps_readonly(&self, readonly: bool) {
        self.bitmaps.set.persistent().iter().for_each(|b| b.set_readonly(readonly));
    }

    /// Whether one more bitmap can be stored.
    ///
    /// # Errors
    /// Why not, in QEMU's words.
    pub(super) fn can_store_bitmap(&self, name: &str, granularity: u32) -> Result<()> {
        if !self.geo.v3() {
            return Err(BlockError::unsupported("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        let bits = granularity.trailing_zeros() as u8;
        if name.len() > MAX_NAME {
            return Err(BlockError::invalid("Bitmap name is too long"));
        }
        if !granularity.is_power_of_two() || bits < *GRANULARITY_BITS.start() {
            let text = format!("Granularity exceeds minimum ({} bytes)", 1u64 << GRANULARITY_BITS.start());
            return Err(BlockError::invalid(text));
        }
        if bits > *GRANULARITY_BITS.end() {
            let text = format!("Granularity exceeds maximum ({} bytes)", 1u64 << GRANULARITY_BITS.end());
            return Err(BlockError::invalid(text));
        }
        let entries = bitmap::table_entries(self.size(), bits, self.geo);
        if bitmap::data_bytes(self.size(), bits) > MAX_DATA_BYTES || entries > u64::from(MAX_TABLE_ENTRIES) {
            let text = "Too much space will be occupied by the bitmap. Use larger granularity";
            return Err(BlockError::new(Errno::EFBIG, text));
        }
        let persistent = self.bitmaps.set.persistent();
        if persistent.len() >= MAX_BITMAPS as usize {
            return Err(BlockError::new(
                Errno::EFBIG,
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        let len = |name: &str| (bitmap::FIXED + name.len()).next_multiple_of(8) as u64;
        let directory: u64 = persistent.iter().map(|b| len(b.name())).sum();
        if directory + len(name) > MAX_DIRECTORY_BYTES {
            return Err(BlockError::new(Errno::EFBIG, "Not enough space in the bitmap directory"));
        }
        Ok(())
    }

    /// Whether the persistent bitmaps stand a change of the disk's size.
    ///
    /// # Errors
    /// One that cannot be changed.
    pub(super) fn bitmaps_allow_resize(&self) -> Result<()> {
        let refuse =
            |b: &Bitmap, why: &str| Err(BlockError::invalid(format!("Bitmap '{}' is {why}", b.name())));
        for bitmap in self.bitmaps.set.persistent() {
            if bitmap.busy() {
                return refuse(&bitmap, "currently in use by another operation and cannot be used");
            }
            if bitmap.readonly() {
                return refuse(&bitmap, "readonly and cannot be modified");
            }
            if bitmap.inconsistent() {
                return refuse(&bitmap, "inconsistent and cannot be used");
            }
        }
        Ok(())
    }
}
