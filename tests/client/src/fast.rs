//! A driver with everything prepared once: the cheapest legal way to keep a vhost-user-blk ring busy.
//!
//! Used by the benchmark alone. Descriptors never change between requests of the same direction, so their cache
//! lines stay shared with the backend; per request only the header, the status byte and one available entry are
//! written. It must stay far cheaper than any backend, so it checks only what keeps itself sane.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::blk::op;
use crate::error::{Error, Result};
use crate::memory::{Cells, GuestMemory};
use crate::queue::{Descriptor, INDIRECT, NEXT, Queue, WRITE};

/// How a request lies in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Header, data, status as three descriptors of the ring.
    Direct,
    /// One descriptor pointing to a table of three, as Linux guests do.
    Indirect,
}

/// Status byte before the device writes it.
const UNWRITTEN: u8 = 0xff;

/// A ring with prepared request slots.
#[derive(Debug)]
pub struct FastQueue {
    queue: Queue,
    format: Format,
    slots: u16,
    headers: Cells<AtomicU64>,
    statuses: Cells<AtomicU8>,
    data: u64,
    block: u32,
    /// Direction the slot's data descriptor is prepared for: true = the guest writes the disk.
    writes: Vec<bool>,
    busy: Vec<bool>,
    in_flight: u16,
    /// Requests whose status byte was not 0.
    pub errors: u64,
}

/// Entries a ring needs for `slots` requests in this format.
#[must_use]
pub fn ring_size(slots: u16, format: Format) -> u16 {
    let wanted = match format {
        Format::Direct => slots.saturating_mul(3),
        Format::Indirect => slots,
    };
    wanted.clamp(2, 1 << 15).next_power_of_two()
}

impl FastQueue {
    /// Prepares `slots` requests of `block` bytes each on `queue`, all as reads.
    ///
    /// # Errors
    /// `Usage` when the ring is too small or memory is used up.
    pub fn new(
        queue: Queue,
        memory: &mut GuestMemory,
        slots: u16,
        block: u32,
        format: Format,
    ) -> Result<Self> {
        if slots == 0 || queue.size() < ring_size(slots, format) {
            return Err(Error::Usage(format!(
                "a ring of {} entries does not hold {slots} requests",
                queue.size()
            )));
        }
        let n = usize::from(slots);
        // A page each: neighbours in one line would be written by both sides for different reasons.
        let headers = memory.allocate(16 * n as u64, 4096)?;
        let statuses = memory.allocate(n as u64, 4096)?;
        let data = memory.allocate(u64::from(block) * n as u64, 4096)?;
        let mut this = Self {
            headers: memory.region(headers, 16 * n)?.cells(headers, 2 * n)?,
            statuses: memory.region(statuses, n)?.cells(statuses, n)?,
            queue,
            format,
            slots,
            data,
            block,
            writes: vec![false; n],
            busy: vec![false; n],
            in_flight: 0,
            errors: 0,
        };
        for slot in 0..slots {
            let chain = [
                Descriptor { addr: headers + 16 * u64::from(slot), len: 16, flags: NEXT, next: 0 },
                Descriptor::default(),
                Descriptor { addr: statuses + u64::from(slot), len: 1, flags: WRITE, next: 0 },
            ];
            match format {
                Format::Direct => {
                    this.queue.write_descriptor(3 * slot, &Descriptor { next: 3 * slot + 1, ..chain[0] });
                    this.queue.write_descriptor(3 * slot + 2, &chain[2]);
                }
                Format::Indirect => {
                    let table = this.queue.indirect_table(slot);
                    this.queue.write_table(table, 0, &Descriptor { next: 1, ..chain[0] })?;
                    this.queue.write_table(table, 2, &chain[2])?;
                    let pointer = Descriptor { addr: table, len: 48, flags: INDIRECT, next: 0 };
                    this.queue.write_descriptor(slot, &pointer);
                }
            }
            this.set_direction(slot, false)?;
        }
        Ok(this)
    }

    fn set_direction(&mut self, slot: u16, write: bool) -> Result<()> {
        let addr = self.data + u64::from(self.block) * u64::from(slot);
        let flags = NEXT | if write { 0 } else { WRITE };
        let mut descriptor = Descriptor { addr, len: self.block, flags, next: 2 };
        self.writes[usize::from(slot)] = write;
        match self.format {
            Format::Direct => {
                descriptor.next = 3 * slot + 2;
                self.queue.write_descriptor(3 * slot + 1, &descriptor);
                Ok(())
            }
            Format::Indirect => self.queue.write_table(self.queue.indirect_table(slot), 1, &descriptor),
        }
    }

    /// Adds the request of `slot` without publishing it. The slot must not be in flight.
    ///
    /// # Errors
    /// `Usage` when guest memory cannot be written, which does not happen after `new`.
    #[inline]
    pub fn submit(&mut self, slot: u16, write: bool, sector: u64) -> Result<()> {
        let at = usize::from(slot);
        if self.writes[at] != write {
            self.set_direction(slot, write)?;
        }
        self.headers[2 * at].store(u64::from(if write { op::OUT } else { op::IN }), Ordering::Relaxed);
        self.headers[2 * at + 1].store(sector, Ordering::Relaxed);
        self.statuses[at].store(UNWRITTEN, Ordering::Relaxed);
        self.busy[at] = true;
        self.in_flight += 1;
        self.queue.push_available(if self.format == Format::Direct { 3 * slot } else { slot });
        Ok(())
    }

    /// Publishes what was added and kicks if the device asks for it.
    ///
    /// # Errors
    /// `Io` when the kick fails.
    #[inline]
    pub fn publish(&mut self) -> Result<bool> {
        self.queue.publish()
    }

    /// Moves the slots of all completed requests to `done`, counting statuses that are not 0.
    ///
    /// # Errors
    /// `Protocol` when the device returns what is not in flight.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<u16>) -> Result<()> {
        let mut at = self.queue.last_used;
        let ready = self.queue.used_idx().wrapping_sub(at);
        if ready == 0 {
            return Ok(());
        }
        if ready > self.in_flight {
            return Err(Error::Protocol(format!("{ready} completions for {} requests", self.in_flight)));
        }
        for _ in 0..ready {
            let id = self.queue.used_element(at).id;
            let slot = if self.format == Format::Direct { id / 3 } else { id };
            match self.busy.get_mut(slot as usize) {
                Some(busy) if *busy => *busy = false,
                _ => return Err(Error::Protocol(format!("head {id} came back but is not in flight"))),
            }
            self.errors += u64::from(self.statuses[slot as usize].load(Ordering::Relaxed) != 0);
            done.push(slot as u16);
            at = at.wrapping_add(1);
        }
        self.queue.last_used = at;
        self.in_flight -= ready;
        Ok(())
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Slots prepared.
    #[must_use]
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// The ring below.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The ring below, for interrupts.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }
}
