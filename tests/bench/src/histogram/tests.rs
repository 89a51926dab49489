//! Buckets are gapless and quantiles within their promised error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Histogram, bucket, upper_end};

#[test]
fn every_value_lies_in_its_bucket() {
    for value in (0..70_000).chain([1 << 40, u64::MAX - 1, u64::MAX]) {
        let at = bucket(value);
        assert!(upper_end(at) >= value, "{value}");
        assert!(at == 0 || upper_end(at - 1) < value, "{value}");
    }
}

#[test]
fn quantiles_are_close_and_ordered() {
    let mut histogram = Histogram::new();
    (1..=100_000).for_each(|value| histogram.record(value));
    for (share, exact) in [(0.5, 50_000.0), (0.9, 90_000.0), (0.99, 99_000.0), (0.999, 99_900.0)] {
        let found = histogram.quantile(share) as f64;
        assert!((found / exact - 1.0).abs() < 0.016, "{share}: {found}");
    }
    assert_eq!((histogram.quantile(1.0), histogram.max(), histogram.total()), (100_000, 100_000, 100_000));
    histogram.clear();
    histogram.record(7);
    assert_eq!(histogram.quantile(0.5), 7);
}
