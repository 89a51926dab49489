//! Tests of what needs no requests. Requests are in the conformance suite and in `drivers/tests/scrutiny/verify.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use graph::{Driver, Errno, Op, Perm, Result, Roles};
use host::sync::Ranges;

use super::{Blkverify, BlkverifyNode, RAW, TEST};
use crate::child_size::ChildSize;

fn node() -> Blkverify {
    Blkverify { name: "v".to_owned(), size: ChildSize::new(1 << 20), read_only: false, ranges: Ranges::new() }
}

type Answer = std::result::Result<(), Errno>;

fn both_agree(node: &Blkverify, raw: Answer, test: Answer) -> Result<((), ())> {
    node.agreed("write", (512, 1024), (raw.map_err(Into::into), test.map_err(Into::into)))
}

#[test]
fn return_values_must_agree() {
    let node = node();
    assert!(both_agree(&node, Ok(()), Ok(())).is_ok());
    // The same error is the request's own.
    let same = both_agree(&node, Err(Errno::ENOSPC), Err(Errno::ENOSPC)).unwrap_err();
    assert_eq!(same.errno(), Errno::ENOSPC);
    let differ = both_agree(&node, Ok(()), Err(Errno::ENOSPC)).unwrap_err();
    assert_eq!(differ.errno(), Errno::EIO);
    assert_eq!(differ.to_string(), "blkverify: write offset=512 bytes=1024 return value mismatch 0 != -28");
    let differ = both_agree(&node, Err(Errno::EIO), Err(Errno::ENOSPC)).unwrap_err();
    assert_eq!(differ.to_string(), "blkverify: write offset=512 bytes=1024 return value mismatch -5 != -28");
}

#[test]
fn only_discards_are_answered_at_once() {
    let node = BlkverifyNode(Arc::new(node()));
    for op in Op::ALL {
        let answer = format!("{:?}", node.map(op, 0, 512));
        assert_eq!(answer, if op == Op::Discard { "Done 512" } else { "Drive" }, "{op:?}");
    }
}

#[test]
fn children_are_used_as_qemu_uses_them() {
    let node = BlkverifyNode(Arc::new(node()));
    let (all, write) = (Perm::ALL, Perm::CONSISTENT_READ | Perm::WRITE);
    assert_eq!(node.child_perm(RAW, Roles::FILTER, write, all), (write, all));
    // Data of a format below: it may grow, and nobody moves its end.
    assert_eq!(node.child_perm(TEST, Roles::DATA, write, all), (write | Perm::RESIZE, all - Perm::RESIZE));
}
