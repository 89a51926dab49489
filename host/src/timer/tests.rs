//! Tests of the timer queue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[test]
fn timers_fire_in_order_and_not_early() {
    let mut t = Timers::default();
    assert_eq!(t.next_deadline(), None);
    let late = t.insert(20);
    let a = t.insert(10);
    let b = t.insert(10);
    assert_eq!(t.next_deadline(), Some(10));
    assert!(t.pop_due(9).is_none());
    assert!(t.register(a, Waker::noop()));
    assert!(t.pop_due(10).unwrap().is_some(), "a, which was registered");
    assert!(!t.register(a, Waker::noop()), "a has fired");
    assert!(t.register(b, Waker::noop()));
    t.remove(b);
    assert!(t.pop_due(10).is_none());
    assert!(t.pop_due(25).unwrap().is_none(), "late, never registered");
    assert!(!t.register(late, Waker::noop()));
    assert_eq!(t.next_deadline(), None);
}
