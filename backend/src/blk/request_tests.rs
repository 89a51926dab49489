//! Requests as a guest may send them, right and wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use graph::Limits;

use super::*;
use crate::blk::config::{DeviceOptions, MAX_RANGE_SECTORS};

fn config(writable: bool, block: u32) -> DeviceConfig {
    let o = DeviceOptions {
        writable,
        num_queues: 1,
        queue_size: 128,
        seg_max: 126,
        logical_block_size: block,
        physical_block_size: 0,
        writethrough: false,
        pin_memory: false,
        serial: [0; 20],
    };
    DeviceConfig::new(o, &Limits::default(), 1 << 20).unwrap()
}

fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN] {
    let mut h = [0; HEADER_LEN];
    h[..4].copy_from_slice(&kind.to_le_bytes());
    h[8..].copy_from_slice(&sector.to_le_bytes());
    h
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; RANGE_LEN] {
    let mut r = [0; RANGE_LEN];
    r[..8].copy_from_slice(&sector.to_le_bytes());
    r[8..12].copy_from_slice(&sectors.to_le_bytes());
    r[12..].copy_from_slice(&flags.to_le_bytes());
    r
}

#[test]
fn reads_and_writes_inside_the_disk() {
    let c = config(true, 512);
    assert_eq!(parse(header(0, 8), 0, 4096, &c), Ok(Kind::Read { offset: 4096, len: 4096 }));
    assert_eq!(parse(header(1, 2047), 512, 0, &c), Ok(Kind::Write { offset: 2047 * 512, len: 512 }));
    assert_eq!(
        parse(header(0, 2048), 0, 0, &c),
        Ok(Kind::Read { offset: 1 << 20, len: 0 }),
        "nothing, at the end"
    );
}

#[test]
fn ranges_outside_or_misaligned_are_errors() {
    let c = config(true, 512);
    for (sector, len) in
        [(2048, 512), (2047, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 2 << 20)]
    {
        assert_eq!(parse(header(0, sector), 0, len, &c), Err(Status::IoErr), "{sector} {len}");
    }
    let big = config(true, 4096);
    assert_eq!(parse(header(0, 8), 0, 4096, &big), Ok(Kind::Read { offset: 4096, len: 4096 }));
    assert_eq!(parse(header(0, 1), 0, 4096, &big), Err(Status::IoErr), "start inside a block");
    assert_eq!(parse(header(0, 0), 0, 512, &big), Err(Status::IoErr), "end inside a block");
}

#[test]
fn a_read_only_disk_refuses_what_writes() {
    let c = config(false, 512);
    for kind in [1, 11, 13] {
        assert_eq!(parse(header(kind, 0), 512, 0, &c), Err(Status::IoErr), "type {kind}");
    }
    assert_eq!(parse(header(4, 0), 0, 0, &c), Ok(Kind::Flush));
    assert_eq!(parse(header(8, 0), 0, 20, &c), Ok(Kind::GetId));
}

#[test]
fn unknown_types_are_unsupported() {
    let c = config(true, 512);
    for kind in [2, 3, 5, 10, 14, 15, 16, 24, u32::MAX] {
        assert_eq!(parse(header(kind, 0), 0, 512, &c), Err(Status::Unsupported), "type {kind}");
    }
}

#[test]
fn ranges_of_discard_and_write_zeroes() {
    let c = config(true, 512);
    let ok = Range { offset: 512, len: 1024, unmap: false };
    assert_eq!(parse_range(range(1, 2, 0), Kind::Discard, &c), Ok(ok));
    assert_eq!(parse_range(range(1, 2, 1), Kind::WriteZeroes, &c), Ok(Range { unmap: true, ..ok }));
    assert_eq!(
        parse_range(range(1, 2, 1), Kind::Discard, &c),
        Err(Status::Unsupported),
        "unmap is for zeroes"
    );
    assert_eq!(parse_range(range(1, 2, 2), Kind::WriteZeroes, &c), Err(Status::Unsupported), "unknown flag");
    assert_eq!(parse_range(range(2047, 2, 0), Kind::Discard, &c), Err(Status::IoErr), "past the end");
    assert_eq!(
        parse_range(range(0, MAX_RANGE_SECTORS + 1, 0), Kind::Discard, &c),
        Err(Status::IoErr),
        "too long"
    );
    assert_eq!(parse_range(range(u64::MAX, u32::MAX, 0), Kind::Discard, &c), Err(Status::IoErr));
    assert_eq!(range_count(32), Ok(2));
    for n in [0, 15, 17, 16 * (u64::from(MAX_RANGE_SEGMENTS) + 1), u64::MAX] {
        assert_eq!(range_count(n), Err(Status::IoErr), "{n} bytes");
    }
}
