//! The front end of the `vhost` crate, which cloud-hypervisor is built on, in the orders of messages that QEMU and
//! cloud-hypervisor send. Each order ends in I/O that is compared with the image file.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use ringblk_scenarios::{Bare, Rig, Wanted, pattern, read_at};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

const SIZE: u64 = 8 << 20;
const QUEUES: usize = 2;
const QUEUE_SIZE: u16 = 128;
/// Bits that either VMM passes on to a virtio-blk driver, as far as we offer them.
const DRIVER: u64 = (1 << 1)
    | (1 << 2)
    | (1 << 6)
    | (1 << 9)
    | (1 << 10)
    | (1 << 11)
    | (1 << 12)
    | (1 << 13)
    | (1 << 14)
    | (1 << 28)
    | (1 << 29)
    | (1 << 32);

fn rig() -> Rig {
    Rig::start(&[Wanted::file("disk", SIZE).options("writable=on,num-queues=2")])
}

fn front(rig: &Rig) -> Frontend {
    Frontend::from_stream(UnixStream::connect(rig.socket("disk")).unwrap(), QUEUES as u64)
}

/// The crate wants its own type of eventfd; this one is the ring's.
fn event(fd: BorrowedFd<'_>) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let copy: OwnedFd = fd.try_clone_to_owned().unwrap();
    #[allow(unsafe_code)]
    // SAFETY: the descriptor was just duplicated and given up by `into_raw_fd`: nobody else owns it.
    unsafe {
        EventFd::from_raw_fd(copy.into_raw_fd())
    }
}

fn regions(rings: &[Bare]) -> Vec<VhostUserMemoryRegionInfo> {
    // Several rings share no memory here; each has two regions, and the guest addresses must not collide: only the
    // first ring's are told unless the caller wants otherwise.
    rings
        .iter()
        .flat_map(|ring| ring.memory.regions())
        .map(|region| {
            let r = region.describe();
            VhostUserMemoryRegionInfo {
                guest_phys_addr: r.guest_addr,
                memory_size: r.size,
                userspace_addr: r.user_addr,
                mmap_offset: r.mmap_offset,
                mmap_handle: region.fd().as_raw_fd(),
            }
        })
        .collect()
}

fn address(ring: &Bare) -> VringConfigData {
    let a = ring.queue.vring_addr();
    VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: QUEUE_SIZE,
        flags: 0,
        desc_table_addr: a.desc,
        used_ring_addr: a.used,
        avail_ring_addr: a.avail,
        log_addr: None,
    }
}

fn io(rig: &Rig, ring: &mut Bare, seed: u64) {
    let data = pattern(seed, 256 << 10);
    let at = seed * (512 << 10);
    ring.write(at, &data);
    assert!(read_at(&rig.image("disk"), at, data.len()) == data, "what was written is in the file");
    assert!(ring.read(at, data.len()) == data, "what was written reads back");
}

/// QEMU 10 (hw/block/vhost-user-blk.c, hw/virtio/vhost.c): what `realize` and then the driver's start send.
#[test]
fn qemu_order() {
    let rig = rig();
    let mut ring = Bare::new(0, QUEUE_SIZE);
    let mut f = front(&rig);

    // realize
    let offered = f.get_features().unwrap();
    assert_ne!(offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
    let protocol = f.get_protocol_features().unwrap();
    // QEMU acknowledges whatever it knows of the offer.
    f.set_protocol_features(protocol).unwrap();
    f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(f.get_queue_num().unwrap(), QUEUES as u64);
    assert!(f.get_max_mem_slots().unwrap() >= 8);
    let (channel, theirs) = UnixStream::pair().unwrap();
    f.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    f.set_owner().unwrap();
    assert_eq!(f.get_features().unwrap(), offered);
    for queue in 0..QUEUES {
        f.set_vring_call(queue, &EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap();
    }
    let (_, config) = f.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SIZE / 512);

    // the driver is ready: features, in-flight area, features again, memory slot by slot, rings
    let features = offered & (DRIVER | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
    f.set_features(features).unwrap();
    if protocol.contains(Protocol::INFLIGHT_SHMFD) {
        let wanted = VhostUserInflight {
            num_queues: QUEUES as u16,
            queue_size: QUEUE_SIZE,
            ..VhostUserInflight::default()
        };
        let (area, file) = f.get_inflight_fd(&wanted).unwrap();
        f.set_inflight_fd(&area, file.as_raw_fd()).unwrap();
    }
    f.set_features(features).unwrap();
    for region in regions(std::slice::from_ref(&ring)) {
        f.add_mem_region(&region).unwrap();
    }
    ring.queue.set_event_idx(features & (1 << 29) != 0);
    f.set_vring_num(0, QUEUE_SIZE).unwrap();
    f.set_vring_base(0, 0).unwrap();
    f.set_vring_addr(0, &address(&ring)).unwrap();
    f.set_vring_kick(0, &event(ring.queue.kick_fd())).unwrap();
    f.set_vring_enable(0, true).unwrap();
    f.set_vring_call(0, &event(ring.queue.call_fd())).unwrap();
    io(&rig, &mut ring, 1);

    // the guest resets: stop, then start again where the ring stopped
    f.set_vring_enable(0, false).unwrap();
    let base = f.get_vring_base(0).unwrap();
    assert_eq!(base, u32::from(ring.queue.available_idx()));
    f.set_vring_num(0, QUEUE_SIZE).unwrap();
    f.set_vring_base(0, base as u16).unwrap();
    f.set_vring_addr(0, &address(&ring)).unwrap();
    f.set_vring_kick(0, &event(ring.queue.kick_fd())).unwrap();
    f.set_vring_enable(0, true).unwrap();
    f.set_vring_call(0, &event(ring.queue.call_fd())).unwrap();
    io(&rig, &mut ring, 2);
    drop(channel);
}

/// cloud-hypervisor (virtio-devices/src/vhost_user): negotiation when the device is made, rings when it is activated.
#[test]
fn cloud_hypervisor_order() {
    let rig = rig();
    let mut ring = Bare::new(0, QUEUE_SIZE);
    let mut f = front(&rig);
    f.set_owner().unwrap();
    let offered = f.get_features().unwrap();
    let protocol = f.get_protocol_features().unwrap();
    let accepted = protocol
        & (Protocol::CONFIG
            | Protocol::MQ
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::REPLY_ACK
            | Protocol::INFLIGHT_SHMFD
            | Protocol::LOG_SHMFD
            | Protocol::DEVICE_STATE);
    assert!(accepted.contains(Protocol::CONFIG | Protocol::MQ | Protocol::REPLY_ACK));
    f.set_protocol_features(accepted).unwrap();
    f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(f.get_queue_num().unwrap(), QUEUES as u64);
    let (_, config) = f.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
    assert_eq!(config.len(), 60);

    // It accepts for the driver what the driver accepts of its own list; the protocol bit stays.
    let features = offered & (DRIVER | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
    f.set_features(features).unwrap();
    f.set_mem_table(&regions(std::slice::from_ref(&ring))).unwrap();
    f.set_vring_num(0, QUEUE_SIZE).unwrap();
    if accepted.contains(Protocol::INFLIGHT_SHMFD) {
        let wanted =
            VhostUserInflight { num_queues: 1, queue_size: QUEUE_SIZE, ..VhostUserInflight::default() };
        let (area, file) = f.get_inflight_fd(&wanted).unwrap();
        f.set_inflight_fd(&area, file.as_raw_fd()).unwrap();
    }
    ring.queue.set_event_idx(features & (1 << 29) != 0);
    f.set_vring_addr(0, &address(&ring)).unwrap();
    f.set_vring_base(0, 0).unwrap();
    f.set_vring_call(0, &event(ring.queue.call_fd())).unwrap();
    f.set_vring_kick(0, &event(ring.queue.kick_fd())).unwrap();
    f.set_vring_enable(0, true).unwrap();
    io(&rig, &mut ring, 1);

    // pause and resume
    f.set_vring_enable(0, false).unwrap();
    f.set_vring_enable(0, true).unwrap();
    io(&rig, &mut ring, 2);

    // reset: disable, then take the ring back
    f.set_vring_enable(0, false).unwrap();
    assert_eq!(f.get_vring_base(0).unwrap(), u32::from(ring.queue.available_idx()));
}

/// QEMU before 7.2 does not acknowledge PROTOCOL_FEATURES to the device: rings start enabled, and ENABLE never comes.
#[test]
fn rings_start_enabled_without_protocol_features() {
    let rig = rig();
    let mut ring = Bare::new(0, QUEUE_SIZE);
    let mut f = front(&rig);
    let offered = f.get_features().unwrap();
    f.set_protocol_features(Protocol::CONFIG | Protocol::MQ | Protocol::REPLY_ACK).unwrap();
    f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    f.set_owner().unwrap();
    // A second owner message, as after a reset.
    f.set_owner().unwrap();
    f.set_features(offered & (1 << 32)).unwrap();
    // Highest addresses first: the protocol asks for no order.
    let mut table = regions(std::slice::from_ref(&ring));
    table.reverse();
    assert!(table[0].guest_phys_addr > table[1].guest_phys_addr);
    f.set_mem_table(&table).unwrap();
    f.set_vring_num(0, QUEUE_SIZE).unwrap();
    f.set_vring_base(0, 0).unwrap();
    f.set_vring_addr(0, &address(&ring)).unwrap();
    f.set_vring_call(0, &event(ring.queue.call_fd())).unwrap();
    f.set_vring_kick(0, &event(ring.queue.kick_fd())).unwrap();
    io(&rig, &mut ring, 1);
    assert_eq!(f.get_vring_base(0).unwrap(), u32::from(ring.queue.available_idx()));
}

/// Sizes that virtio does not allow are refused, not rounded; a legal one starts the ring.
#[test]
fn ring_sizes_that_are_no_powers_of_two_are_refused() {
    let rig = rig();
    for size in [0u16, 1, 3, 100, 127, 129, 2048, 65535] {
        let mut f = front(&rig);
        f.get_features().unwrap();
        f.set_protocol_features(Protocol::REPLY_ACK).unwrap();
        f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        f.set_owner().unwrap();
        assert!(f.set_vring_num(0, size).is_err(), "{size} must be refused");
    }
    for size in [2u16, 4, 128, 1024] {
        let mut f = front(&rig);
        f.get_features().unwrap();
        f.set_protocol_features(Protocol::REPLY_ACK).unwrap();
        f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        f.set_owner().unwrap();
        f.set_vring_num(0, size).unwrap_or_else(|e| panic!("{size}: {e}"));
    }
}
