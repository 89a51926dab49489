//! Sums over shards, folding, histogram borders.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[test]
fn shards_add_up_and_survive_their_owner() {
    let stats = NodeStats::default();
    let (a, b) = (stats.shard(), stats.shard());
    a.account(Op::Read, 4096, 1000, true);
    b.account(Op::Read, 512, 3000, true);
    b.account(Op::Write, 512, 10, false);
    let check = |stats: &NodeStats| {
        let t = stats.totals();
        let read = t.op(Op::Read);
        assert_eq!((read.done, read.bytes, read.total_ns, read.failed), (2, 4608, 4000, 0));
        assert_eq!((read.latency[9], read.latency[11]), (1, 1));
        assert_eq!((t.op(Op::Write).done, t.op(Op::Write).failed, t.op(Op::Write).bytes), (0, 1, 0));
    };
    check(&stats);
    stats.retire(&a);
    check(&stats);
    // Twice does not count twice.
    stats.retire(&a);
    stats.retire(&b);
    check(&stats);
    assert!(stats.state().shards.is_empty());
}

#[test]
fn buckets_are_powers_of_two() {
    assert_eq!(latency_bucket(0), 0);
    assert_eq!(latency_bucket(1), 0);
    assert_eq!(latency_bucket(2), 1);
    assert_eq!(latency_bucket(1023), 9);
    assert_eq!(latency_bucket(1024), 10);
    assert_eq!(latency_bucket(u64::MAX), LATENCY_BUCKETS - 1);
}
