//! The device under the stock `VhostUserDaemon` of `vhost-user-backend`: what that crate's readers expect of a device,
//! shown by I/O through our own front end in both VMMs' orders.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::rc::Rc;

use client::blk::{op, status};
use client::disk::{Disk, Payload, Request};
use client::session::{Order, Setup};
use graph::{Graph, Perm, Registry, Root, RootOptions};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions};
use serde_json::{Value, json};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

use super::*;
use crate::blk::config::{DeviceConfig, DeviceOptions};
use crate::blk::device::DeviceSource;

const SIZE: u64 = 8 << 20;
const QUEUES: u16 = 2;

/// A graph of one node, and a device on it that nothing but the stock daemon serves.
struct World {
    graph: Graph,
    root: Option<Root>,
    iothread: IoThread,
    device: VhostDevice,
    folder: tempfile::TempDir,
}

impl World {
    fn new(node: impl FnOnce(&std::path::Path) -> Value) -> World {
        let folder = tempfile::tempdir().unwrap();
        let iothread =
            IoThread::start(IoThreadOptions { name: "io".into(), ..IoThreadOptions::default() }).unwrap();
        let graph = Graph::new(Registry::new(drivers::ALL.iter().copied()), Some(iothread.clone()));
        block_on(graph.blockdev_add(node(folder.path()))).unwrap();
        let found = graph.node("n").unwrap();
        let options = DeviceOptions {
            writable: true,
            num_queues: QUEUES,
            queue_size: 256,
            seg_max: 126,
            logical_block_size: 0,
            physical_block_size: 0,
            writethrough: false,
            pin_memory: false,
            serial: *b"under the stock one\0",
        };
        let config = DeviceConfig::new(options, &found.driver().limits(), found.size()).unwrap();
        let device =
            BlkDevice::new("stock".into(), config, std::slice::from_ref(&iothread), Box::new(|_| {}));
        let root = RootOptions {
            perm: Perm::CONSISTENT_READ | Perm::WRITE,
            shared: Perm::ALL - Perm::WRITE,
            granularity: 512,
            ..RootOptions::new("test", false)
        };
        let root = block_on(graph.attach("n", root, Rc::new(DeviceSource(device.clone())))).unwrap();
        World { graph, root: Some(root), iothread, device: VhostDevice(device), folder }
    }

    fn file() -> World {
        World::new(|folder| {
            let image = folder.join("image");
            std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
            json!({"driver": "file", "node-name": "n", "filename": image})
        })
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// Serves one connection with a stock daemon while `front` drives the other end.
    fn serve(&self, front: impl FnOnce(PathBuf) + Send) {
        let socket = self.folder.path().join("socket");
        let mut listener = Listener::new(&socket, true).unwrap();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("stock".into(), self.device.clone(), memory).unwrap();
        std::thread::scope(|scope| {
            let front = scope.spawn(move || front(socket));
            daemon.start(&mut listener).unwrap();
            // A front end that leaves is an error to the stock daemon.
            let _ = daemon.wait();
            front.join().unwrap();
        });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.device.release_view();
        if let Some(root) = self.root.take() {
            block_on(root.detach());
        }
        block_on(self.graph.close_all());
        self.iothread.clone().stop();
    }
}

fn setup(order: Order) -> Setup {
    Setup { order, queues: QUEUES, memory: vec![(0, 16 << 20), (4 << 30, 16 << 20)], ..Setup::default() }
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_mul(29).wrapping_add((at / 5) as u8)).collect()
}

#[test]
fn data_go_through_and_arrive_in_the_file() {
    for order in [Order::Qemu, Order::CloudHypervisor] {
        let world = World::file();
        let image = world.image();
        world.serve(|socket| {
            let mut disk = Disk::connect(&socket, &setup(order)).unwrap();
            assert_eq!(disk.session().config.capacity, SIZE / 512);
            assert_eq!(disk.session().config.num_queues, QUEUES);
            assert_eq!(disk.get_id().unwrap(), "under the stock one");
            let mut waiting = Vec::new();
            for queue in 0..QUEUES {
                for n in 0..20u8 {
                    let block = u64::from(queue) * 20 + u64::from(n);
                    let data = bytes(block as u8, 16384);
                    let request = Request::new(op::OUT, block * 32, Payload::Out(data));
                    waiting.push(disk.submit(queue, &request).unwrap());
                }
                disk.kick(queue).unwrap();
            }
            for token in waiting {
                assert_eq!(disk.wait(token).unwrap().status, status::OK);
            }
            disk.flush().unwrap();
            for block in 0..40u64 {
                assert!(
                    disk.read(block * 16384, 16384).unwrap() == bytes(block as u8, 16384),
                    "block {block}"
                );
            }
            disk.session().stop().unwrap();
        });
        let found = std::fs::read(&image).unwrap();
        for (block, part) in (0u8..).zip(found.chunks(16384)).take(40) {
            assert!(part == bytes(block, 16384), "{order:?}: block {block} of the file");
        }
    }
}

#[test]
fn a_stopped_ring_is_drained_and_starts_again_where_it_stopped() {
    let world = World::new(
        |_| json!({"driver": "null-co", "node-name": "n", "size": SIZE, "latency-ns": 30_000_000, "read-zeroes": true}),
    );
    world.serve(|socket| {
        let mut disk = Disk::connect(&socket, &setup(Order::Qemu)).unwrap();
        for _ in 0..5 {
            let tokens: Vec<_> = (0..32)
                .map(|n| disk.submit(0, &Request::new(op::IN, n, Payload::In(512))).unwrap())
                .collect();
            disk.kick(0).unwrap();
            // Whatever the ring has taken by now is finished when the reply comes.
            let bases = disk.session().stop().unwrap();
            let used = disk.session().guest.queues[0].used_idx();
            assert_eq!(bases[0], client::session::Base::At(used));
            disk.session_mut().start(&bases).unwrap();
            for token in tokens {
                assert_eq!(disk.wait(token).unwrap().status, status::OK);
            }
        }
        disk.session().stop().unwrap();
    });
}

#[test]
fn memory_changes_below_running_rings() {
    let world = World::file();
    world.serve(|socket| {
        let mut disk = Disk::connect(&socket, &setup(Order::Qemu)).unwrap();
        for round in 0..50u64 {
            let gpa = (8 << 30) + (round << 30);
            let token =
                disk.submit(0, &Request::new(op::OUT, round * 8, Payload::Out(bytes(round as u8, 4096))));
            disk.kick(0).unwrap();
            let session = disk.session_mut();
            session.guest.memory.add(client::memory::Region::new(gpa, 1 << 20).unwrap());
            session.send_memory(true).unwrap();
            session.guest.memory.remove(gpa).unwrap();
            session.send_memory(true).unwrap();
            assert_eq!(disk.wait(token.unwrap()).unwrap().status, status::OK);
            assert!(disk.read(round * 4096, 4096).unwrap() == bytes(round as u8, 4096));
        }
        disk.session().stop().unwrap();
    });
}

#[test]
fn one_device_serves_one_daemon_after_the_other() {
    let world = World::file();
    for round in 0..3u8 {
        world.serve(|socket| {
            let mut disk = Disk::connect(&socket, &setup(Order::CloudHypervisor)).unwrap();
            if round > 0 {
                assert!(disk.read(0, 4096).unwrap() == bytes(round - 1, 4096));
            }
            disk.write(0, &bytes(round, 4096)).unwrap();
            disk.session().stop().unwrap();
        });
    }
}
