//! Tests of resize.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::Wanted;

#[test]
fn sizes_and_differences() {
    let apply = |text: &str, now| Wanted::parse(text).unwrap().apply(now);
    assert_eq!(apply("1M", 7), Some(1 << 20));
    assert_eq!(apply("+1k", 1024), Some(2048));
    assert_eq!(apply("-1k", 2048), Some(1024));
    assert_eq!(apply("-1k", 1024), None);
    assert_eq!(apply("0", 1024), None);
    assert_eq!(apply("+0", 0), None);
    assert_eq!(apply("+7E", 7 << 60), None);
    for text in ["", "+", "-", "+-1", "1x", "8E", "--1"] {
        assert!(Wanted::parse(text).is_err(), "{text}");
    }
}
