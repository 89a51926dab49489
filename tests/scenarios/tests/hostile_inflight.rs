//! Front ends that lie about the in-flight area, and areas that lie about the ring. Each ends its own connection or stops its
//! own ring; the next one is served, the daemon's other exports go on, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use client::blk::op;
use client::disk::{Payload, Request};
use client::frontend::InflightDescription;
use client::inflight::Inflight;
use client::session::{Base, Guest};
use client::wire::{feature, request};
use client::{Connection, Disk, Frontend, Session};
use ringblk_scenarios::Rig;
use ringblk_scenarios::hostile::{LIMIT, Victim, memfd, negotiated, send, setup};

/// 64 + 64 * 2 * 16 bytes rounded up: a ring of 128 entries, as `setup` makes it.
const PART: u64 = 2112;

/// Two bytes of the area, and where.
type Field = (u64, [u8; 2]);

fn description(mmap_size: u64, mmap_offset: u64, num_queues: u16, queue_size: u16) -> InflightDescription {
    InflightDescription { mmap_size, mmap_offset, num_queues, queue_size }
}

fn tell(front: &Frontend, description: &InflightDescription, fds: &[BorrowedFd<'_>]) {
    send(front, request::SET_INFLIGHT_FD, &description.encode(), fds);
}

#[test]
fn areas_that_cannot_be() {
    let mut r = Victim::start();
    // More queues than the device has; none; no entries; more than a ring can have.
    for (queues, queue_size) in [(2, 128), (u16::MAX, u16::MAX), (0, 128), (1, 0), (1, 32769), (1, u16::MAX)]
    {
        let d = description(0, 0, queues, queue_size);
        r.closes(&format!("GET_INFLIGHT_FD {queues} x {queue_size}"), |rig| {
            let f = negotiated(rig);
            send(&f, request::GET_INFLIGHT_FD, &d.encode(), &[]);
            f
        });
        let d = description(1 << 20, 0, queues, queue_size);
        r.closes(&format!("SET_INFLIGHT_FD {queues} x {queue_size}"), |rig| {
            let f = negotiated(rig);
            tell(&f, &d, &[memfd(1 << 20).as_fd()]);
            f
        });
    }
    let cases = [
        ("a size that is too small", 4096, description(PART - 1, 0, 1, 128)),
        ("no size", 4096, description(0, 0, 1, 128)),
        ("a file that is too short", PART - 1, description(PART, 0, 1, 128)),
        ("an empty file", 0, description(PART, 0, 1, 128)),
        ("a size beyond the file", 4096, description(4097, 0, 1, 128)),
        ("a size beyond all files", 4096, description(u64::MAX, 0, 1, 128)),
        ("an offset beyond the file", 4096, description(PART, 4096, 1, 128)),
        ("an offset beyond all files", 4096, description(PART, u64::MAX - 63, 1, 128)),
        ("an offset that is not aligned", 8192, description(PART, 8, 1, 128)),
        ("entries that the size does not hold", 4096, description(4096, 0, 1, 256)),
    ];
    for (name, len, d) in cases {
        r.closes(name, |rig| {
            let f = negotiated(rig);
            tell(&f, &d, &[memfd(len).as_fd()]);
            f
        });
    }
}

#[test]
fn descriptors_of_the_wrong_number_and_kind() {
    let mut r = Victim::start();
    let area = memfd(4096);
    let d = description(PART, 0, 1, 128);
    for count in [0usize, 2, 8] {
        r.closes(&format!("an area with {count} descriptors"), |rig| {
            let f = negotiated(rig);
            tell(&f, &d, &vec![area.as_fd(); count]);
            f
        });
    }
    r.closes("GET_INFLIGHT_FD with a descriptor", |rig| {
        let f = negotiated(rig);
        send(&f, request::GET_INFLIGHT_FD, &d.encode(), &[area.as_fd()]);
        f
    });
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let read_only: OwnedFd = {
        let path = r.rig.folder().join("area");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        std::fs::File::open(path).unwrap().into()
    };
    for (name, fd) in [("a pipe", &pipe), ("/dev/null", &null), ("a file that cannot be written", &read_only)]
    {
        r.closes(name, |rig| {
            let f = negotiated(rig);
            tell(&f, &d, &[fd.as_fd()]);
            f
        });
    }
    // Areas without number: only the last one of a connection is kept.
    r.bears("many areas", |rig| {
        let before = rig.holdings();
        let mut f = negotiated(rig);
        for _ in 0..500 {
            let (d, fd) = f.get_inflight_fd(1, 128).unwrap();
            f.set_inflight_fd(&d, fd.as_fd()).unwrap();
        }
        f.get_features().unwrap();
        // The connection, its thread's copies, and one area.
        assert!(rig.holdings().descriptors <= before.descriptors + 8, "{before:?} -> {:?}", rig.holdings());
    });
}

/// A session whose area is `area`, with the ring asleep before its start.
fn establish(rig: &Rig, area: Inflight) -> client::error::Result<Session> {
    let mut guest = Guest::new(&setup())?;
    guest.inflight = Some(area);
    let connection = Connection::connect(&rig.socket("victim"), LIMIT)?;
    Session::establish(connection, guest, &setup(), &[Base::At(0)])
}

/// An area for one ring of `queue_size` entries, whose bytes `spoil` writes: (offset, value).
fn spoilt(queue_size: u16, spoil: &[(u64, &[u8])]) -> Inflight {
    let fd = memfd(1 << 16);
    let area = Inflight::new(description(1 << 16, 0, 1, queue_size), fd).unwrap();
    for (at, bytes) in spoil {
        area.area().write(*at, bytes).unwrap();
    }
    area
}

#[test]
fn a_ring_larger_than_its_area() {
    let mut r = Victim::start();
    r.bears("a ring larger than its area", |rig| {
        for queue_size in [1, 64, 127] {
            assert!(establish(rig, spoilt(queue_size, &[])).is_err(), "{queue_size}");
        }
        assert!(establish(rig, spoilt(128, &[])).is_ok());
    });
}

#[test]
fn areas_whose_content_makes_no_sense() {
    let mut r = Victim::start();
    let version = |v: u16| (8u64, v.to_ne_bytes());
    let entries = (10u64, 128u16.to_ne_bytes());
    let last = |head: u16| (12u64, head.to_ne_bytes());
    let used = |idx: u16| (14u64, idx.to_ne_bytes());
    let cases: [(&str, Vec<Field>); 6] = [
        ("a version nobody knows", vec![version(2), entries]),
        ("another number of entries", vec![version(1), (10, 127u16.to_ne_bytes())]),
        ("no number of entries", vec![version(1)]),
        ("a used index far behind, and a mark", vec![version(1), entries, used(1000), (16, [1, 0])]),
        ("a list out of the ring", vec![version(1), entries, used(u16::MAX), last(128), (16, [1, 0])]),
        (
            "a list far out of the ring",
            vec![version(1), entries, used(u16::MAX), last(u16::MAX), (16, [1, 0])],
        ),
    ];
    for (name, spoil) in cases {
        r.bears(name, |rig| {
            let spoil: Vec<_> = spoil.iter().map(|(at, b)| (*at, b.as_slice())).collect();
            assert!(establish(rig, spoilt(128, &spoil)).is_err(), "{name} is accepted");
        });
    }
    // Marks for requests that are none: the ring stops, nothing else does.
    let all: Vec<Field> = (0..128).map(|head| (16 + 16 * head, [0xff, 0xff])).collect();
    r.bears("marks on everything", |rig| {
        let mut spoil: Vec<(u64, &[u8])> = all.iter().map(|(at, b)| (*at, b.as_slice())).collect();
        let (v, e) = (version(1), entries);
        spoil.extend([(v.0, v.1.as_slice()), (e.0, e.1.as_slice())]);
        let mut disk = Disk::new(establish(rig, spoilt(128, &spoil)).unwrap());
        disk.submit(0, &Request::new(op::IN, 0, Payload::In(512))).unwrap();
        disk.kick(0).unwrap();
        disk.session().frontend.get_vring_base(0).unwrap();
        assert_eq!(disk.session().guest.queues[0].used_idx(), 0);
    });
}

#[test]
fn an_area_that_is_written_and_cut_while_the_ring_runs() {
    let mut r = Victim::start();
    r.bears("an area full of noise under load", |rig| {
        let mut disk = rig.disk("victim", &setup());
        let mut noise = ringblk_scenarios::Rng::new(7);
        for round in 0..200u64 {
            for sector in 0..8 {
                disk.submit(0, &Request::new(op::IN, sector, Payload::In(512))).unwrap();
            }
            disk.kick(0).unwrap();
            let area = disk.session().guest.inflight.as_ref().unwrap();
            area.area().write(0, &noise.bytes(PART as usize)).unwrap();
            while disk.in_flight() > 0 {
                assert_eq!(disk.wait_any(0).unwrap().status, 0, "round {round}");
            }
        }
    });
    r.bears("an area that vanishes", |rig| {
        let fd = memfd(1 << 16);
        let cut = fd.try_clone().unwrap();
        let area = Inflight::new(description(1 << 16, 0, 1, 128), fd).unwrap();
        let mut disk = Disk::new(establish(rig, area).unwrap());
        disk.read(0, 512).unwrap();
        rustix::fs::ftruncate(&cut, 0).unwrap();
        // Served or not: the ring may have stopped by then.
        for sector in 0..4 {
            disk.submit(0, &Request::new(op::IN, sector, Payload::In(512))).unwrap();
            disk.kick(0).unwrap();
        }
        disk.session().frontend.get_vring_base(0).unwrap();
    });
}

#[test]
fn an_area_that_is_exchanged_under_a_running_ring() {
    let mut r = Victim::start();
    r.closes("SET_INFLIGHT_FD while the ring runs", |rig| {
        let mut disk = rig.disk("victim", &setup());
        disk.read(0, 512).unwrap();
        let session = disk.session();
        assert_ne!(session.guest.features & feature::VHOST_USER_PROTOCOL_FEATURES, 0);
        let f = Frontend::new(Connection::new(session.frontend.connection().stream().try_clone().unwrap()));
        tell(&f, &description(PART, 0, 1, 128), &[memfd(4096).as_fd()]);
        f
    });
}
