//! Which queue goes to which iothread, and what an id may look like.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn entry(iothread: &str, vqs: Option<&[u16]>) -> IoThreadVirtQueueMapping {
    IoThreadVirtQueueMapping { iothread: iothread.to_owned(), vqs: vqs.map(<[u16]>::to_vec) }
}

#[test]
fn queues_are_dealt_out_in_turn() {
    let m = [entry("a", None), entry("b", None)];
    assert_eq!(place(&m, 5).unwrap(), [0, 1, 0, 1, 0]);
    assert_eq!(place(&m[..1], 3).unwrap(), [0, 0, 0]);
}

#[test]
fn queues_go_where_they_are_told() {
    let m = [entry("a", Some(&[2, 0])), entry("b", Some(&[1]))];
    assert_eq!(place(&m, 3).unwrap(), [0, 1, 0]);
}

#[test]
fn wrong_mappings_say_what_is_wrong() {
    let refused = |m: &[IoThreadVirtQueueMapping], queues| place(m, queues).unwrap_err().desc;
    assert!(refused(&[], 1).contains("at least one"));
    assert!(refused(&[entry("a", None), entry("a", None)], 2).contains("'a' twice"));
    assert!(refused(&[entry("a", Some(&[0])), entry("b", None)], 1).contains("all entries or in none"));
    assert!(refused(&[entry("a", Some(&[0, 1]))], 1).contains("vq 1"));
    assert!(refused(&[entry("a", Some(&[0, 0]))], 1).contains("vq 0 twice"));
    assert!(refused(&[entry("a", Some(&[0]))], 2).contains("vq 1 without"));
}

#[test]
fn ids_follow_the_rule_for_identifiers() {
    for good in ["a", "disk0", "a-b.c_d", &"x".repeat(127)] {
        assert!(valid_id(good), "{good}");
    }
    for bad in ["", "0a", "-a", "a b", "a/b", "ä", "#a", &"x".repeat(128)] {
        assert!(!valid_id(bad), "{bad}");
    }
}
