//! Tests of what needs no requests: options, votes, and children that come and go. Requests are in the conformance suite
//! and in `drivers/tests/scrutiny/quorum.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::Errno;
use graph::options::parse_options;
use host::IoVecs;
use serde_json::{Value, json};

use super::open::Rules;
use super::options::QuorumOptions;
use super::vote::{Outcome, vote, vote_errors};

fn refused(options: Value) -> String {
    let options: QuorumOptions = parse_options(options).unwrap();
    Rules::new(&options).err().unwrap().to_string()
}

#[test]
fn options_that_make_no_sense_are_refused_in_qemus_words() {
    let two = json!(["a", "b"]);
    assert_eq!(
        refused(json!({"children": [], "vote-threshold": 1})),
        "Number of provided children must be 1 or more"
    );
    for threshold in [0, -1] {
        assert_eq!(
            refused(json!({"children": two, "vote-threshold": threshold})),
            "Parameter 'vote-threshold' expects a value >= 1"
        );
    }
    assert_eq!(
        refused(json!({"children": two, "vote-threshold": 3})),
        "threshold may not exceed children count"
    );
    assert_eq!(
        refused(json!({"children": two, "vote-threshold": 1, "blkverify": true})),
        "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
    );
    assert_eq!(
        refused(json!({"children": two, "vote-threshold": 2, "blkverify": true, "rewrite-corrupted": true})),
        "rewrite-corrupted=on cannot be used with blkverify=on"
    );
    let many: Vec<String> = (0..65).map(|n| format!("n{n}")).collect();
    assert_eq!(refused(json!({"children": many, "vote-threshold": 1})), "Too many children");
    // QEMU does not look at these without votes.
    let fifo = json!({"children": two, "vote-threshold": 1, "read-pattern": "fifo", "blkverify": true});
    let rules = Rules::new(&parse_options(fifo).unwrap()).unwrap();
    assert!(!rules.blkverify && !rules.rewrite);
}

/// The outcome for buffers filled with these bytes.
fn outcome(bytes: &[u8]) -> Option<Outcome> {
    let buffers: Vec<IoVecs> = bytes.iter().map(|b| IoVecs::from_vec(vec![*b; 5000])).collect();
    vote(&buffers.iter().collect::<Vec<_>>())
}

#[test]
fn most_votes_win_and_the_first_of_those_with_the_same_number() {
    let expect = |winner, votes, losers: &[usize]| Some(Outcome { winner, votes, losers: losers.to_vec() });
    assert_eq!(outcome(&[]), None);
    assert_eq!(outcome(&[7]), expect(0, 1, &[]));
    assert_eq!(outcome(&[7, 7, 7]), expect(0, 3, &[]));
    assert_eq!(outcome(&[9, 7, 7]), expect(1, 2, &[0]));
    assert_eq!(outcome(&[7, 9, 7, 8]), expect(0, 2, &[1, 3]));
    assert_eq!(outcome(&[1, 2, 2, 1]), expect(0, 2, &[1, 2]));
    assert_eq!(outcome(&[1, 2, 3]), expect(0, 1, &[1, 2]));
}

#[test]
fn the_last_byte_has_a_say() {
    let mut other = vec![0; 10_001];
    other[10_000] = 1;
    let [a, b, c] = [vec![0; 10_001], other, vec![0; 10_001]].map(IoVecs::from_vec);
    let outcome = vote(&[&a, &b, &c]).unwrap();
    assert_eq!((outcome.winner, outcome.votes, outcome.losers), (0, 2, vec![1]));
}

#[test]
fn errors_are_voted_on_too() {
    let (io, space) = (Errno::EIO, Errno::ENOSPC);
    assert_eq!(vote_errors(&[]), io);
    assert_eq!(vote_errors(&[space]), space);
    assert_eq!(vote_errors(&[io, space, space]), space);
    assert_eq!(vote_errors(&[space, io]), space);
}
