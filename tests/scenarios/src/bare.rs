//! One ring with memory of its own and no opinion on messages: for tests that do the set-up by hand.
//!
//! Called by tests that drive a stock front end or an order of their own, where `Disk` cannot be used because it comes
//! with a session.

use std::time::Duration;

use client::blk::SECTOR;
use client::memory::GuestMemory;
use client::queue::{Buffer, Queue};

/// Longest wait for a completion.
const LIMIT: Duration = Duration::from_secs(20);
/// Largest transfer of one request, in bytes.
const ROOM: u64 = 1 << 20;

/// Memory in two regions, a ring in the first, a buffer in the second.
#[derive(Debug)]
pub struct Bare {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The ring.
    pub queue: Queue,
    header: u64,
    data: u64,
}

impl Bare {
    /// A ring with this number and size.
    #[must_use]
    pub fn new(index: u16, size: u16) -> Self {
        let mut memory = GuestMemory::new(&[(0, 16 << 20), (4 << 30, 4 << 20)]).expect("guest memory");
        let queue = Queue::new(&mut memory, index, size).expect("a ring");
        let header = memory.allocate(32, 16).expect("room for a header");
        let data = memory.allocate_in(&[1], ROOM, 4096).expect("room for data");
        Self { memory, queue, header, data }
    }

    fn run(&mut self, op: u32, sector: u64, len: u32, device_writes: bool) -> u8 {
        let mut header = op.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        header.push(0xff);
        self.memory.write(self.header, &header).expect("the header lies in memory");
        let mut chain = vec![Buffer { addr: self.header, len: 16, write: false }];
        if len > 0 {
            chain.push(Buffer { addr: self.data, len, write: device_writes });
        }
        chain.push(Buffer { addr: self.header + 16, len: 1, write: true });
        let head = self.queue.add(&chain, false).expect("a free descriptor");
        self.queue.publish().expect("the kick is written");
        let used = self.queue.pop_within(LIMIT).unwrap_or_else(|e| panic!("request {op} at {sector}: {e}"));
        assert_eq!(used.id, u32::from(head));
        let mut status = [0];
        self.memory.read(self.header + 16, &mut status).expect("the status lies in memory");
        status[0]
    }

    /// Reads `len` bytes at byte `offset`.
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let status = self.run(client::blk::op::IN, offset / SECTOR, len as u32, true);
        assert_eq!(status, client::blk::status::OK, "read at {offset}");
        let mut out = vec![0; len];
        self.memory.read(self.data, &mut out).expect("the data lie in memory");
        out
    }

    /// Writes `data` at byte `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.memory.write(self.data, data).expect("the data lie in memory");
        let status = self.run(client::blk::op::OUT, offset / SECTOR, data.len() as u32, false);
        assert_eq!(status, client::blk::status::OK, "write at {offset}");
    }
}
