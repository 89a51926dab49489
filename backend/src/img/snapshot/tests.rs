//! Tests of snapshot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::SnapshotInfo;

use super::{clock, list};

#[test]
fn clocks() {
    assert_eq!(clock(0), "0000:00:00.000");
    assert_eq!(clock(((25 * 60 + 61) * 60 + 1) * 1_000_000_000 + 2_999_999), "0026:01:01.002");
}

#[test]
fn the_table_is_empty_without_snapshots_and_aligned_with_them() {
    assert_eq!(list(&[]), "");
    let one = SnapshotInfo {
        id: "1".to_owned(),
        name: "s1".to_owned(),
        icount: Some(0),
        ..SnapshotInfo::default()
    };
    let text = list(&[one]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[1], "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT");
    assert_eq!(lines[2].len(), lines[1].len());
    assert!(lines[2].starts_with("1       s1                    0 B "));
}
