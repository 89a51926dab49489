//! The bitmaps of one node.
//!
//! Filled by the driver while it opens (stored bitmaps) and by the control side in drained sections; marked by `io` on any
//! thread.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Bitmap, MAX_BITMAP_BYTES, MAX_BITMAPS, MAX_NODE_BITMAP_BYTES};
use crate::error::{BlockError, Errno, Result};

/// What an image with as many bitmaps as it may have makes too slow to look up one by one.
#[derive(Debug, Default)]
struct Members {
    list: Vec<Arc<Bitmap>>,
    names: HashSet<String>,
    /// Bytes all of them take.
    memory: u64,
}

/// All bitmaps of a node, in the order they were added.
#[derive(Debug, Default)]
pub struct BitmapSet {
    members: Mutex<Members>,
    /// Whether there is one at all: most nodes have none and need not lock.
    any: AtomicBool,
}

impl Members {
    /// After sizes have changed.
    fn count_memory(&mut self) {
        self.memory = self.list.iter().map(|b| b.memory()).fold(0, u64::saturating_add);
    }
}

impl BitmapSet {
    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one.
    ///
    /// # Errors
    /// `Bitmap already exists: x`; too many; too large together.
    pub fn add(&self, bitmap: Bitmap) -> Result<Arc<Bitmap>> {
        let members = &mut *self.lock();
        if members.names.contains(bitmap.name()) {
            return Err(BlockError::new(Errno::EEXIST, format!("Bitmap already exists: {}", bitmap.name())));
        }
        if members.list.len() >= MAX_BITMAPS {
            return Err(BlockError::new(
                Errno::ENOMEM,
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        let memory = members.memory.saturating_add(bitmap.memory());
        if memory > MAX_NODE_BITMAP_BYTES {
            let text = "Not enough memory for another bitmap: remove one or take a coarser granularity";
            return Err(BlockError::new(Errno::ENOMEM, text));
        }
        let bitmap = Arc::new(bitmap);
        members.memory = memory;
        members.names.insert(bitmap.name().to_owned());
        members.list.push(Arc::clone(&bitmap));
        self.any.store(true, Relaxed);
        Ok(bitmap)
    }

    /// Takes one out.
    pub fn remove(&self, name: &str) -> Option<Arc<Bitmap>> {
        let members = &mut *self.lock();
        if !members.names.remove(name) {
            return None;
        }
        let at = members.list.iter().position(|b| b.name() == name)?;
        let gone = members.list.remove(at);
        members.memory = members.memory.saturating_sub(gone.memory());
        self.any.store(!members.list.is_empty(), Relaxed);
        Some(gone)
    }

    /// The one of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Bitmap>> {
        self.lock().list.iter().find(|b| b.name() == name).cloned()
    }

    /// All, in the order they were added.
    pub fn list(&self) -> Vec<Arc<Bitmap>> {
        self.lock().list.clone()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        !self.any.load(Relaxed)
    }

    /// Whether one records changes.
    pub fn recording(&self) -> bool {
        !self.is_empty() && self.lock().list.iter().any(|b| b.recording())
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
        let members = &mut *self.lock();
        let mut grown = false;
        for bitmap in &members.list {
            // A write past the end has made the node larger.
            if bitmap.size() < size {
                grown = true;
                if let Err(e) = bitmap.resize(size) {
                    // What it cannot cover it cannot answer for.
                    log::error!("a bitmap is given up: {e}");
                    bitmap.set_inconsistent();
                }
            }
            if bitmap.recording() {
                bitmap.set(offset, len);
            }
        }
        if grown {
            members.count_memory();
        }
    }

    /// Those that shall be stored in the image.
    pub fn persistent(&self) -> Vec<Arc<Bitmap>> {
        if self.is_empty() {
            return Vec::new();
        }
        self.lock().list.iter().filter(|b| b.persistent()).cloned().collect()
    }

    /// Whether all of them can follow the node to another size.
    ///
    /// # Errors
    /// One would become too large, or all of them together.
    pub fn check_resize(&self, size: u64) -> Result<()> {
        let mut memory = 0u64;
        for bitmap in &self.lock().list {
            let bytes = bitmap.memory_at(size);
            if bytes > MAX_BITMAP_BYTES {
                return Err(bitmap.too_large());
            }
            memory = memory.saturating_add(bytes);
        }
        if memory > MAX_NODE_BITMAP_BYTES {
            let text = "The bitmaps of the node would become too large together: remove one first";
            return Err(BlockError::new(Errno::ENOMEM, text));
        }
        Ok(())
    }

    /// The node has another size.
    ///
    /// # Errors
    /// One would become too large: it is inconsistent now.
    pub fn resize(&self, size: u64) -> Result<()> {
        let mut result = Ok(());
        let members = &mut *self.lock();
        for bitmap in members.list.iter().filter(|b| b.size() != size) {
            if let Err(e) = bitmap.resize(size) {
                bitmap.set_inconsistent();
                result = Err(e);
            }
        }
        members.count_memory();
        result
    }
}
