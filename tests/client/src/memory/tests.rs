//! Bounds and reuse of guest memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicU32, Ordering};

use super::{GuestMemory, Region};

#[test]
fn ranges_outside_a_region_are_refused() {
    let region = Region::new(0x1_0000, 0x2000).unwrap();
    assert!(region.write(0x1_1ffc, &[1; 4]).is_ok());
    for (gpa, len) in [(0x1_1ffd, 4), (0xffff, 1), (0x1_2000, 1), (u64::MAX, 2), (0, usize::MAX)] {
        assert!(region.check(gpa, len).is_err(), "{gpa:#x}+{len}");
    }
    assert!(region.cells::<AtomicU32>(0x1_0002, 1).is_err(), "misaligned");
    assert!(region.cells::<AtomicU32>(0x1_0000, 0x801).is_err(), "too many");
}

#[test]
fn cells_and_copies_see_the_same_bytes() {
    let region = Region::new(0, 4096).unwrap();
    let cells = region.cells::<AtomicU32>(8, 2).unwrap();
    drop(region.clone());
    cells[1].store(0x0403_0201, Ordering::Relaxed);
    let mut bytes = [0; 4];
    region.read(12, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
}

#[test]
fn blocks_do_not_overlap_and_come_back() {
    let mut memory = GuestMemory::new(&[(0, 8192), (0x10_0000, 8192)]).unwrap();
    let first = memory.block(4096).unwrap();
    let second = memory.block(4000).unwrap();
    let third = memory.block(4096).unwrap();
    assert_eq!([first, second, third], [0, 4096, 0x10_0000]);
    memory.release(second, 4000);
    assert_eq!(memory.block(4096).unwrap(), second);
    memory.block(4096).unwrap();
    assert!(memory.block(4096).is_err(), "memory is used up");
    memory.remove(0x10_0000).unwrap();
    memory.release(first, 4096);
    assert_eq!(memory.block(4096).unwrap(), first);
    assert!(memory.block(4096).is_err(), "the removed region is not handed out");
}
