//! Limits and their refusals, buckets against a model, groups under a virtual clock and between threads. Requests through a
//! node are in the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use host::sim::{self, Faults};
use host::{IoThread, IoThreadOptions, Local};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::bucket::{Bucket, Buckets, Direction};
use super::group::{Member, ThrottleGroup};
use super::limits::{Limits, MAX_RATE, Rate, ThrottleLimits};

const SECOND: u64 = 1_000_000_000;

fn limits(told: Value) -> Result<Limits, String> {
    let told: ThrottleLimits = serde_json::from_value(told).unwrap();
    Limits::default().with(&told).map_err(|e| e.to_string())
}

#[test]
fn limits_that_cannot_be_are_refused_in_qemus_words() {
    const CONFLICT: &str = "bps/iops/max total values and read/write values cannot be used at the same time";
    const RANGE: &str = "bps/iops/max values must be within [0, 1000000000000000]";
    let refused = [
        (json!({"iops-total": 100, "iops-read": 10}), CONFLICT),
        (json!({"bps-total": 100, "bps-write": 10}), CONFLICT),
        (json!({"iops-total": 1, "iops-total-max": 2, "iops-read-max": 2}), CONFLICT),
        (json!({"iops-total-max": 100}), "bps_max/iops_max require corresponding bps/iops values"),
        (json!({"bps-read": 100, "bps-read-max": 50}), "bps_max/iops_max cannot be lower than bps/iops"),
        (json!({"iops-total": 100, "iops-total-max-length": 5}), "burst length set without burst rate"),
        (
            json!({"iops-total": 100, "iops-total-max": 200, "iops-total-max-length": 0}),
            "the burst length cannot be 0",
        ),
        (json!({"iops-total": -1}), RANGE),
        (json!({"iops-total": MAX_RATE + 1}), RANGE),
        (
            json!({"iops-total": 100, "iops-total-max": MAX_RATE, "iops-total-max-length": 2}),
            "burst length too high for this burst rate",
        ),
        (
            json!({"iops-total": 100, "iops-total-max": 200, "iops-total-max-length": 1u64 << 33}),
            "iops-total-max-length value must be in the range [0, 4294967295]",
        ),
        (json!({"iops-size": 5}), "iops size requires an iops value to be set"),
        (json!({"bps-total": 9, "iops-size": 5}), "iops size requires an iops value to be set"),
        (json!({"iops-total": 9, "iops-size": -5}), "Property values cannot be negative"),
    ];
    for (told, words) in refused {
        assert_eq!(limits(told.clone()).unwrap_err(), words, "{told}");
    }
    for told in [
        json!({}),
        json!({"iops-total": 0, "iops-read": 10, "bps-total": 7}),
        json!({"iops-write": 10, "iops-write-max": 10, "iops-write-max-length": 60, "iops-size": 4096}),
        json!({"bps-total": MAX_RATE, "bps-total-max": MAX_RATE}),
    ] {
        assert!(limits(told.clone()).is_ok(), "{told}");
    }
}

fn rate() -> impl Strategy<Value = Rate> {
    let avg = prop_oneof![1u64..2000, 1_000_000u64..1_000_000_000, Just(MAX_RATE)];
    (avg, 0u64..4, 1u64..20).prop_map(|(avg, factor, burst_length)| match factor {
        0 => Rate { avg, max: 0, burst_length: 1 },
        _ => {
            let max = avg.saturating_mul(factor).min(MAX_RATE);
            Rate { avg, max, burst_length: burst_length.min(MAX_RATE / max) }
        }
    })
}

proptest! {
    /// Whatever comes whenever: never more goes through than the limits grant, and never does anybody wait longer than that
    /// takes.
    #[test]
    fn a_bucket_lets_through_what_it_must_and_no_more(
        rate in rate(),
        steps in prop::collection::vec((0u64..3 * SECOND, 1u64..5_000_000), 1..80),
    ) {
        let nano = u128::from(SECOND);
        let mut bucket = Bucket::new(rate);
        let (mut now, mut poured, mut largest) = (0u64, 0u128, 0u128);
        for (pause, units) in steps {
            bucket.leak(pause);
            now += pause;
            let wait = bucket.wait();
            if wait > 0 {
                let mut early = bucket;
                early.leak(wait - 1);
                prop_assert!(early.wait() > 0, "it could have gone a nanosecond earlier");
            }
            bucket.leak(wait);
            now += wait;
            // The wait of the burst bucket may have been the shorter one, never the other way round.
            let more = bucket.wait();
            bucket.leak(more);
            now += more;
            prop_assert_eq!(bucket.wait(), 0);
            let at_once = match rate.max {
                0 => u128::from(rate.avg) * nano / 10,
                max => u128::from(max) * u128::from(rate.burst_length) * nano,
            };
            let granted = at_once + u128::from(rate.avg) * u128::from(now);
            prop_assert!(poured <= granted, "{poured} of {granted} at {now}");
            if rate.burst_length > 1 {
                let granted = u128::from(rate.max) * nano / 10 + u128::from(rate.max) * u128::from(now);
                prop_assert!(poured <= granted, "burst: {poured} of {granted} at {now}");
            }
            let amount = u128::from(units) * nano;
            bucket.pour(amount);
            poured += amount;
            largest = largest.max(amount);
        }
    }

    #[test]
    fn a_clock_that_goes_back_stands_still(a in 0u64..10, b in 0u64..10) {
        let mut buckets = Buckets::new(limits(json!({"iops-total": 1})).unwrap());
        buckets.advance(a * SECOND);
        buckets.account(Direction::Read, 1);
        buckets.account(Direction::Write, 1);
        let before = buckets.wait(Direction::Read);
        buckets.advance(b * SECOND);
        prop_assert_eq!(before.saturating_sub(b.saturating_sub(a) * SECOND), buckets.wait(Direction::Read));
    }
}

#[test]
fn each_limit_counts_what_it_is_for() {
    let waits = |told: Value, direction: Direction, bytes: u64| {
        let mut buckets = Buckets::new(limits(told).unwrap());
        buckets.advance(0);
        buckets.account(direction, bytes);
        (buckets.wait(Direction::Read), buckets.wait(Direction::Write))
    };
    let (read, write) = (Direction::Read, Direction::Write);
    // One request of ten per second: it may come at once and fills the bucket exactly.
    assert_eq!(waits(json!({"iops-total": 10}), read, 1), (0, 0));
    // Of five: half a request too many.
    assert_eq!(waits(json!({"iops-total": 5}), read, 1), (SECOND / 10, SECOND / 10));
    assert_eq!(waits(json!({"iops-read": 5}), read, 1), (SECOND / 10, 0));
    assert_eq!(waits(json!({"iops-read": 5}), write, 1), (0, 0));
    assert_eq!(waits(json!({"iops-write": 5}), write, 1), (0, SECOND / 10));
    assert_eq!(waits(json!({"bps-total": 1000}), write, 600), (SECOND / 2, SECOND / 2));
    assert_eq!(waits(json!({"bps-read": 1000}), write, 600), (0, 0));
    // A long request counts as several, in proportion; a short one as one.
    assert_eq!(
        waits(json!({"iops-total": 10, "iops-size": 4096}), read, 10240),
        (SECOND * 15 / 100, SECOND * 15 / 100)
    );
    assert_eq!(waits(json!({"iops-total": 10, "iops-size": 4096}), read, 512), (0, 0));
    // A burst: ten at once and no more, then one second's worth of the average for each.
    let mut bucket = Bucket::new(Rate { avg: 1, max: 10, burst_length: 1 });
    (0..10).for_each(|_| bucket.pour(u128::from(SECOND)));
    assert_eq!(bucket.wait(), 0);
    bucket.pour(u128::from(SECOND));
    assert_eq!(bucket.wait(), SECOND);
    // A long burst goes at its own rate first.
    let mut bucket = Bucket::new(Rate { avg: 1, max: 10, burst_length: 3 });
    bucket.pour(2 * u128::from(SECOND));
    assert_eq!(bucket.wait(), SECOND / 10);
}

fn group(told: Value) -> Arc<ThrottleGroup> {
    Arc::new(ThrottleGroup::new(&serde_json::from_value(told).unwrap()).unwrap())
}

fn join(group: &Arc<ThrottleGroup>) -> Arc<Member> {
    Arc::new(group.join(&Arc::new(AtomicBool::new(false)), false))
}

/// Counts what tasks have got through.
type Count = Rc<Cell<u64>>;

/// Keeps `tasks` requests of a member coming for ever.
fn load(local: &Local, member: &Arc<Member>, direction: Direction, bytes: u64, tasks: usize) -> Count {
    let count = Count::default();
    for _ in 0..tasks {
        let (member, count, own) = (Arc::clone(member), Rc::clone(&count), local.clone());
        local.spawn(async move {
            loop {
                member.admit(&own, direction, bytes).await;
                count.set(count.get() + 1);
            }
        });
    }
    count
}

fn simulate<F: Future<Output = ()> + 'static>(test: impl FnOnce(Local) -> F) {
    sim::run(1, Faults::default(), test).unwrap();
}

#[test]
fn members_take_turns_whatever_they_ask_for() {
    simulate(|local| async move {
        let group = group(json!({"iops-total": 100}));
        let members: Vec<_> = (0..3).map(|_| join(&group)).collect();
        // Different depths, the same share.
        let counts: Vec<Count> = members
            .iter()
            .zip([1, 5, 40])
            .map(|(m, tasks)| load(&local, m, Direction::Read, 512, tasks))
            .collect();
        local.sleep(60 * SECOND).await;
        let counts: Vec<u64> = counts.iter().map(|c| c.get()).collect();
        let all: u64 = counts.iter().sum();
        // A tenth of a second's worth at once, and whoever fills the bucket may spill over.
        assert!((6000..=6012).contains(&all), "{counts:?}");
        let (least, most) = (*counts.iter().min().unwrap(), *counts.iter().max().unwrap());
        assert!(most - least <= 12, "{counts:?}");
    });
}

#[test]
fn reads_and_writes_share_a_common_limit() {
    simulate(|local| async move {
        let group = group(json!({"bps-total": 1 << 20, "iops-read": 1000}));
        let member = join(&group);
        let reads = load(&local, &member, Direction::Read, 4096, 7);
        let writes = load(&local, &member, Direction::Write, 4096, 2);
        local.sleep(40 * SECOND).await;
        let (reads, writes) = (reads.get(), writes.get());
        assert!((10240..=10240 + 40).contains(&(reads + writes)), "{reads} and {writes}");
        assert!(reads.abs_diff(writes) <= 40, "{reads} and {writes}");
    });
}

#[test]
fn bursts_are_as_fast_and_as_long_as_said() {
    simulate(|local| async move {
        let group = group(json!({"iops-total": 10, "iops-total-max": 100, "iops-total-max-length": 5}));
        let member = join(&group);
        let count = load(&local, &member, Direction::Write, 1, 16);
        local.sleep(4 * SECOND).await;
        let burst = count.get();
        assert!((400..=412).contains(&burst), "{burst} in the burst");
        local.sleep(96 * SECOND).await;
        // The bucket holds five seconds of burst; besides, it leaks ten a second.
        let all = count.get();
        assert!((1500..=1502).contains(&all), "{all} in all");
    });
}

#[test]
fn a_drain_lets_everybody_go_at_once() {
    simulate(|local| async move {
        let group = group(json!({"iops-total": 1}));
        let (member, other) = (join(&group), join(&group));
        let waiting = Rc::new(Cell::new(0));
        for (member, direction) in [
            (&member, Direction::Read),
            (&member, Direction::Write),
            (&other, Direction::Read),
            (&member, Direction::Read),
            (&member, Direction::Read),
            (&other, Direction::Read),
        ] {
            let (member, own, waiting) = (Arc::clone(member), local.clone(), Rc::clone(&waiting));
            local.spawn(async move {
                waiting.set(waiting.get() + 1);
                member.admit(&own, direction, 512).await;
                waiting.set(waiting.get() - 1);
            });
        }
        local.sleep(1000).await;
        assert_eq!(waiting.get(), 5, "the first one passed");
        let then = local.now();
        member.set_drained(true);
        local.yield_now().await;
        local.yield_now().await;
        assert_eq!(waiting.get(), 2, "only the other member's wait");
        member.admit(&local, Direction::Read, 512).await;
        assert!(local.now() - then < 1000);
        // They were counted all the same.
        member.set_drained(false);
        member.admit(&local, Direction::Read, 512).await;
        assert!(local.now() - then >= 4 * SECOND, "{}", local.now() - then);
        local.sleep(3 * SECOND).await;
        assert_eq!(waiting.get(), 0);
    });
}

#[test]
fn limits_change_for_those_who_wait() {
    simulate(|local| async move {
        let group = group(json!({"iops-total": 1, "iops-total-max": 1}));
        let limited = Arc::new(AtomicBool::new(false));
        let member = Arc::new(group.join(&limited, false));
        assert!(limited.load(Relaxed));
        let count = load(&local, &member, Direction::Read, 1, 4);
        local.sleep(SECOND / 2).await;
        assert_eq!(count.get(), 2);
        let told = |value: Value| serde_json::from_value::<ThrottleLimits>(value).unwrap();
        group.set_limits(&told(json!({"iops-total": 1000, "iops-total-max": 0}))).unwrap();
        let then = count.get();
        local.sleep(SECOND).await;
        assert!((1000..=1101).contains(&(count.get() - then)), "{}", count.get());
        assert!(group.set_limits(&told(json!({"iops-read": 1}))).is_err());
        assert_eq!(group.limits().get("iops-total"), Some(1000));
    });
    // Without limits everybody goes, and the nodes hear of it.
    simulate(|local| async move {
        let group = group(json!({"bps-write": 1}));
        let limited = Arc::new(AtomicBool::new(false));
        let member = Arc::new(group.join(&limited, false));
        let done = Rc::new(RefCell::new(Vec::new()));
        for n in 0..3 {
            let (member, own, done) = (Arc::clone(&member), local.clone(), Rc::clone(&done));
            local.spawn(async move {
                member.admit(&own, Direction::Write, 1 << 20).await;
                done.borrow_mut().push(n);
            });
        }
        local.sleep(1000 * SECOND).await;
        assert_eq!(*done.borrow(), [0]);
        group.set_limits(&ThrottleLimits { bps_write: Some(0), ..ThrottleLimits::default() }).unwrap();
        assert!(!limited.load(Relaxed));
        local.yield_now().await;
        local.yield_now().await;
        assert_eq!(*done.borrow(), [0, 1, 2], "in the order they came in");
    });
}

#[test]
fn who_gives_up_holds_nobody_up() {
    simulate(|local| async move {
        let group = group(json!({"iops-total": 1}));
        let (member, other) = (join(&group), join(&group));
        member.admit(&local, Direction::Read, 1).await;
        let done = Rc::new(Cell::new(false));
        {
            let head = member.admit(&local, Direction::Read, 1);
            let mut head = Box::pin(head);
            assert!(
                std::future::poll_fn(|cx| std::task::Poll::Ready(head.as_mut().poll(cx).is_pending())).await
            );
            let (own, flag) = (local.clone(), Rc::clone(&done));
            local.spawn(async move {
                other.admit(&own, Direction::Read, 1).await;
                flag.set(true);
            });
            local.yield_now().await;
        }
        // A member that leaves lets its own go.
        drop(member);
        local.sleep(2 * SECOND).await;
        assert!(done.get());
    });
}

#[test]
fn waiters_of_several_threads_wake_each_other() {
    let group = group(json!({"iops-total": 4000, "bps-read": 100 << 20}));
    let threads: Vec<IoThread> = (0..3)
        .map(|n| {
            IoThread::start(IoThreadOptions { name: format!("t{n}"), ..IoThreadOptions::default() }).unwrap()
        })
        .collect();
    let members = [join(&group), join(&group)];
    let calls: Vec<_> = threads
        .iter()
        .flat_map(|t| members.iter().map(move |m| (t, Arc::clone(m))))
        .map(|(thread, member)| {
            thread.call(move |local| async move {
                for n in 0..150 {
                    let direction = if n % 3 == 0 { Direction::Write } else { Direction::Read };
                    member.admit(&local, direction, 4096).await;
                }
            })
        })
        .collect();
    // Each ends: no wake-up is lost.
    calls.into_iter().for_each(|c| host::exec::block_on(c).unwrap());
    threads.into_iter().for_each(IoThread::stop);
}
