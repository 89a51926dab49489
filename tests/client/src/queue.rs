//! The driver's side of a split virtqueue (virtio 1.3 §2.7), with raw access for hostile tests.
//!
//! Used by `disk` (whole requests), `fast` (benchmarks) and tests that write descriptors by hand. It keeps a legal
//! ring as long as only `add`, `publish` and `pop` are used; the `write_*` functions are the way to an illegal one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use crate::connection::wait;
use crate::error::{Error, Result};
use crate::memory::{Cells, GuestMemory, Region};
use crate::wire::VringAddr;

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Entries of the indirect table prepared for each descriptor.
pub const INDIRECT_ENTRIES: u16 = 256;

/// `used.flags`: the device needs no kick; `avail.flags`: the driver needs no interrupt.
const NO_NOTIFY: u16 = 1;

/// A descriptor (§2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// `NEXT`, `WRITE`, `INDIRECT`.
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// The two little-endian words in memory.
    #[must_use]
    pub fn words(&self) -> [u64; 2] {
        [self.addr, u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48]
    }
}

/// A buffer to put into a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the completed chain.
    pub id: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// The driver's side of one ring.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    size: u16,
    desc_gpa: u64,
    avail_gpa: u64,
    used_gpa: u64,
    indirect_gpa: u64,
    region: Region,
    pub(crate) desc: Cells<AtomicU64>,
    /// flags, idx, ring[size], used_event.
    pub(crate) avail: Cells<AtomicU16>,
    /// flags, idx.
    pub(crate) used: Cells<AtomicU16>,
    pub(crate) used_ring: Cells<AtomicU32>,
    avail_event: Cells<AtomicU16>,
    kick: OwnedFd,
    call: OwnedFd,
    pub(crate) event_idx: bool,
    /// Next available index, published or not.
    pub(crate) avail_idx: u16,
    published: u16,
    pub(crate) last_used: u16,
    free: Vec<u16>,
    /// Descriptors of the chain that starts here, while it is in flight.
    chains: Vec<Vec<u16>>,
    /// Times the kick eventfd was written.
    pub kicks: u64,
}

impl Queue {
    /// Lays a ring of `size` entries (power of two for a legal one) out in the first region with room.
    ///
    /// # Errors
    /// `Usage` when memory is used up, `Io` without eventfds.
    pub fn new(memory: &mut GuestMemory, index: u16, size: u16) -> Result<Self> {
        let entries = u64::from(size);
        let avail_at = 16 * entries;
        let used_at = (avail_at + 6 + 2 * entries).next_multiple_of(4096);
        let total = used_at + 6 + 8 * entries;
        let base = memory.allocate(total, 4096)?;
        let indirect_gpa = memory.allocate(entries * 16 * u64::from(INDIRECT_ENTRIES), 4096)?;
        let region = memory.region(base, total as usize)?.clone();
        let (avail_gpa, used_gpa) = (base + avail_at, base + used_at);
        let n = usize::from(size);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            index,
            size,
            desc_gpa: base,
            avail_gpa,
            used_gpa,
            indirect_gpa,
            desc: region.cells(base, 2 * n)?,
            avail: region.cells(avail_gpa, n + 3)?,
            used: region.cells(used_gpa, 2)?,
            used_ring: region.cells(used_gpa + 4, 2 * n)?,
            avail_event: region.cells(used_gpa + 4 + 8 * entries, 1)?,
            region,
            kick: eventfd(0, flags).map_err(Error::io("eventfd"))?,
            call: eventfd(0, flags).map_err(Error::io("eventfd"))?,
            event_idx: false,
            avail_idx: 0,
            published: 0,
            last_used: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); n],
            kicks: 0,
        })
    }

    /// Number of the ring.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The eventfd the driver writes.
    #[must_use]
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The eventfd the device writes.
    #[must_use]
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Guest addresses of descriptor table, available ring, used ring.
    #[must_use]
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.desc_gpa, self.avail_gpa, self.used_gpa)
    }

    /// What SET_VRING_ADDR says of this ring.
    #[must_use]
    pub fn vring_addr(&self) -> VringAddr {
        let described = self.region.describe();
        let user = |gpa: u64| gpa - described.guest_addr + described.user_addr;
        VringAddr {
            index: u32::from(self.index),
            flags: 0,
            desc: user(self.desc_gpa),
            used: user(self.used_gpa),
            avail: user(self.avail_gpa),
            log: self.used_gpa,
        }
    }

    /// Tells the ring whether EVENT_IDX was negotiated; polling drivers call `suppress_interrupts` afterwards.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
    }

    /// Adds a chain without publishing it. `indirect` puts the buffers into a table of their own.
    ///
    /// # Errors
    /// `Usage` when descriptors are used up or the chain is empty or too long.
    pub fn add(&mut self, buffers: &[Buffer], indirect: bool) -> Result<u16> {
        let wanted = if indirect { 1 } else { buffers.len() };
        let limit = if indirect { usize::from(INDIRECT_ENTRIES) } else { usize::from(self.size) };
        if buffers.is_empty() || buffers.len() > limit || self.free.len() < wanted {
            return Err(Error::Usage(format!("no descriptors for a chain of {}", buffers.len())));
        }
        let taken: Vec<u16> = self.free.split_off(self.free.len() - wanted);
        let head = taken.first().copied().unwrap_or_default();
        if indirect {
            let table = self.indirect_table(head);
            for (at, buffer) in (0u16..).zip(buffers) {
                let descriptor = link(buffer, at + 1, usize::from(at) + 1 == buffers.len());
                self.write_table(table, at, &descriptor)?;
            }
            let len = buffers.len() as u32 * 16;
            self.write_descriptor(head, &Descriptor { addr: table, len, flags: INDIRECT, next: 0 });
        } else {
            for (at, (buffer, &slot)) in buffers.iter().zip(&taken).enumerate() {
                let next = taken.get(at + 1).copied();
                self.write_descriptor(slot, &link(buffer, next.unwrap_or(0), next.is_none()));
            }
        }
        if let Some(chain) = self.chains.get_mut(usize::from(head)) {
            *chain = taken;
        }
        self.push_available(head);
        Ok(head)
    }

    /// Publishes everything added so far with one index store and kicks if the device asks for it. True if kicked.
    ///
    /// # Errors
    /// `Io` when the kick cannot be written.
    pub fn publish(&mut self) -> Result<bool> {
        let old = self.published;
        self.avail[1].store(self.avail_idx, Ordering::Release);
        self.published = self.avail_idx;
        // Pairs with the device's barrier between writing avail_event (or used.flags) and reading avail.idx again:
        // either it sees the new index, or we see that it wants a kick.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.avail_event[0].load(Ordering::Relaxed);
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < self.avail_idx.wrapping_sub(old)
        } else {
            self.used[0].load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted && old != self.avail_idx {
            self.kick()?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Writes the kick eventfd.
    ///
    /// # Errors
    /// `Io` when it cannot be written.
    pub fn kick(&mut self) -> Result<()> {
        self.kicks += 1;
        rustix::io::write(&self.kick, &1u64.to_ne_bytes())
            .map(drop)
            .map_err(Error::io("writing the kick eventfd"))
    }

    /// Takes the next completed chain and frees its descriptors.
    ///
    /// # Errors
    /// `Protocol` when the device returns a head that is not in flight or moves the index too far.
    pub fn pop(&mut self) -> Result<Option<Used>> {
        let pending = self.used_idx().wrapping_sub(self.last_used);
        if pending == 0 {
            return Ok(None);
        }
        if pending > self.size {
            return Err(Error::Protocol(format!("used index is {pending} ahead on a ring of {}", self.size)));
        }
        let used = self.used_element(self.last_used);
        let chain = usize::try_from(used.id)
            .ok()
            .and_then(|id| self.chains.get_mut(id))
            .map(std::mem::take)
            .unwrap_or_default();
        if chain.is_empty() {
            return Err(Error::Protocol(format!("head {} came back but is not in flight", used.id)));
        }
        self.free.extend(chain.into_iter().rev());
        self.last_used = self.last_used.wrapping_add(1);
        Ok(Some(used))
    }

    /// Waits for the next completed chain, asleep on the call eventfd.
    ///
    /// # Errors
    /// `Timeout`, and those of `pop`.
    pub fn pop_within(&mut self, limit: Duration) -> Result<Used> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(used) = self.pop()? {
                return Ok(used);
            }
            self.request_interrupt();
            if let Some(used) = self.pop()? {
                return Ok(used);
            }
            if !wait(self.call.as_fd(), PollFlags::IN, deadline)? {
                return Err(Error::Timeout { waiting_for: "completed request".into(), limit });
            }
            self.take_interrupts();
        }
    }

    /// Asks for an interrupt at the next completion. Look at the used ring once more before sleeping.
    pub fn request_interrupt(&mut self) {
        if self.event_idx {
            self.avail[usize::from(self.size) + 2].store(self.last_used, Ordering::Relaxed);
        } else {
            self.avail[0].store(0, Ordering::Relaxed);
        }
        // Pairs with the device's barrier between publishing used.idx and reading used_event (or avail.flags).
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts; with EVENT_IDX one still comes each time the index passes the event again.
    pub fn suppress_interrupts(&mut self) {
        if self.event_idx {
            self.avail[usize::from(self.size) + 2].store(self.last_used.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.avail[0].store(NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Reads the call eventfd empty; the number of interrupts since the last time.
    pub fn take_interrupts(&mut self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.call, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Chains in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.chains.iter().filter(|chain| !chain.is_empty()).count()
    }

    /// The published available index.
    #[must_use]
    pub fn available_idx(&self) -> u16 {
        self.published
    }

    /// The device's used index.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.used[1].load(Ordering::Acquire)
    }

    /// The used index up to which completions were taken.
    #[must_use]
    pub fn taken_idx(&self) -> u16 {
        self.last_used
    }

    /// The element that index `at` falls on.
    #[must_use]
    pub fn used_element(&self, at: u16) -> Used {
        let slot = 2 * usize::from(at & (self.size - 1));
        Used {
            id: self.used_ring[slot].load(Ordering::Relaxed),
            len: self.used_ring[slot + 1].load(Ordering::Relaxed),
        }
    }

    /// Guest address of the indirect table prepared for descriptor `head`.
    #[must_use]
    pub fn indirect_table(&self, head: u16) -> u64 {
        self.indirect_gpa + u64::from(head) * 16 * u64::from(INDIRECT_ENTRIES)
    }

    /// Raw: writes entry `at` of a table anywhere in the ring's region.
    ///
    /// # Errors
    /// `Usage` when that is outside.
    pub fn write_table(&self, table: u64, at: u16, descriptor: &Descriptor) -> Result<()> {
        let bytes: Vec<u8> = descriptor.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.region.write(table + 16 * u64::from(at), &bytes)
    }

    /// Raw: writes a descriptor of the ring's table.
    pub fn write_descriptor(&self, at: u16, descriptor: &Descriptor) {
        for (word, value) in descriptor.words().into_iter().enumerate() {
            self.desc[2 * usize::from(at) + word].store(value, Ordering::Relaxed);
        }
    }

    /// Raw: puts any head into the available ring and moves the local index; `publish` makes it visible.
    pub fn push_available(&mut self, head: u16) {
        self.avail[2 + usize::from(self.avail_idx & (self.size - 1))].store(head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Raw: writes the available index itself, without kicking.
    pub fn write_available_idx(&mut self, value: u16) {
        self.avail_idx = value;
        self.published = value;
        self.avail[1].store(value, Ordering::Release);
    }

    /// Raw: takes a used element without asking whether its head was in flight.
    pub fn pop_any(&mut self) -> Option<Used> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let used = self.used_element(self.last_used);
        self.last_used = self.last_used.wrapping_add(1);
        Some(used)
    }

    /// Starts over: both rings zeroed, all descriptors free, as after a guest reset.
    pub fn reset(&mut self) {
        self.avail.iter().chain(self.used.iter()).for_each(|cell| cell.store(0, Ordering::Relaxed));
        self.avail_event[0].store(0, Ordering::Relaxed);
        (self.avail_idx, self.published, self.last_used) = (0, 0, 0);
        self.free = (0..self.size).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
        self.take_interrupts();
    }
}

fn link(buffer: &Buffer, next: u16, last: bool) -> Descriptor {
    let flags = if buffer.write { WRITE } else { 0 } | if last { 0 } else { NEXT };
    Descriptor { addr: buffer.addr, len: buffer.len, flags, next: if last { 0 } else { next } }
}
