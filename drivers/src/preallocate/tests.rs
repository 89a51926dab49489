//! Steps and their refusals, what goes the fast way, what it takes of its child. Growing is tested through graphs
//! (`tests/filters_own.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::{Driver, Map, Op, Perm, Roles};
use proptest::prelude::*;

use super::Preallocate;
use super::options::Steps;

const GROWS: Perm = Perm::WRITE.union(Perm::RESIZE);

#[test]
fn steps_that_cannot_be_are_refused_in_qemus_words() {
    let refused = |align: Option<i64>, size: Option<i64>, child: u32| {
        Steps::new(align, size, child).unwrap_err().to_string()
    };
    const ALIGN: &str = "prealloc-align parameter of preallocate filter";
    assert_eq!(refused(Some(100), None, 1), format!("{ALIGN} is not aligned to 512"));
    assert_eq!(
        refused(Some(512), None, 4096),
        format!("{ALIGN} is not aligned to underlying node request alignment (4096)")
    );
    assert_eq!(refused(Some(0), None, 1), format!("{ALIGN} must not be 0"));
    assert_eq!(refused(Some(-512), None, 1), "Value '-512' is out of range for parameter 'prealloc-align'");
    assert_eq!(refused(None, Some(-1), 1), "Value '-1' is out of range for parameter 'prealloc-size'");
    assert_eq!(
        refused(None, Some(i64::MAX), 1),
        format!("Value '{}' is out of range for parameter 'prealloc-size'", i64::MAX)
    );
    assert_eq!(Steps::new(None, None, 4096).unwrap(), Steps { align: 1 << 20, size: 128 << 20 });
}

proptest! {
    #[test]
    fn a_step_is_aligned_and_reaches_far_enough(
        align in (1u64..5000).prop_map(|n| n * 512),
        size in 0u64..1 << 40,
        from in 0u64..1 << 50,
        ahead in 1u64..1 << 30,
    ) {
        let end = from + ahead;
        let steps = Steps { align, size };
        match steps.next(from, end) {
            Some((start, stop)) => {
                prop_assert!(start.is_multiple_of(align) && stop.is_multiple_of(align));
                prop_assert!(start >= from && start < from + align);
                prop_assert!(stop >= end + size && stop < start.max(end) + size + align);
            }
            // The write itself ends where the step would.
            None => prop_assert!(size == 0 && end <= from.next_multiple_of(align)),
        }
        let most = i64::MAX as u64;
        let far = Steps { align: 1 << 60, size: 1 << 60 };
        prop_assert!(far.next(most - 1, most).is_none());
    }
}

#[test]
fn inside_of_the_data_requests_go_the_fast_way() {
    let node = Preallocate::new(Steps { align: 512, size: 512 }, 4096);
    for op in [Op::Read, Op::Write, Op::WriteZeroes, Op::Discard] {
        assert!(matches!(node.map(op, 0, 4096), Map::Child { child: 0, offset: 0, len: 4096 }), "{op:?}");
        assert!(matches!(node.map(op, 1, 4096), Map::Drive), "{op:?}");
        assert!(matches!(node.map(op, u64::MAX, 2), Map::Drive), "{op:?}");
    }
    assert!(matches!(node.map(Op::Flush, 0, 0), Map::Child { .. }));
}

#[test]
fn who_may_make_the_file_longer_is_alone_with_it() {
    let node = Preallocate::new(Steps { align: 512, size: 512 }, 4096);
    let perm = |perm: Perm| node.child_perm(0, Roles::FILTER, perm, Perm::ALL);
    let cr = Perm::CONSISTENT_READ;
    assert_eq!(perm(Perm::NONE), (Perm::NONE, Perm::ALL));
    assert_eq!(perm(cr | Perm::WRITE), (cr | Perm::WRITE, Perm::ALL));
    assert_eq!(perm(Perm::RESIZE), (Perm::RESIZE, Perm::ALL));
    assert_eq!(perm(cr | GROWS), (cr | GROWS, Perm::ALL - GROWS));
    // As long as there is something to cut off.
    node.set_aside.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(perm(Perm::NONE), (GROWS, Perm::ALL - GROWS));
}
