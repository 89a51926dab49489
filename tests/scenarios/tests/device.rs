//! The block device as a driver sees it (virtio 1.3 §5.2): requests, statuses, limits, the cache, the serial; and what
//! two exports of one node may do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::unix::fs::MetadataExt;

use client::blk::{self, SEGMENT_UNMAP, Segment, op, status};
use client::disk::{Payload, Request};
use client::wire::protocol;
use client::{Disk, Error, Setup};
use ringblk_scenarios::{Rig, Rng, Wanted, pattern, read_at};
use serde_json::json;

const SIZE: u64 = 16 << 20;

fn setup() -> Setup {
    Setup { memory: vec![(0, 32 << 20)], ..Setup::default() }
}

fn run(disk: &mut Disk, op: u32, sector: u64, payload: Payload) -> u8 {
    disk.run(0, &Request::new(op, sector, payload)).unwrap().status
}

#[test]
fn unknown_requests_are_unsupported_and_the_ring_goes_on() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    for kind in
        [2u32, 3, 5, 6, 7, 9, op::GET_LIFETIME, 12, op::SECURE_ERASE, 15, 16, 17, 26, 0x8000_0000, u32::MAX]
    {
        assert_eq!(run(&mut disk, kind, 0, Payload::None), status::UNSUPP, "type {kind}");
        assert_eq!(run(&mut disk, kind, 0, Payload::In(512)), status::UNSUPP, "type {kind}");
        assert_eq!(run(&mut disk, kind, 0, Payload::Out(vec![0; 512])), status::UNSUPP, "type {kind}");
    }
    assert_eq!(run(&mut disk, op::IN, 0, Payload::In(512)), status::OK);
}

#[test]
fn requests_outside_the_disk_or_between_blocks_fail() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    let end = SIZE / 512;
    for (sector, len) in
        [(end, 512u32), (end - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 4096)]
    {
        assert_eq!(run(&mut disk, op::IN, sector, Payload::In(len)), status::IOERR, "read {len} at {sector}");
        let data = vec![9; len as usize];
        assert_eq!(
            run(&mut disk, op::OUT, sector, Payload::Out(data)),
            status::IOERR,
            "write {len} at {sector}"
        );
    }
    for len in [1u32, 511, 513, 1000] {
        assert_eq!(run(&mut disk, op::IN, 0, Payload::In(len)), status::IOERR, "read {len}");
        assert_eq!(
            run(&mut disk, op::OUT, 0, Payload::Out(vec![9; len as usize])),
            status::IOERR,
            "write {len}"
        );
    }
    // The last sector is there, and nothing was written beside it.
    disk.write(SIZE - 512, &[3; 512]).unwrap();
    assert!(disk.read(SIZE - 512, 512).unwrap() == [3; 512]);
    assert!(read_at(&rig.image("disk"), 0, 4096) == [0; 4096]);
    assert_eq!(rig.image("disk").metadata().unwrap().len(), SIZE, "the file did not grow");
}

#[test]
fn data_may_be_cut_anyhow() {
    // Descriptors are no blocks (§2.7.4.2): data are what they are in sum.
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    for indirect in [false, true] {
        let mut disk = rig.disk("disk", &setup());
        disk.set_indirect(indirect);
        let mut rng = Rng::new(7);
        for round in 0..100u64 {
            let len = 512 * (1 + rng.below(64)) as usize;
            let cuts: Vec<u32> = (0..rng.below(20)).map(|_| 1 + rng.below(3000) as u32).collect();
            let at = rng.below(SIZE / 512 - 64);
            let data = pattern(round, len);
            let mut write = Request::new(op::OUT, at, Payload::Out(data.clone()));
            write.cuts = cuts.clone();
            assert_eq!(disk.run(0, &write).unwrap().status, status::OK);
            assert!(
                read_at(&rig.image("disk"), at * 512, len) == data,
                "round {round} of {indirect}: {cuts:?}"
            );
            let mut read = Request::new(op::IN, at, Payload::In(len as u32));
            read.cuts = cuts.iter().rev().copied().collect();
            let done = disk.run(0, &read).unwrap();
            assert_eq!((done.status, done.used_len), (status::OK, len as u32 + 1));
            assert!(done.data == data, "round {round} of {indirect}: {cuts:?}");
        }
    }
}

#[test]
fn read_only_disks_refuse_everything_that_writes() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE).options("writable=off")]);
    let mut disk = rig.disk("disk", &setup());
    let features = disk.session().guest.features;
    assert_ne!(features & blk::feature::RO, 0);
    assert_eq!(features & (blk::feature::DISCARD | blk::feature::WRITE_ZEROES), 0);
    let segment = Segment { sector: 0, sectors: 8, flags: 0 }.encode();
    assert_eq!(run(&mut disk, op::OUT, 0, Payload::Out(vec![1; 512])), status::IOERR);
    assert_eq!(run(&mut disk, op::DISCARD, 0, Payload::Out(segment.clone())), status::IOERR);
    assert_eq!(run(&mut disk, op::WRITE_ZEROES, 0, Payload::Out(segment)), status::IOERR);
    assert_eq!(run(&mut disk, op::FLUSH, 0, Payload::None), status::OK);
    assert!(disk.read(0, 4096).unwrap() == [0; 4096]);
    // A node that is itself read-only can be exported read-only and no other way.
    let file = rig.image("disk").display().to_string();
    rig.command(
        "blockdev-add",
        json!({"driver": "file", "filename": file, "node-name": "ro", "read-only": true, "locking": "off"}),
    );
    let error = rig.add_export("other", "ro", &json!({"writable": true})).unwrap_err();
    assert!(error.contains("read-only"), "{error}");
    rig.add_export("other", "ro", &json!({"writable": false})).unwrap();
}

#[test]
fn the_serial() {
    let mut rig = Rig::start(&[
        Wanted::file("plain", SIZE),
        Wanted::file("named", SIZE).options("writable=on,serial=12345678901234567890"),
    ]);
    assert_eq!(rig.disk("plain", &setup()).get_id().unwrap(), "plain");
    let mut disk = rig.disk("named", &setup());
    assert_eq!(disk.get_id().unwrap(), "12345678901234567890");
    // Shorter buffers get the start, longer ones no more than twenty bytes.
    for (room, expected) in [(1u32, 1usize), (19, 19), (20, 20), (512, 20)] {
        let done = disk.run(0, &Request::new(op::GET_ID, 0, Payload::In(room))).unwrap();
        assert_eq!(done.status, status::OK);
        assert_eq!(&done.data[..expected], &b"12345678901234567890"[..expected]);
        assert!(done.data[expected..].iter().all(|&b| b == 0));
        assert_eq!(done.used_len as usize, expected + 1, "{room} bytes of room");
    }
    drop(disk);
    let error =
        rig.add_export("long", "node-plain", &json!({"serial": "123456789012345678901"})).unwrap_err();
    assert!(error.contains("serial"), "{error}");
}

#[test]
fn discard_and_write_zeroes() {
    let rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    let config = disk.session().config.clone();
    assert!(config.max_discard_seg >= 16 && config.max_write_zeroes_seg >= 16);
    assert_eq!(config.write_zeroes_may_unmap, 1);
    let data = pattern(1, SIZE as usize);
    for (at, part) in (0..).zip(data.chunks(1 << 20)) {
        disk.write(at << 20, part).unwrap();
    }
    let mut expected = data;
    let zero = |expected: &mut Vec<u8>, s: &Segment| {
        let at = s.sector as usize * 512;
        expected[at..at + s.sectors as usize * 512].fill(0);
    };
    // Sixteen segments in one request, none adjacent, sectors and not pages.
    let segments: Vec<Segment> = (0..16)
        .map(|n| Segment {
            sector: n * 100 + 3,
            sectors: 1 + n as u32,
            flags: (n % 2) as u32 * SEGMENT_UNMAP,
        })
        .collect();
    disk.write_zeroes(&segments).unwrap();
    segments.iter().for_each(|s| zero(&mut expected, s));
    assert!(read_at(&rig.image("disk"), 0, SIZE as usize) == expected, "write zeroes, sixteen segments");
    // Discard gives back space, and only inside what was named.
    let blocks = || rig.image("disk").metadata().unwrap().blocks();
    let full = blocks();
    let holes = [
        Segment { sector: 8192, sectors: 4096, flags: 0 },
        Segment { sector: 16384, sectors: 2048, flags: 0 },
    ];
    disk.discard(&holes).unwrap();
    holes.iter().for_each(|s| zero(&mut expected, s));
    assert!(read_at(&rig.image("disk"), 0, SIZE as usize) == expected, "discard");
    assert!(blocks() < full, "discard gives back space");
    // Empty segments do nothing, and the end of the disk is the end.
    disk.discard(&[Segment { sector: 0, sectors: 0, flags: 0 }]).unwrap();
    disk.write_zeroes(&[Segment { sector: SIZE / 512 - 1, sectors: 1, flags: 0 }]).unwrap();
    zero(&mut expected, &Segment { sector: SIZE / 512 - 1, sectors: 1, flags: 0 });

    for (what, ops, segment, wanted) in [
        (
            "past the end",
            vec![op::DISCARD, op::WRITE_ZEROES],
            Segment { sector: SIZE / 512 - 1, sectors: 2, flags: 0 },
            status::IOERR,
        ),
        (
            "far outside",
            vec![op::DISCARD, op::WRITE_ZEROES],
            Segment { sector: u64::MAX, sectors: 1, flags: 0 },
            status::IOERR,
        ),
        (
            "unknown flags",
            vec![op::DISCARD, op::WRITE_ZEROES],
            Segment { sector: 0, sectors: 8, flags: 2 },
            status::UNSUPP,
        ),
        (
            "unmap on discard",
            vec![op::DISCARD],
            Segment { sector: 0, sectors: 8, flags: SEGMENT_UNMAP },
            status::UNSUPP,
        ),
        (
            "too long",
            vec![op::DISCARD, op::WRITE_ZEROES],
            Segment { sector: 0, sectors: u32::MAX, flags: 0 },
            status::IOERR,
        ),
    ] {
        for kind in ops {
            // A good segment in front must not be done when a bad one follows.
            let good = Segment { sector: 2000, sectors: 8, flags: 0 };
            let bytes = [good.encode(), segment.encode()].concat();
            assert_eq!(run(&mut disk, kind, 0, Payload::Out(bytes)), wanted, "{what}, type {kind}");
        }
    }
    for len in [0usize, 1, 15, 17, 31] {
        let payload = if len == 0 { Payload::None } else { Payload::Out(vec![0; len]) };
        assert_eq!(run(&mut disk, op::DISCARD, 0, payload.clone()), status::IOERR, "{len} bytes of segments");
        assert_eq!(run(&mut disk, op::WRITE_ZEROES, 0, payload), status::IOERR, "{len} bytes of segments");
    }
    let many =
        Segment { sector: 0, sectors: 1, flags: 0 }.encode().repeat(config.max_discard_seg as usize + 1);
    assert_eq!(
        run(&mut disk, op::DISCARD, 0, Payload::Out(many)),
        status::IOERR,
        "more segments than announced"
    );
    assert!(read_at(&rig.image("disk"), 0, SIZE as usize) == expected, "what fails changes nothing");
}

#[test]
fn the_write_cache_is_what_the_driver_is_told() {
    let rig = Rig::start(&[
        Wanted::file("back", SIZE),
        Wanted::file("through", SIZE).options("writable=on,writethrough=on"),
    ]);
    let mut back = rig.disk("back", &setup());
    assert_eq!(back.session().config.writeback, 1, "there is a cache, and it is told");
    // The driver switches it off and on again; other values are refused (see the hostile tests).
    back.session().frontend.set_config(blk::CONFIG_WRITEBACK, 0, &[0]).unwrap();
    assert_eq!(back.session_mut().refresh_config().unwrap().writeback, 0);
    back.write(0, &[1; 4096]).unwrap();
    back.session().frontend.set_config(blk::CONFIG_WRITEBACK, 0, &[1]).unwrap();
    assert_eq!(back.session_mut().refresh_config().unwrap().writeback, 1);
    back.write(0, &[2; 4096]).unwrap();
    back.flush().unwrap();
    let mut through = rig.disk("through", &setup());
    assert_eq!(through.session().config.writeback, 0);
    through.write(0, &[3; 65536]).unwrap();
    through.write_zeroes(&[Segment { sector: 0, sectors: 8, flags: 0 }]).unwrap();
    through.discard(&[Segment { sector: 16, sectors: 8, flags: 0 }]).unwrap();
    through.flush().unwrap();
    assert!(through.read(0, 4096).unwrap() == [0; 4096]);
    assert!(through.read(4096, 4096).unwrap() == [3; 4096]);
    // A driver that took neither FLUSH nor CONFIG_WCE cannot flush: it is served all the same.
    let features = setup().features & !(blk::feature::FLUSH | blk::feature::CONFIG_WCE);
    drop(back);
    let mut plain = rig.disk("back", &Setup { features, ..setup() });
    plain.write(0, &[4; 4096]).unwrap();
    assert!(read_at(&rig.image("back"), 0, 4096) == [4; 4096]);
}

#[test]
fn the_cache_mode_belongs_to_the_connection() {
    // A driver's choice ends with it: the next one finds the default again.
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let disk = rig.disk("disk", &setup());
    disk.session().frontend.set_config(blk::CONFIG_WRITEBACK, 0, &[0]).unwrap();
    drop(disk);
    rig.wait_disconnected("disk");
    assert_eq!(rig.disk("disk", &setup()).session().config.writeback, 1);
}

/// Through `raw` the guest is told the sizes of the file below.
#[test]
fn block_sizes_come_from_the_bottom_of_the_graph() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let node = format!("raw,file.driver=file,file.filename={}", image.display());
    let rig = Rig::start(&[Wanted::node("plain", &node).options("writable=on")]);
    let block = std::os::unix::fs::MetadataExt::blksize(&std::fs::metadata(&image).unwrap());
    let block = if block.is_power_of_two() && (512..=1 << 21).contains(&block) { block } else { 512 };
    let disk = rig.disk("plain", &setup());
    let config = &disk.session().config;
    assert_eq!(u64::from(config.blk_size) << config.physical_block_exp, block);
}

#[test]
fn block_sizes() {
    let mut rig = Rig::start(&[
        Wanted::file("big", SIZE).options("writable=on,logical-block-size=4096"),
        Wanted::file("both", SIZE).options("writable=on,logical-block-size=512,physical-block-size=4096"),
    ]);
    let mut disk = rig.disk("big", &setup());
    assert_eq!(disk.session().config.blk_size, 4096);
    assert_eq!(
        disk.session().config.capacity,
        SIZE / 512,
        "the capacity counts sectors of 512 bytes all the same"
    );
    for (sector, len) in [(1u64, 4096u32), (8, 512), (0, 6144), (7, 512)] {
        assert_eq!(run(&mut disk, op::IN, sector, Payload::In(len)), status::IOERR, "read {len} at {sector}");
        let data = vec![1; len as usize];
        assert_eq!(
            run(&mut disk, op::OUT, sector, Payload::Out(data)),
            status::IOERR,
            "write {len} at {sector}"
        );
    }
    for (sector, sectors) in [(1u64, 8u32), (8, 4)] {
        let bytes = Segment { sector, sectors, flags: 0 }.encode();
        assert_eq!(run(&mut disk, op::WRITE_ZEROES, 0, Payload::Out(bytes)), status::IOERR);
    }
    assert_eq!(run(&mut disk, op::OUT, 8, Payload::Out(vec![5; 8192])), status::OK);
    assert!(read_at(&rig.image("big"), 4096, 8192) == [5; 8192]);
    let both = rig.disk("both", &setup());
    assert_eq!((both.session().config.blk_size, both.session().config.physical_block_exp), (512, 3));
    drop(both);
    for (options, word) in [
        (json!({"logical-block-size": 1000}), "logical-block-size"),
        (json!({"logical-block-size": 256}), "logical-block-size"),
        (json!({"logical-block-size": 4096, "physical-block-size": 512}), "physical-block-size"),
        (json!({"num-queues": 0}), "num-queues"),
        (json!({"num-queues": 257}), "num-queues"),
        (json!({"queue-size": 100}), "queue-size"),
        (json!({"queue-size": 2048}), "queue-size"),
    ] {
        let error = rig.add_export("bad", "node-both", &options).unwrap_err();
        assert!(error.contains(word), "{options}: {error}");
    }
}

#[test]
fn two_exports_of_one_node() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    // The first one writes and shares with nobody.
    let error = rig.add_export("second", "node-disk", &json!({"writable": true})).unwrap_err();
    assert!(error.contains("disk"), "{error}");
    let error =
        rig.add_export("second", "node-disk", &json!({"writable": true, "share-rw": true})).unwrap_err();
    assert!(error.contains("disk"), "both must share: {error}");
    assert!(!rig.socket("second").exists(), "a refused export leaves no socket");

    let mut rig = Rig::start(&[Wanted::file("disk", SIZE).options("writable=on,share-rw=on")]);
    rig.add_export("second", "node-disk", &json!({"writable": true, "share-rw": true})).unwrap();
    let mut first = rig.disk("disk", &setup());
    let mut second = rig.disk("second", &setup());
    for n in 0..50u64 {
        let data = pattern(n, 8192);
        first.write(n * 8192, &data).unwrap();
        assert!(second.read(n * 8192, 8192).unwrap() == data);
        let data = pattern(n + 1000, 8192);
        second.write(n * 8192, &data).unwrap();
        assert!(first.read(n * 8192, 8192).unwrap() == data);
    }
    // The end of one is not the end of the other.
    drop(second);
    rig.wait_disconnected("second");
    rig.command("block-export-del", json!({"id": "second"}));
    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    first.write(0, &[1; 512]).unwrap();
}

#[test]
fn one_socket_is_not_taken_twice() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE).options("writable=on,share-rw=on")]);
    let path = rig.socket("disk").display().to_string();
    let again = rig.qmp.execute(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "thief", "node-name": "node-disk", "writable": true, "share-rw": true,
               "addr": {"type": "unix", "path": path}}),
    );
    assert!(matches!(again, Err(Error::Qmp { .. })), "{again:?}");
    rig.disk("disk", &setup()).read(0, 512).unwrap();
}

#[test]
fn random_requests_on_two_queues_leave_the_image_that_the_model_says() {
    random_requests(&Rig::start(&[Wanted::file("disk", SIZE).options("writable=on,num-queues=2")]));
}

#[test]
fn the_same_with_an_iothread_for_each_queue() {
    let options =
        "writable=on,num-queues=2,iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.1.iothread=b";
    random_requests(&Rig::start_with(
        &[Wanted::file("disk", SIZE).options(options)],
        &["--object", "iothread,id=a", "--object", "iothread,id=b"],
    ));
}

#[test]
fn the_same_without_a_write_cache() {
    let options = "writable=on,num-queues=2,writethrough=on";
    random_requests(&Rig::start(&[Wanted::file("disk", SIZE).options(options)]));
}

fn random_requests(rig: &Rig) {
    let protocol = setup().protocol & !protocol::INFLIGHT_SHMFD;
    for seed in 0..3u64 {
        let mut disk = rig.disk("disk", &Setup { queues: 2, protocol, ..setup() });
        let mut model = read_at(&rig.image("disk"), 0, SIZE as usize);
        let mut rng = Rng::new(seed);
        // Each queue works on its own half, so that the order of completions between them does not matter; within a
        // batch of a queue no two requests overlap.
        for _ in 0..150 {
            let mut batch = Vec::new();
            for queue in 0..2u16 {
                let half = SIZE / 512 / 2;
                let slice = half / 16;
                for n in 0..16u64 {
                    let sectors = 1 + rng.below(64);
                    let at = u64::from(queue) * half + n * slice + rng.below(slice - sectors);
                    let bytes = at as usize * 512..(at + sectors) as usize * 512;
                    let request = match rng.below(8) {
                        0..=2 => {
                            let data = rng.bytes(bytes.len());
                            model[bytes.clone()].copy_from_slice(&data);
                            let mut r = Request::new(op::OUT, at, Payload::Out(data));
                            r.cuts = (0..rng.below(4)).map(|_| 1 + rng.below(2000) as u32).collect();
                            r
                        }
                        3 => {
                            model[bytes.clone()].fill(0);
                            let s =
                                Segment { sector: at, sectors: sectors as u32, flags: rng.below(2) as u32 };
                            Request::new(op::WRITE_ZEROES, 0, Payload::Out(s.encode()))
                        }
                        4 => {
                            // The file driver punches what it is asked to: zeroes afterwards.
                            model[bytes.clone()].fill(0);
                            let s = Segment { sector: at, sectors: sectors as u32, flags: 0 };
                            Request::new(op::DISCARD, 0, Payload::Out(s.encode()))
                        }
                        5 => Request::new(op::FLUSH, 0, Payload::None),
                        _ => Request::new(op::IN, at, Payload::In(bytes.len() as u32)),
                    };
                    let read = (request.op == op::IN).then_some(bytes);
                    batch.push((disk.submit(queue, &request).unwrap(), read));
                }
            }
            disk.kick(1).unwrap();
            disk.kick(0).unwrap();
            for (token, read) in batch {
                let done = disk.wait(token).unwrap();
                assert_eq!(done.status, status::OK);
                if let Some(bytes) = read {
                    assert!(done.data == model[bytes.clone()], "seed {seed}: {bytes:?} reads something else");
                }
            }
        }
        disk.flush().unwrap();
        assert!(
            read_at(&rig.image("disk"), 0, SIZE as usize) == model,
            "seed {seed}: the image differs from the model"
        );
    }
}
