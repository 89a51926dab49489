//! A guest that writes and reads all the time on two queues and knows what must come back.
//!
//! Runs on a thread of its own until it is told to end. Every block belongs to one queue and holds its number and the
//! number of its last write; a block is in one request at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Instant;

use client::Disk;
use client::blk::{Segment, op};
use client::disk::{Completion, Payload, Request, Token};
use ringblk_scenarios::Rng;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Requests in flight per queue.
const DEPTH: usize = 8;

/// What the load tells while it runs.
#[derive(Debug, Default)]
pub struct Shared {
    end: AtomicBool,
    done: AtomicU64,
    /// The longest a request took since this was last taken, ns.
    longest: AtomicU64,
}

/// The running guest.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<(Disk, Vec<u64>)>>,
}

enum Doing {
    Write { block: u64, version: u64 },
    Zero { block: u64 },
    Read { block: u64 },
    Flush,
}

/// What block `block` holds after write number `version`; zeroes for number 0.
#[must_use]
pub fn content(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK as usize];
    }
    let mut out = Vec::with_capacity(BLOCK as usize);
    while out.len() < BLOCK as usize {
        out.extend_from_slice(&block.to_le_bytes());
        out.extend_from_slice(&version.to_le_bytes());
    }
    out
}

struct Guest {
    disk: Disk,
    queues: u16,
    shared: Arc<Shared>,
    /// By block: the number of the last write that completed.
    versions: Vec<u64>,
    busy: Vec<bool>,
    doing: Vec<(Token, Instant, Doing)>,
    rng: Rng,
    made: u64,
}

impl Guest {
    fn start(&mut self, queue: u16) {
        let blocks = self.versions.len() as u64;
        let block = loop {
            let block =
                self.rng.below(blocks / u64::from(self.queues)) * u64::from(self.queues) + u64::from(queue);
            if !self.busy[block as usize] {
                break block;
            }
        };
        let sector = block * BLOCK / 512;
        self.made += 1;
        let (request, doing) = match self.rng.below(100) {
            0..=44 => {
                let data = content(block, self.made);
                (
                    Request::new(op::OUT, sector, Payload::Out(data)),
                    Doing::Write { block, version: self.made },
                )
            }
            45..=49 => {
                let segment = Segment { sector, sectors: (BLOCK / 512) as u32, flags: 0 };
                (
                    Request::new(op::WRITE_ZEROES, 0, Payload::Out(segment.encode().to_vec())),
                    Doing::Zero { block },
                )
            }
            50 => (Request::new(op::FLUSH, 0, Payload::None), Doing::Flush),
            _ => (Request::new(op::IN, sector, Payload::In(BLOCK as u32)), Doing::Read { block }),
        };
        if !matches!(doing, Doing::Flush) {
            self.busy[block as usize] = true;
        }
        let token = self.disk.submit(queue, &request).unwrap();
        self.doing.push((token, Instant::now(), doing));
    }

    fn finish(&mut self, done: &Completion) {
        let at = self.doing.iter().position(|(t, ..)| *t == done.token).unwrap();
        let (_, since, doing) = self.doing.swap_remove(at);
        self.shared.longest.fetch_max(since.elapsed().as_nanos() as u64, Relaxed);
        self.shared.done.fetch_add(1, Relaxed);
        let free = |busy: &mut Vec<bool>, block: u64| busy[block as usize] = false;
        match doing {
            Doing::Flush => assert_eq!(done.status, 0, "a flush failed"),
            Doing::Write { block, version } => {
                assert_eq!(done.status, 0, "write {version} of block {block} failed");
                self.versions[block as usize] = version;
                free(&mut self.busy, block);
            }
            Doing::Zero { block } => {
                assert_eq!(done.status, 0, "zeroing block {block} failed");
                self.versions[block as usize] = 0;
                free(&mut self.busy, block);
            }
            Doing::Read { block } => {
                assert_eq!(done.status, 0, "a read of block {block} failed");
                let version = self.versions[block as usize];
                if done.data != content(block, version) {
                    let word = |i: usize| u64::from_le_bytes(done.data[i..i + 8].try_into().unwrap());
                    panic!("block {block} holds ({}, {}), not version {version}", word(0), word(8));
                }
                free(&mut self.busy, block);
            }
        }
    }

    fn run(mut self) -> (Disk, Vec<u64>) {
        let mut last = Instant::now();
        loop {
            let ending = self.shared.end.load(Relaxed);
            if ending && self.doing.is_empty() {
                return (self.disk, self.versions);
            }
            let mut any = false;
            for queue in 0..self.queues {
                while let Some(done) = self.disk.poll(queue).unwrap() {
                    self.finish(&done);
                    any = true;
                }
                let running = self.doing.iter().filter(|(t, ..)| t.queue == queue).count();
                if !ending && running < DEPTH {
                    (running..DEPTH).for_each(|_| self.start(queue));
                    self.disk.kick(queue).unwrap();
                }
            }
            if any {
                last = Instant::now();
            } else {
                assert!(last.elapsed().as_secs() < 60, "no request completes any more");
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
        }
    }
}

impl Load {
    /// Starts on a disk of `size` bytes that holds zeroes.
    #[must_use]
    pub fn start(disk: Disk, size: u64, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let blocks = (size / BLOCK) as usize;
        let guest = Guest {
            queues: disk.session().setup().queues,
            disk,
            shared: shared.clone(),
            versions: vec![0; blocks],
            busy: vec![false; blocks],
            doing: Vec::new(),
            rng: Rng::new(seed),
            made: 0,
        };
        let thread = std::thread::spawn(move || guest.run());
        Self { shared, thread: Some(thread) }
    }

    /// Requests that have completed.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.shared.done.load(Relaxed)
    }

    /// The longest a request took since the last call, ns.
    #[must_use]
    pub fn take_longest(&self) -> u64 {
        self.shared.longest.swap(0, Relaxed)
    }

    /// Fails if the guest has failed.
    pub fn check(&mut self) {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.end();
            panic!("the guest has ended");
        }
    }

    /// Ends; the disk, and the number of the last write of each block. Everything is read once more.
    pub fn end(&mut self) -> (Disk, Vec<u64>) {
        self.shared.end.store(true, Relaxed);
        let thread = self.thread.take().expect("it runs");
        let (mut disk, versions) = match thread.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        for (block, version) in versions.iter().enumerate() {
            let data = disk.read(block as u64 * BLOCK, BLOCK as u32).unwrap();
            assert!(data == content(block as u64, *version), "block {block} is not at version {version}");
        }
        (disk, versions)
    }
}
