//! What a guest must not get away with: each case gives its error, stops the ring, and touches nothing else.

use super::*;
use crate::MAX_SEGMENTS;
use crate::testing::{Desc, descriptor};

/// Offers head 0 of a ring of eight with these descriptors; the error must be final.
fn refused(descriptors: &[Desc], table: &[Desc]) -> QueueError {
    refused_with(Driver::new(8), descriptors, table, |_| {})
}

fn refused_with(
    mut driver: Driver,
    descriptors: &[Desc],
    table: &[Desc],
    change: impl FnOnce(&mut SplitConfig),
) -> QueueError {
    let mut config = driver.config();
    change(&mut config);
    let mut queue = SplitQueue::new(driver.memory.clone(), &config).unwrap();
    for (i, d) in descriptors.iter().enumerate() {
        driver.desc(i as u16, *d);
    }
    driver.table(TABLE, table);
    driver.offer(0);
    let error = take_all(&mut queue).unwrap_err();
    assert_eq!(queue.broken(), Some(error));
    assert_eq!((queue.in_flight(), queue.state().last_avail, driver.used_idx()), (0, 0, 0));
    error
}

/// Guest address of the indirect table.
const TABLE: u64 = DATA + 0x8000;

fn indirect(entries: u32) -> Desc {
    (TABLE, 16 * entries, INDIRECT, 0)
}

#[test]
fn loops_end() {
    let looped = QueueError::Loop { head: 0 };
    assert_eq!(refused(&[(DATA, 1, NEXT, 0)], &[]), looped);
    assert_eq!(refused(&[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], &[]), looped);
    // Of no bytes at all, so that no length limit would end it (CVE-2016-6490).
    assert_eq!(refused(&[(DATA, 0, NEXT, 0)], &[]), looped);
    assert_eq!(refused(&[indirect(2)], &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 1)]), looped);
    assert_eq!(refused(&[indirect(1)], &[(DATA, 0, NEXT, 0)]), looped);
}

#[test]
fn a_chain_as_long_as_the_ring_is_no_loop() {
    let mut driver = Driver::new(8);
    for i in 0..8 {
        driver.desc(i, (DATA + 16 * u64::from(i), 16, if i < 7 { NEXT } else { WRITE }, i + 1));
    }
    driver.offer(0);
    let all = take_all(&mut driver.queue()).unwrap();
    assert_eq!((all[0].1.len(), all[0].2.len()), (7, 1));
}

#[test]
fn indices_out_of_range() {
    for next in [8, 9, 0x7fff, 0xffff] {
        assert_eq!(refused(&[(DATA, 1, NEXT, next)], &[]), QueueError::NextRange { next });
    }
    assert_eq!(refused(&[indirect(3)], &[(DATA, 1, NEXT, 3)]), QueueError::NextRange { next: 3 });
    for head in [8, 0x8000, 0xffff] {
        let mut driver = Driver::new(8);
        driver.offer(head);
        assert_eq!(take_all(&mut driver.queue()), Err(QueueError::HeadRange { head }));
    }
}

#[test]
fn the_available_index_may_not_jump() {
    for (next, idx, bad) in [
        (0, 8, false),
        (0, 9, true),
        (0, 0xffff, true),
        (0, 0x8000, true),
        (65535, 7, false),
        (65535, 8, true),
        (65535, 65534, true),
        (5, 4, true),
    ] {
        let driver = Driver::new(8);
        driver.set_u16(driver.avail() + 2, idx);
        let config = SplitConfig { last_avail: next, ..driver.config() };
        let mut queue = SplitQueue::new(driver.memory.clone(), &config).unwrap();
        assert!(queue.has_work());
        let want = if bad { Err(QueueError::AvailIndex { idx, next }) } else { Ok(8) };
        assert_eq!(queue.fetch(), want, "{next} -> {idx}");
        assert_eq!(queue.has_work(), !bad);
    }
}

#[test]
fn a_head_in_flight_is_not_taken_twice() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    driver.desc(0, (DATA, 1, WRITE, 0));
    driver.desc(1, (DATA, 1, WRITE, 0));
    driver.offer(0);
    driver.offer(1);
    take_all(&mut queue).unwrap();
    // Completed, but the driver cannot know yet.
    queue.push_used(0, 1).unwrap();
    driver.offer(0);
    assert_eq!(take_all(&mut queue), Err(QueueError::HeadInFlight { head: 0 }));
    assert_eq!(queue.in_flight(), 2);

    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    for _ in 0..3 {
        driver.offer(0);
        take_all(&mut queue).unwrap();
        queue.push_used(0, 0).unwrap();
        queue.publish();
    }
    driver.offer(0);
    driver.offer(0);
    assert_eq!(take_all(&mut queue), Err(QueueError::HeadInFlight { head: 0 }));
}

#[test]
fn in_flight_never_exceeds_the_ring() {
    let mut driver = Driver::new(4);
    let mut queue = driver.queue();
    for head in 0..4 {
        driver.desc(head, (DATA, 1, WRITE, 0));
        driver.offer(head);
    }
    take_all(&mut queue).unwrap();
    for head in 0..4 {
        queue.push_used(head, 0).unwrap();
    }
    // A driver that does not wait for completions finds every head taken.
    driver.offer(2);
    assert!(take_all(&mut queue).is_err());
    assert_eq!((queue.in_flight(), queue.pending().len()), (4, 4));
}

#[test]
fn indirect_rules() {
    let head = 0;
    let plain = [(DATA, 1, WRITE, 0)];
    assert_eq!(
        refused(&[(TABLE, 16, INDIRECT | NEXT, 1), (DATA, 1, WRITE, 0)], &plain),
        QueueError::IndirectAndNext { head }
    );
    assert_eq!(refused(&[indirect(1)], &[(DATA, 16, INDIRECT, 0)]), QueueError::IndirectNested { head });
    for len in [0, 1, 15, 17, 31, 0xffff_ffff] {
        assert_eq!(refused(&[(TABLE, len, INDIRECT, 0)], &plain), QueueError::IndirectLength { len });
    }
    let off = refused_with(Driver::new(8), &[indirect(1)], &plain, |c| c.indirect = false);
    assert_eq!(off, QueueError::IndirectNotNegotiated { head });
}

#[test]
fn indirect_tables_have_a_limit_and_it_is_reached() {
    let too_many = QueueError::TooManySegments { head: 0 };
    for entries in [1025, 65535, 0x0fff_ffff] {
        assert_eq!(refused(&[indirect(entries)], &[(DATA, 1, WRITE, 0)]), too_many);
    }
    let mut driver = Driver::new(8);
    for i in 0..MAX_SEGMENTS as u64 {
        let last = i + 1 == MAX_SEGMENTS as u64;
        let d = (DATA + i, 1, if last { WRITE } else { WRITE | NEXT }, i as u16 + 1);
        driver.memory.write(TABLE + 16 * i, &descriptor(d)).unwrap();
    }
    driver.desc(0, indirect(MAX_SEGMENTS as u32));
    driver.offer(0);
    assert_eq!(take_all(&mut driver.queue()).unwrap()[0].2.len(), MAX_SEGMENTS);
    // One direct descriptor before it is one segment too many.
    driver.desc(1, (DATA, 1, WRITE | NEXT, 0));
    let too_many = QueueError::TooManySegments { head: 1 };
    assert_eq!(driver.queue().resubmit(1, &mut Chain::new()), Err(too_many));
}

#[test]
fn directions_do_not_mix() {
    let mixed = QueueError::ReadableAfterWritable { head: 0 };
    assert_eq!(refused(&[(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)], &[]), mixed);
    assert_eq!(refused(&[(DATA, 0, WRITE | NEXT, 1), (DATA, 1, 0, 0)], &[]), mixed);
    let table = [(DATA, 1, NEXT, 1), (DATA, 1, WRITE | NEXT, 2), (DATA, 1, NEXT, 3), (DATA, 1, WRITE, 0)];
    assert_eq!(refused(&[indirect(4)], &table), mixed);
}

#[test]
fn buffers_must_be_guest_memory_to_the_last_byte() {
    let end = 2 << 20;
    let bad = |addr: u64, len: u32| {
        let e = QueueError::BufferUnmapped { addr, len };
        assert_eq!(refused(&[(addr, len, WRITE, 0)], &[]), e);
        assert_eq!(refused(&[indirect(1)], &[(addr, len, WRITE, 0)]), e);
    };
    bad(end, 1);
    bad(end - 1, 2);
    bad(end - 0x1000, u32::MAX);
    bad(u64::MAX, 1);
    bad(u64::MAX, u32::MAX);
    bad(u64::MAX - 15, 16);
    bad(0xffff_ffff_0000_0000, 0x1000);
    // Tables, too.
    let table = |addr: u64, len: u32| {
        assert_eq!(refused(&[(addr, len, INDIRECT, 0)], &[]), QueueError::BufferUnmapped { addr, len });
    };
    table(end, 16);
    table(end - 16, 32);
    table(u64::MAX - 15, 16);
    table(u64::MAX - 14, 16);
    let mut driver = Driver::new(8);
    driver.desc(0, (end - 1, 1, WRITE, 0));
    driver.offer(0);
    assert_eq!(take_all(&mut driver.queue()), Ok(vec![(0, vec![], vec![(end - 1, 1)])]));
}

#[test]
fn empty_buffers_are_skipped_wherever_they_point() {
    let mut driver = Driver::new(8);
    driver.desc(0, (u64::MAX, 0, NEXT, 1));
    driver.desc(1, (DATA, 16, NEXT, 2));
    driver.desc(2, (0, 0, NEXT, 3));
    driver.desc(3, (2 << 20, 0, NEXT | WRITE, 4));
    driver.desc(4, (DATA + 64, 1, WRITE | NEXT, 5));
    driver.desc(5, (DATA, 0, WRITE, 0));
    driver.offer(0);
    driver.desc(6, (0, 0, 0, 0));
    driver.offer(6);
    let want = vec![(0, vec![(DATA, 16)], vec![(DATA + 64, 1)]), (6, vec![], vec![])];
    assert_eq!(take_all(&mut driver.queue()), Ok(want));
}

/// Two regions that touch in guest addresses but not in this process, then a gap.
fn split_memory() -> Arc<Memory> {
    Arc::new(Memory::anonymous(&[(0, USER, 2 << 20), (2 << 20, USER + (8 << 20), 0x10000)]).unwrap())
}

#[test]
fn buffers_over_a_region_border_become_two_segments() {
    let border = 2 << 20;
    let mut driver = Driver::over(split_memory(), 8);
    driver.desc(0, (border - 100, 300, NEXT, 1));
    driver.desc(1, (border - 1, 2, WRITE, 0));
    driver.offer(0);
    let want = (0, vec![(border - 100, 100), (border, 200)], vec![(border - 1, 1), (border, 1)]);
    assert_eq!(take_all(&mut driver.queue()), Ok(vec![want]));
    let e = refused_with(Driver::over(split_memory(), 8), &[(border - 1, 0x10002, WRITE, 0)], &[], |_| {});
    assert_eq!(e, QueueError::BufferUnmapped { addr: border - 1, len: 0x10002 });
}

#[test]
fn an_indirect_table_over_a_region_border_is_walked() {
    let border = 2 << 20;
    let mut driver = Driver::over(split_memory(), 8);
    for shift in [8, 16, 17, 40] {
        let table = border - shift;
        driver
            .table(table, &[(DATA, 16, NEXT, 2), (DATA + 32, 1, WRITE, 0), (DATA + 64, 8, NEXT | WRITE, 1)]);
        driver.desc(0, (table, 48, INDIRECT, 0));
        driver.offer(0);
        let config = SplitConfig { last_avail: driver.avail_idx - 1, ..driver.config() };
        let mut queue = SplitQueue::new(driver.memory.clone(), &config).unwrap();
        assert_eq!(
            take_all(&mut queue),
            Ok(vec![(0, vec![(DATA, 16)], vec![(DATA + 64, 8), (DATA + 32, 1)])])
        );
    }
}

#[test]
#[cfg_attr(miri, ignore = "a gigabyte")]
fn a_chain_has_at_most_four_gib() {
    let gib = 1_u32 << 30;
    let memory = Arc::new(
        Memory::anonymous(&[(0, USER, 2 << 20), (1 << 32, USER + (1 << 32), gib as usize)]).unwrap(),
    );
    let chain = |n: u16, extra: u32| {
        let mut driver = Driver::over(memory.clone(), 8);
        for i in 0..n {
            driver.desc(i, (1 << 32, gib, WRITE | NEXT, i + 1));
        }
        driver.desc(n, (DATA, extra, WRITE, 0));
        driver.offer(0);
        take_all(&mut driver.queue()).map(|all| all[0].2.iter().map(|s| s.1 as u64).sum::<u64>())
    };
    assert_eq!(chain(4, 0), Ok(1 << 32));
    assert_eq!(chain(4, 1), Err(QueueError::TooLong { head: 0 }));
    assert_eq!(chain(5, 0), Err(QueueError::TooLong { head: 0 }));
    assert_eq!(chain(3, gib / 2), Err(QueueError::BufferUnmapped { addr: DATA, len: gib / 2 }));
}

/// A table that changes under the walk: whatever is read, the result lies in guest memory and the walk ends.
#[test]
#[cfg_attr(miri, ignore = "spins")]
fn a_driver_that_rewrites_its_descriptors_gets_errors_at_worst() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let memory = split_memory();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let driver = Driver::over(memory.clone(), 4);
            let mut n = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let flags = (n >> 33) as u16 & 7;
                let addr = if n & (1 << 40) == 0 { DATA } else { (2 << 20) - 8 };
                driver
                    .desc((n >> 50) as u16 & 3, (addr, (n >> 44) as u32 & 0x3f, flags, (n >> 58) as u16 & 7));
            }
        });
        let mut good = 0;
        let mut bad = 0;
        let mut rounds = 0;
        while rounds < 20_000 || ((good == 0 || bad == 0) && rounds < 2_000_000) {
            rounds += 1;
            let mut queue = Driver::over(memory.clone(), 4).queue();
            let mut chain = Chain::new();
            match queue.resubmit(0, &mut chain) {
                Ok(()) => {
                    good += 1;
                    for iov in chain.readable().iter().chain(chain.writable()) {
                        let last = iov.base().wrapping_add(iov.len() - 1);
                        assert!(
                            memory.guest_of_host(iov.base()).is_some()
                                && memory.guest_of_host(last).is_some()
                        );
                    }
                }
                Err(_) => bad += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(good > 0 && bad > 0, "{good} chains, {bad} errors: the race was not exercised");
    });
}
