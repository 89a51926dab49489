//! Tests of progress.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::share;

#[test]
fn shares_do_not_overflow_and_end_at_a_hundred_percent() {
    assert_eq!(share(0, 0), 10_000);
    assert_eq!(share(0, 5), 0);
    assert_eq!(share(1, 3), 3333);
    assert_eq!(share(u64::MAX, u64::MAX), 10_000);
    assert_eq!(share(7, 5), 10_000);
}
