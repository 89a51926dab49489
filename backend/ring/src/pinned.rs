//! Guest memory that the kernel keeps at hand on one iothread: a guard around `Local::pin_memory`.
//!
//! Made by a queue for each memory epoch when its export asks for it. Must not outlive the epoch: it holds it.

use std::io;
use std::sync::Arc;

use host::Local;

use crate::Memory;

/// Keeps a memory epoch pinned for an iothread's operations on O_DIRECT files, until it is dropped.
pub struct Pinned {
    local: Local,
    /// What was pinned stays mapped as long as this.
    memory: Arc<Memory>,
}

impl Pinned {
    /// Pins all of an epoch. Takes its time: every page is brought in.
    ///
    /// # Errors
    /// As `Local::pin_memory`.
    pub fn new(local: &Local, memory: &Arc<Memory>) -> io::Result<Pinned> {
        let ranges = memory.host_ranges();
        // SAFETY: the mappings live as long as the Memory, which is held until the unpinning in `drop`; a Mapped never
        // changes what is mapped at its addresses (a page that vanished is replaced by a zero page after the front end
        // broke its memory, when its rings stop).
        unsafe { local.pin_memory(memory.epoch(), &ranges) }?;
        Ok(Pinned { local: local.clone(), memory: memory.clone() })
    }

    /// Unpins, and hands the epoch out: dropping the last of it unmaps guest memory, which takes its time.
    #[must_use = "dropping it here may unmap guest memory on an iothread"]
    pub fn release(self) -> Arc<Memory> {
        self.memory.clone()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.local.unpin_memory(self.memory.epoch());
    }
}
