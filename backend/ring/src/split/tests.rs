//! Set-up, order of use, notifications and the numbers that wrap. What hostile chains do is in `hostile`, the comparison
//! with `virtio-queue` in `oracle`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use super::*;
use crate::testing::{DATA, Driver, INDIRECT, NEXT, RINGS, USER, WRITE, take_all};

mod hostile;
mod oracle;

/// A read request as Linux makes it: header, data, status.
fn request(driver: &Driver, first: u16) {
    let at = DATA + 0x2000 * u64::from(first);
    driver.desc(first, (at, 16, NEXT, first + 1));
    driver.desc(first + 1, (at + 0x1000, 512, NEXT | WRITE, first + 2));
    driver.desc(first + 2, (at + 16, 1, WRITE, 0));
}

#[test]
fn a_direct_chain_comes_out_and_its_completion_arrives() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    assert_eq!(take_all(&mut queue), Ok(vec![]));
    request(&driver, 0);
    driver.offer(0);
    assert!(queue.has_work());
    let at = DATA;
    assert_eq!(take_all(&mut queue), Ok(vec![(0, vec![(at, 16)], vec![(at + 0x1000, 512), (at + 16, 1)])]));
    assert!(!queue.has_work());
    assert_eq!((queue.in_flight(), driver.used_idx()), (1, 0));

    queue.push_used(0, 513).unwrap();
    assert_eq!(queue.pending(), [UsedElement { head: 0, len: 513 }]);
    assert_eq!((queue.in_flight(), driver.used_idx()), (1, 0));
    assert!(queue.publish());
    assert_eq!((queue.in_flight(), driver.used_idx(), driver.used_element(0)), (0, 1, (0, 513)));
    assert_eq!(queue.state(), QueueState { last_avail: 1, used_idx: 1 });
    assert!(!queue.publish());
}

#[test]
fn an_indirect_chain_comes_out_also_behind_direct_descriptors() {
    let mut driver = Driver::new(4);
    let mut queue = driver.queue();
    // Not aligned, and not in the order of the table: both are the driver's right.
    let table = DATA + 0x101;
    driver
        .table(table, &[(DATA, 16, NEXT, 2), (DATA + 32, 1, WRITE, 9), (DATA + 0x800, 64, NEXT | WRITE, 1)]);
    driver.desc(3, (table, 48, INDIRECT | WRITE, 77));
    driver.desc(1, (DATA + 0x900, 8, NEXT, 3));
    driver.offer(1);
    let readable = vec![(DATA + 0x900, 8), (DATA, 16)];
    let writable = vec![(DATA + 0x800, 64), (DATA + 32, 1)];
    assert_eq!(take_all(&mut queue), Ok(vec![(1, readable, writable)]));
}

#[test]
fn pop_gives_no_more_than_fetch_saw() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let mut chain = Chain::new();
    request(&driver, 0);
    request(&driver, 3);
    driver.offer(0);
    assert_eq!(queue.fetch(), Ok(1));
    driver.offer(3);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert_eq!(queue.pop(&mut chain), Ok(false));
    assert_eq!(queue.fetch(), Ok(1));
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert_eq!(chain.head(), 3);
}

#[test]
fn completions_in_any_order_across_the_wrap_of_the_index() {
    let mut driver = Driver::new(4);
    let start = 65533;
    driver.avail_idx = start;
    driver.set_u16(driver.avail() + 2, start);
    driver.set_u16(driver.used() + 2, start);
    let mut queue =
        SplitQueue::new(driver.memory.clone(), &SplitConfig { last_avail: start, ..driver.config() })
            .unwrap();
    assert_eq!(queue.state(), QueueState { last_avail: start, used_idx: start });
    let mut total = 0;
    for round in 0..20_u32 {
        for head in 0..4 {
            driver.desc(head, (DATA + 64 * u64::from(head), 1, WRITE, 0));
            driver.offer(head);
        }
        assert_eq!(take_all(&mut queue).unwrap().len(), 4);
        for head in [2, 0, 3, 1] {
            queue.push_used(head, round).unwrap();
        }
        queue.publish();
        for head in [2_u32, 0, 3, 1] {
            let slot = start.wrapping_add(total) % 4;
            assert_eq!(driver.used_element(slot), (head, round));
            total += 1;
        }
        assert_eq!(driver.used_idx(), start.wrapping_add(total));
    }
}

#[test]
fn a_chain_that_is_not_in_flight_cannot_be_completed() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    request(&driver, 0);
    driver.offer(0);
    assert_eq!(queue.push_used(0, 0), Err(QueueError::NotInFlight { head: 0 }));
    take_all(&mut queue).unwrap();
    assert_eq!(queue.push_used(1, 0), Err(QueueError::NotInFlight { head: 1 }));
    assert_eq!(queue.push_used(9999, 0), Err(QueueError::NotInFlight { head: 9999 }));
    queue.push_used(0, 0).unwrap();
    assert_eq!(queue.push_used(0, 0), Err(QueueError::NotInFlight { head: 0 }));
    assert_eq!((queue.pending().len(), queue.broken()), (1, None));
}

#[test]
fn sizes_are_powers_of_two_within_the_limits() {
    let memory = Arc::new(Memory::anonymous(&[(0, USER, 2 << 20)]).unwrap());
    let with = |size: u32, max_size: u16| {
        let addresses = RingAddresses {
            descriptors: USER,
            available: USER + (1 << 20),
            used: USER + (1 << 20) + (1 << 18),
        };
        let config = SplitConfig { size, max_size, addresses, ..Driver::new(8).config() };
        SplitQueue::new(memory.clone(), &config).map(|q| q.size())
    };
    for size in [0, 1, 3, 6, 100, 1023, 32769, 65536, 1 << 31, u32::MAX] {
        assert_eq!(with(size, u16::MAX), Err(QueueError::Size { size }));
    }
    for shift in 1..=15 {
        assert_eq!(with(1 << shift, u16::MAX), Ok(1 << shift));
    }
    assert_eq!(with(256, 256), Ok(256));
    assert_eq!(with(512, 256), Err(QueueError::Size { size: 512 }));
}

#[test]
fn each_table_must_be_aligned_and_lie_in_one_region() {
    let memory =
        Arc::new(Memory::anonymous(&[(0, USER, 0x10000), (0x10000, USER + 0x10000, 0x10000)]).unwrap());
    let good = RingAddresses { descriptors: USER, available: USER + 0x1000, used: USER + 0x2000 };
    let with = |addresses| {
        let config = SplitConfig { size: 16, addresses, ..Driver::new(8).config() };
        SplitQueue::new(memory.clone(), &config).map(|_| ())
    };
    assert_eq!(with(good), Ok(()));
    let unaligned = |table, addr| Err(QueueError::RingUnaligned { table, addr });
    let unmapped = |table, addr, len| Err(QueueError::RingUnmapped { table, addr, len });
    let (desc, avail, used) = ("descriptor table", "available ring", "used ring");
    assert_eq!(with(RingAddresses { descriptors: USER + 8, ..good }), unaligned(desc, USER + 8));
    assert_eq!(with(RingAddresses { available: USER + 1, ..good }), unaligned(avail, USER + 1));
    assert_eq!(with(RingAddresses { used: USER + 2, ..good }), unaligned(used, USER + 2));
    // The last place where each fits the region, and one step further.
    for (len, align, name) in [(256, 16, desc), (38, 2, avail), (134, 4, used)] {
        let place = |addr| match name {
            "descriptor table" => RingAddresses { descriptors: addr, ..good },
            "available ring" => RingAddresses { available: addr, ..good },
            _ => RingAddresses { used: addr, ..good },
        };
        for end in [USER + 0x10000, USER + 0x20000] {
            let last = (end - len) & !(align - 1);
            assert_eq!(with(place(last)), Ok(()), "{name}");
            assert_eq!(with(place(last + align)), unmapped(name, last + align, len), "{name}");
        }
        for addr in [USER - align, 0, !(align - 1), USER + 0x20000] {
            assert_eq!(with(place(addr)), unmapped(name, addr, len), "{name}");
        }
    }
}

#[test]
fn without_event_idx_the_flags_decide() {
    let mut driver = Driver::new(4);
    let mut queue =
        SplitQueue::new(driver.memory.clone(), &SplitConfig { event_idx: false, ..driver.config() }).unwrap();
    let mut complete = |queue: &mut SplitQueue, flags: u16| {
        driver.set_u16(driver.avail(), flags);
        driver.desc(0, (DATA, 1, WRITE, 0));
        driver.offer(0);
        take_all(queue).unwrap();
        queue.push_used(0, 1).unwrap();
        queue.publish()
    };
    assert!(complete(&mut queue, 1), "the first one is always told");
    assert!(!complete(&mut queue, 1));
    assert!(complete(&mut queue, 0));
    assert!(!complete(&mut queue, 0xffff));
    assert!(complete(&mut queue, 0xfffe));
    queue.disable_notification();
    assert_eq!(driver.get_u16(driver.used()), 1);
    assert!(!queue.enable_notification());
    assert_eq!(driver.get_u16(driver.used()), 0);
    driver.offer(0);
    assert!(queue.enable_notification());
}

#[test]
fn with_event_idx_the_device_asks_for_the_next_entry_only_when_it_sleeps() {
    let mut driver = Driver::new(4);
    let mut queue = driver.queue();
    for head in 0..3 {
        driver.desc(head, (DATA, 1, WRITE, 0));
        driver.offer(head);
    }
    take_all(&mut queue).unwrap();
    queue.disable_notification();
    assert_eq!((driver.avail_event(), driver.get_u16(driver.used())), (0, 0));
    assert!(!queue.enable_notification());
    assert_eq!((driver.avail_event(), driver.get_u16(driver.used())), (3, 0));
    driver.desc(3, (DATA, 1, WRITE, 0));
    driver.offer(3);
    assert!(queue.enable_notification(), "what came in between must be seen");
}

#[test]
fn one_decision_covers_all_entries_since_the_last() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let mut complete = |queue: &mut SplitQueue, n: u16| {
        for head in 0..n {
            driver.desc(head, (DATA, 1, WRITE, 0));
            driver.offer(head);
        }
        take_all(queue).unwrap();
        (0..n).for_each(|head| queue.push_used(head, 1).unwrap());
    };
    let event = |queue: &SplitQueue, value: u16| {
        queue.epoch().write(RINGS + 128 + 4 + 16, &value.to_le_bytes()).unwrap();
    };
    complete(&mut queue, 1);
    assert!(queue.publish(), "the first decision is always yes");
    // The driver wants entry 3; entries 1 and 2 do not reach it, entries 3 to 6 do, the next ones are beyond.
    event(&queue, 3);
    complete(&mut queue, 2);
    assert!(!queue.publish());
    complete(&mut queue, 4);
    assert!(queue.publish());
    complete(&mut queue, 8);
    assert!(!queue.publish());
    queue.set_event_idx(true);
    complete(&mut queue, 1);
    assert!(queue.publish(), "after a change of the feature the first decision is yes");
}

/// Every event index against every batch around the wrap, compared with looking at the entries one by one.
#[test]
fn event_index_arithmetic_is_exact_around_the_wrap() {
    let batches: &[u16] = if cfg!(miri) { &[1, 4] } else { &[0, 1, 2, 3, 5, 8, 31, 255, 256, 1024, 32768] };
    let olds: &[u16] =
        if cfg!(miri) { &[65534] } else { &[0, 1, 7, 32767, 32768, 65280, 65530, 65533, 65534, 65535] };
    for &old in olds {
        for &batch in batches {
            let new = old.wrapping_add(batch);
            let mut hit = vec![false; 1 << 16];
            for i in 0..batch {
                hit[usize::from(old.wrapping_add(i))] = true;
            }
            let step = if cfg!(miri) { 997 } else { 1 };
            for event in (0..=u16::MAX).step_by(step) {
                assert_eq!(
                    passes_event(event, old, new),
                    hit[usize::from(event)],
                    "event {event} in {old}+{batch}"
                );
            }
        }
    }
}

/// The whole way once around the index with a driver that asks for the next entry each time, then for the one after.
#[test]
fn no_notification_is_lost_in_a_whole_turn_of_the_index() {
    let mut driver = Driver::new(2);
    let start = if cfg!(miri) { 65500 } else { 0 };
    driver.avail_idx = start;
    driver.set_u16(driver.avail() + 2, start);
    driver.set_u16(driver.used() + 2, start);
    let mut queue =
        SplitQueue::new(driver.memory.clone(), &SplitConfig { last_avail: start, ..driver.config() })
            .unwrap();
    driver.desc(0, (DATA, 1, WRITE, 0));
    let turns = if cfg!(miri) { 80_u32 } else { 70_000 };
    for turn in 0..turns {
        let skip = (turn % 2) as u16;
        driver.set_used_event(driver.avail_idx.wrapping_add(skip));
        driver.offer(0);
        assert_eq!(queue.fetch(), Ok(1));
        let mut chain = Chain::new();
        assert_eq!(queue.pop(&mut chain), Ok(true));
        queue.push_used(0, 1).unwrap();
        assert_eq!(queue.publish(), skip == 0 || turn == 0, "turn {turn}");
    }
}

#[test]
fn rebase_follows_the_rings_and_leaves_chains_alone() {
    let mut driver = Driver::new(4);
    let mut queue = driver.queue();
    driver.desc(0, (DATA, 8, NEXT, 1));
    driver.desc(1, (DATA + 8, 1, WRITE, 0));
    driver.memory.write(DATA, b"original").unwrap();
    driver.offer(0);
    let old = queue.epoch().clone();
    let mut chain = Chain::new();
    queue.fetch().unwrap();
    assert_eq!(queue.pop(&mut chain), Ok(true));

    // The same rings in new memory, which starts as a copy of the old.
    let fresh = Arc::new(Memory::anonymous(&[(0, USER, 2 << 20)]).unwrap());
    let mut copy = vec![0; 0x10000];
    old.read(0, &mut copy).unwrap();
    fresh.write(0, &copy).unwrap();
    queue.rebase(fresh.clone()).unwrap();
    assert_eq!(queue.epoch().epoch(), fresh.epoch());

    let mut header = [0; 8];
    assert_eq!(chain.take_header(&fresh, &mut header), Err(crate::AccessError::WrongEpoch));
    chain.take_header(&old, &mut header).unwrap();
    assert_eq!(&header, b"original");
    queue.push_used(0, 1).unwrap();
    queue.publish();
    let mut idx = [0; 2];
    fresh.read(driver.used() + 2, &mut idx).unwrap();
    assert_eq!((u16::from_le_bytes(idx), driver.used_idx()), (1, 0), "published in the new memory alone");

    let elsewhere = Arc::new(Memory::anonymous(&[(0, 0, 2 << 20)]).unwrap());
    assert!(matches!(queue.rebase(elsewhere), Err(QueueError::RingUnmapped { .. })));
    assert_eq!(queue.fetch(), Err(queue.broken().unwrap()));
    assert_eq!(queue.epoch().epoch(), fresh.epoch());
}

#[test]
fn a_tracked_head_is_taken_in_again() {
    let mut driver = Driver::new(8);
    request(&driver, 0);
    request(&driver, 3);
    driver.offer(0);
    driver.offer(3);
    take_all(&mut driver.queue()).unwrap();
    // The device starts anew: both were popped, nothing was published.
    let config = SplitConfig { last_avail: 2, used_idx: Some(0), ..driver.config() };
    let mut queue = SplitQueue::new(driver.memory.clone(), &config).unwrap();
    let mut chain = Chain::new();
    for head in [3, 0] {
        queue.resubmit(head, &mut chain).unwrap();
        assert_eq!((chain.head(), chain.writable_len()), (head, 513));
    }
    assert_eq!((queue.fetch(), queue.in_flight()), (Ok(0), 2));
    assert_eq!(queue.resubmit(0, &mut chain), Err(QueueError::HeadInFlight { head: 0 }));
}

#[test]
fn a_queue_can_move_but_tells_its_errors_only_once_broken() {
    fn movable<T: Send>(t: T) -> T {
        t
    }
    let mut driver = Driver::new(4);
    let mut queue = movable(driver.queue());
    driver.desc(0, (DATA, 1, WRITE, 0));
    driver.offer(0);
    driver.offer(4);
    let mut chain = Chain::new();
    assert_eq!(queue.fetch(), Ok(2));
    assert_eq!(queue.pop(&mut chain), Ok(true));
    let error = QueueError::HeadRange { head: 4 };
    for _ in 0..2 {
        assert_eq!(queue.pop(&mut chain), Err(error));
        assert_eq!(queue.fetch(), Err(error));
    }
    assert!(!queue.has_work() && !queue.enable_notification());
    // What was taken before may still be finished.
    queue.push_used(0, 1).unwrap();
    assert!(queue.publish());
    assert_eq!((driver.used_idx(), queue.state().last_avail), (1, 1));
}
