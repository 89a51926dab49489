//! Headers and status bytes in every way a driver may lay them out, and copies that must not leave the chain.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::testing::{DATA, Desc, Driver, NEXT, WRITE};

/// The chain of these `(address, length, writable)` buffers.
fn chain(buffers: &[(u64, u32, bool)]) -> (Driver, Chain) {
    let driver = Driver::new(64);
    for (i, &(addr, len, writable)) in buffers.iter().enumerate() {
        let more = if i + 1 < buffers.len() { NEXT } else { 0 };
        let d: Desc = (addr, len, more | if writable { WRITE } else { 0 }, i as u16 + 1);
        driver.desc(i as u16, d);
    }
    let mut chain = Chain::new();
    driver.queue().resubmit(0, &mut chain).unwrap();
    (driver, chain)
}

#[test]
fn a_header_may_be_spread_over_any_number_of_descriptors() {
    let text: Vec<u8> = (100..132).collect();
    for cuts in [vec![32], vec![16, 16], vec![1; 32], vec![15, 1, 16], vec![7, 20, 5], vec![3, 0, 29]] {
        let mut at = DATA;
        let mut buffers = Vec::new();
        for &len in &cuts {
            buffers.push((at, len, false));
            // A hole after each, so that running on instead of following the list shows.
            at += u64::from(len) + 3;
        }
        let (driver, mut chain) = chain(&buffers);
        let mut done = 0;
        for &(addr, len, _) in &buffers {
            driver.memory.write(addr, &text[done..done + len as usize]).unwrap();
            done += len as usize;
        }
        let mut header = [0; 16];
        chain.take_header(&driver.memory, &mut header).unwrap();
        assert_eq!(header, text[..16], "{cuts:?}");
        assert_eq!(chain.readable_len(), 16);
        assert!(chain.readable().iter().all(|s| !s.is_empty()));
        let mut rest = [0; 16];
        chain.read_at(&driver.memory, 0, &mut rest).unwrap();
        assert_eq!(rest, text[16..], "{cuts:?}");
        let mut middle = [0; 5];
        chain.read_at(&driver.memory, 9, &mut middle).unwrap();
        assert_eq!(middle, text[25..30]);
        let mut more = [0; 17];
        let short = Err(AccessError::TooShort { needed: 17, have: 16 });
        assert_eq!(chain.take_header(&driver.memory, &mut more), short);
        assert_eq!(chain.read_at(&driver.memory, 1, &mut rest), short);
        chain.take_header(&driver.memory, &mut rest).unwrap();
        assert_eq!((chain.readable().len(), chain.readable_len()), (0, 0));
    }
}

#[test]
fn the_last_writable_byte_is_the_status_wherever_it_is() {
    for cuts in [vec![512, 1], vec![513], vec![1], vec![512, 1, 0], vec![0, 2]] {
        let mut buffers = vec![(DATA, 16, false)];
        let mut at = DATA + 0x1000;
        for &len in &cuts {
            buffers.push((at, len, true));
            at += u64::from(len) + 7;
        }
        let total: u64 = cuts.iter().map(|&l| u64::from(l)).sum();
        let (driver, mut chain) = chain(&buffers);
        assert_eq!(chain.write_last(&driver.memory, 1), Err(AccessError::TooShort { needed: 1, have: 0 }));
        chain.reserve_last().unwrap();
        assert_eq!(chain.writable_len(), total - 1);
        assert_eq!(chain.writable().iter().map(|s| s.len() as u64).sum::<u64>(), total - 1);
        assert!(chain.writable().iter().all(|s| !s.is_empty()));
        chain.write_at(&driver.memory, 0, &vec![0x11; total as usize - 1]).unwrap();
        chain.write_last(&driver.memory, 0xab).unwrap();
        let (addr, len, _) = *buffers.iter().rfind(|b| b.1 > 0).unwrap();
        let mut around = [0; 2];
        driver.memory.read(addr + u64::from(len) - 1, &mut around).unwrap();
        assert_eq!(around, [0xab, 0], "{cuts:?}");
        if len > 1 {
            let mut before = [0; 1];
            driver.memory.read(addr + u64::from(len) - 2, &mut before).unwrap();
            assert_eq!(before, [0x11]);
        }
    }
    let (_, mut chain) = chain(&[(DATA, 16, false)]);
    assert_eq!(chain.reserve_last(), Err(AccessError::TooShort { needed: 1, have: 0 }));
}

#[test]
fn writes_stay_inside_the_writable_part() {
    let (driver, chain) = chain(&[(DATA, 16, false), (DATA + 100, 10, true), (DATA + 200, 10, true)]);
    driver.memory.write(DATA, &[0xff; 300]).unwrap();
    chain.write_at(&driver.memory, 5, b"0123456789").unwrap();
    chain.zero_at(&driver.memory, 12, 8).unwrap();
    let mut all = [0; 300];
    driver.memory.read(DATA, &mut all).unwrap();
    assert_eq!(
        (&all[104..111], &all[199..213]),
        (&b"\xff01234\xff"[..], &b"\xff56\0\0\0\0\0\0\0\0\xff\xff\xff"[..])
    );
    let short = |needed| Err(AccessError::TooShort { needed, have: 20 });
    assert_eq!(chain.write_at(&driver.memory, 11, b"0123456789"), short(21));
    assert_eq!(chain.write_at(&driver.memory, u64::MAX, b"01"), short(u64::MAX));
    assert_eq!(chain.zero_at(&driver.memory, 1, 20), short(21));
    assert_eq!(chain.zero_at(&driver.memory, 1, u64::MAX), short(u64::MAX));
    assert_eq!(chain.write_at(&driver.memory, 20, b""), Ok(()));
    let mut after = [0; 300];
    driver.memory.read(DATA, &mut after).unwrap();
    assert_eq!(after, all);
}

#[test]
fn another_epoch_is_no_witness() {
    let (driver, mut chain) = chain(&[(DATA, 16, false), (DATA + 16, 8, true)]);
    let other = Driver::new(64);
    let wrong = Err(AccessError::WrongEpoch);
    chain.reserve_last().unwrap();
    assert_eq!(chain.take_header(&other.memory, &mut [0; 4]), wrong);
    assert_eq!(chain.read_at(&other.memory, 0, &mut [0; 4]), wrong);
    assert_eq!(chain.write_at(&other.memory, 0, &[0; 4]), wrong);
    assert_eq!(chain.zero_at(&other.memory, 0, 1), wrong);
    assert_eq!(chain.write_last(&other.memory, 0), wrong);
    assert_eq!(Chain::new().take_header(&driver.memory, &mut []), wrong);
    chain.clear();
    assert_eq!(chain.write_last(&driver.memory, 0), wrong);
    assert_eq!((chain.readable().len(), chain.writable().len(), chain.epoch()), (0, 0, 0));
}

#[test]
fn a_long_chain_does_not_keep_its_storage() {
    let driver = Driver::new(1024);
    for i in 0..1024 {
        driver.desc(i, (DATA, 1, if i < 1023 { WRITE | NEXT } else { WRITE }, i + 1));
    }
    let mut chain = Chain::new();
    driver.queue().resubmit(0, &mut chain).unwrap();
    assert_eq!(chain.writable().len(), 1024);
    chain.clear();
    assert!(chain.iovs.capacity() <= 160);
}
