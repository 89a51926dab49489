//! Tests of size.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{human, parse};

#[test]
fn sizes_are_read() {
    let good = [
        ("0", 0),
        ("100", 100),
        ("1b", 1),
        ("1k", 1024),
        ("1K", 1024),
        ("1.5M", 1_572_864),
        ("1.3k", 1331),
        (".5k", 512),
        ("0x600", 0x600),
        ("16E", 0),
        ("15E", 15 << 60),
        ("18446744073709551615", u64::MAX),
    ];
    for (text, value) in good {
        let expected = (text != "16E").then_some(value);
        assert_eq!(parse(text), expected, "{text}");
    }
}

#[test]
fn nonsense_is_refused() {
    for text in
        ["", "x", "1x", "1kk", "-1", "+1", "1.5", "0x", "0x1k", "0x-1", "k", ".k", "18446744073709551616"]
    {
        assert_eq!(parse(text), None, "{text}");
    }
}

#[test]
fn people_read_three_digits() {
    let cases = [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (4096, "4 KiB"),
        (221_184, "216 KiB"),
        (1_048_576, "1 MiB"),
        (1_023_590, "1e+03 KiB"),
        (1_572_864, "1.5 MiB"),
        (2_297_856, "2.19 MiB"),
        (1_023 * 1024, "0.999 MiB"),
        (1 << 60, "1 EiB"),
        (u64::MAX, "16 EiB"),
    ];
    for (bytes, text) in cases {
        assert_eq!(human(bytes), text);
    }
}
