//! What the graph is told about a copy-on-read node. Copying is tested through graphs (`tests/filters_own.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::{Driver, Map, Op, Perm, Roles};

use super::CopyOnRead;
use crate::filter::{FILE, Shown};

#[test]
fn reads_go_the_fast_way_only_to_what_the_child_has_itself() {
    let node = CopyOnRead { child: Shown::of_size(8192), bottom: None };
    assert!(matches!(node.map(Op::Read, 512, 1024), Map::Own { child: FILE, offset: 512, len: 1024 }));
    for op in [Op::Write, Op::WriteZeroes, Op::Discard] {
        assert!(matches!(node.map(op, 4096, 4096), Map::Child { child: FILE, offset: 4096, len: 4096 }));
        // What makes the child longer changes the node's size, too.
        assert!(matches!(node.map(op, 4096, 4097), Map::Drive), "{op:?}");
    }
    assert!(matches!(node.map(Op::Flush, 0, 0), Map::Child { .. }));
}

#[test]
fn it_writes_without_being_asked_to() {
    let node = CopyOnRead { child: Shown::of_size(0), bottom: None };
    let perm = |perm: Perm, shared: Perm| node.child_perm(FILE, Roles::FILTER, perm, shared);
    assert_eq!(perm(Perm::NONE, Perm::ALL), (Perm::WRITE_UNCHANGED, Perm::ALL));
    assert_eq!(
        perm(Perm::CONSISTENT_READ | Perm::WRITE, Perm::CONSISTENT_READ),
        (Perm::CONSISTENT_READ | Perm::WRITE | Perm::WRITE_UNCHANGED, Perm::CONSISTENT_READ)
    );
}
