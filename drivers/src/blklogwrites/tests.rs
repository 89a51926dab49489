//! Tests of the format and of the options. Requests are in the conformance suite and in `drivers/tests/scrutiny/logwrites.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::options::parse_options;
use serde_json::{Value, json};

use super::format::{Bad, DISCARD, ENTRY_LEN, Entry, FLUSH, FUA, Super, sector_size};
use super::open::Settings;

fn settings(more: Value) -> Result<Settings, String> {
    let mut options = json!({"file": "f", "log": "l"});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Settings::new(&parse_options(options).unwrap()).map_err(|e| e.to_string())
}

#[test]
fn options_that_make_no_sense_are_refused_in_qemus_words() {
    let plain = Settings { sector_size: Some(512), interval: 4096, append: false };
    assert_eq!(settings(json!({})).unwrap(), plain);
    assert_eq!(
        settings(json!({"log-append": true, "log-super-update-interval": 1})).unwrap(),
        Settings { sector_size: None, interval: 1, append: true }
    );
    for size in [0, 100, 256, 513, 1 << 24] {
        assert_eq!(
            settings(json!({"log-sector-size": size})).unwrap_err(),
            format!("Invalid log sector size {size}")
        );
    }
    assert_eq!(
        settings(json!({"log-append": true, "log-sector-size": 512})).unwrap_err(),
        "log-append and log-sector-size are mutually exclusive"
    );
    for interval in [0, -1] {
        assert_eq!(
            settings(json!({"log-super-update-interval": interval})).unwrap_err(),
            format!("Invalid log superblock update interval {interval}")
        );
    }
}

#[test]
fn what_is_written_can_be_read() {
    let head = Super { entries: 7, sector_size: 4096 };
    let bytes = head.bytes();
    assert_eq!(bytes.len(), 4096);
    assert_eq!(bytes[..8], [0x72, 0x68, 0x73, 0x77, 0x66, 0x73, 0x6a, 0]);
    assert_eq!(Super::parse(&bytes), Ok(head));
    let entry = Entry { sector: 3, sectors: 8, flags: FUA };
    let bytes = entry.bytes();
    assert_eq!(bytes.len(), ENTRY_LEN);
    assert_eq!(Entry::parse(&bytes), Ok(entry));
    assert_eq!(entry.place(), Some(9));
    assert_eq!(Entry { flags: DISCARD, ..entry }.place(), Some(1));
    assert_eq!(Entry { sector: 0, sectors: 0, flags: FLUSH }.place(), Some(1));
    assert_eq!(Entry { sectors: u64::MAX, ..entry }.place(), None);
}

#[test]
fn what_is_no_log_is_refused() {
    let good = Super { entries: 0, sector_size: 512 }.bytes();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        Super::parse(&bytes)
    };
    assert_eq!(with(0, 1), Err(Bad::Magic));
    assert_eq!(with(8, 2), Err(Bad::Version(2)));
    assert_eq!(with(24, 1), Err(Bad::SectorSize(513)));
    assert_eq!(Super::parse(&[]), Err(Bad::Magic));
    assert_eq!(sector_size(8 << 20), Ok(8 << 20));
    let mut entry = Entry { sector: 0, sectors: 0, flags: 0 }.bytes();
    entry[16] = 64;
    assert_eq!(Entry::parse(&entry), Err(Bad::Flags(64)));
    entry[16] = 8;
    assert!(Entry::parse(&entry).is_ok(), "marks are others', and no harm");
}
