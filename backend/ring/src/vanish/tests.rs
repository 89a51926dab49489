//! A memory file that is cut short under a mapping: the process lives, the loss is known, others are untouched.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::OwnedFd;

use crate::{Memory, Region};

const SIZE: u64 = 1 << 20;

fn region(guest_addr: u64) -> (Region, OwnedFd) {
    let fd = rustix::fs::memfd_create("vanish", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, SIZE).unwrap();
    let ours = fd.try_clone().unwrap();
    (Region { guest_addr, size: SIZE, user_addr: guest_addr, fd, mmap_offset: 0 }, ours)
}

#[test]
fn a_shortened_file_is_survived_and_noticed() {
    let (cut, fd) = region(0);
    let (whole, _keep) = region(0);
    let (cut, whole) = (Memory::map(vec![cut]).unwrap(), Memory::map(vec![whole]).unwrap());
    cut.write(SIZE / 2, b"before").unwrap();
    whole.write(SIZE / 2, b"before").unwrap();
    rustix::fs::ftruncate(&fd, 0).unwrap();

    let mut seen = [1; 6];
    assert!(!cut.is_lost());
    cut.read(SIZE / 2, &mut seen).unwrap();
    assert_eq!(seen, [0; 6]);
    // Another page, by writing.
    cut.write(0, b"after").unwrap();
    assert!(cut.is_lost());

    whole.read(SIZE / 2, &mut seen).unwrap();
    assert_eq!(&seen, b"before");
    assert!(!whole.is_lost());
    drop(cut);

    // A place that is used again starts afresh.
    let (again, _keep) = region(0);
    assert!(!Memory::map(vec![again]).unwrap().is_lost());
}
