//! Front ends that break the vhost-user protocol: wrong sizes, numbers, indexes, descriptors, orders. Each ends its own
//! connection at most; the next one is served, the daemon's other exports go on, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use client::wire::{
    self, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, MemoryRegion, VRING_NO_FD, VringAddr, feature, protocol,
    request,
};
use client::{Connection, Frontend, Session};
use ringblk_scenarios::Rng;
use ringblk_scenarios::hostile::{LIMIT, SIZE, Victim, event, memfd, negotiated, send, setup};

/// Spoils the addresses of a ring.
type Change = fn(&mut VringAddr);
/// Makes a message for a session.
type Payload = fn(&Session) -> Vec<u8>;

#[test]
fn queue_indexes_that_do_not_exist() {
    let mut r = Victim::start();
    for index in [1u32, 2, 255, 256, 65536, u32::MAX] {
        let addr = VringAddr { index, desc: 0x1000, used: 0x2000, avail: 0x3000, ..VringAddr::default() };
        let cases: [(&str, u32, Vec<u8>); 6] = [
            ("SET_VRING_NUM", request::SET_VRING_NUM, wire::state(index, 128)),
            ("SET_VRING_ADDR", request::SET_VRING_ADDR, addr.encode()),
            ("SET_VRING_BASE", request::SET_VRING_BASE, wire::state(index, 0)),
            ("GET_VRING_BASE", request::GET_VRING_BASE, wire::state(index, 0)),
            ("SET_VRING_ENABLE", request::SET_VRING_ENABLE, wire::state(index, 1)),
            ("SET_VRING_ENABLE off", request::SET_VRING_ENABLE, wire::state(index, 0)),
        ];
        for (name, number, payload) in cases {
            r.closes(&format!("{name} of ring {index}"), |rig| {
                let f = negotiated(rig);
                send(&f, number, &payload, &[]);
                f
            });
        }
    }
    for index in [1u64, 7, 255] {
        for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            r.closes(&format!("descriptor message {number} for ring {index}"), |rig| {
                let f = negotiated(rig);
                send(&f, number, &wire::words(&[index]), &[event().as_fd()]);
                f
            });
        }
    }
}

#[test]
fn payloads_of_the_wrong_size() {
    let mut r = Victim::start();
    // Every message of the specification and some beyond, with payloads that fit none of them.
    for number in 1..=45u32 {
        for len in [1usize, 3, 200] {
            let name = format!("message {number} with {len} bytes");
            r.closes(&name, |rig| {
                let f = negotiated(rig);
                send(&f, number, &vec![0xa5; len], &[]);
                // SET_DEVICE_STATE_FD and the like want a descriptor first; whatever is left of the connection ends here.
                let _ = f.connection().stream().shutdown(std::net::Shutdown::Write);
                f
            });
        }
    }
}

#[test]
fn headers_that_are_none() {
    let mut r = Victim::start();
    for number in [0u32, 46, 99, 1000, u32::MAX] {
        r.closes(&format!("message number {number}"), |rig| {
            let f = negotiated(rig);
            send(&f, number, &[], &[]);
            f
        });
    }
    for flags in [0u32, 2, 3, FLAG_VERSION | FLAG_REPLY, u32::MAX] {
        r.closes(&format!("flags {flags:#x}"), |rig| {
            let f = negotiated(rig);
            f.connection().send(request::GET_FEATURES, flags, &[], &[]).unwrap();
            f
        });
    }
    for size in [4097u32, 65536, 0x7fff_ffff, u32::MAX] {
        r.closes(&format!("a header that announces {size} bytes"), |rig| {
            let f = negotiated(rig);
            let header = wire::header(request::SET_MEM_TABLE, FLAG_VERSION, size);
            f.connection().send_raw(&header, &[]).unwrap();
            let _ = f.connection().stream().shutdown(std::net::Shutdown::Write);
            f
        });
    }
}

#[test]
fn messages_cut_short() {
    let mut r = Victim::start();
    let whole =
        [wire::header(request::SET_VRING_NUM, FLAG_VERSION, 8).to_vec(), wire::state(0, 128)].concat();
    for len in 0..whole.len() {
        r.closes(&format!("{len} of {} bytes, then the end", whole.len()), |rig| {
            let f = negotiated(rig);
            if len > 0 {
                f.connection().send_raw(&whole[..len], &[]).unwrap();
            }
            f.connection().stream().shutdown(std::net::Shutdown::Write).unwrap();
            f
        });
    }
    // The same cut by closing both ways, with a descriptor under way.
    for len in [1, 11, 12, 13] {
        let name = format!("{len} bytes and a descriptor, then nobody");
        r.bears(&name, |rig| {
            let f = negotiated(rig);
            let message =
                [wire::header(request::SET_VRING_KICK, FLAG_VERSION, 8).to_vec(), wire::words(&[0])].concat();
            f.connection().send_raw(&message[..len], &[event().as_fd()]).unwrap();
        });
    }
}

#[test]
fn bytes_one_by_one_are_a_message_all_the_same() {
    let mut r = Victim::start();
    r.bears("a message in single bytes", |rig| {
        let f = Frontend::new(rig.connection("victim"));
        for byte in wire::header(request::GET_FEATURES, FLAG_VERSION, 0) {
            f.connection().send_raw(&[byte], &[]).unwrap();
            std::thread::yield_now();
        }
        let reply = f.connection().recv().unwrap();
        assert_eq!(reply.request, request::GET_FEATURES);
        assert_ne!(reply.u64().unwrap() & feature::VERSION_1, 0);
    });
}

#[test]
fn noise() {
    let mut r = Victim::start();
    for seed in 0..40 {
        let name = format!("noise {seed}");
        r.bears(&name, |rig| {
            let connection = rig.connection("victim");
            let bytes = Rng::new(seed).bytes(64 << 10);
            // It closes after the first header that makes no sense, perhaps while we still write.
            match connection.send_raw(&bytes, &[]) {
                Err(e) if !e.is_closed() => panic!("{e}"),
                _ => {}
            }
            connection.wait_closed(LIMIT).unwrap();
        });
    }
}

#[test]
fn well_formed_messages_in_any_order_with_any_values() {
    let mut r = Victim::start();
    let memory = memfd(1 << 20);
    for seed in 0..60u64 {
        let name = format!("random messages, seed {seed}");
        r.bears(&name, |rig| {
            let mut rng = Rng::new(seed);
            let f = if rng.below(4) == 0 { Frontend::new(rig.connection("victim")) } else { negotiated(rig) };
            for _ in 0..200 {
                let small = |rng: &mut Rng| [0u64, 1, 2, 128, 256, 0x1000, rng.bits()][rng.below(7) as usize];
                let number = (1 + rng.below(43)) as u32;
                let (payload, fds) = match number {
                    request::SET_VRING_NUM
                    | request::SET_VRING_BASE
                    | request::SET_VRING_ENABLE
                    | request::GET_VRING_BASE => {
                        (wire::state(rng.below(2) as u32, small(&mut rng) as u32), vec![])
                    }
                    request::SET_VRING_ADDR => {
                        let a = VringAddr {
                            index: 0,
                            flags: 0,
                            desc: small(&mut rng) & !15,
                            used: small(&mut rng) & !3,
                            avail: small(&mut rng) & !1,
                            log: 0,
                        };
                        (a.encode(), vec![])
                    }
                    request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                        (wire::words(&[0]), vec![event()])
                    }
                    request::SET_MEM_TABLE => {
                        let region = MemoryRegion {
                            guest_addr: small(&mut rng) & !4095,
                            size: 1 << (12 + rng.below(10)),
                            user_addr: small(&mut rng) & !4095,
                            mmap_offset: 0,
                        };
                        (wire::memory_table(&[region]), vec![memory.try_clone().unwrap()])
                    }
                    request::SET_FEATURES => (wire::words(&[f.offered & rng.bits()]), vec![]),
                    request::SET_PROTOCOL_FEATURES => {
                        (wire::words(&[f.protocol_offered & rng.bits()]), vec![])
                    }
                    request::GET_CONFIG => (wire::config(0, 0, &[0; 60]), vec![]),
                    _ => (vec![], vec![]),
                };
                let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
                let flags = FLAG_VERSION | if rng.below(2) == 0 { FLAG_NEED_REPLY } else { 0 };
                if let Err(e) = f.connection().send(number, flags, &payload, &fds) {
                    assert!(e.is_closed(), "{e}");
                    break;
                }
            }
            let _ = f.connection().stream().shutdown(std::net::Shutdown::Write);
            f.connection().wait_closed(LIMIT).unwrap();
        });
    }
}

#[test]
fn descriptors_that_are_no_eventfds() {
    let mut r = Victim::start();
    let (pipe_read, pipe_write) = rustix::pipe::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let timer = rustix::time::timerfd_create(
        rustix::time::TimerfdClockId::Monotonic,
        rustix::time::TimerfdFlags::CLOEXEC,
    )
    .unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
    let area = memfd(4096);
    let kinds = [
        ("a pipe's read end", pipe_read.as_fd()),
        ("a pipe's write end", pipe_write.as_fd()),
        ("a socket", socket.as_fd()),
        ("a timerfd", timer.as_fd()),
        ("an epoll", epoll.as_fd()),
        ("a file", file.as_fd()),
        ("/dev/null", null.as_fd()),
        ("a memfd", area.as_fd()),
    ];
    for (kind, fd) in kinds {
        for (what, number) in [
            ("kick", request::SET_VRING_KICK),
            ("call", request::SET_VRING_CALL),
            ("error", request::SET_VRING_ERR),
        ] {
            r.closes(&format!("{kind} as {what} descriptor"), |rig| {
                let f = negotiated(rig);
                send(&f, number, &wire::words(&[0]), &[fd]);
                f
            });
            // The same on a ring that runs.
            r.closes(&format!("{kind} as {what} descriptor of a running ring"), |rig| {
                let session = Session::connect(&rig.socket("victim"), &setup()).unwrap();
                let f = session.frontend;
                send(&f, number, &wire::words(&[0]), &[fd]);
                f
            });
        }
    }
}

#[test]
fn descriptors_in_the_wrong_number() {
    let mut r = Victim::start();
    let one = event();
    let many: Vec<BorrowedFd<'_>> = (0..32).map(|_| one.as_fd()).collect();
    for number in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
        for (name, value, fds) in [
            ("none where one was announced", 0u64, &many[..0]),
            ("one where none was announced", VRING_NO_FD, &many[..1]),
            ("two", 0, &many[..2]),
            ("thirty-two", 0, &many[..]),
        ] {
            r.closes(&format!("message {number} with descriptors: {name}"), |rig| {
                let f = negotiated(rig);
                send(&f, number, &wire::words(&[value]), fds);
                f
            });
        }
    }
    for number in
        [request::GET_FEATURES, request::SET_OWNER, request::GET_PROTOCOL_FEATURES, request::GET_QUEUE_NUM]
    {
        r.closes(&format!("message {number} with a descriptor"), |rig| {
            let f = negotiated(rig);
            send(&f, number, &[], &many[..1]);
            f
        });
    }
    // No polling mode: a kick descriptor is needed.
    r.closes("no kick descriptor", |rig| {
        let f = negotiated(rig);
        send(&f, request::SET_VRING_KICK, &wire::words(&[VRING_NO_FD]), &[]);
        f
    });
    let region = MemoryRegion { guest_addr: 0, size: 4096, user_addr: 0x10000, mmap_offset: 0 };
    let area = memfd(4096);
    for (regions, fds) in [(1usize, 0usize), (1, 2), (2, 1), (0, 0), (0, 1), (8, 7)] {
        r.closes(&format!("a table of {regions} region(s) with {fds} descriptor(s)"), |rig| {
            let f = negotiated(rig);
            let fds: Vec<BorrowedFd<'_>> = (0..fds).map(|_| area.as_fd()).collect();
            send(&f, request::SET_MEM_TABLE, &wire::memory_table(&vec![region; regions]), &fds);
            f
        });
    }
    r.closes("a table that announces more regions than it has", |rig| {
        let f = negotiated(rig);
        let mut payload = wire::memory_table(&[region]);
        payload[..4].copy_from_slice(&1000u32.to_le_bytes());
        send(&f, request::SET_MEM_TABLE, &payload, &[area.as_fd()]);
        f
    });
    for fds in [0usize, 2] {
        r.closes(&format!("ADD_MEM_REG with {fds} descriptors"), |rig| {
            let f = negotiated(rig);
            let fds: Vec<BorrowedFd<'_>> = (0..fds).map(|_| area.as_fd()).collect();
            send(&f, request::ADD_MEM_REG, &wire::single_region(&region), &fds);
            f
        });
    }
}

#[test]
fn back_end_channels_that_are_none() {
    let mut r = Victim::start();
    let (read, write) = rustix::pipe::pipe().unwrap();
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let area = memfd(4096);
    for (name, fds) in [
        ("none", vec![]),
        ("a pipe", vec![read.as_fd()]),
        ("a pipe's other end", vec![write.as_fd()]),
        ("a datagram socket", vec![datagram.as_fd()]),
        ("a memfd", vec![area.as_fd()]),
        ("two", vec![read.as_fd(), write.as_fd()]),
    ] {
        r.closes(&format!("a back-end channel that is {name}"), |rig| {
            let f = negotiated(rig);
            send(&f, request::SET_BACKEND_REQ_FD, &[], &fds);
            f
        });
    }
    r.closes("a back-end channel that was not negotiated", |rig| {
        let mut f = Frontend::new(rig.connection("victim"));
        f.get_features().unwrap();
        f.get_protocol_features().unwrap();
        f.set_protocol_features(protocol::CONFIG).unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        send(&f, request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        f
    });
    // A channel that nobody reads: the daemon must neither block on it nor die of it when it is resized many times.
    let session = Session::connect(&r.rig.socket("victim"), &setup()).unwrap();
    for n in 0..2000u64 {
        let size = SIZE + (n + 1) % 2 * 4096;
        r.rig.command("block_resize", serde_json::json!({"node-name": "node-victim", "size": size}));
    }
    r.neighbour.check("two thousand resizes that nobody hears of");
    drop(session);
    r.rig.wait_disconnected("victim");
    r.serves("two thousand resizes");
}

#[test]
fn features_that_were_not_offered() {
    let mut r = Victim::start();
    for bit in [0u64, 3, 4, 15, 16, 17, 24, 33, 34, 40, 63] {
        r.closes(&format!("feature bit {bit}"), |rig| {
            let mut f = Frontend::new(rig.connection("victim"));
            let offered = f.get_features().unwrap();
            assert_eq!(offered & (1 << bit), 0, "bit {bit} is offered: choose another");
            send(&f, request::SET_FEATURES, &wire::words(&[offered | 1 << bit]), &[]);
            f
        });
        r.closes(&format!("protocol feature bit {bit}"), |rig| {
            let mut f = Frontend::new(rig.connection("victim"));
            f.get_features().unwrap();
            let offered = f.get_protocol_features().unwrap();
            let bit = (bit..64).find(|b| offered & (1 << b) == 0).unwrap();
            send(&f, request::SET_PROTOCOL_FEATURES, &wire::words(&[offered | 1 << bit]), &[]);
            f
        });
    }
    r.closes("a legacy driver", |rig| {
        let session = Session::connect(&rig.socket("victim"), &setup()).unwrap();
        let base = session.frontend.get_vring_base(0).unwrap();
        let f = session.frontend;
        send(&f, request::SET_FEATURES, &wire::words(&[session.guest.features & !feature::VERSION_1]), &[]);
        send(&f, request::SET_VRING_BASE, &wire::state(0, base), &[]);
        send(&f, request::SET_VRING_KICK, &wire::words(&[0]), &[session.guest.queues[0].kick_fd()]);
        f
    });
}

#[test]
fn ring_values_that_cannot_be() {
    let mut r = Victim::start();
    for size in [0u32, 1, 3, 127, 2048, 32769, 65536, 65664, u32::MAX] {
        r.closes(&format!("a ring of {size}"), |rig| {
            let f = negotiated(rig);
            send(&f, request::SET_VRING_NUM, &wire::state(0, size), &[]);
            f
        });
    }
    for base in [65536u32, u32::MAX] {
        r.closes(&format!("base {base}"), |rig| {
            let f = negotiated(rig);
            send(&f, request::SET_VRING_BASE, &wire::state(0, base), &[]);
            f
        });
    }
    r.closes("ENABLE 2", |rig| {
        let f = negotiated(rig);
        send(&f, request::SET_VRING_ENABLE, &wire::state(0, 2), &[]);
        f
    });
    // Addresses that no memory holds, that are not aligned, or that run out of their region: refused when the ring is to
    // start.
    let moved: [(&str, Change); 8] = [
        ("descriptors nowhere", |a| a.desc = 0x10),
        ("an available ring nowhere", |a| a.avail = 0x10),
        ("a used ring nowhere", |a| a.used = 0x10),
        ("descriptors that are not aligned", |a| a.desc += 8),
        ("an available ring that is not aligned", |a| a.avail += 1),
        ("a used ring that is not aligned", |a| a.used += 2),
        ("descriptors that run out of memory", |a| a.desc += (8 << 20) - 64),
        ("addresses at the very top", |a| (a.desc, a.avail, a.used) = (!15, !1, !3)),
    ];
    for (name, change) in moved {
        r.closes(name, |rig| {
            let session = Session::connect(&rig.socket("victim"), &setup()).unwrap();
            let queue = &session.guest.queues[0];
            session.frontend.get_vring_base(0).unwrap();
            let mut addr = queue.vring_addr();
            change(&mut addr);
            let f = session.frontend;
            send(&f, request::SET_VRING_ADDR, &addr.encode(), &[]);
            send(&f, request::SET_VRING_KICK, &wire::words(&[0]), &[queue.kick_fd()]);
            send(&f, request::SET_VRING_ENABLE, &wire::state(0, 1), &[]);
            f
        });
    }
    // A ring that runs may not be resized, rebased or moved.
    let running: [(&str, u32, Payload); 3] = [
        ("SET_VRING_NUM", request::SET_VRING_NUM, |_| wire::state(0, 64)),
        ("SET_VRING_BASE", request::SET_VRING_BASE, |_| wire::state(0, 5)),
        ("SET_VRING_ADDR", request::SET_VRING_ADDR, |s| {
            let mut a = s.guest.queues[0].vring_addr();
            a.desc += 4096;
            a.encode()
        }),
    ];
    for (name, number, payload) in running {
        r.closes(&format!("{name} on a running ring"), |rig| {
            let session = Session::connect(&rig.socket("victim"), &setup()).unwrap();
            let payload = payload(&session);
            let f = session.frontend;
            send(&f, number, &payload, &[]);
            f
        });
    }
}

#[test]
fn configuration_writes_and_reads_that_cannot_be() {
    let mut r = Victim::start();
    for (offset, bytes) in
        [(0u32, &[1u8][..]), (31, &[1]), (32, &[1, 1]), (32, &[2]), (60, &[0]), (4095, &[0])]
    {
        r.closes(&format!("{} byte(s) written at {offset}", bytes.len()), |rig| {
            let f = negotiated(rig);
            send(&f, request::SET_CONFIG, &wire::config(offset, 0, bytes), &[]);
            f
        });
    }
    // A size that lies about the bytes that follow.
    for (size, len) in [(61u32, 60usize), (59, 60), (u32::MAX, 60), (0, 0), (4096, 60)] {
        r.closes(&format!("GET_CONFIG of {size} bytes with {len}"), |rig| {
            let f = negotiated(rig);
            let mut payload = wire::config(0, 0, &vec![0; len]);
            payload[4..8].copy_from_slice(&size.to_le_bytes());
            send(&f, request::GET_CONFIG, &payload, &[]);
            f
        });
    }
    r.closes("GET_CONFIG at the end of all offsets", |rig| {
        let f = negotiated(rig);
        send(&f, request::GET_CONFIG, &wire::config(u32::MAX - 3, 0, &[0; 60]), &[]);
        f
    });
}

#[test]
fn operations_that_were_not_negotiated() {
    let mut r = Victim::start();
    let area = memfd(4096);
    let cases: [(&str, u32, Vec<u8>, bool); 9] = [
        ("GET_CONFIG", request::GET_CONFIG, wire::config(0, 0, &[0; 60]), false),
        ("SET_CONFIG", request::SET_CONFIG, wire::config(32, 0, &[1]), false),
        ("GET_QUEUE_NUM", request::GET_QUEUE_NUM, vec![], false),
        ("GET_MAX_MEM_SLOTS", request::GET_MAX_MEM_SLOTS, vec![], false),
        ("RESET_DEVICE", request::RESET_DEVICE, vec![], false),
        ("SET_LOG_BASE", request::SET_LOG_BASE, wire::words(&[4096, 0]), true),
        ("GET_INFLIGHT_FD", request::GET_INFLIGHT_FD, vec![0; 24], false),
        ("SET_INFLIGHT_FD", request::SET_INFLIGHT_FD, vec![0; 24], true),
        ("SET_VRING_ENABLE", request::SET_VRING_ENABLE, wire::state(0, 1), false),
    ];
    for (name, number, payload, with_fd) in cases {
        r.closes(&format!("{name} without its feature"), |rig| {
            let f = Frontend::new(rig.connection("victim"));
            let fds: Vec<BorrowedFd<'_>> = with_fd.then(|| area.as_fd()).into_iter().collect();
            send(&f, number, &payload, &fds);
            f
        });
    }
}

#[test]
fn a_flood_of_requests_whose_replies_nobody_reads() {
    let mut r = Victim::start();
    r.bears("a flood of GET_FEATURES", |rig| {
        let mut connection = rig.connection("victim");
        connection.set_limit(Duration::from_millis(300));
        // Until both directions are full: the daemon's thread for this connection is stuck in its reply by then.
        let mut sent = 0u32;
        while connection.send(request::GET_FEATURES, FLAG_VERSION, &[], &[]).is_ok() {
            sent += 1;
            assert!(sent < 10_000_000, "the daemon takes requests without end and without giving replies");
        }
        assert!(sent > 10);
    });
    // The same, and the export is deleted meanwhile: nobody waits for the flooder.
    let mut connection = r.rig.connection("victim");
    connection.set_limit(Duration::from_millis(300));
    while connection.send(request::GET_FEATURES, FLAG_VERSION, &[], &[]).is_ok() {}
    r.neighbour.check("a flood");
    r.rig.command("block-export-del", serde_json::json!({"id": "victim", "mode": "hard"}));
    r.rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    r.neighbour.check("a flood, and the end of the export");
    r.rig.assert_running();
}

#[test]
fn clients_that_wait_in_the_backlog_and_leave() {
    let mut r = Victim::start();
    let before = r.rig.holdings();
    let mut disk = r.rig.disk("victim", &setup());
    // One is served at a time; the others wait, some give up.
    let mut waiting: Vec<_> = (0..20)
        .filter_map(|_| Connection::connect(&r.rig.socket("victim"), Duration::from_millis(10)).ok())
        .collect();
    assert!(!waiting.is_empty(), "at least one finds room in the backlog");
    waiting.truncate(waiting.len() / 2);
    disk.write(0, &[1; 512]).unwrap();
    assert!(disk.read(0, 512).is_ok(), "the one that is served is served");
    drop(disk);
    drop(waiting);
    r.serves("a crowd");
    r.neighbour.check("a crowd");
    r.rig.wait_holdings(before);
}
