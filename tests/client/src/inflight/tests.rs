//! Reading the area another implementation wrote, byte by byte after the specification.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Inflight, RingState};
use crate::frontend::InflightDescription;
use crate::memory::Region;

#[test]
fn entries_are_found_in_counter_order() {
    // Two rings of 5 entries: 16 + 5 * 16 = 96, rounded up to 128 each.
    let area = Region::new(0, 4096).unwrap();
    let second = 128;
    area.write(second + 8, &[1, 0, 5, 0, 3, 0, 0xfe, 0xff]).unwrap();
    for (head, counter) in [(1u64, 9u64), (4, 7)] {
        area.write(second + 16 + 16 * head, &[1]).unwrap();
        area.write(second + 16 + 16 * head + 8, &counter.to_le_bytes()).unwrap();
    }
    let description = InflightDescription { mmap_size: 4096, mmap_offset: 0, num_queues: 2, queue_size: 5 };
    let inflight = Inflight::new(description, area.fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(inflight.stride(), 128);
    assert_eq!(inflight.ring(0).unwrap().inflight, []);
    let expected = RingState {
        version: 1,
        desc_num: 5,
        last_batch_head: 3,
        used_idx: 0xfffe,
        inflight: vec![(4, 7), (1, 9)],
    };
    assert_eq!(inflight.ring(1).unwrap(), expected);
    assert!(inflight.ring(40).is_err(), "past the end of the area");
}
