//! A device that completes everything at once: the yardstick for the front end itself.
//!
//! Used by the benchmark to show that its own side is not the limit, and by unit tests of the rings. It is the
//! least a device can legally do (fetch, walk the chain, read the header, write status and used element, one index
//! store per batch, notify as asked) and serves rings of our own making: it must not be taken for a backend.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::error::{Error, Result};
use crate::memory::{Cells, GuestMemory};
use crate::queue::{INDIRECT, NEXT, Queue};

/// The device's side of one ring whose buffers all lie in the ring's own region.
#[derive(Debug)]
pub struct Loopback {
    size: u16,
    base: u64,
    words: Cells<AtomicU64>,
    bytes: Cells<AtomicU8>,
    desc: u64,
    avail: Cells<AtomicU16>,
    used: Cells<AtomicU16>,
    used_ring: Cells<AtomicU32>,
    event_idx: bool,
    call: std::os::fd::OwnedFd,
    next: u16,
    /// Requests completed.
    pub completed: u64,
}

impl Loopback {
    /// Serves `queue`, which lies in `memory`; EVENT_IDX is taken from the queue.
    ///
    /// # Errors
    /// `Usage` when the ring is not in one region, `Io` when the call eventfd cannot be duplicated.
    pub fn new(memory: &GuestMemory, queue: &Queue) -> Result<Self> {
        let (desc, avail, used) = queue.addresses();
        let n = usize::from(queue.size());
        let region = memory.region(desc, 16 * n)?;
        // A device that polls wants no kicks. With EVENT_IDX it leaves avail_event alone: one kick in 65536 requests
        // is cheaper than another shared line per batch.
        let flags = region.cells::<AtomicU16>(used, 1)?;
        flags[0].store(1, Ordering::Relaxed);
        Ok(Self {
            size: queue.size(),
            base: region.gpa(),
            words: region.cells(region.gpa(), region.len() as usize / 8)?,
            bytes: region.cells(region.gpa(), region.len() as usize)?,
            desc: desc - region.gpa(),
            avail: region.cells(avail, n + 3)?,
            used: region.cells(used, 2)?,
            used_ring: region.cells(used + 4, 2 * n)?,
            event_idx: queue.event_idx,
            call: queue.call_fd().try_clone_to_owned().map_err(Error::io("duplicating the call eventfd"))?,
            next: 0,
            completed: 0,
        })
    }

    #[inline]
    fn descriptor(&self, table: u64, at: u16) -> (u64, u32, u16, u16) {
        let word = table as usize / 8 + 2 * usize::from(at);
        let (addr, rest) =
            (self.words[word].load(Ordering::Relaxed), self.words[word + 1].load(Ordering::Relaxed));
        (addr, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
    }

    /// Completes whatever is available; the number of requests. No kicks are asked for.
    pub fn poll(&mut self) -> u16 {
        let available = self.avail[1].load(Ordering::Acquire).wrapping_sub(self.next);
        if available == 0 {
            return 0;
        }
        let old = self.next;
        for _ in 0..available {
            let slot = usize::from(self.next & (self.size - 1));
            let head = self.avail[2 + slot].load(Ordering::Relaxed);
            let (mut table, mut at) = (self.desc, head);
            let (mut header, mut written) = (None, 0);
            loop {
                let (addr, len, flags, next) = self.descriptor(table, at);
                if flags & INDIRECT != 0 {
                    (table, at) = (addr - self.base, 0);
                    continue;
                }
                if header.is_none() {
                    let word = (addr - self.base) as usize / 8;
                    let kind = self.words[word].load(Ordering::Relaxed);
                    header = Some((kind, self.words[word + 1].load(Ordering::Relaxed)));
                }
                written += len;
                if flags & NEXT == 0 {
                    // The largest request type known is 14; anything else is a ring gone wrong.
                    let status = u8::from(header.is_none_or(|(kind, _)| kind > 14));
                    self.bytes[(addr - self.base) as usize].store(status, Ordering::Relaxed);
                    break;
                }
                at = next;
            }
            self.used_ring[2 * slot].store(u32::from(head), Ordering::Relaxed);
            self.used_ring[2 * slot + 1].store(written, Ordering::Relaxed);
            self.next = self.next.wrapping_add(1);
        }
        self.used[1].store(self.next, Ordering::Release);
        // Pairs with the driver's barrier in `Queue::request_interrupt`.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.avail[usize::from(self.size) + 2].load(Ordering::Relaxed);
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
        } else {
            self.avail[0].load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            let _ = rustix::io::write(&self.call, &1u64.to_ne_bytes());
        }
        self.completed += u64::from(available);
        available
    }

    /// Polls until `stop` is set.
    pub fn run(mut self, stop: &Arc<AtomicBool>) -> u64 {
        while !stop.load(Ordering::Relaxed) {
            if self.poll() == 0 {
                std::hint::spin_loop();
            }
        }
        self.completed
    }
}
