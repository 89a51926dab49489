//! A disk that changes its size: the driver hears of it, requests beyond the old end work, and nobody minds when no
//! front end is there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::time::Duration;

use client::blk::{op, status};
use client::disk::{Payload, Request};
use client::wire::protocol;
use client::{Error, Setup};
use ringblk_scenarios::{Rig, Wanted};
use serde_json::json;

const SIZE: u64 = 8 << 20;
const LIMIT: Duration = Duration::from_secs(20);

fn setup() -> Setup {
    Setup { memory: vec![(0, 16 << 20)], ..Setup::default() }
}

fn resize(rig: &mut Rig, size: u64) {
    rig.command("block_resize", json!({"node-name": "node-disk", "size": size}));
}

#[test]
fn growth_reaches_the_driver() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    assert_eq!(
        disk.run(0, &Request::new(op::IN, SIZE / 512, Payload::In(512))).unwrap().status,
        status::IOERR
    );
    for round in 1..=10u64 {
        let size = SIZE + round * (1 << 20);
        resize(&mut rig, size);
        disk.session().channel.as_ref().unwrap().expect_config_change(LIMIT).unwrap();
        assert_eq!(disk.session_mut().refresh_config().unwrap().capacity, size / 512);
        disk.write(size - 4096, &[round as u8; 4096]).unwrap();
        assert!(disk.read(size - 4096, 4096).unwrap() == [round as u8; 4096]);
    }
    assert_eq!(rig.image("disk").metadata().unwrap().len(), SIZE + (10 << 20));
}

#[test]
fn shrinking_ends_the_disk_earlier() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    disk.write(SIZE - 512, &[1; 512]).unwrap();
    resize(&mut rig, SIZE / 2);
    disk.session().channel.as_ref().unwrap().expect_config_change(LIMIT).unwrap();
    assert_eq!(disk.session_mut().refresh_config().unwrap().capacity, SIZE / 2 / 512);
    let beyond = Request::new(op::OUT, SIZE / 2 / 512, Payload::Out(vec![1; 512]));
    assert_eq!(disk.run(0, &beyond).unwrap().status, status::IOERR);
    disk.write(SIZE / 2 - 512, &[2; 512]).unwrap();
    assert_eq!(rig.image("disk").metadata().unwrap().len(), SIZE / 2);
}

#[test]
fn nobody_is_there() {
    // Before the first front end ever, and after it has gone.
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    resize(&mut rig, SIZE + (1 << 20));
    let disk = rig.disk("disk", &setup());
    assert_eq!(disk.session().config.capacity, (SIZE + (1 << 20)) / 512);
    drop(disk);
    rig.wait_disconnected("disk");
    resize(&mut rig, SIZE + (2 << 20));
    let mut disk = rig.disk("disk", &setup());
    assert_eq!(disk.session().config.capacity, (SIZE + (2 << 20)) / 512);
    disk.write(SIZE + (1 << 20), &[1; 4096]).unwrap();
    // What happened before this connection is not told to it.
    let message = disk.session().channel.as_ref().unwrap().recv(Duration::from_millis(100));
    assert!(matches!(message, Err(Error::Timeout { .. })), "{message:?}");
}

#[test]
fn a_front_end_without_a_channel() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk =
        rig.disk("disk", &Setup { protocol: setup().protocol & !protocol::BACKEND_REQ, ..setup() });
    assert!(disk.session().channel.is_none());
    resize(&mut rig, SIZE * 2);
    // It is not disconnected for that, and sees the new size when it looks.
    assert_eq!(disk.session_mut().refresh_config().unwrap().capacity, SIZE * 2 / 512);
    disk.write(SIZE, &[1; 512]).unwrap();
}

#[test]
fn a_suspended_device_hears_of_it_when_it_starts_again() {
    // The protocol forbids messages of a suspended back end: they come with the next ring that starts.
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    let bases = disk.session().stop().unwrap();
    resize(&mut rig, SIZE * 2);
    let early = disk.session().channel.as_ref().unwrap().recv(Duration::from_millis(100));
    assert!(matches!(early, Err(Error::Timeout { .. })), "{early:?}");
    disk.session_mut().start(&bases).unwrap();
    disk.session().channel.as_ref().unwrap().expect_config_change(LIMIT).unwrap();
    assert_eq!(disk.session_mut().refresh_config().unwrap().capacity, SIZE * 2 / 512);
}

#[test]
fn resizes_under_load() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    for round in 0..100u64 {
        let tokens: Vec<_> = (0..32u64)
            .map(|n| {
                disk.submit(0, &Request::new(op::OUT, n * 8, Payload::Out(vec![round as u8; 4096]))).unwrap()
            })
            .collect();
        disk.kick(0).unwrap();
        resize(&mut rig, SIZE + (round + 1) * 4096);
        for token in tokens {
            assert_eq!(disk.wait(token).unwrap().status, status::OK, "round {round}");
        }
        disk.session().channel.as_ref().unwrap().expect_config_change(LIMIT).unwrap();
    }
}

#[test]
fn the_channel_is_closed_under_the_daemon() {
    let mut rig = Rig::start(&[Wanted::file("disk", SIZE)]);
    let mut disk = rig.disk("disk", &setup());
    drop(disk.session_mut().channel.take());
    resize(&mut rig, SIZE * 2);
    resize(&mut rig, SIZE * 3);
    disk.write(SIZE * 2, &[1; 512]).unwrap();
    rig.assert_running();
}
