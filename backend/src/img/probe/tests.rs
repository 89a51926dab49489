//! Tests of probe.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::of;

#[test]
fn magic_numbers() {
    assert_eq!(of(b"QFI\xfb\0\0\0\x03"), "qcow2");
    assert_eq!(of(b"LUKS\xba\xbe\0\x01"), "luks");
    assert_eq!(of(b"QFI"), "raw");
    assert_eq!(of(b""), "raw");
}
