//! What the graph is told about a compress node. Writes are tested through graphs (`tests/filters_own.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::{Driver, Map, Op};

use super::Compress;
use crate::filter::{FILE, Shown};

#[test]
fn only_writes_are_its_business() {
    let node = Compress { child: Shown::of_size(65536) };
    assert!(matches!(node.map(Op::Write, 0, 65536), Map::Drive));
    for op in [Op::Read, Op::WriteZeroes, Op::Discard] {
        assert!(
            matches!(node.map(op, 0, 65536), Map::Child { child: FILE, offset: 0, len: 65536 }),
            "{op:?}"
        );
    }
    assert!(matches!(node.map(Op::Flush, 0, 0), Map::Child { .. }));
}
