//! The daemon is killed under load, again and again, and started anew: each accepted request is completed exactly once, the
//! data are right, nothing gets stuck. A head that came back twice is an error of the client's ring, one that never came a
//! timeout.
//!
//! `RINGBLK_CRASHES` sets the number of kills of each test; the default suits a run per change, 1000 a release.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use client::blk::{op, status};
use client::daemon::Launch;
use client::disk::{Completion, Payload, Request, Token};
use client::session::Order;
use client::wire::protocol;
use client::{Daemon, Disk, Setup};
use ringblk_scenarios::{Rng, image, pattern, read_at, rig};
use rustix::process::{Pid, Signal, kill_process};

const SIZE: u64 = 1 << 20;
const BLOCK: usize = 4096;
const BLOCKS: usize = SIZE as usize / BLOCK;
const DEPTH: usize = 24;
const LIMIT: Duration = Duration::from_secs(20);

fn crashes() -> u64 {
    std::env::var("RINGBLK_CRASHES").ok().and_then(|n| n.parse().ok()).unwrap_or(20)
}

fn setup(order: Order, queues: u16) -> Setup {
    Setup {
        order,
        queues,
        queue_size: 64,
        memory: vec![(0, 8 << 20), (4 << 30, 4 << 20)],
        ..Setup::default()
    }
}

/// A daemon that can be started again as it was.
struct Served {
    folder: tempfile::TempDir,
    launch: Launch,
    daemon: Daemon,
}

impl Served {
    /// `node`: `--blockdev` text without the name; `None`: an image file.
    fn start(node: Option<&str>, queues: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launch = Self::launch(&folder.path().join("disk.img"), &folder.path().join("disk"), node, queues);
        if node.is_none() {
            image::create(&folder.path().join("disk.img"), SIZE);
        }
        let daemon = launch.spawn().unwrap();
        Self { folder, launch, daemon }
    }

    fn launch(image: &std::path::Path, socket: &std::path::Path, node: Option<&str>, queues: u16) -> Launch {
        let node = node.map_or_else(|| format!("file,filename={}", image.display()), str::to_owned);
        Launch::new(rig::ringblk()).env("RINGBLK_LOG", "info").args([
            "--object".to_owned(),
            "iothread,id=t0".into(),
            "--object".into(),
            "iothread,id=t1".into(),
            "--blockdev".into(),
            format!("{node},node-name=n"),
            "--export".into(),
            format!(
                "vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={},num-queues={queues},\
                 iothread-vq-mapping.0.iothread=t0,iothread-vq-mapping.1.iothread=t1",
                socket.display()
            ),
        ])
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn connect(&mut self, setup: &Setup) -> Disk {
        let disk = Disk::connect(&self.socket(), setup)
            .unwrap_or_else(|e| panic!("{e}: {:?} {}", self.daemon.check_running(), self.daemon.stderr()));
        assert_ne!(disk.session().guest.protocol & protocol::INFLIGHT_SHMFD, 0);
        disk
    }

    fn kill(&mut self) {
        self.daemon.kill().unwrap();
    }

    /// The next daemon, at once: what the dead one left to the kernel is still under way.
    fn restart(&mut self, disk: Disk) -> Disk {
        self.daemon = self.launch.spawn().unwrap();
        disk.reconnect(&self.socket())
            .unwrap_or_else(|e| panic!("{e}: {:?} {}", self.daemon.check_running(), self.daemon.stderr()))
    }
}

/// Heads that the area of ring `queue` shows in flight, oldest first.
fn marked(disk: &Disk, queue: u16) -> Vec<u16> {
    let area = disk.session().guest.inflight.as_ref().expect("an area was made");
    area.ring(queue).unwrap().inflight.into_iter().map(|(head, _)| head).collect()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "no {what} within {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// What the guest does and knows. A block has one request at a time, so its content is always known.
struct Load {
    rng: Rng,
    pending: HashMap<Token, (usize, bool)>,
    /// Seed of what each block holds; 0 = zeroes.
    blocks: Vec<u64>,
    busy: Vec<bool>,
    /// Whether the disk keeps what is written.
    keeps: bool,
    submitted: u64,
    completed: u64,
}

impl Load {
    fn new(seed: u64, keeps: bool) -> Self {
        Self {
            rng: Rng::new(seed),
            pending: HashMap::new(),
            blocks: vec![0; BLOCKS],
            busy: vec![false; BLOCKS],
            keeps,
            submitted: 0,
            completed: 0,
        }
    }

    fn fill(&mut self, disk: &mut Disk, queue: u16, depth: usize) {
        while self.pending.keys().filter(|token| token.queue == queue).count() < depth {
            let block = self.rng.below(BLOCKS as u64) as usize;
            if std::mem::replace(&mut self.busy[block], true) {
                continue;
            }
            let write = self.rng.below(2) == 0;
            let (kind, payload) = if write {
                self.blocks[block] = self.rng.bits() | 1;
                (op::OUT, Payload::Out(pattern(self.blocks[block], BLOCK)))
            } else {
                (op::IN, Payload::In(BLOCK as u32))
            };
            let request = Request::new(kind, block as u64 * (BLOCK as u64 / 512), payload);
            let token = disk.submit(queue, &request).unwrap();
            assert!(self.pending.insert(token, (block, write)).is_none());
            self.submitted += 1;
        }
        disk.kick(queue).unwrap();
    }

    fn expected(&self, block: usize) -> Vec<u8> {
        match self.blocks[block] {
            seed if seed != 0 && self.keeps => pattern(seed, BLOCK),
            _ => vec![0; BLOCK],
        }
    }

    fn done(&mut self, done: &Completion) {
        let (block, write) = self.pending.remove(&done.token).expect("completed twice, or never asked for");
        assert_eq!(done.status, status::OK, "block {block}");
        if !write {
            assert!(done.data == self.expected(block), "block {block} reads something else");
        }
        self.busy[block] = false;
        self.completed += 1;
    }

    fn finish(&mut self, disk: &mut Disk, queues: u16) {
        for queue in 0..queues {
            while self.pending.keys().any(|token| token.queue == queue) {
                let done = disk.wait_any(queue).unwrap();
                self.done(&done);
            }
        }
        assert_eq!((disk.in_flight(), self.completed), (0, self.submitted));
        for queue in &disk.session().guest.queues {
            assert_eq!(queue.used_idx(), queue.available_idx());
        }
    }
}

/// Runs load until the daemon was killed at a moment that the load knows nothing of; what was in flight then.
fn until_killed(
    served: &mut Served,
    disk: &mut Disk,
    load: &mut Load,
    queues: u16,
    longest_us: u64,
) -> usize {
    let pid = Pid::from_raw(served.daemon.pid() as i32).unwrap();
    let killed = Arc::new(AtomicBool::new(false));
    let after = Duration::from_micros(load.rng.below(longest_us));
    let killer = std::thread::spawn({
        let killed = killed.clone();
        move || {
            std::thread::sleep(after);
            kill_process(pid, Signal::KILL).unwrap();
            killed.store(true, Ordering::Release);
        }
    });
    while !killed.load(Ordering::Acquire) {
        for queue in 0..queues {
            load.fill(disk, queue, DEPTH);
            while let Some(done) = disk.poll(queue).unwrap() {
                load.done(&done);
            }
        }
    }
    killer.join().unwrap();
    served.kill();
    // The guest goes on meanwhile: takes what was published last, and offers what nobody has taken.
    for queue in 0..queues {
        while let Some(done) = disk.poll(queue).unwrap() {
            load.done(&done);
        }
        load.fill(disk, queue, DEPTH + 8);
    }
    (0..queues).map(|queue| marked(disk, queue).len()).sum()
}

fn endure(node: Option<&str>, order: Order, queues: u16, longest_us: u64) {
    let mut served = Served::start(node, queues);
    let mut disk = served.connect(&setup(order, queues));
    let mut load = Load::new(queues.into(), node.is_none());
    let mut in_flight = 0;
    for _ in 0..crashes() {
        in_flight += until_killed(&mut served, &mut disk, &mut load, queues, longest_us);
        disk = served.restart(disk);
    }
    load.finish(&mut disk, queues);
    assert!(in_flight > 0, "no kill met a request in flight: the test shows nothing");
    disk.flush().unwrap();
    if load.keeps {
        for block in 0..BLOCKS {
            assert!(read_at(&served.image(), (block * BLOCK) as u64, BLOCK) == load.expected(block));
        }
    }
}

#[test]
fn kills_under_load_as_qemu_reconnects() {
    endure(None, Order::Qemu, 1, 4000);
}

#[test]
fn kills_under_load_as_cloud_hypervisor_reconnects() {
    endure(None, Order::CloudHypervisor, 1, 4000);
}

#[test]
fn kills_under_load_on_two_queues_of_two_iothreads() {
    endure(None, Order::Qemu, 2, 6000);
}

#[test]
fn kills_of_a_slow_disk_with_everything_in_flight() {
    for order in [Order::Qemu, Order::CloudHypervisor] {
        endure(Some("null-co,size=1048576,read-zeroes=on,latency-ns=1000000"), order, 2, 6000);
    }
}

#[test]
fn kills_before_anything_was_done_again() {
    let mut served = Served::start(Some("null-co,size=1048576,read-zeroes=on,latency-ns=400000000"), 1);
    let mut disk = served.connect(&setup(Order::Qemu, 1));
    let mut load = Load::new(1, false);
    load.fill(&mut disk, 0, 9);
    wait_until("request in flight", || marked(&disk, 0).len() == 9);
    let order = marked(&disk, 0);
    for round in 0..5 {
        served.kill();
        assert_eq!(marked(&disk, 0), order, "round {round}");
        disk = served.restart(disk);
    }
    load.finish(&mut disk, 1);
    wait_until("cleared area", || marked(&disk, 0).is_empty());
}

#[test]
fn a_connection_that_ends_leaves_nothing_in_flight() {
    let mut served = Served::start(Some("null-co,size=1048576,read-zeroes=on,latency-ns=20000000"), 1);
    let setup = setup(Order::CloudHypervisor, 1);
    let mut disk = served.connect(&setup);
    let mut load = Load::new(1, false);
    load.fill(&mut disk, 0, 9);
    wait_until("request in flight", || marked(&disk, 0).len() == 9);
    disk.session().frontend.connection().stream().shutdown(std::net::Shutdown::Both).unwrap();
    wait_until("cleared area", || marked(&disk, 0).is_empty());
    assert_eq!(disk.session().guest.queues[0].used_idx(), 9, "published before the ring was let go");
    // Neither VMM's base is what is gone on from.
    load.fill(&mut disk, 0, 12);
    disk = disk.reconnect(&served.socket()).unwrap();
    load.finish(&mut disk, 1);
    served.daemon.check_running().unwrap();
}

#[test]
fn a_guest_that_stops_its_rings_starts_them_again_with_the_same_area() {
    let mut served = Served::start(None, 1);
    let mut disk = served.connect(&setup(Order::Qemu, 1));
    let mut load = Load::new(1, true);
    for _ in 0..20 {
        load.fill(&mut disk, 0, 8);
        let bases = disk.session().stop().unwrap();
        assert_eq!(marked(&disk, 0), [0; 0]);
        // What was not taken is taken now, in the same connection.
        disk.session_mut().start(&bases).unwrap();
        load.finish(&mut disk, 1);
    }
    load.fill(&mut disk, 0, 8);
    served.kill();
    disk = served.restart(disk);
    load.finish(&mut disk, 1);
}

#[test]
fn a_successor_waits_for_the_image_of_a_predecessor_that_is_dying() {
    let mut served = Served::start(None, 1);
    let mut disk = served.connect(&setup(Order::Qemu, 1));
    disk.write(0, &pattern(1, BLOCK)).unwrap();
    let socket = served.folder.path().join("next");
    let mut next = Served::launch(&served.image(), &socket, None, 1).spawn().unwrap();
    // Long enough, as a rule, for it to meet the lock; if not, this shows less.
    std::thread::sleep(Duration::from_millis(100));
    served.kill();
    let mut disk = Disk::connect(&socket, &setup(Order::Qemu, 1))
        .unwrap_or_else(|e| panic!("{e}: {:?}", next.check_running()));
    assert!(disk.read(0, BLOCK as u32).unwrap() == pattern(1, BLOCK));
}
