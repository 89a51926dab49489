//! What a driver reads from the configuration space, and which options are refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use super::*;

fn options() -> DeviceOptions {
    DeviceOptions {
        writable: true,
        num_queues: 2,
        queue_size: 128,
        seg_max: 126,
        logical_block_size: 0,
        physical_block_size: 0,
        writethrough: false,
        pin_memory: false,
        serial: [0; 20],
    }
}

fn le32(space: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
}

#[test]
fn the_space_has_the_layout_of_the_specification() {
    let limits = Limits {
        request_alignment: 1,
        logical_block_size: 512,
        physical_block_size: 4096,
        discard_alignment: 65536,
        opt_transfer: 1 << 20,
        ..Limits::default()
    };
    let c = DeviceConfig::new(options(), &limits, 10 << 20).unwrap();
    let s = c.read(0, CONFIG_LEN as u32);
    assert_eq!(u64::from_le_bytes(s[0..8].try_into().unwrap()), 20480, "capacity in sectors");
    assert_eq!(le32(&s, 12), 126, "seg_max");
    assert_eq!(le32(&s, 20), 512, "blk_size");
    assert_eq!(s[24], 3, "physical block exponent: 4096 is 2^3 logical blocks");
    assert_eq!(u16::from_le_bytes([s[26], s[27]]), 8, "min_io_size in logical blocks");
    assert_eq!(le32(&s, 28), 2048, "opt_io_size in logical blocks");
    assert_eq!(s[32], 1, "the cache is on, and says so");
    assert_eq!(u16::from_le_bytes([s[34], s[35]]), 2, "num_queues");
    assert_eq!(le32(&s, 36), MAX_RANGE_SECTORS);
    assert_eq!(le32(&s, 40), MAX_RANGE_SEGMENTS);
    assert_eq!(le32(&s, 44), 128, "discard alignment in sectors");
    assert_eq!(s[56], 1, "write zeroes may unmap");
    // Longer and shifted reads: zero padded, same bytes.
    assert_eq!(c.read(0, 256)[CONFIG_LEN..], [0; 256 - CONFIG_LEN]);
    assert_eq!(c.read(20, 4), s[20..24]);
    assert_eq!(c.read(300, 4), [0; 4]);
}

#[test]
fn a_read_only_export_offers_nothing_that_writes() {
    let c = DeviceConfig::new(DeviceOptions { writable: false, ..options() }, &Limits::default(), 1 << 20)
        .unwrap();
    assert_eq!(c.features() & feature::RO, feature::RO);
    assert_eq!(c.features() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    let s = c.read(0, 60);
    assert_eq!(le32(&s, 36), 0);
    assert_eq!(s[56], 0);
}

#[test]
fn the_write_cache_tells_the_truth() {
    let c = DeviceConfig::new(options(), &Limits::default(), 1 << 20).unwrap();
    let both = feature::FLUSH | feature::CONFIG_WCE;
    assert!(c.write_cache(both));
    assert!(!c.write_cache(feature::VERSION_1), "a driver that cannot flush has no cache");
    c.write(WCE_OFFSET, &[0]).unwrap();
    assert!(!c.write_cache(both));
    assert_eq!(c.read(WCE_OFFSET, 1), [0]);
    c.reset_write_cache();
    assert!(c.write_cache(both));
    for (offset, bytes) in [(32, &[2u8][..]), (31, &[0]), (32, &[0, 0]), (0, &[0; 8]), (32, &[])] {
        assert!(c.write(offset, bytes).is_err(), "{offset} {bytes:?}");
    }
    let through =
        DeviceConfig::new(DeviceOptions { writethrough: true, ..options() }, &Limits::default(), 0).unwrap();
    assert!(!through.write_cache(both));
    assert_eq!(through.read(WCE_OFFSET, 1), [0]);
}

#[test]
fn block_sizes_are_checked_and_follow_the_node() {
    let with = |logical, physical, limits: &Limits| {
        let o = DeviceOptions { logical_block_size: logical, physical_block_size: physical, ..options() };
        DeviceConfig::new(o, limits, 1 << 20)
    };
    let direct = Limits { request_alignment: 4096, ..Limits::default() };
    assert_eq!(with(0, 0, &direct).unwrap().logical_block_size(), 4096, "what the node needs");
    assert_eq!(with(512, 0, &direct).unwrap().logical_block_size(), 512, "the graph aligns if told so");
    assert!(with(513, 0, &Limits::default()).unwrap_err().contains("logical-block-size"));
    assert!(with(4 << 20, 0, &Limits::default()).unwrap_err().contains("logical-block-size"));
    assert!(with(4096, 512, &Limits::default()).unwrap_err().contains("physical-block-size"));
}
