//! The driver's half of a split ring over a [`Memory`], for this crate's tests: writes whatever a test asks for, sane or
//! not. Never compiled into the crate itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use crate::{GuestIov, Memory, QueueError, RingAddresses, SplitConfig, SplitQueue};

/// Difference between guest physical and user addresses in these tests.
pub const USER: u64 = 0x7f00_0000_0000;
/// Guest address of the rings.
pub const RINGS: u64 = 0x1000;
/// Guest address of 1 MiB for buffers and indirect tables.
pub const DATA: u64 = 0x10_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// `(address, length, flags, next)`.
pub type Desc = (u64, u32, u16, u16);

pub struct Driver {
    pub memory: Arc<Memory>,
    pub size: u16,
    pub avail_idx: u16,
}

pub fn descriptor(d: Desc) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&d.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&d.1.to_le_bytes());
    bytes[12..14].copy_from_slice(&d.2.to_le_bytes());
    bytes[14..].copy_from_slice(&d.3.to_le_bytes());
    bytes
}

impl Driver {
    /// Two MiB of guest memory, from 0.
    pub fn new(size: u16) -> Self {
        Self::over(Arc::new(Memory::anonymous(&[(0, USER, 2 << 20)]).unwrap()), size)
    }

    pub fn over(memory: Arc<Memory>, size: u16) -> Self {
        Self { memory, size, avail_idx: 0 }
    }

    pub fn avail(&self) -> u64 {
        RINGS + 16 * u64::from(self.size)
    }

    pub fn used(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    pub fn config(&self) -> SplitConfig {
        SplitConfig {
            size: u32::from(self.size),
            max_size: crate::MAX_QUEUE_SIZE,
            addresses: RingAddresses {
                descriptors: USER + RINGS,
                available: USER + self.avail(),
                used: USER + self.used(),
            },
            event_idx: true,
            indirect: true,
            last_avail: 0,
            used_idx: None,
        }
    }

    pub fn queue(&self) -> SplitQueue {
        SplitQueue::new(self.memory.clone(), &self.config()).unwrap()
    }

    pub fn set_u16(&self, gpa: u64, value: u16) {
        self.memory.write(gpa, &value.to_le_bytes()).unwrap();
    }

    pub fn get_u16(&self, gpa: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(gpa, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    pub fn desc(&self, index: u16, d: Desc) {
        self.memory.write(RINGS + 16 * u64::from(index), &descriptor(d)).unwrap();
    }

    pub fn table(&self, gpa: u64, table: &[Desc]) {
        for (i, d) in table.iter().enumerate() {
            self.memory.write(gpa + 16 * i as u64, &descriptor(*d)).unwrap();
        }
    }

    /// Puts `head` into the available ring and publishes it.
    pub fn offer(&mut self, head: u16) {
        self.set_u16(self.avail() + 4 + 2 * u64::from(self.avail_idx % self.size), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_u16(self.avail() + 2, self.avail_idx);
    }

    pub fn used_idx(&self) -> u16 {
        self.get_u16(self.used() + 2)
    }

    pub fn used_element(&self, slot: u16) -> (u32, u32) {
        let mut bytes = [0; 8];
        self.memory.read(self.used() + 4 + 8 * u64::from(slot), &mut bytes).unwrap();
        (
            u32::from_le_bytes(bytes[..4].try_into().unwrap()),
            u32::from_le_bytes(bytes[4..].try_into().unwrap()),
        )
    }

    pub fn set_used_event(&self, value: u16) {
        self.set_u16(self.avail() + 4 + 2 * u64::from(self.size), value);
    }

    pub fn avail_event(&self) -> u16 {
        self.get_u16(self.used() + 4 + 8 * u64::from(self.size))
    }
}

/// The guest address a segment starts at.
pub fn guest_address(memory: &Memory, iov: &GuestIov) -> u64 {
    memory.guest_of_host(iov.base()).expect("a segment outside guest memory")
}

/// Fetches everything there is: `(head, readable, writable)` with `(guest address, length)` each.
pub type Parsed = (u16, Vec<(u64, usize)>, Vec<(u64, usize)>);

pub fn take_all(queue: &mut SplitQueue) -> Result<Vec<Parsed>, QueueError> {
    let memory = queue.epoch().clone();
    let waiting = queue.fetch()?;
    let mut chain = crate::Chain::new();
    let mut all = Vec::new();
    while queue.pop(&mut chain)? {
        let list =
            |iovs: &[GuestIov]| iovs.iter().map(|i| (guest_address(&memory, i), i.len())).collect::<Vec<_>>();
        let sum = |iovs: &[GuestIov]| iovs.iter().map(|i| i.len() as u64).sum::<u64>();
        assert_eq!(sum(chain.readable()), chain.readable_len());
        assert_eq!(sum(chain.writable()), chain.writable_len());
        all.push((chain.head(), list(chain.readable()), list(chain.writable())));
    }
    assert_eq!(all.len(), usize::from(waiting));
    Ok(all)
}
