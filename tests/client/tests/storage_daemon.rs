//! The whole client against qemu-storage-daemon, which shows that the client speaks the protocol as others do.
//! Each test says so and passes over when the daemon is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use ringblk_client::blk::{Segment, feature, op};
use ringblk_client::connection::{Connection, DEFAULT_LIMIT};
use ringblk_client::disk::{Disk, Payload, Request};
use ringblk_client::memory::Region;
use ringblk_client::queue::Descriptor;
use ringblk_client::session::{Order, Session, Setup};
use ringblk_client::wire::{self, protocol, request};
use ringblk_client::{Daemon, Error, Frontend, qmp};
use serde_json::json;
use tempfile::TempDir;

const SIZE: u64 = 16 << 20;

struct Peer {
    daemon: Daemon,
    folder: TempDir,
}

impl Peer {
    /// Starts the daemon with one raw file exported on two queues, or says why not.
    fn start() -> Option<Self> {
        let program = Path::new("/usr/bin/qemu-storage-daemon");
        if !program.exists() {
            println!("passed over: {} is not installed", program.display());
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let daemon = Daemon::start(
            program,
            [
                "--blockdev".to_owned(),
                format!("file,node-name=f,filename={},discard=unmap", image.display()),
                "--blockdev".to_owned(),
                "raw,node-name=n,file=f,discard=unmap".to_owned(),
                "--chardev".to_owned(),
                format!("socket,id=c,path={},server=on,wait=off", path("qmp")),
                "--monitor".to_owned(),
                "chardev=c".to_owned(),
                "--export".to_owned(),
                format!(
                    "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},writable=on,num-queues=2",
                    path("blk")
                ),
            ],
        )
        .unwrap();
        Some(Self { daemon, folder })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("blk")
    }

    fn disk(&self, setup: &Setup) -> Disk {
        Disk::connect(&self.socket(), setup).unwrap()
    }
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_mul(31).wrapping_add((at / 7) as u8)).collect()
}

#[test]
fn both_orders_read_back_what_was_written() {
    let Some(peer) = Peer::start() else { return };
    for (order, indirect) in [
        (Order::Qemu, true),
        (Order::CloudHypervisor, true),
        (Order::Qemu, false),
        (Order::CloudHypervisor, false),
    ] {
        let mut disk = peer.disk(&Setup { order, queues: 2, ..Setup::default() });
        assert_eq!(disk.session().config.capacity, SIZE / 512);
        assert_eq!(disk.session().config.num_queues, 2);
        assert_eq!(disk.session().config.seg_max, 126);
        disk.set_indirect(indirect);
        let data = pattern(u8::from(indirect) + 2 * u8::from(order == Order::Qemu), 65536);
        disk.write(65536, &data).unwrap();
        disk.flush().unwrap();
        assert!(disk.read(65536, 65536).unwrap() == data, "{order:?}");
        assert_eq!(disk.get_id().unwrap(), "vhost_user_blk");
        assert!(disk.session().stop().unwrap().len() == 2);
    }
}

#[test]
fn cut_requests_reach_every_queue_in_any_number() {
    let Some(peer) = Peer::start() else { return };
    for event_idx in [true, false] {
        let features = Setup::default().features & !(if event_idx { 0 } else { wire::feature::EVENT_IDX });
        let mut disk = peer.disk(&Setup { queues: 2, features, ..Setup::default() });
        let mut tokens = Vec::new();
        for queue in 0..2u16 {
            for at in 0..20u64 {
                let mut request = Request::new(
                    op::OUT,
                    (u64::from(queue) * 20 + at) * 16,
                    Payload::Out(pattern((at + 3) as u8 ^ queue as u8, 8192)),
                );
                request.cuts = vec![512, 1024, 100];
                tokens.push((queue, at, disk.submit(queue, &request).unwrap()));
            }
            disk.kick(queue).unwrap();
        }
        for (_, _, token) in tokens.iter().rev() {
            assert_eq!(disk.wait(*token).unwrap().status, 0);
        }
        assert_eq!(disk.in_flight(), 0);
        for (queue, at, _) in tokens {
            let back = disk.read((u64::from(queue) * 20 + at) * 8192, 8192).unwrap();
            assert!(back == pattern((at + 3) as u8 ^ queue as u8, 8192), "queue {queue}, request {at}");
        }
    }
}

#[test]
fn statuses_of_refused_requests_come_through() {
    let Some(peer) = Peer::start() else { return };
    let mut disk = peer.disk(&Setup::default());
    assert!(disk.session().guest.features & (feature::DISCARD | feature::WRITE_ZEROES) != 0);
    assert!(matches!(disk.read(SIZE, 512), Err(Error::Status(1))), "past the end");
    let unknown = disk.run(0, &Request::new(99, 0, Payload::In(512))).unwrap();
    assert_eq!(unknown.status, 2);
    disk.write(8192, &pattern(9, 8192)).unwrap();
    let segment = Segment { sector: 16, sectors: 8, flags: 0 };
    disk.write_zeroes(&[segment]).unwrap();
    assert_eq!(disk.read(8192, 4096).unwrap(), vec![0; 4096]);
    disk.discard(&[Segment { sector: 24, ..segment }]).unwrap();
    assert!(matches!(disk.discard(&[segment, segment]), Err(Error::Status(2))), "one segment is the limit");
}

#[test]
fn memory_comes_and_goes() {
    let Some(peer) = Peer::start() else { return };
    let mut disk = peer.disk(&Setup::default());
    assert!(disk.session().frontend.protocol_acked & protocol::CONFIGURE_MEM_SLOTS != 0);
    disk.write(0, &pattern(1, 4096)).unwrap();
    let extra = Region::new(8 << 30, 1 << 20).unwrap();
    disk.session().frontend.add_mem_reg(&extra.describe(), extra.fd()).unwrap();
    // A read straight into the new region, by hand.
    let session = disk.session_mut();
    let header = extra.gpa();
    extra.write(header, &[0; 16]).unwrap();
    let queue = &mut session.guest.queues[0];
    let [data, status] = [extra.gpa() + 4096, extra.gpa() + 512];
    queue.write_descriptor(120, &Descriptor { addr: header, len: 16, flags: 1, next: 121 });
    queue.write_descriptor(121, &Descriptor { addr: data, len: 4096, flags: 3, next: 122 });
    queue.write_descriptor(122, &Descriptor { addr: status, len: 1, flags: 2, next: 0 });
    queue.push_available(120);
    queue.publish().unwrap();
    let used = loop {
        if let Some(used) = queue.pop_any() {
            break used;
        }
        std::thread::yield_now();
    };
    assert_eq!((used.id, used.len), (120, 4097));
    let mut back = vec![0; 4096];
    extra.read(data, &mut back).unwrap();
    assert_eq!(back, pattern(1, 4096));
    disk.session().frontend.rem_mem_reg(&extra.describe()).unwrap();
    assert_eq!(disk.read(0, 4096).unwrap(), pattern(1, 4096));
}

#[test]
fn a_new_connection_continues_where_the_last_was_lost() {
    let Some(peer) = Peer::start() else { return };
    for order in [Order::Qemu, Order::CloudHypervisor] {
        let mut disk = peer.disk(&Setup { order, ..Setup::default() });
        for round in 0..5u8 {
            disk.write(u64::from(round) * 4096, &pattern(round, 4096)).unwrap();
            disk = disk.reconnect(&peer.socket()).unwrap();
            assert_eq!(disk.read(u64::from(round) * 4096, 4096).unwrap(), pattern(round, 4096));
        }
        // A clean stop and start on the same connection.
        let bases = disk.session().stop().unwrap();
        disk.session_mut().start(&bases).unwrap();
        assert_eq!(disk.read(0, 4096).unwrap(), pattern(0, 4096));
    }
}

#[test]
fn resize_arrives_on_the_channel_and_over_qmp() {
    let Some(peer) = Peer::start() else { return };
    let mut control = qmp::Client::connect(&peer.folder.path().join("qmp")).unwrap();
    let mut session = Session::connect(&peer.socket(), &Setup::default()).unwrap();
    control.execute("block_resize", json!({"node-name": "n", "size": SIZE * 2})).unwrap();
    session.channel.as_ref().unwrap().expect_config_change(DEFAULT_LIMIT).unwrap();
    assert_eq!(session.refresh_config().unwrap().capacity, SIZE * 2 / 512);
    session.frontend.set_config(32, 0, &[1]).unwrap();
    assert_eq!(session.refresh_config().unwrap().writeback, 1);
    let error = control.execute("block_resize", json!({"node-name": "missing", "size": 0})).unwrap_err();
    assert!(
        matches!(&error, Error::Qmp { class, desc, .. } if class == "GenericError" && desc.contains("missing"))
    );
    drop(session);
    control.execute("block-export-del", json!({"id": "e"})).unwrap();
    let event = control.wait_event_where("BLOCK_EXPORT_DELETED", |data| data["id"] == "e").unwrap();
    assert!(event["timestamp"]["seconds"].as_i64().is_some());
}

#[test]
fn malformed_messages_end_the_connection_and_not_the_client() {
    let Some(mut peer) = Peer::start() else { return };
    let connection = peer.daemon.connect(&peer.socket()).unwrap();
    // Wrong payload size for GET_FEATURES, in two parts.
    connection.send_raw(&wire::header(request::GET_FEATURES, 1, 1 << 24)[..5], &[]).unwrap();
    connection.send_raw(&wire::header(request::GET_FEATURES, 1, 1 << 24)[5..], &[]).unwrap();
    connection.wait_closed(DEFAULT_LIMIT).unwrap();
    // The daemon goes on.
    let mut frontend = Frontend::new(peer.daemon.connect(&peer.socket()).unwrap());
    assert!(frontend.get_features().unwrap() & wire::feature::VERSION_1 != 0);
    let error = frontend.connection().recv_within(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }));
}

#[test]
fn the_process_can_be_measured_and_ended() {
    let Some(mut peer) = Peer::start() else { return };
    let session = Session::connect(&peer.socket(), &Setup::default()).unwrap();
    assert!(peer.daemon.resident().unwrap().total > 1 << 20);
    assert!(!peer.daemon.threads().unwrap().is_empty());
    assert!(peer.daemon.descriptors().unwrap() > 3);
    assert!(peer.daemon.cpu_ns().unwrap() > 0);
    peer.daemon.check_running().unwrap();
    assert!(peer.daemon.terminate(DEFAULT_LIMIT).unwrap().success());
    session.frontend.connection().wait_closed(DEFAULT_LIMIT).unwrap();
    assert!(peer.daemon.check_running().is_err());
    assert!(Connection::connect(&peer.socket(), Duration::from_millis(1)).is_err());
}
