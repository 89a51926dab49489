//! The same random ring, once through `virtio-queue` and once through this crate: the same chains, or both refuse.
//!
//! `virtio-queue` ends a malformed chain early and says nothing, so "refuses" means there that the descriptors it yields
//! do not end with one without NEXT. This crate is stricter, on purpose, where the list in `stricter` says so.

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::testing::{Desc, Parsed, descriptor};

const MEM: u64 = 0x20000;
const SIZE: u16 = 8;
/// Two indirect tables of up to 16 entries.
const TABLES: [u64; 2] = [0x4000, 0x4800];

#[derive(Debug, Clone)]
struct Ring {
    descriptors: Vec<Desc>,
    tables: [Vec<Desc>; 2],
    heads: Vec<u16>,
    start: u16,
    /// How far the published index is off what the heads say.
    skew: u16,
}

/// What `virtio-queue` makes of one head.
struct Oracle {
    head: u16,
    /// `(address, length, writable)` as far as it got.
    buffers: Vec<(u64, u32, bool)>,
    /// Whether it got to the end.
    complete: bool,
}

fn any_descriptor(limit: u16, indirect: bool) -> impl Strategy<Value = Desc> {
    // Mostly sane, so that whole chains come up; every field goes astray now and then.
    let addr = prop_oneof![
        20 => (0x8000_u64..0x9000, Just(())).prop_map(|(a, ())| a),
        1 => Just(MEM - 4),
        1 => Just(u64::MAX - 3),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![12 => 1_u32..64, 2 => Just(0), 1 => Just(u32::MAX), 1 => any::<u32>()];
    let next = prop_oneof![20 => 0..limit, 1 => any::<u16>()];
    let flags = prop_oneof![8 => Just(NEXT), 6 => Just(WRITE | NEXT), 8 => Just(WRITE), 3 => Just(0), 1 => any::<u16>()];
    let plain = (addr, len, flags, next).boxed();
    if !indirect {
        return plain;
    }
    let table = (0_usize..2, prop_oneof![10 => 1_u32..=16, 1 => Just(0), 1 => Just(65536)], any::<u8>())
        .prop_map(|(table, entries, odd)| {
            let len = if odd == 0 { 16 * entries + 1 } else { 16_u32.wrapping_mul(entries) };
            let flags = if odd == 1 { INDIRECT | NEXT } else { INDIRECT };
            (TABLES[table], len, flags, 0)
        });
    prop_oneof![3 => plain, 2 => table].boxed()
}

fn any_ring() -> impl Strategy<Value = Ring> {
    let table = || prop::collection::vec(any_descriptor(16, false), 16);
    (
        prop::collection::vec(any_descriptor(SIZE, true), usize::from(SIZE)),
        table(),
        table(),
        prop_oneof![
            6 => Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle().prop_flat_map(|v| (1..=v.len()).prop_map(move |n| v[..n].to_vec())),
            1 => prop::collection::vec(prop_oneof![10 => 0..SIZE, 1 => any::<u16>()], 0..=usize::from(SIZE)),
        ],
        prop_oneof![Just(0), Just(65532), any::<u16>()],
        prop_oneof![20 => Just(0), 1 => any::<u16>()],
    )
        .prop_map(|(descriptors, a, b, heads, start, skew)| Ring { descriptors, tables: [a, b], heads, start, skew })
}

/// What both made of a ring.
struct Outcome {
    /// `None`: the index was refused.
    theirs: Option<Vec<Oracle>>,
    ours: Result<(), QueueError>,
    /// The chains that came before an error, or all.
    good: Vec<Parsed>,
}

/// Writes the ring and lets both look at it.
fn both(ring: &Ring) -> Outcome {
    let table = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEM as usize)]).unwrap();
    let put = |at: u64, list: &[Desc]| {
        for (i, d) in list.iter().enumerate() {
            table.write_slice(&descriptor(*d), GuestAddress(at + 16 * i as u64)).unwrap();
        }
    };
    put(RINGS, &ring.descriptors);
    put(TABLES[0], &ring.tables[0]);
    put(TABLES[1], &ring.tables[1]);
    let memory = Arc::new(Memory::from_vm_memory(&table).unwrap());
    let driver = Driver::over(memory.clone(), SIZE);
    for (i, &head) in ring.heads.iter().enumerate() {
        let slot = ring.start.wrapping_add(i as u16) % SIZE;
        driver.set_u16(driver.avail() + 4 + 2 * u64::from(slot), head);
    }
    driver.set_u16(
        driver.avail() + 2,
        ring.start.wrapping_add(ring.heads.len() as u16).wrapping_add(ring.skew),
    );

    let mut oracle = Queue::new(SIZE).unwrap();
    oracle.set_size(SIZE);
    oracle.set_desc_table_address(Some(RINGS as u32), Some(0));
    oracle.set_avail_ring_address(Some(driver.avail() as u32), Some(0));
    oracle.set_used_ring_address(Some(driver.used() as u32), Some(0));
    oracle.set_next_avail(ring.start);
    oracle.set_ready(true);
    assert!(oracle.is_valid(&table));
    let theirs = oracle.iter(&table).ok().map(|chains| {
        chains
            .map(|chain| {
                let head = chain.head_index();
                let all: Vec<_> = chain.collect();
                Oracle {
                    head,
                    complete: all.last().is_some_and(|d| !d.has_next()),
                    buffers: all.iter().map(|d| (d.addr().0, d.len(), d.is_write_only())).collect(),
                }
            })
            .collect()
    });

    let addresses = RingAddresses { descriptors: RINGS, available: driver.avail(), used: driver.used() };
    let config = SplitConfig { addresses, last_avail: ring.start, ..driver.config() };
    let mut queue = SplitQueue::new(memory.clone(), &config).unwrap();
    let mut good = Vec::new();
    let ours = queue.fetch().and_then(|_| {
        let mut chain = Chain::new();
        while queue.pop(&mut chain)? {
            let list = |iovs: &[crate::GuestIov]| {
                iovs.iter().map(|i| (memory.guest_of_host(i.base()).unwrap(), i.len())).collect::<Vec<_>>()
            };
            good.push((chain.head(), list(chain.readable()), list(chain.writable())));
        }
        Ok(())
    });
    Outcome { theirs, ours, good }
}

/// What this crate refuses and `virtio-queue` lets pass at this level.
fn stricter(error: QueueError) -> bool {
    matches!(
        error,
        // There, buffers are looked up only when they are used.
        QueueError::BufferUnmapped { .. }
        // There, left to the device.
        | QueueError::ReadableAfterWritable { .. }
        | QueueError::HeadInFlight { .. }
        | QueueError::IndirectAndNext { .. }
        // There, 65535 entries.
        | QueueError::TooManySegments { .. }
    )
}

/// The buffers as this crate lists them.
fn as_ours(oracle: &Oracle) -> Parsed {
    let side = |writable| {
        oracle
            .buffers
            .iter()
            .filter(|b| b.2 == writable && b.1 > 0)
            .map(|b| (b.0, b.1 as usize))
            .collect::<Vec<_>>()
    };
    (oracle.head, side(false), side(true))
}

fn compare(ring: &Ring) -> Result<usize, TestCaseError> {
    let Outcome { theirs, ours, good } = both(ring);
    let Some(theirs) = theirs else {
        prop_assert!(
            matches!(ours, Err(QueueError::AvailIndex { .. })),
            "index refused there, here {ours:?}"
        );
        return Ok(0);
    };
    let index = matches!(ours, Err(QueueError::AvailIndex { .. }));
    prop_assert!(!index, "index refused here, not there");
    // What was taken is the same, in the same order, and was complete there, too.
    for (here, there) in good.iter().zip(&theirs) {
        prop_assert!(there.complete, "taken here, ended early there: {here:?}");
        prop_assert_eq!(here, &as_ours(there));
    }
    match ours {
        Ok(()) => prop_assert_eq!(good.len(), theirs.len()),
        Err(error) => {
            let next = theirs.get(good.len());
            prop_assert!(next.is_some(), "{error}: there is no such chain");
            if let Some(next) = next
                && next.complete
            {
                prop_assert!(stricter(error), "{error}: {:?} is complete there", next.buffers);
            }
        }
    }
    Ok(good.len())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 4000 }) })]

    #[test]
    fn both_see_the_same_chains_or_refuse(ring in any_ring()) {
        compare(&ring)?;
    }
}

/// The generator is worth nothing if all it makes is refused.
#[test]
#[cfg_attr(miri, ignore = "long")]
fn the_comparison_sees_chains_of_both_kinds_and_most_errors() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut chains, mut longest, mut indirect) = (0, 0, 0);
    let mut errors = std::collections::BTreeSet::new();
    for _ in 0..6000 {
        let ring = any_ring().new_tree(&mut runner).unwrap().current();
        let Outcome { ours, good, .. } = both(&ring);
        chains += good.len();
        for (head, readable, writable) in &good {
            longest = longest.max(readable.len() + writable.len());
            indirect += usize::from(ring.descriptors[usize::from(*head)].2 & INDIRECT != 0);
        }
        if let Err(e) = ours {
            let name = format!("{e:?}");
            errors.insert(name.split_whitespace().next().unwrap().to_owned());
        }
    }
    assert!(
        chains > 1000 && indirect > 200 && longest >= 4,
        "{chains} chains, {indirect} indirect, longest {longest}"
    );
    let wanted = [
        "AvailIndex",
        "BufferUnmapped",
        "HeadInFlight",
        "HeadRange",
        "IndirectAndNext",
        "IndirectLength",
        "IndirectNested",
        "Loop",
        "NextRange",
        "ReadableAfterWritable",
        "TooManySegments",
    ];
    for name in wanted {
        assert!(errors.contains(name), "{name} never came up: {errors:?}");
    }
}
