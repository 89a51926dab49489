//! The bitmaps of one node.
//!
//! Filled by the driver while it opens (stored bitmaps) and by the control side in drained sections; marked by `io` on any
//! thread.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Bitmap, MAX_BITMAPS, MAX_NODE_BITMAP_BYTES};
use crate::error::{BlockError, Errno, Result};

/// All bitmaps of a node, in the order they were added.
#[derive(Debug, Default)]
pub struct BitmapSet {
    list: Mutex<Vec<Arc<Bitmap>>>,
    /// Whether there is one at all: most nodes have none and need not lock.
    any: AtomicBool,
}

impl BitmapSet {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Bitmap>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one.
    ///
    /// # Errors
    /// `Bitmap already exists: x`; too many; too large together.
    pub fn add(&self, bitmap: Bitmap) -> Result<Arc<Bitmap>> {
        let list = &mut *self.lock();
        if list.iter().any(|b| b.name() == bitmap.name()) {
            return Err(BlockError::new(Errno::EEXIST, format!("Bitmap already exists: {}", bitmap.name())));
        }
        if list.len() >= MAX_BITMAPS {
            return Err(BlockError::new(
                Errno::ENOMEM,
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        let memory = list.iter().map(|b| b.memory()).fold(bitmap.memory(), u64::saturating_add);
        if memory > MAX_NODE_BITMAP_BYTES {
            let text = "Not enough memory for another bitmap: remove one or take a coarser granularity";
            return Err(BlockError::new(Errno::ENOMEM, text));
        }
        let bitmap = Arc::new(bitmap);
        list.push(Arc::clone(&bitmap));
        self.any.store(true, Relaxed);
        Ok(bitmap)
    }

    /// Takes one out.
    pub fn remove(&self, name: &str) -> Option<Arc<Bitmap>> {
        let list = &mut *self.lock();
        let at = list.iter().position(|b| b.name() == name)?;
        let gone = list.remove(at);
        self.any.store(!list.is_empty(), Relaxed);
        Some(gone)
    }

    /// The one of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Bitmap>> {
        self.lock().iter().find(|b| b.name() == name).cloned()
    }

    /// All, in the order they were added.
    pub fn list(&self) -> Vec<Arc<Bitmap>> {
        self.lock().clone()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        !self.any.load(Relaxed)
    }

    /// Whether one records changes.
    pub fn recording(&self) -> bool {
        !self.is_empty() && self.lock().iter().any(|b| b.recording())
    }

    /// A change of the node's content at `offset` for `len` bytes has ended, well or not; the node is `size` bytes large now.
    #[inline]
    pub fn note_change(&self, offset: u64, len: u64, size: u64) {
        if !self.is_empty() {
            self.mark(offset, len, size);
        }
    }

    #[cold]
    fn mark(&self, offset: u64, len: u64, size: u64) {
        for bitmap in self.lock().iter() {
            // A write past the end has made the node larger.
            if bitmap.size() < size
                && let Err(e) = bitmap.resize(size)
            {
                // What it cannot cover it cannot answer for.
                log::error!("a bitmap is given up: {e}");
                bitmap.set_inconsistent();
            }
            if bitmap.recording() {
                bitmap.set(offset, len);
            }
        }
    }

    /// Those that shall be stored in the image.
    pub fn persistent(&self) -> Vec<Arc<Bitmap>> {
        if self.is_empty() {
            return Vec::new();
        }
        self.lock().iter().filter(|b| b.persistent()).cloned().collect()
    }

    /// The node has another size.
    ///
    /// # Errors
    /// One would become too large: it is inconsistent now.
    pub fn resize(&self, size: u64) -> Result<()> {
        let mut result = Ok(());
        for bitmap in self.lock().iter().filter(|b| b.size() != size) {
            if let Err(e) = bitmap.resize(size) {
                bitmap.set_inconsistent();
                result = Err(e);
            }
        }
        result
    }
}
