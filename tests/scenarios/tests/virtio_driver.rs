//! The `virtio-driver` crate as an independent driver: its own idea of rings, messages and requests against ours.
//! Each combination of indirect descriptors and event index, on several queues, is compared with the image file.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// The crate takes addresses of buffers in memory that it shares with the device.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use client::memory::Region;
use ringblk_scenarios::{Rig, Rng, Wanted, pattern, read_at};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags as Blk, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

const QUEUES: usize = 4;
const QUEUE_SIZE: u16 = 128;
/// Bytes of one request.
const BLOCK: usize = 16 << 10;
/// Requests of one queue, each with a block of the disk and of memory of its own.
const BLOCKS: usize = 64;
const AREA: usize = BLOCK * BLOCKS;
const SIZE: u64 = (QUEUES * AREA) as u64;

/// A driver with its queues and one region of memory for all buffers.
struct Driver {
    transport: Box<VirtioBlkTransport>,
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    memory: Region,
}

impl Driver {
    fn connect(rig: &Rig, id: &str, features: VirtioFeatureFlags) -> Self {
        let socket = rig.socket(id).display().to_string();
        let features = features.bits() | (Blk::MQ | Blk::FLUSH | Blk::WRITE_ZEROES).bits();
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(&socket, features).unwrap());
        assert_eq!(transport.get_features() & features, features, "all of these are offered");
        let memory = Region::new(0, SIZE).unwrap();
        let address = memory.describe().user_addr as usize;
        transport.map_mem_region(address, SIZE as usize, memory.fd().as_raw_fd(), 0).unwrap();
        let queues = VirtioBlkQueue::setup_queues(transport.as_mut(), QUEUES, QUEUE_SIZE).unwrap();
        Self { transport, queues, memory }
    }

    fn run(&mut self, write: bool, order: &[usize]) {
        for queue in 0..QUEUES {
            for &block in order {
                let at = queue * AREA + block * BLOCK;
                let buffer = self.memory.describe().user_addr as usize + at;
                let q = &mut self.queues[queue];
                // SAFETY: the block lies inside `memory`, which outlives the requests (each is waited for below), and
                // each block belongs to one request at a time.
                let queued = unsafe {
                    if write {
                        q.write_raw(at as u64, buffer as *const u8, BLOCK, block)
                    } else {
                        q.read_raw(at as u64, buffer as *mut u8, BLOCK, block)
                    }
                };
                queued.unwrap();
            }
            self.notify(queue);
        }
        for queue in 0..QUEUES {
            let mut done = self.wait(queue, order.len());
            done.sort_unstable();
            let mut all = order.to_vec();
            all.sort_unstable();
            assert_eq!(done, all, "queue {queue} completes each request once");
        }
    }

    fn notify(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().unwrap();
        }
    }

    /// Waits for `count` completions of a queue; the contexts in the order they came.
    fn wait(&mut self, queue: usize, count: usize) -> Vec<usize> {
        let fd = self.transport.get_completion_fd(queue);
        let deadline = Instant::now() + Duration::from_secs(20);
        let q = &mut self.queues[queue];
        let mut done = Vec::new();
        q.set_used_notif_enabled(true);
        while done.len() < count {
            for completion in q.completions() {
                assert_eq!(completion.ret, 0, "queue {queue}, block {}", completion.context);
                done.push(completion.context);
            }
            if done.len() < count {
                assert!(Instant::now() < deadline, "queue {queue}: {} of {count} completions", done.len());
                let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
                if poll(&mut [PollFd::new(&*fd, PollFlags::IN)], Some(&limit)).unwrap() > 0 {
                    let _ = fd.read();
                }
            }
        }
        done
    }
}

fn round_trip(features: VirtioFeatureFlags) {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE).options("writable=on,num-queues=4")]);
    let mut driver = Driver::connect(&rig, "disk", features | VirtioFeatureFlags::VERSION_1);
    let config = driver.transport.get_config().unwrap();
    assert_eq!(config.capacity.to_native(), SIZE / 512);
    assert_eq!(usize::from(config.num_queues.to_native()), QUEUES);

    let data = pattern(1, SIZE as usize);
    driver.memory.write(0, &data).unwrap();
    // In an order of its own per half: the ring wraps in between, and neighbours are not adjacent on disk.
    let mut order: Vec<usize> = (0..BLOCKS).collect();
    let mut rng = Rng::new(features.bits());
    for at in (1..BLOCKS).rev() {
        order.swap(at, rng.below(at as u64 + 1) as usize);
    }
    // With chains in the ring a request takes three descriptors.
    for part in order.chunks(32) {
        driver.run(true, part);
    }
    assert!(read_at(&rig.image("disk"), 0, SIZE as usize) == data, "the image holds what was written");

    driver.memory.write(0, &vec![0; SIZE as usize]).unwrap();
    for part in order.chunks(32) {
        driver.run(false, part);
    }
    let mut back = vec![0; SIZE as usize];
    driver.memory.read(0, &mut back).unwrap();
    assert!(back == data, "the driver reads back what it wrote");

    // Zeroes over the second block of queue 1, then a flush; nothing beside it changes.
    let zeroed = AREA + BLOCK;
    driver.queues[1].write_zeroes(zeroed as u64, BLOCK as u64, true, 7).unwrap();
    driver.notify(1);
    assert_eq!(driver.wait(1, 1), [7]);
    driver.queues[2].flush(8).unwrap();
    driver.notify(2);
    assert_eq!(driver.wait(2, 1), [8]);
    let mut expected = data;
    expected[zeroed..zeroed + BLOCK].fill(0);
    assert!(read_at(&rig.image("disk"), 0, SIZE as usize) == expected, "zeroes where they were asked for");
    rig.assert_running();
}

#[test]
fn plain_chains() {
    round_trip(VirtioFeatureFlags::empty());
}

#[test]
fn indirect_descriptors() {
    round_trip(VirtioFeatureFlags::RING_INDIRECT_DESC);
}

#[test]
fn event_index() {
    round_trip(VirtioFeatureFlags::RING_EVENT_IDX);
}

#[test]
fn indirect_descriptors_and_event_index() {
    round_trip(VirtioFeatureFlags::RING_INDIRECT_DESC | VirtioFeatureFlags::RING_EVENT_IDX);
}

#[test]
fn event_index_past_the_wrap_of_all_indexes() {
    // 70 000 requests of depth one: avail and used indexes pass 65 535 with the event index deciding every kick and
    // every interrupt. A stale event index shows as a request nobody completes.
    let mut rig = Rig::start(&[
        Wanted::node("disk", "null-co,size=1048576,read-zeroes=on").options("writable=on,num-queues=4")
    ]);
    let features = VirtioFeatureFlags::RING_EVENT_IDX
        | VirtioFeatureFlags::RING_INDIRECT_DESC
        | VirtioFeatureFlags::VERSION_1;
    let mut driver = Driver::connect(&rig, "disk", features);
    let buffer = driver.memory.describe().user_addr as usize;
    for n in 0..70_000 {
        // SAFETY: the first block of `memory`, used by this request alone, which is waited for at once.
        unsafe { driver.queues[0].read_raw(0, buffer as *mut u8, 512, n) }.unwrap();
        driver.notify(0);
        assert_eq!(driver.wait(0, 1), [n]);
    }
    rig.assert_running();
}
