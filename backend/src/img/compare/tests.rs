//! Tests of compare.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use host::IoVecs;

use super::{PIECE, first_difference};

#[test]
fn the_first_difference_is_found_in_any_piece() {
    let base = vec![7u8; 2 * PIECE + 100];
    for at in [0, 1, PIECE - 1, PIECE, 2 * PIECE, 2 * PIECE + 99] {
        let mut other = base.clone();
        other[at] = 8;
        let (a, b) = (IoVecs::from_vec(base.clone()), IoVecs::from_vec(other));
        assert_eq!(first_difference(&a, &b), Some(at as u64));
    }
    let (a, b) = (IoVecs::from_vec(base.clone()), IoVecs::from_vec(base));
    assert_eq!(first_difference(&a, &b), None);
}
