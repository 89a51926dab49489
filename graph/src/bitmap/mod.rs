//! Dirty bitmaps of a node: which parts changed since somebody last looked.
//!
//! [`Bitmap`] is one of them, in memory; [`BitmapSet`] all those of a node. Set by every successful or failed change through
//! the node (`io`), steered by the control channel, stored and loaded by drivers that can. A node with a recording bitmap takes
//! its changes off the fast path (`ViewNode::new`), so a set changes only in drained sections. Must not do I/O.

mod bits;
mod set;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{BlockError, Errno, Result};

use bits::Bits;
pub use set::BitmapSet;

/// Longest name, bytes; what fits into an image.
pub const MAX_BITMAP_NAME: usize = 1023;
/// Finest granularity, bytes.
pub const MIN_BITMAP_GRANULARITY: u32 = 512;
/// Coarsest granularity, bytes.
pub const MAX_BITMAP_GRANULARITY: u32 = 1 << 31;
/// Most memory one bitmap may take, bytes; also the most an image can hold.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Most memory all bitmaps of one node may take together, bytes.
pub const MAX_NODE_BITMAP_BYTES: u64 = 1 << 30;
/// Most bitmaps of a node; what an image can hold.
pub const MAX_BITMAPS: usize = 65535;

/// A dirty bitmap. All methods may be called from any thread.
#[derive(Debug)]
pub struct Bitmap {
    name: String,
    granularity: u32,
    bits: RwLock<Bits>,
    recording: AtomicBool,
    persistent: AtomicBool,
    inconsistent: AtomicBool,
    busy: AtomicBool,
    readonly: AtomicBool,
}

impl Bitmap {
    /// An empty bitmap over `size` bytes, recording, not persistent. `granularity` in bytes.
    ///
    /// # Errors
    /// A bad name or granularity in QEMU's words; too large.
    pub fn new(name: &str, granularity: u32, size: u64) -> Result<Bitmap> {
        if name.is_empty() {
            return Err(BlockError::invalid("Bitmap name cannot be empty"));
        }
        if name.len() > MAX_BITMAP_NAME {
            return Err(BlockError::invalid(format!("Bitmap name too long: {name}")));
        }
        if granularity < MIN_BITMAP_GRANULARITY {
            return Err(BlockError::invalid(format!(
                "Granularity must be at least {MIN_BITMAP_GRANULARITY}"
            )));
        }
        if !granularity.is_power_of_two() {
            return Err(BlockError::invalid("Granularity must be a power of 2"));
        }
        let bits = Bits::new(granularity.trailing_zeros(), size);
        if bits.bytes() > MAX_BITMAP_BYTES {
            let text =
                format!("A bitmap of granularity {granularity} is too large for a node of {size} bytes");
            return Err(BlockError::new(Errno::EFBIG, text));
        }
        Ok(Bitmap {
            name: name.to_owned(),
            granularity,
            bits: RwLock::new(bits),
            recording: AtomicBool::new(true),
            persistent: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            readonly: AtomicBool::new(false),
        })
    }

    fn bits(&self) -> RwLockReadGuard<'_, Bits> {
        self.bits.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn bits_mut(&self) -> RwLockWriteGuard<'_, Bits> {
        self.bits.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes one bit stands for.
    pub fn granularity(&self) -> u32 {
        self.granularity
    }

    /// Bytes the bitmap covers: the size of its node.
    pub fn size(&self) -> u64 {
        self.bits().size()
    }

    /// How many bits there are.
    pub fn granules(&self) -> u64 {
        self.bits().granules()
    }

    /// Whether changes of the node are recorded ("enabled").
    pub fn recording(&self) -> bool {
        self.recording.load(Relaxed)
    }

    /// Starts or stops recording. In a drained section, through [`crate::Graph`], once the bitmap belongs to a node.
    pub fn set_recording(&self, on: bool) {
        self.recording.store(on, Relaxed);
    }

    /// Whether it shall be stored in the image.
    pub fn persistent(&self) -> bool {
        self.persistent.load(Relaxed)
    }

    /// Makes it persistent or not.
    pub fn set_persistent(&self, on: bool) {
        self.persistent.store(on, Relaxed);
    }

    /// Whether its content is not known, as after a crash: it may only be removed.
    pub fn inconsistent(&self) -> bool {
        self.inconsistent.load(Relaxed)
    }

    /// Marks it as inconsistent.
    pub fn set_inconsistent(&self) {
        self.inconsistent.store(true, Relaxed);
        self.recording.store(false, Relaxed);
    }

    /// Whether an operation (a backup) uses it.
    pub fn busy(&self) -> bool {
        self.busy.load(Relaxed)
    }

    /// Marks it as used by an operation, or not.
    pub fn set_busy(&self, on: bool) {
        self.busy.store(on, Relaxed);
    }

    /// Whether it must not change: its image is read-only.
    pub fn readonly(&self) -> bool {
        self.readonly.load(Relaxed)
    }

    /// Forbids or allows changes.
    pub fn set_readonly(&self, on: bool) {
        self.readonly.store(on, Relaxed);
    }

    /// Marks a range of bytes, cut to the size.
    pub fn set(&self, offset: u64, len: u64) {
        self.bits().set(offset, len);
    }

    /// Unmarks every granule a range touches.
    pub fn clear(&self, offset: u64, len: u64) {
        self.bits().clear(offset, len);
    }

    /// Unmarks all.
    pub fn clear_all(&self) {
        let size = self.size();
        self.bits().clear(0, size);
    }

    /// Whether the granule of this byte is marked.
    pub fn is_dirty(&self, offset: u64) -> bool {
        self.bits().get(offset)
    }

    /// The first marked range at or after `offset` and before `end`: (offset, length) in bytes, cut to `offset..end` and to the
    /// size; at most `max` bytes long (`u64::MAX` for no limit).
    pub fn next_dirty(&self, offset: u64, end: u64, max: u64) -> Option<(u64, u64)> {
        self.bits().next_range(offset, end, max)
    }

    /// The marked bytes: whole granules, as QEMU counts.
    pub fn count(&self) -> u64 {
        self.bits().count() << self.granularity.trailing_zeros()
    }

    /// Whether [`Bitmap::merge`] would be refused.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn check_merge(&self, other: &Bitmap) -> Result<()> {
        let (into, from) = (self.size(), other.size());
        if into == from {
            return Ok(());
        }
        Err(BlockError::invalid(format!(
            "Bitmaps are of different sizes (destination size is {into}, source size is {from}) and can't be merged"
        )))
    }

    /// Marks what `other` marks; granularities may differ.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn merge(&self, other: &Bitmap) -> Result<()> {
        if std::ptr::eq(self, other) {
            return Ok(());
        }
        self.check_merge(other)?;
        let (mut at, end) = (0, self.size());
        while let Some((offset, len)) = other.next_dirty(at, end, u64::MAX) {
            self.set(offset, len);
            at = offset + len;
        }
        Ok(())
    }

    /// The node has another size. What is new is unmarked.
    ///
    /// # Errors
    /// Too large; nothing changes then.
    pub fn resize(&self, size: u64) -> Result<()> {
        let bits = &mut *self.bits_mut();
        let new = bits.resized(size);
        if new.bytes() > MAX_BITMAP_BYTES {
            return Err(self.too_large());
        }
        *bits = new;
        Ok(())
    }

    /// Bytes of the serialised form: one bit for each granule, rounded up to 8 bytes.
    pub fn serialised_len(&self) -> u64 {
        self.bits().bytes()
    }

    /// Writes bytes `at..at + out.len()` of the serialised form (little-endian 64-bit words: bit *i* of byte *j* is granule
    /// *8 j + i*); zeroes past its end. `at` is a multiple of 8.
    ///
    /// # Errors
    /// `EINVAL` for an `at` that is not.
    pub fn serialise(&self, at: u64, out: &mut [u8]) -> Result<()> {
        self.bits().store(at, out)
    }

    /// Whether bytes `at..at + len` of the serialised form hold no mark. `at` is a multiple of 8.
    pub fn serialised_is_zero(&self, at: u64, len: u64) -> bool {
        self.bits().is_zero(at, len)
    }

    /// Takes over bytes of the serialised form, in place of what was there; bits past the last granule are ignored.
    ///
    /// # Errors
    /// `EINVAL` for an `at` that is no multiple of 8.
    pub fn deserialise(&self, at: u64, from: &[u8]) -> Result<()> {
        self.bits().load(at, from)
    }

    /// Marks bytes `at..at + len` of the serialised form altogether. `at` is a multiple of 8.
    pub fn deserialise_ones(&self, at: u64, len: u64) {
        let shift = self.granularity.trailing_zeros();
        let bits = self.bits();
        let first = at.saturating_mul(8).min(bits.granules());
        let end = at.saturating_add(len).saturating_mul(8).min(bits.granules());
        bits.set(first << shift, (end - first) << shift);
    }

    fn too_large(&self) -> BlockError {
        BlockError::new(Errno::EFBIG, format!("Bitmap '{}' would become too large", self.name))
    }

    /// Bytes of memory over a node of another size.
    fn memory_at(&self, size: u64) -> u64 {
        bits::bytes(self.granularity.trailing_zeros(), size)
    }

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        self.bits().bytes()
    }
}

#[cfg(test)]
mod tests;
