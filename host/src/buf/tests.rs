//! Tests of scatter lists.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

/// A list over pieces of one vector, laid out in reverse, so that offsets in the list are not offsets in memory.
fn list(lens: &[usize]) -> (IoVecs, usize) {
    let total: usize = lens.iter().sum();
    let mut mem = vec![0u8; total].into_boxed_slice();
    let base = mem.as_mut_ptr();
    let mut end = total;
    let iov: Vec<_> = lens
        .iter()
        .map(|l| {
            end -= l;
            iovec { iov_base: base.wrapping_add(end).cast(), iov_len: *l }
        })
        .collect();
    let keep: Rc<dyn Any> = Rc::new(Owned(Box::into_raw(mem)));
    // SAFETY: all pieces lie in `mem`, which `keep` frees.
    (unsafe { IoVecs::from_raw(&iov, keep) }, total)
}

proptest! {
    #[test]
    fn a_list_behaves_like_a_vector(
        lens in proptest::collection::vec(0usize..40, 0..12),
        ops in proptest::collection::vec((0usize..300, 0usize..300, 0u8..4, any::<u8>()), 0..20),
    ) {
        let (l, total) = list(&lens);
        let mut model = vec![0u8; total];
        for (at, len, what, byte) in ops {
            let s = at.min(total);
            let e = (at.saturating_add(len)).min(total);
            match what {
                0 => {
                    l.copy_from(at, &vec![byte; len]);
                    model[s..e].fill(byte);
                }
                1 => {
                    l.slice(at, len).fill(byte);
                    model[s..e].fill(byte);
                }
                2 => {
                    let src = IoVecs::from_vec((0..len).map(|i| byte.wrapping_add(i as u8)).collect());
                    let dst = l.slice(at, len);
                    dst.copy_iov(&src);
                    for (i, b) in model[s..e].iter_mut().enumerate() {
                        *b = byte.wrapping_add(i as u8);
                    }
                }
                _ => {
                    let mut out = vec![0xa5; len];
                    l.copy_to(at, &mut out);
                    prop_assert_eq!(&out[..e - s], &model[s..e]);
                    prop_assert!(out[e - s..].iter().all(|b| *b == 0xa5));
                }
            }
            prop_assert_eq!(l.slice(at, len).to_vec(), &model[s..e]);
            prop_assert_eq!(l.slice(at, len).is_zero(), model[s..e].iter().all(|b| *b == 0));
            let mut pieces = vec![];
            prop_assert_eq!(l.slice(at, len).gather(usize::MAX, &mut pieces), e - s);
            prop_assert_eq!(l.slice(at, len).slice(1, len).len(), (e - s).saturating_sub(1).min(len));
        }
        prop_assert_eq!(l.to_vec(), model);
    }
}

#[test]
fn one_byte_anywhere_is_not_zero() {
    for len in [1usize, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 17] {
        let b = IoVecs::alloc(len, 512).unwrap();
        assert!(b.is_zero());
        for at in [0, len / 3, len / 2, len - 1] {
            b.copy_from(at, &[1]);
            assert!(!b.is_zero(), "{at} of {len}");
            b.copy_from(at, &[0]);
        }
    }
    assert!(IoVecs::empty().is_zero());
}

#[test]
fn alignment_is_of_addresses_and_lengths() {
    let b = IoVecs::alloc(8192, 4096).unwrap();
    assert!(b.is_aligned(4096) && b.is_aligned(1));
    assert!(!b.slice(0, 100).is_aligned(512));
    assert!(!b.slice(100, 512).is_aligned(512));
    assert!(b.slice(100, 512).is_aligned(4));
    assert!(b.slice(512, 512).is_aligned(512));
    assert_eq!(IoVecs::alloc(1, 3).err().unwrap().raw_os_error(), Some(libc::EINVAL));
    assert!(IoVecs::alloc(usize::MAX / 2 + 1, 1).is_err());
    assert_eq!(IoVecs::alloc(0, 512).unwrap().len(), 0);
}

#[test]
fn views_outlive_the_list_and_count_their_pieces() {
    let (l, total) = list(&[10, 0, 20, 30]);
    l.copy_from(0, &(0..total as u8).collect::<Vec<_>>());
    assert_eq!(l.iov_count(), 4);
    let v = l.slice(5, 20);
    assert_eq!(v.iov_count(), 2);
    assert!(v.raw().is_none() && l.raw().is_some());
    drop(l);
    assert_eq!(v.to_vec(), (5..25).collect::<Vec<u8>>());
}

#[test]
fn parts_make_one_list() {
    let a = IoVecs::from_vec(vec![1, 2, 3]);
    let b = IoVecs::from_vec(vec![4, 5, 6, 7]);
    let all = IoVecs::concat(&[a.slice(1, 2), IoVecs::empty(), b.slice(0, 3)]);
    assert_eq!((all.len(), all.iov_count()), (5, 2));
    assert_eq!(all.to_vec(), [2, 3, 4, 5, 6]);
    drop((a, b));
    all.slice(1, 3).copy_from(0, &[9, 9, 9]);
    assert_eq!(all.to_vec(), [2, 9, 9, 9, 6], "the memory stays while the list does");
}

#[test]
fn the_first_difference_is_found_across_pieces() {
    let bytes: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    let whole = IoVecs::from_vec(bytes.clone());
    let parts = IoVecs::concat(&[whole.slice(0, 4095), whole.slice(4095, 3), whole.slice(4098, 9000)]);
    assert_eq!(whole.first_difference(&parts), None);
    assert_eq!(parts.slice(7, 9000).first_difference(&whole.slice(7, 9000)), None);
    for at in [0, 4095, 4096, 8191, 9999] {
        let mut other = bytes.clone();
        other[at] ^= 1;
        assert_eq!(parts.first_difference(&IoVecs::from_vec(other)), Some(at));
    }
    assert_eq!(whole.first_difference(&IoVecs::empty()), None);
}
