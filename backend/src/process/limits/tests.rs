//! Tests of the descriptor limit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[test]
fn the_goal_is_the_hard_limit_within_reason() {
    for (current, maximum, now) in [
        (Some(1024), Some(4096), 4096),
        (Some(1024), None, MAX_DESCRIPTORS),
        (Some(1024), Some(MAX_DESCRIPTORS * 4), MAX_DESCRIPTORS),
        (Some(MAX_DESCRIPTORS * 2), Some(MAX_DESCRIPTORS * 4), MAX_DESCRIPTORS * 2),
        (Some(4096), Some(4096), 4096),
        (None, None, u64::MAX),
    ] {
        assert_eq!(wanted(Rlimit { current, maximum }).1, now, "{current:?} {maximum:?}");
    }
}

#[test]
fn the_limit_of_this_process_is_raised() {
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let found = raise_nofile().unwrap();
    let current = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    assert_eq!(found.now, current);
    assert!(current >= hard.min(MAX_DESCRIPTORS));
}
