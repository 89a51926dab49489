//! Whether an image may still be written: not after a contradiction was found, not after a barrier failed (invariants I10,
//! I18).
//!
//! Asked by every write, set by whoever finds out. Barriers live here because their failure has no other way out.

use std::sync::atomic::{AtomicU8, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Mutex, PoisonError};

use graph::{BlockError, Errno, NodeIo, Result};

use super::write::both;

const FINE: u8 = 0;
/// A barrier failed: memory and disk may differ for ever.
const STOPPED: u8 = 1;
/// A contradiction was found; the corrupt bit is to be written.
const DAMAGED: u8 = 2;
/// The same, the bit was written or tried to.
const MARKED: u8 = 3;

/// Hears of contradictions: message, offset, size, fatal. As `NodeEvents::image_corrupted`.
pub(crate) type Alarm = Box<dyn Fn(&str, Option<u64>, Option<u64>, bool) + Send + Sync>;

/// See the module's page.
pub(crate) struct Health {
    state: AtomicU8,
    reason: Mutex<String>,
    alarm: Alarm,
    /// A read-only image is only complained about.
    writable: bool,
    complained: std::sync::atomic::AtomicBool,
}

impl Health {
    /// A sound image.
    pub(crate) fn new(writable: bool, alarm: Alarm) -> Health {
        Health {
            state: AtomicU8::new(FINE),
            reason: Mutex::default(),
            alarm,
            writable,
            complained: false.into(),
        }
    }

    /// Whether it may be written.
    #[inline]
    pub(crate) fn is_fine(&self) -> bool {
        self.state.load(Acquire) == FINE
    }

    /// The same, as an error with the reason.
    ///
    /// # Errors
    /// `EIO`.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_fine() {
            return Ok(());
        }
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(BlockError::new(Errno::EIO, reason))
    }

    fn set(&self, state: u8, reason: &str) -> bool {
        // Pairs with the Acquire loads of `is_fine` and `check`, and with the other exchanges.
        let first = self.state.compare_exchange(FINE, state, AcqRel, Acquire).is_ok();
        if first {
            *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason.to_owned();
        }
        first
    }

    /// A barrier failed, or the header is in a state nobody knows.
    pub(crate) fn stop(&self, why: &str) {
        if self.set(STOPPED, why) {
            log::error!("a qcow2 image takes no more writes: {why}");
        }
    }

    /// A contradiction was found; tells it once. The corrupt bit follows with [`super::Commits::mark`].
    pub(crate) fn damaged(&self, message: &str, offset: Option<u64>, size: Option<u64>) {
        if !self.writable {
            if !self.complained.swap(true, AcqRel) {
                log::warn!(
                    "qcow2: Image is corrupt: {message}; further non-fatal corruption events will be suppressed"
                );
                (self.alarm)(message, offset, size, false);
            }
            return;
        }
        if self.set(DAMAGED, message) {
            log::error!(
                "qcow2: Marking image as corrupt: {message}; further corruption events will be suppressed"
            );
            (self.alarm)(message, offset, size, true);
        }
    }

    /// True once after a contradiction was found.
    pub(crate) fn take_unmarked(&self) -> bool {
        self.state.compare_exchange(DAMAGED, MARKED, AcqRel, Acquire).is_ok()
    }

    /// Makes everything completed on the image file, and on the data file if given, durable.
    ///
    /// # Errors
    /// What the disk says; the image takes no more writes then.
    pub(crate) async fn barrier(&self, file: &NodeIo, data: Option<&NodeIo>) -> Result<()> {
        let result = match data {
            None => file.flush().await,
            Some(data) => match both(file.flush(), data.flush()).await {
                (Ok(()), second) => second,
                (first, _) => first,
            },
        };
        if let Err(e) = &result {
            self.stop(&format!("a flush of the image failed: {e}"));
        }
        result
    }
}
