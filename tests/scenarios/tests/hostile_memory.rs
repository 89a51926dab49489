//! Front ends that lie about guest memory: regions that cannot be, regions without number, and files that get shorter
//! under the daemon's hands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use client::blk::status;
use client::connection::{Connection, DEFAULT_LIMIT};
use client::memory::{GuestMemory, Region};
use client::queue::{Buffer, Queue};
use client::wire::{self, MemoryRegion, request};
use client::{Error, Guest, Session};
use ringblk_scenarios::hostile::{LIMIT, Victim, event, memfd, negotiated, send, setup};

#[test]
fn regions_that_cannot_be() {
    let mut r = Victim::start();
    let area = memfd(1 << 20);
    let region =
        |guest_addr, size, user_addr, mmap_offset| MemoryRegion { guest_addr, size, user_addr, mmap_offset };
    let good = region(0, 4096, 0x10_0000, 0);
    let tables: [(&str, Vec<MemoryRegion>); 13] = [
        ("an empty region", vec![region(0, 0, 0x1000, 0)]),
        ("a region longer than its file", vec![region(0, 2 << 20, 0x1000, 0)]),
        ("a region that starts beyond its file", vec![region(0, 4096, 0x1000, 1 << 20)]),
        ("a region that runs past its file", vec![region(0, 1 << 20, 0x1000, 4096)]),
        ("an offset that wraps", vec![region(0, 4096, 0x1000, u64::MAX - 100)]),
        ("an offset with the sign bit", vec![region(0, 4096, 0x1000, 1 << 63)]),
        ("a guest address that wraps", vec![region(u64::MAX - 100, 4096, 0x1000, 0)]),
        ("a user address that wraps", vec![region(0, 4096, u64::MAX - 100, 0)]),
        ("a region of half of everything", vec![region(0, 1 << 63, 0, 0)]),
        ("a region of everything", vec![region(0, u64::MAX, 0, 0)]),
        ("a region twice", vec![good, good]),
        ("regions that overlap by a byte", vec![good, region(4095, 4096, 0x20_0000, 0)]),
        ("one region inside another", vec![region(0, 65536, 0x10_0000, 0), region(4096, 4096, 0x20_0000, 0)]),
    ];
    for (name, table) in &tables {
        let fds: Vec<BorrowedFd<'_>> = table.iter().map(|_| area.as_fd()).collect();
        r.closes(name, |rig| {
            let f = negotiated(rig);
            send(&f, request::SET_MEM_TABLE, &wire::memory_table(table), &fds);
            f
        });
        r.closes(&format!("{name}, added"), |rig| {
            let f = negotiated(rig);
            for region in table {
                send(&f, request::ADD_MEM_REG, &wire::single_region(region), &[area.as_fd()]);
            }
            f
        });
    }
    let (pipe, _write) = rustix::pipe::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let zero: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap().into();
    let folder: OwnedFd = std::fs::File::open("/").unwrap().into();
    let only_read: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    let event = event();
    for (name, fd) in [
        ("a pipe", pipe.as_fd()),
        ("a socket", socket.as_fd()),
        ("/dev/zero", zero.as_fd()),
        ("a folder", folder.as_fd()),
        ("a file that may only be read", only_read.as_fd()),
        ("an eventfd", event.as_fd()),
    ] {
        r.closes(&format!("memory that is {name}"), |rig| {
            let f = negotiated(rig);
            send(&f, request::SET_MEM_TABLE, &wire::memory_table(&[good]), &[fd]);
            f
        });
    }
    r.closes("the removal of a region that is not there", |rig| {
        let f = negotiated(rig);
        send(&f, request::ADD_MEM_REG, &wire::single_region(&good), &[area.as_fd()]);
        send(&f, request::REM_MEM_REG, &wire::single_region(&region(4096, 4096, 0x1000, 0)), &[]);
        f
    });
    r.closes("the removal of a region before any", |rig| {
        let f = negotiated(rig);
        send(&f, request::REM_MEM_REG, &wire::single_region(&good), &[]);
        f
    });
}

#[test]
fn more_memory_slots_than_there_are() {
    let mut r = Victim::start();
    let area = memfd(4096);
    r.bears("600 memory slots", |rig| {
        let f = negotiated(rig);
        let slots = f.get_max_mem_slots().unwrap();
        for n in 0..slots {
            let region = MemoryRegion {
                guest_addr: n << 20,
                size: 4096,
                user_addr: 0x10_0000 + (n << 20),
                mmap_offset: 0,
            };
            f.add_mem_reg(&region, area.as_fd()).unwrap_or_else(|e| panic!("slot {n} of {slots}: {e}"));
        }
        let one_more =
            MemoryRegion { guest_addr: slots << 20, size: 4096, user_addr: 1 << 40, mmap_offset: 0 };
        let refused = f.add_mem_reg(&one_more, area.as_fd());
        assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
        f.connection().wait_closed(LIMIT).unwrap();
    });
}

/// A region that is longer than the kernel can map in one piece, on a file that claims to be as long.
#[test]
fn a_region_of_an_exbibyte() {
    let mut r = Victim::start();
    // tmpfs allows sparse files of 8 EiB less a page.
    let area = memfd(1 << 60);
    r.bears("a region of an exbibyte", |rig| {
        let f = negotiated(rig);
        let region = MemoryRegion { guest_addr: 0, size: 1 << 60, user_addr: 0, mmap_offset: 0 };
        send(&f, request::SET_MEM_TABLE, &wire::memory_table(&[region]), &[area.as_fd()]);
        f.connection().wait_closed(LIMIT).unwrap();
    });
    // And one that can be mapped although nobody has so much memory.
    let area = memfd(1 << 40);
    r.bears("a region of a tebibyte", |rig| {
        let f = negotiated(rig);
        let region = MemoryRegion { guest_addr: 0, size: 1 << 40, user_addr: 0, mmap_offset: 0 };
        f.set_mem_table(&[(region, area.as_fd())]).unwrap();
    });
}

/// Bytes of the memory that is cut: ring and buffers.
const MEMORY: u64 = 8 << 20;

/// A session whose memory is an unsealed memfd in two regions (0: ring and indirect tables, 1: the rest).
fn unsealed(r: &Victim) -> (Session, OwnedFd, OwnedFd) {
    let (first, second) = (memfd(MEMORY), memfd(MEMORY));
    let mut memory = GuestMemory::default();
    memory.add(Region::from_fd(0, MEMORY, first.try_clone().unwrap(), 0).unwrap());
    memory.add(Region::from_fd(4 << 30, MEMORY, second.try_clone().unwrap(), 0).unwrap());
    let queues = vec![Queue::new(&mut memory, 0, 128).unwrap()];
    let guest = Guest { memory, queues, ..Guest::default() };
    let connection = Connection::connect(&r.rig.socket("victim"), DEFAULT_LIMIT).unwrap();
    (Session::establish(connection, guest, &setup(), &[]).unwrap(), first, second)
}

/// Queues a read of one page without telling the device: header at `header`, data at `data`, status after the header.
fn prepare(session: &mut Session, header: u64, data: u64) {
    let memory = &session.guest.memory;
    memory.write(header, &[0; 16]).unwrap();
    memory.write(header + 16, &[0xff]).unwrap();
    let chain = [
        Buffer { addr: header, len: 16, write: false },
        Buffer { addr: data, len: 4096, write: true },
        Buffer { addr: header + 16, len: 1, write: true },
    ];
    session.guest.queues[0].add(&chain, false).unwrap();
}

#[test]
fn data_pages_that_vanished_fail_their_request() {
    let mut r = Victim::start();
    let before = r.rig.holdings();
    let (mut session, _first, second) = unsealed(&r);
    prepare(&mut session, 1 << 22, 4 << 30);
    rustix::fs::ftruncate(&second, 0).unwrap();
    session.guest.queues[0].publish().unwrap();
    let used = session.guest.queues[0].pop_within(LIMIT).unwrap();
    assert_eq!(used.len, 1);
    let mut found = [0];
    session.guest.memory.read((1 << 22) + 16, &mut found).unwrap();
    assert_eq!(found[0], status::IOERR);
    drop(session);
    r.after("data pages that vanished", before);
}

#[test]
fn header_pages_that_vanished() {
    let mut r = Victim::start();
    let before = r.rig.holdings();
    let (mut session, _first, second) = unsealed(&r);
    prepare(&mut session, 4 << 30, 1 << 22);
    rustix::fs::ftruncate(&second, 0).unwrap();
    session.guest.queues[0].publish().unwrap();
    session.guest.queues[0].kick().unwrap();
    r.neighbour.check("header pages that vanished");
    drop(session);
    r.after("header pages that vanished", before);
}

#[test]
fn a_ring_whose_pages_vanished() {
    let mut r = Victim::start();
    let before = r.rig.holdings();
    let (session, first, _second) = unsealed(&r);
    rustix::fs::ftruncate(&first, 0).unwrap();
    let mut queue = session.guest.queues;
    // The bell only: this process must not touch the ring any more either.
    queue[0].kick().unwrap();
    r.neighbour.check("a ring whose pages vanished");
    drop((session.frontend, queue));
    r.after("a ring whose pages vanished", before);
}
