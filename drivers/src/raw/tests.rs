//! Tests of the window: its checks, its arithmetic, and what the child is asked for. Requests are in the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::options::parse_options;
use graph::{Driver, Errno, Map, Op, Perm, Roles};
use serde_json::json;

use super::options::RawOptions;
use super::{Raw, Window};

fn window(more: serde_json::Value) -> Result<Window, String> {
    let mut options = json!({"file": "f"});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    parse_options::<RawOptions>(options).and_then(|o| Window::new(&o)).map_err(|e| e.to_string())
}

fn raw(more: serde_json::Value, file_size: u64) -> Raw {
    let window = window(more).unwrap();
    window.check(file_size).unwrap();
    Raw { window, file_size: file_size.into() }
}

fn misfit(more: serde_json::Value, file_size: u64) -> String {
    window(more).unwrap().check(file_size).unwrap_err().to_string()
}

#[test]
fn windows_that_do_not_fit_are_refused_in_qemus_words() {
    const M: u64 = 1 << 20;
    assert_eq!(window(json!({"size": 100})).err().unwrap(), "Specified size is not multiple of 512");
    assert_eq!(
        window(json!({"offset": -1})).err().unwrap(),
        "Value '-1' is out of range for parameter 'offset'"
    );
    assert_eq!(window(json!({"foo": 1})).err().unwrap(), "Parameter 'foo' is unexpected");
    assert_eq!(
        misfit(json!({"offset": 2 * M}), M),
        "Offset (2097152) cannot be greater than size of the containing file (1048576)"
    );
    assert_eq!(
        misfit(json!({"offset": 512, "size": M}), M),
        "The sum of offset (512) and size (1048576) has to be smaller or equal to the actual size of the containing \
         file (1048576)"
    );
    assert_eq!(
        misfit(json!({"offset": i64::MAX - 511, "size": 512}), M),
        "Offset (9223372036854775296) cannot be greater than size of the containing file (1048576)"
    );
    assert_eq!(raw(json!({"offset": M}), M).size(), 0);
    assert_eq!(raw(json!({"size": 0}), M).size(), 0);
    assert_eq!(raw(json!({"offset": 100}), M).size(), M - 100);
}

#[test]
fn a_child_is_a_filters_only_without_a_window() {
    assert_eq!(window(json!({})).unwrap().roles(), Roles::FILTERED | Roles::PRIMARY);
    assert_eq!(window(json!({"offset": 0})).unwrap().roles(), Roles::FILTERED | Roles::PRIMARY);
    assert_eq!(window(json!({"offset": 512})).unwrap().roles(), Roles::DATA | Roles::PRIMARY);
    assert_eq!(window(json!({"size": 512})).unwrap().roles(), Roles::DATA | Roles::PRIMARY);
}

#[test]
fn map_adds_the_offset_and_never_leaves_the_window() {
    let node = raw(json!({"offset": 512, "size": 1024}), 4096);
    assert!(matches!(node.map(Op::Read, 0, 1024), Map::Child { child: 0, offset: 512, len: 1024 }));
    assert!(matches!(node.map(Op::Write, 512, 512), Map::Child { child: 0, offset: 1024, len: 512 }));
    assert!(matches!(node.map(Op::Flush, 0, 0), Map::Child { child: 0, .. }));
    for (offset, len) in [(512, 1024), (1024, 1), (u64::MAX, 1), (0, u64::MAX)] {
        assert!(matches!(node.map(Op::Write, offset, len), Map::Error(Errno::ENOSPC)), "{offset} {len}");
    }
    let open_ended = raw(json!({"offset": 512}), 4096);
    assert!(matches!(open_ended.map(Op::Write, 4096 - 512, 512), Map::Drive), "growing");
    assert!(matches!(open_ended.map(Op::Write, i64::MAX as u64 - 512, 512), Map::Error(Errno::EFBIG)));
}

#[test]
fn a_child_that_shrank_takes_the_window_along() {
    let node = raw(json!({"offset": 512, "size": 1024}), 4096);
    node.file_size.store(1024, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(node.size(), 512);
    node.file_size.store(0, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(node.size(), 0);
    node.child_changed(0, None);
    assert_eq!(node.size(), 0);
}

#[test]
fn the_child_is_written_only_when_the_node_is() {
    let whole = raw(json!({}), 4096);
    let window = raw(json!({"offset": 512}), 4096);
    let cr = Perm::CONSISTENT_READ;
    assert_eq!(
        whole.child_perm(0, Roles::FILTER, cr | Perm::WRITE, Perm::ALL),
        (cr | Perm::WRITE, Perm::ALL)
    );
    let data = Roles::DATA | Roles::PRIMARY;
    let (used, shared) = window.child_perm(0, data, cr | Perm::WRITE, Perm::ALL);
    assert_eq!((used, shared), (cr | Perm::WRITE, Perm::ALL - Perm::RESIZE));
    let (used, _) = window.child_perm(0, data, Perm::WRITE_UNCHANGED, Perm::ALL);
    assert_eq!(used, Perm::WRITE_UNCHANGED);
    let (used, _) = window.child_perm(0, data, Perm::RESIZE, Perm::ALL);
    assert_eq!(used, Perm::RESIZE);
}
