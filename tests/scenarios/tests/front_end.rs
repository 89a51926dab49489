//! What front ends do while requests are in flight: change memory, stop rings, vanish and come back, reset, mask and
//! unmask interrupts. No request may be lost or done twice, and a stopped ring is silent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use client::blk::{op, status};
use client::connection::wait;
use client::disk::{Payload, Request};
use client::memory::Region;
use client::session::{Base, Order};
use client::wire::{feature, protocol};
use client::{Disk, Frontend, Session, Setup};
use ringblk_scenarios::{Rig, Rng, Wanted, pattern, read_at};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use serde_json::json;

const SIZE: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(20);
/// A node whose requests take 20 ms: what is submitted is in flight for a while.
const SLOW: &str = "null-co,size=16777216,read-zeroes=on,latency-ns=20000000";
/// And one whose requests take a second.
const SLOWER: &str = "null-co,size=16777216,read-zeroes=on,latency-ns=1000000000";

fn setup() -> Setup {
    Setup { memory: vec![(0, 16 << 20), (4 << 30, 16 << 20)], ..Setup::default() }
}

fn without_inflight() -> Setup {
    Setup { protocol: setup().protocol & !protocol::INFLIGHT_SHMFD, ..setup() }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => 0,
    }
}

/// Waits until the device has taken `taken` chains of ring 0: it asks for a kick at the next one then (EVENT_IDX).
fn wait_taken(session: &Session, taken: u16) {
    let queue = &session.guest.queues[0];
    let avail_event = queue.addresses().2 + 4 + 8 * u64::from(queue.size());
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut bytes = [0; 2];
        session.guest.memory.read(avail_event, &mut bytes).unwrap();
        if u16::from_le_bytes(bytes) == taken {
            return;
        }
        assert!(Instant::now() < deadline, "the device does not take what was offered");
        std::thread::yield_now();
    }
}

/// Keeps `depth` requests in flight: random blocks written and read back, each checked.
struct Load {
    rng: Rng,
    pending: Vec<(client::disk::Token, u64, bool)>,
    /// Seed of what each 4 KiB block holds; 0 = zeroes.
    blocks: Vec<u64>,
    busy: Vec<bool>,
    pub done: u64,
}

const BLOCK: usize = 4096;

impl Load {
    fn new(seed: u64, blocks: usize) -> Self {
        Self {
            rng: Rng::new(seed),
            pending: vec![],
            blocks: vec![0; blocks],
            busy: vec![false; blocks],
            done: 0,
        }
    }

    fn fill(&mut self, disk: &mut Disk, depth: usize) {
        while self.pending.len() < depth {
            let block = self.rng.below(self.blocks.len() as u64) as usize;
            if std::mem::replace(&mut self.busy[block], true) {
                continue;
            }
            let write = self.rng.below(2) == 0;
            let payload = if write {
                self.blocks[block] = self.rng.bits() | 1;
                Payload::Out(pattern(self.blocks[block], BLOCK))
            } else {
                Payload::In(BLOCK as u32)
            };
            let kind = if write { op::OUT } else { op::IN };
            let request = Request::new(kind, block as u64 * (BLOCK as u64 / 512), payload);
            let token = disk.submit(0, &request).unwrap();
            self.pending.push((token, block as u64, write));
        }
        disk.kick(0).unwrap();
    }

    fn reap(&mut self, disk: &mut Disk) {
        let done = disk.wait_any(0).unwrap();
        let at = self.pending.iter().position(|(token, ..)| *token == done.token).unwrap();
        let (_, block, write) = self.pending.swap_remove(at);
        assert_eq!(done.status, status::OK, "block {block}");
        if !write {
            assert!(done.data == self.expected(block as usize), "block {block} reads something else");
        }
        self.busy[block as usize] = false;
        self.done += 1;
    }

    fn expected(&self, block: usize) -> Vec<u8> {
        match self.blocks[block] {
            0 => vec![0; BLOCK],
            seed => pattern(seed, BLOCK),
        }
    }

    fn finish(&mut self, disk: &mut Disk) {
        while !self.pending.is_empty() {
            self.reap(disk);
        }
        assert_eq!(disk.in_flight(), 0);
    }
}

#[test]
fn memory_tables_change_under_load() {
    tables_change(Rig::start(&[Wanted::file("disk", SIZE)]));
}

#[test]
fn pinned_memory_tables_change_under_load() {
    let options = "writable=on,pin-memory=on";
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE).direct().options(options)]);
    rig.assert_running();
    tables_change(rig);
}

fn tables_change(mut rig: Rig) {
    // Whole tables each time, as front ends without slots send them.
    let setup = Setup { protocol: setup().protocol & !protocol::CONFIGURE_MEM_SLOTS, ..without_inflight() };
    let mut disk = rig.disk("disk", &setup);
    let before = rig.holdings();
    let mut load = Load::new(1, 512);
    for _ in 0..500 {
        load.fill(&mut disk, 32);
        disk.session_mut().send_memory(false).unwrap();
        load.reap(&mut disk);
    }
    load.finish(&mut disk);
    assert!(load.done >= 500);
    for (block, seed) in load.blocks.iter().enumerate() {
        let expected = if *seed == 0 { vec![0; BLOCK] } else { pattern(*seed, BLOCK) };
        assert!(read_at(&rig.image("disk"), (block * BLOCK) as u64, BLOCK) == expected, "block {block}");
    }
    rig.wait_holdings(before);
}

#[test]
fn memory_regions_come_and_go_under_load() {
    // With a slow node, requests are in flight in each epoch; the region they lie in stays, another comes and goes.
    for node in [Wanted::file("disk", SIZE), Wanted::node("disk", SLOW)] {
        let mut rig = Rig::start(&[node]);
        let mut disk = rig.disk("disk", &without_inflight());
        let before = rig.holdings();
        let mut load = Load::new(2, 256);
        // Null nodes keep nothing: reads are not to be compared there.
        let reads_back = rig.image("disk").exists();
        for round in 0..100u64 {
            if reads_back {
                load.fill(&mut disk, 32);
            } else {
                while disk.in_flight() < 30 {
                    disk.submit(0, &Request::new(op::IN, 0, Payload::In(4096))).unwrap();
                }
                disk.kick(0).unwrap();
            }
            let gpa = (16 << 30) + round * (1 << 30);
            let memory = &mut disk.session_mut().guest.memory;
            memory.add(Region::new(gpa, 1 << 20).unwrap());
            disk.session_mut().send_memory(true).unwrap();
            if reads_back {
                load.reap(&mut disk);
            } else {
                assert_eq!(disk.wait_any(0).unwrap().status, status::OK);
            }
            disk.session_mut().guest.memory.remove(gpa).unwrap();
            disk.session_mut().send_memory(true).unwrap();
        }
        if reads_back {
            load.finish(&mut disk);
        }
        while disk.in_flight() > 0 {
            assert_eq!(disk.wait_any(0).unwrap().status, status::OK);
        }
        rig.wait_holdings(before);
    }
}

#[test]
fn memory_that_goes_away_while_requests_use_it() {
    // The front end takes a region away with a request in flight that reads into it: the mapping outlives the region for
    // that request's sake, and the data arrive in the memory that the front end still holds.
    let rig = Rig::start(&[Wanted::node("disk", SLOWER)]);
    let mut session = Session::connect(&rig.socket("disk"), &without_inflight()).unwrap();
    let far = Region::new(32 << 30, 1 << 20).unwrap();
    session.guest.memory.add(far.clone());
    session.send_memory(true).unwrap();
    far.write(32 << 30, &[0xee; 4096]).unwrap();
    let header = session.guest.memory.allocate(32, 16).unwrap();
    session.guest.memory.write(header, &[0; 16]).unwrap();
    session.guest.memory.write(header + 16, &[0xff]).unwrap();
    let chain = [
        client::queue::Buffer { addr: header, len: 16, write: false },
        client::queue::Buffer { addr: 32 << 30, len: 4096, write: true },
        client::queue::Buffer { addr: header + 16, len: 1, write: true },
    ];
    session.guest.queues[0].add(&chain, false).unwrap();
    session.guest.queues[0].publish().unwrap();
    session.guest.queues[0].kick().unwrap();
    wait_taken(&session, 1);
    session.guest.memory.remove(32 << 30).unwrap();
    session.send_memory(true).unwrap();
    let used = session.guest.queues[0].pop_within(LIMIT).unwrap();
    assert_eq!(used.len, 4097);
    let mut data = [1; 4096];
    far.read(32 << 30, &mut data).unwrap();
    assert!(data == [0; 4096], "the data went to the region that was taken away meanwhile");
}

#[test]
fn a_stopped_ring_has_nothing_in_flight_and_everything_in_the_used_ring() {
    let rig = Rig::start(&[Wanted::node("disk", SLOWER)]);
    let mut disk = rig.disk("disk", &setup());
    let tokens: Vec<_> =
        (0..128).map(|n| disk.submit(0, &Request::new(op::IN, n * 8, Payload::In(4096))).unwrap()).collect();
    disk.kick(0).unwrap();
    wait_taken(disk.session(), 128);
    disk.session().frontend.set_vring_enable(0, false).unwrap();
    let base = disk.session().frontend.get_vring_base(0).unwrap();
    // From here on the daemon may not touch the ring: what is in the used ring now is all there will be.
    let used = disk.session().guest.queues[0].used_idx();
    assert_eq!(base, 128);
    assert_eq!(used, 128, "the reply comes when all that was taken is in the used ring");
    disk.session_mut().guest.queues[0].take_interrupts();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(disk.session().guest.queues[0].used_idx(), used, "a stopped ring is silent");
    assert_eq!(disk.session_mut().guest.queues[0].take_interrupts(), 0, "a stopped ring interrupts nobody");
    for token in tokens {
        assert_eq!(disk.wait(token).unwrap().status, status::OK);
    }
    // The next start goes on from where the reply said.
    disk.session_mut().start(&[Base::At(base as u16)]).unwrap();
    let done = disk.run(0, &Request::new(op::IN, 0, Payload::In(512))).unwrap();
    assert_eq!(done.status, status::OK);
}

#[test]
fn other_exports_answer_while_a_ring_drains() {
    let mut rig = Rig::start(&[Wanted::node("slow", SLOWER), Wanted::file("fast", SIZE)]);
    let mut slow = rig.disk("slow", &setup());
    let mut fast = rig.disk("fast", &setup());
    for n in 0..64 {
        slow.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap();
    }
    slow.kick(0).unwrap();
    wait_taken(slow.session(), 64);
    let drained = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| slow.session().frontend.get_vring_base(0).unwrap());
        let mut served = 0;
        while !waiter.is_finished() {
            fast.write(0, &[1; 4096]).unwrap();
            assert!(rig.connected("slow"));
            served += 1;
        }
        assert!(served > 0);
        waiter.join().unwrap()
    });
    assert_eq!(drained, 64);
}

#[test]
fn a_front_end_that_vanishes_with_requests_in_flight() {
    for order in [Order::Qemu, Order::CloudHypervisor] {
        let mut rig = Rig::start(&[Wanted::file("disk", SIZE), Wanted::node("slow", SLOW)]);
        let setup = Setup { order, ..setup() };
        drop(rig.disk("disk", &setup));
        drop(rig.disk("slow", &setup));
        rig.wait_disconnected("disk");
        rig.wait_disconnected("slow");
        let before = rig.holdings();
        for round in 0..20 {
            for id in ["disk", "slow"] {
                let mut disk = rig.disk(id, &setup);
                for n in 0..64u64 {
                    let request = Request::new(op::OUT, n * 8, Payload::Out(pattern(round * 64 + n, 4096)));
                    disk.submit(0, &request).unwrap();
                }
                disk.kick(0).unwrap();
                drop(disk);
            }
        }
        rig.wait_disconnected("disk");
        rig.wait_disconnected("slow");
        rig.wait_holdings(before);
        // Nobody is in the way of a new one.
        let mut disk = rig.disk("disk", &setup);
        disk.write(0, &[5; 4096]).unwrap();
        assert!(disk.read(0, 4096).unwrap() == [5; 4096]);
    }
}

#[test]
fn the_same_guest_comes_back_and_goes_on() {
    for order in [Order::Qemu, Order::CloudHypervisor] {
        let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
        let mut disk = rig.disk("disk", &Setup { order, ..setup() });
        let mut load = Load::new(3, 512);
        for _ in 0..30 {
            for _ in 0..20 {
                load.fill(&mut disk, 16);
                load.reap(&mut disk);
            }
            // An orderly front end stops its rings first; nothing is in flight when it leaves.
            load.finish(&mut disk);
            disk = disk.reconnect(&rig.socket("disk")).unwrap();
        }
        load.fill(&mut disk, 16);
        load.finish(&mut disk);
        rig.assert_running();
    }
}

#[test]
fn a_reset_device_starts_over() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &without_inflight());
    for round in 0..20u8 {
        disk.write(0, &[round; 4096]).unwrap();
        let session = disk.session_mut();
        // A driver that found the cache switched off finds it on again after the reset.
        session.frontend.set_config(32, 0, &[0]).unwrap();
        assert_eq!(session.refresh_config().unwrap().writeback, 0);
        session.frontend.reset_device().unwrap();
        assert_eq!(session.refresh_config().unwrap().writeback, 1);
        for queue in &mut session.guest.queues {
            queue.reset();
        }
        session.start(&[]).unwrap();
        assert!(disk.read(0, 4096).unwrap() == [round; 4096]);
    }
}

#[test]
fn a_reset_with_requests_in_flight_waits_for_them() {
    let rig = Rig::start(&[Wanted::node("disk", SLOW)]);
    let mut disk = rig.disk("disk", &without_inflight());
    for n in 0..64 {
        disk.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap();
    }
    disk.kick(0).unwrap();
    wait_taken(disk.session(), 64);
    disk.session().frontend.reset_device().unwrap();
    let used = disk.session().guest.queues[0].used_idx();
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(disk.session().guest.queues[0].used_idx(), used, "a reset device writes no memory");
}

#[test]
fn a_storm_of_call_descriptors() {
    // A guest masks and unmasks its interrupt: QEMU swaps the call descriptor each time. No completion may lose its
    // interrupt: each new descriptor is signalled once, and the driver here sleeps on whatever is the present one.
    for event_idx in [true, false] {
        let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
        let features = setup().features & !(if event_idx { 0 } else { feature::EVENT_IDX });
        let mut disk = rig.disk("disk", &Setup { features, ..setup() });
        let mut load = Load::new(4, 512);
        for round in 0..1000 {
            load.fill(&mut disk, 8);
            let session = disk.session();
            let masked = event();
            session.frontend.set_vring_call(0, Some(masked.as_fd())).unwrap();
            if round % 3 == 0 {
                session.frontend.set_vring_call(0, None).unwrap();
            }
            session.frontend.set_vring_call(0, Some(session.guest.queues[0].call_fd())).unwrap();
            load.reap(&mut disk);
        }
        load.finish(&mut disk);
    }
}

#[test]
fn a_new_call_descriptor_is_signalled_once() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    disk.read(0, 512).unwrap();
    let fresh = event();
    disk.session().frontend.set_vring_call(0, Some(fresh.as_fd())).unwrap();
    assert!(
        wait(fresh.as_fd(), PollFlags::IN, Instant::now() + LIMIT).unwrap(),
        "an interrupt may have been lost"
    );
    assert_eq!(count(&fresh), 1);
}

#[test]
fn kicks_before_the_call_descriptor_and_without_one() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let session = Session::connect(&rig.socket("disk"), &setup()).unwrap();
    session.stop().unwrap();
    // The ring starts with the kick descriptor, requests are there already, and no call descriptor was ever sent.
    let mut disk = Disk::new(session);
    let token = disk.submit(0, &Request::new(op::IN, 0, Payload::In(512))).unwrap();
    disk.kick(0).unwrap();
    let session = disk.session();
    let queue = &session.guest.queues[0];
    let f = &session.frontend;
    f.set_vring_call(0, None).unwrap();
    f.set_vring_num(0, 128).unwrap();
    f.set_vring_base(0, 0).unwrap();
    f.set_vring_addr(&queue.vring_addr()).unwrap();
    f.set_vring_kick(0, Some(queue.kick_fd())).unwrap();
    f.set_vring_enable(0, true).unwrap();
    // A driver that polls sees it without an interrupt.
    let deadline = Instant::now() + LIMIT;
    while disk.session().guest.queues[0].used_idx() == 0 {
        assert!(Instant::now() < deadline, "the request that waited is not served");
        std::thread::yield_now();
    }
    // The call descriptor comes late: it is signalled although the completion was before it.
    let late = event();
    disk.session().frontend.set_vring_call(0, Some(late.as_fd())).unwrap();
    assert!(wait(late.as_fd(), PollFlags::IN, Instant::now() + LIMIT).unwrap());
    assert_eq!(disk.wait(token).unwrap().status, status::OK);
}

#[test]
fn a_disabled_ring_takes_no_requests() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE).options("writable=on,num-queues=2")]);
    let mut disk = rig.disk("disk", &Setup { queues: 2, ..setup() });
    for _ in 0..100 {
        disk.session().frontend.set_vring_enable(1, false).unwrap();
        let token = disk.submit(1, &Request::new(op::IN, 0, Payload::In(512))).unwrap();
        disk.kick(1).unwrap();
        // The other queue serves meanwhile, several times over: time for the daemon to do the wrong thing.
        for _ in 0..5 {
            disk.read(0, 512).unwrap();
        }
        assert!(disk.poll(1).unwrap().is_none(), "a disabled ring was served");
        disk.session().frontend.set_vring_enable(1, true).unwrap();
        assert_eq!(disk.wait(token).unwrap().status, status::OK);
    }
}

#[test]
fn a_new_kick_descriptor_for_a_running_ring() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    for n in 0..200u64 {
        let fresh = event();
        disk.session().frontend.set_vring_kick(0, Some(fresh.as_fd())).unwrap();
        // Ring the new bell only.
        let token = disk.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap();
        let queue = &mut disk.session_mut().guest.queues[0];
        queue.publish().unwrap();
        rustix::io::write(&fresh, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(disk.wait(token).unwrap().status, status::OK, "round {n}");
    }
}

#[test]
fn rings_of_every_size() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    for queue_size in [4u16, 8, 64, 256, 512, 1024] {
        let mut disk = rig.disk("disk", &Setup { queue_size, memory: vec![(0, 64 << 20)], ..setup() });
        for n in 0..u64::from(queue_size) * 2 + 5 {
            let data = pattern(n + u64::from(queue_size), 512);
            disk.write(n * 512, &data).unwrap();
            assert!(disk.read(n * 512, 512).unwrap() == data, "ring of {queue_size}, request {n}");
        }
    }
}

#[test]
fn old_cloud_hypervisor_reads_the_configuration_at_0x100() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut f = Frontend::new(rig.connection("disk"));
    f.get_features().unwrap();
    let offered = f.get_protocol_features().unwrap();
    f.set_protocol_features(offered).unwrap();
    for size in [8u32, 60, 96, 256] {
        let at_zero = f.get_config(0, size, 0).unwrap();
        assert_eq!(at_zero.len(), size as usize);
        assert_eq!(u64::from_le_bytes(at_zero[..8].try_into().unwrap()), SIZE / 512);
        assert!(f.get_config(0x100, size.min(256), 1).unwrap() == at_zero, "{size} bytes at 0x100");
    }
    // Part of it, from the middle: blk_size.
    assert_eq!(f.get_config(20, 4, 0).unwrap(), 512u32.to_le_bytes());
}

#[test]
fn cloud_hypervisor_reconnects_without_asking_first() {
    // SET_PROTOCOL_FEATURES with the set of the last connection is the first message after SET_OWNER, before any GET.
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let accepted = {
        let mut f = Frontend::new(rig.connection("disk"));
        f.get_features().unwrap();
        f.get_protocol_features().unwrap() & setup().protocol
    };
    rig.wait_disconnected("disk");
    let mut f = Frontend::new(rig.connection("disk"));
    f.set_owner().unwrap();
    f.set_protocol_features(accepted).unwrap();
    let offered = f.get_features().unwrap();
    f.set_features(offered & setup().features).unwrap();
    assert_eq!(f.get_config(0, 60, 1).unwrap().len(), 60);
    // What was accepted is in force: a refused message is answered with an error, not with silence.
    assert!(matches!(f.set_vring_num(0, 3), Err(client::Error::Refused { .. })));
}

#[test]
fn an_export_deleted_under_load() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE), Wanted::node("slow", SLOWER)]);
    for id in ["disk", "slow"] {
        let mut disk = rig.disk(id, &setup());
        for n in 0..64 {
            disk.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap();
        }
        disk.kick(0).unwrap();
        let safe = rig.qmp.execute("block-export-del", json!({"id": id}));
        assert!(matches!(safe, Err(client::Error::Qmp { .. })), "a front end is connected: {safe:?}");
        rig.command("block-export-del", json!({"id": id, "mode": "hard"}));
        rig.qmp.wait_event_where("BLOCK_EXPORT_DELETED", |data| data["id"] == id).unwrap();
        disk.session().frontend.connection().wait_closed(LIMIT).unwrap();
        // Whatever was taken is finished: the used ring stands still from the event on.
        let used = disk.session().guest.queues[0].used_idx();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(disk.session().guest.queues[0].used_idx(), used);
        // The node and the name are free again.
        let node = format!("node-{id}");
        rig.add_export(id, &node, &json!({"writable": true})).unwrap();
        rig.disk(id, &setup()).read(0, 512).unwrap();
    }
}

#[test]
fn the_daemon_ends_under_load_and_loses_nothing_acknowledged() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    let mut load = Load::new(6, 512);
    for _ in 0..200 {
        load.fill(&mut disk, 32);
        load.reap(&mut disk);
    }
    let ended = rig.daemon.terminate(LIMIT).unwrap();
    assert!(ended.success(), "{ended}: {}", rig.daemon.stderr());
    // What completed until the end is in the image; what did not is old or new.
    while let Some(done) = disk.poll(0).unwrap() {
        let at = load.pending.iter().position(|(token, ..)| *token == done.token).unwrap();
        load.pending.swap_remove(at);
    }
    for block in 0..load.blocks.len() {
        if !load.pending.iter().any(|(_, b, _)| *b == block as u64) {
            let found = read_at(&rig.image("disk"), (block * BLOCK) as u64, BLOCK);
            assert!(found == load.expected(block), "block {block}");
        }
    }
}
