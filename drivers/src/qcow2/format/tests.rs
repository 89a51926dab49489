//! Unit tests of the format: written in the next change beside the properties.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[test]
fn a_new_header_parses_again() {
    let g = Geometry::new(16, 4, false, true, false).unwrap();
    let mut h = Header::new(3, g, 1 << 30);
    h.l1_size = 2;
    h.l1_offset = 3 << 16;
    h.reftable_offset = 1 << 16;
    h.reftable_clusters = 1;
    h.backing_file = Some(b"base.img".to_vec());
    h.backing_format = Some(b"raw".to_vec());
    let bytes = h.serialise().unwrap();
    let mut again = Header::parse(&bytes, Policy::default()).unwrap();
    assert_eq!(again.feature_names.len(), 8);
    again.feature_names.clear();
    assert_eq!(again, h);
}
