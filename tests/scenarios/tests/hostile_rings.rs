//! Drivers that break the rules of the ring (virtio 1.3 §2.7). Each misdeed stops its own ring, which is told on the
//! ring's error eventfd; the ring can be taken back, the connection closed and a new one used, the daemon's other
//! exports go on, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use client::blk::{op, status};
use client::connection::wait;
use client::disk::{Payload, Request};
use client::queue::{Buffer, Descriptor, INDIRECT, NEXT, WRITE};
use client::wire::feature;
use client::{Disk, Session, Setup};
use ringblk_scenarios::{Neighbour, Rig, Wanted};
use rustix::event::{EventfdFlags, PollFlags, eventfd};

const LIMIT: Duration = Duration::from_secs(20);
const SIZE: u64 = 1 << 20;

fn setup() -> Setup {
    Setup { memory: vec![(0, 8 << 20), (4 << 30, 4 << 20)], ..Setup::default() }
}

/// A session whose ring 0 has an error eventfd.
fn session(rig: &Rig, setup: &Setup) -> (Session, OwnedFd) {
    let mut session = Session::connect(&rig.socket("victim"), setup).unwrap();
    let bases = session.stop().unwrap();
    let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    session.frontend.set_vring_err(0, Some(error.as_fd())).unwrap();
    session.start(&bases).unwrap();
    (session, error)
}

/// Memory of a request: header, a page of data, status.
struct Place {
    header: u64,
    data: u64,
    status: u64,
}

fn place(session: &mut Session) -> Place {
    let memory = &mut session.guest.memory;
    let header = memory.allocate(4096, 4096).unwrap();
    let data = memory.allocate(4096, 4096).unwrap();
    // A read of sector 0.
    memory.write(header, &[0; 16]).unwrap();
    memory.write(header + 16, &[0xff]).unwrap();
    Place { header, data, status: header + 16 }
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { addr, len, flags, next }
}

/// Writes descriptors from 0 on and makes descriptor 0 available.
fn offer(session: &mut Session, chain: &[Descriptor]) {
    let queue = &mut session.guest.queues[0];
    for (at, d) in (0..).zip(chain) {
        queue.write_descriptor(at, d);
    }
    queue.push_available(0);
    queue.publish().unwrap();
    queue.kick().unwrap();
}

/// The same through an indirect table, which lies in the place that the ring keeps for it.
fn offer_table(session: &mut Session, table: &[Descriptor], len: u32) {
    let at = session.guest.queues[0].indirect_table(0);
    for (n, d) in (0..).zip(table) {
        session.guest.queues[0].write_table(at, n, d).unwrap();
    }
    offer(session, &[desc(at, len, INDIRECT, 0)]);
}

type Misdeed = (&'static str, fn(&mut Session));

const MISDEEDS: &[Misdeed] = &[
    ("a head beyond the table", |s| {
        s.guest.queues[0].push_available(128);
        s.guest.queues[0].publish().unwrap();
        s.guest.queues[0].kick().unwrap();
    }),
    ("head 65535", |s| {
        s.guest.queues[0].push_available(65535);
        s.guest.queues[0].publish().unwrap();
        s.guest.queues[0].kick().unwrap();
    }),
    ("an available index that jumps", |s| {
        s.guest.queues[0].write_available_idx(129);
        s.guest.queues[0].kick().unwrap();
    }),
    ("an available index that goes back", |s| {
        s.guest.queues[0].write_available_idx(65535);
        s.guest.queues[0].kick().unwrap();
    }),
    ("a descriptor that follows itself", |s| {
        let p = place(s);
        offer(s, &[desc(p.header, 16, NEXT, 0)]);
    }),
    ("a loop of three", |s| {
        let p = place(s);
        offer(
            s,
            &[
                desc(p.header, 16, NEXT, 1),
                desc(p.data, 512, NEXT | WRITE, 2),
                desc(p.data, 512, NEXT | WRITE, 1),
            ],
        );
    }),
    ("a next beyond the table", |s| {
        let p = place(s);
        offer(s, &[desc(p.header, 16, NEXT, 128)]);
    }),
    ("a header outside memory", |s| {
        let p = place(s);
        offer(s, &[desc(0xdead_0000_0000, 16, NEXT, 1), desc(p.status, 1, WRITE, 0)]);
    }),
    ("a status outside memory", |s| {
        let p = place(s);
        offer(s, &[desc(p.header, 16, NEXT, 1), desc(0xdead_0000_0000, 1, WRITE, 0)]);
    }),
    ("data that run past the end of memory", |s| {
        let p = place(s);
        offer(
            s,
            &[
                desc(p.header, 16, NEXT, 1),
                desc((4 << 30) + (4 << 20) - 512, 4096, NEXT | WRITE, 2),
                desc(p.status, 1, WRITE, 0),
            ],
        );
    }),
    ("data in the hole between two regions", |s| {
        let p = place(s);
        offer(
            s,
            &[desc(p.header, 16, NEXT, 1), desc(8 << 20, 512, NEXT | WRITE, 2), desc(p.status, 1, WRITE, 0)],
        );
    }),
    ("an address that wraps", |s| {
        let p = place(s);
        offer(
            s,
            &[
                desc(p.header, 16, NEXT, 1),
                desc(u64::MAX - 100, 512, NEXT | WRITE, 2),
                desc(p.status, 1, WRITE, 0),
            ],
        );
    }),
    ("data of 4 GiB less one", |s| {
        let p = place(s);
        offer(
            s,
            &[desc(p.header, 16, NEXT, 1), desc(0, u32::MAX, NEXT | WRITE, 2), desc(p.status, 1, WRITE, 0)],
        );
    }),
    ("no room for a header", |s| {
        let p = place(s);
        offer(s, &[desc(p.header, 15, NEXT, 1), desc(p.status, 1, WRITE, 0)]);
    }),
    ("nothing but a status", |s| {
        let p = place(s);
        offer(s, &[desc(p.status, 1, WRITE, 0)]);
    }),
    ("no status", |s| {
        let p = place(s);
        offer(s, &[desc(p.header, 16, NEXT, 1), desc(p.data, 512, 0, 0)]);
    }),
    ("a readable buffer after a writable one", |s| {
        let p = place(s);
        offer(s, &[desc(p.header, 16, NEXT, 1), desc(p.status, 1, WRITE | NEXT, 2), desc(p.data, 512, 0, 0)]);
    }),
    ("an empty indirect table", |s| offer_table(s, &[], 0)),
    ("a torn indirect table", |s| {
        let p = place(s);
        offer_table(s, &[desc(p.header, 16, NEXT, 1), desc(p.status, 1, WRITE, 0)], 31);
    }),
    ("an indirect table outside memory", |s| offer(s, &[desc(0xdead_0000_0000, 32, INDIRECT, 0)])),
    ("an indirect table that runs past the end of memory", |s| {
        offer(s, &[desc((4 << 30) + (4 << 20) - 16, 65535 * 16, INDIRECT, 0)]);
    }),
    ("an indirect table inside an indirect table", |s| {
        let inner = s.guest.queues[0].indirect_table(1);
        offer_table(s, &[desc(inner, 32, INDIRECT, 0)], 16);
    }),
    ("an indirect descriptor with a successor", |s| {
        let table = s.guest.queues[0].indirect_table(0);
        let p = place(s);
        offer(s, &[desc(table, 32, INDIRECT | NEXT, 1), desc(p.status, 1, WRITE, 0)]);
    }),
    ("a loop inside an indirect table", |s| {
        let p = place(s);
        offer_table(s, &[desc(p.header, 16, NEXT, 1), desc(p.data, 512, NEXT | WRITE, 1)], 32);
    }),
    ("a next beyond the indirect table", |s| {
        let p = place(s);
        offer_table(s, &[desc(p.header, 16, NEXT, 2)], 32);
    }),
    ("65 535 entries that are one long loop", |s| {
        let p = place(s);
        // The table fits between the regions' ends; the entries all point at their successor, the last at the first.
        let table = s.guest.memory.allocate(65535 * 16, 4096).unwrap();
        let bytes: Vec<u8> = (0..65535u32)
            .flat_map(|n| desc(p.data, 1, NEXT | WRITE, ((n + 1) % 65535) as u16).words())
            .flat_map(u64::to_le_bytes)
            .collect();
        s.guest.memory.write(table, &bytes).unwrap();
        offer(s, &[desc(table, 65535 * 16, INDIRECT, 0)]);
    }),
];

/// Runs one misdeed and everything that must hold afterwards.
fn survive(rig: &mut Rig, neighbour: &mut Neighbour, setup: &Setup, name: &str, misdeed: fn(&mut Session)) {
    let before = rig.holdings();
    let (mut session, error) = session(rig, setup);
    misdeed(&mut session);
    assert!(
        wait(error.as_fd(), PollFlags::IN, Instant::now() + LIMIT).unwrap(),
        "{name}: the ring's error eventfd says nothing: {}",
        rig.daemon.stderr()
    );
    neighbour.check(name);
    // A driver that notices resets the device: the ring can be taken back, which waits for what is in flight.
    session.frontend.get_vring_base(0).unwrap_or_else(|e| panic!("{name}: GET_VRING_BASE: {e}"));
    // And can be used afresh on the same connection.
    session.guest.queues[0].reset();
    session.start(&[]).unwrap_or_else(|e| panic!("{name}: the ring cannot be started again: {e}"));
    let mut disk = Disk::new(session);
    assert!(disk.read(0, 4096).is_ok(), "{name}: the ring does not work after a reset");
    drop(disk);
    drop(error);
    rig.wait_disconnected("victim");
    assert!(rig.disk("victim", setup).read(0, 4096).is_ok(), "{name}: a new connection works");
    rig.wait_disconnected("victim");
    rig.wait_holdings(before);
    rig.assert_running();
}

fn rig() -> Rig {
    Rig::start(&[Wanted::file("victim", SIZE), Neighbour::wanted()])
}

#[test]
fn each_misdeed_stops_its_ring_and_nothing_else() {
    let mut rig = rig();
    let mut neighbour = Neighbour::connect(&rig);
    // Threads and pools that the first use brings up.
    drop(rig.disk("victim", &setup()));
    rig.wait_disconnected("victim");
    for &(name, misdeed) in MISDEEDS {
        survive(&mut rig, &mut neighbour, &setup(), name, misdeed);
    }
}

#[test]
fn indirect_descriptors_that_were_not_negotiated() {
    let mut rig = rig();
    let mut neighbour = Neighbour::connect(&rig);
    let setup = Setup { features: setup().features & !feature::INDIRECT_DESC, ..setup() };
    survive(&mut rig, &mut neighbour, &setup, "an indirect table without the feature", |s| {
        let p = place(s);
        offer_table(s, &[desc(p.header, 16, NEXT, 1), desc(p.status, 1, WRITE, 0)], 32);
    });
}

#[test]
fn a_misdeed_with_requests_in_flight_lets_them_finish() {
    // The node takes 300 ms per request: the good ones are in flight when the bad one comes.
    let mut rig = Rig::start(&[
        Wanted::node("victim", "null-co,size=1048576,read-zeroes=on,latency-ns=300000000"),
        Neighbour::wanted(),
    ]);
    let mut neighbour = Neighbour::connect(&rig);
    let (session, error) = session(&rig, &setup());
    let mut disk = Disk::new(session);
    let tokens: Vec<_> =
        (0..16).map(|n| disk.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap()).collect();
    disk.kick(0).unwrap();
    let queue = &mut disk.session_mut().guest.queues[0];
    queue.push_available(500);
    queue.publish().unwrap();
    queue.kick().unwrap();
    assert!(wait(error.as_fd(), PollFlags::IN, Instant::now() + LIMIT).unwrap(), "the ring stopped");
    neighbour.check("a bad head among good ones");
    // The reply comes when nothing is in flight any more, and by then the used ring holds them all.
    disk.session().frontend.get_vring_base(0).unwrap();
    for token in tokens {
        let done = disk.wait(token).unwrap();
        assert_eq!(done.status, status::OK);
    }
    drop(disk);
    rig.wait_disconnected("victim");
    rig.assert_running();
}

#[test]
fn the_same_head_twice() {
    // The second offer of a chain that is in flight must not be executed into the same slot: the ring stops, or the
    // chain completes once per offer; the daemon must not lose count.
    let mut rig = Rig::start(&[
        Wanted::node("victim", "null-co,size=1048576,read-zeroes=on,latency-ns=50000000"),
        Neighbour::wanted(),
    ]);
    let mut neighbour = Neighbour::connect(&rig);
    let (mut session, _error) = session(&rig, &setup());
    let p = place(&mut session);
    let chain =
        [desc(p.header, 16, NEXT, 1), desc(p.data, 512, NEXT | WRITE, 2), desc(p.status, 1, WRITE, 0)];
    let queue = &mut session.guest.queues[0];
    for (at, d) in (0..).zip(&chain) {
        queue.write_descriptor(at, d);
    }
    for _ in 0..100 {
        queue.push_available(0);
    }
    queue.publish().unwrap();
    queue.kick().unwrap();
    neighbour.check("one head offered a hundred times");
    session.frontend.get_vring_base(0).unwrap();
    let queue = &mut session.guest.queues[0];
    let mut returned = 0;
    while let Some(used) = queue.pop_any() {
        assert_eq!(used.id, 0);
        returned += 1;
    }
    assert!(returned <= 100, "{returned} completions of 100 offers");
    drop(session);
    rig.wait_disconnected("victim");
    let mut disk = rig.disk("victim", &setup());
    assert!(disk.read(0, 512).is_ok());
    rig.assert_running();
}

#[test]
fn a_driver_that_rewrites_its_ring_while_it_is_read() {
    // Another thread scribbles over descriptors, heads and indexes while the device works: whatever it reads, it reads
    // once, and the daemon lives.
    let mut rig = rig();
    let mut neighbour = Neighbour::connect(&rig);
    for seed in 0..20 {
        let Ok(mut session) = Session::connect(&rig.socket("victim"), &setup()) else { panic!("no session") };
        let p = place(&mut session);
        let mut rng = ringblk_scenarios::Rng::new(seed);
        let queue = &mut session.guest.queues[0];
        let deadline = Instant::now() + Duration::from_millis(100);
        while Instant::now() < deadline {
            for _ in 0..64 {
                let addr = match rng.below(4) {
                    0 => p.header,
                    1 => p.data,
                    2 => p.status,
                    _ => rng.bits(),
                };
                let len = [0, 1, 15, 16, 512, 4096, u32::MAX][rng.below(7) as usize];
                let d = desc(addr, len, rng.below(8) as u16, rng.below(130) as u16);
                queue.write_descriptor(rng.below(128) as u16, &d);
                if rng.below(8) == 0 {
                    queue.push_available(rng.below(130) as u16);
                }
            }
            queue.publish().unwrap();
            queue.kick().unwrap();
        }
        // The ring may be dead by now; it can be taken back all the same.
        session.frontend.get_vring_base(0).unwrap();
        drop(session);
        neighbour.check("random descriptors");
        rig.assert_running();
    }
    rig.wait_disconnected("victim");
}

#[test]
fn chains_as_long_as_the_ring_and_longer() {
    let rig = rig();
    let mut disk = rig.disk("victim", &setup());
    // 126 segments of a sector each: what seg_max announces, in the ring itself and in a table.
    assert_eq!(disk.session().config.seg_max, 126);
    for indirect in [false, true] {
        disk.set_indirect(indirect);
        let mut request = Request::new(op::IN, 0, Payload::In(126 * 512));
        request.cuts = vec![512; 125];
        assert_eq!(disk.run(0, &request).unwrap().status, status::OK, "indirect: {indirect}");
    }
    // A table longer than the ring is not allowed (§2.7.5.3.1); either it is served or the ring stops, but the
    // connection lives.
    let session = disk.session_mut();
    let base = session.guest.memory.allocate(4096, 4096).unwrap();
    let mut chain = vec![Buffer { addr: base, len: 16, write: false }];
    chain.extend((0..200).map(|_| Buffer { addr: base + 512, len: 512, write: true }));
    chain.push(Buffer { addr: base + 16, len: 1, write: true });
    session.guest.queues[0].add(&chain, true).unwrap();
    session.guest.queues[0].publish().unwrap();
    session.frontend.get_vring_base(0).unwrap();
}

#[test]
fn a_call_descriptor_that_is_full_blocks_nobody() {
    let mut rig = rig();
    let mut neighbour = Neighbour::connect(&rig);
    let mut disk = rig.disk("victim", &setup());
    // The counter at its maximum: one more write would block without O_NONBLOCK.
    let call = disk.session().guest.queues[0].call_fd().try_clone_to_owned().unwrap();
    while rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).is_err() {
        // The daemon's own signal of the start is in it.
        disk.session_mut().guest.queues[0].take_interrupts();
    }
    let tokens: Vec<_> =
        (0..64).map(|n| disk.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap()).collect();
    disk.kick(0).unwrap();
    let deadline = Instant::now() + LIMIT;
    while disk.session().guest.queues[0].used_idx() != 64 {
        assert!(Instant::now() < deadline, "the ring stands still");
        std::thread::yield_now();
    }
    neighbour.check("a call descriptor that nobody reads");
    for token in tokens {
        assert_eq!(disk.wait(token).unwrap().status, status::OK);
    }
    rig.assert_running();
}
