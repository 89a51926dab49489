//! Tests of the null driver's options; how it serves requests is in the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::options::parse_options;
use graph::{Driver, Map, Op};
use serde_json::json;

use super::Null;
use super::options::NullOptions;

fn open(options: serde_json::Value) -> Result<Null, String> {
    parse_options::<NullOptions>(options).and_then(|o| Null::new("null-co", &o)).map_err(|e| e.to_string())
}

#[test]
fn defaults_are_qemus() {
    let null = open(json!({})).unwrap();
    assert_eq!((null.size, null.latency_ns, null.read_zeroes), (1 << 30, 0, false));
    assert_eq!(null.filename, "null-co://");
}

#[test]
fn sizes_are_whole_sectors() {
    let null = open(json!({"size": 1000})).unwrap();
    assert_eq!(null.size(), 1024);
    assert_eq!(null.filename, r#"json:{"driver": "null-co", "size": 1000}"#);
    assert_eq!(open(json!({"size": 0})).unwrap().size(), 0);
    assert_eq!(open(json!({"size": i64::MAX - 511})).unwrap().size(), i64::MAX as u64 - 511);
}

#[test]
fn nonsense_is_refused_with_words() {
    for (options, words) in [
        (json!({"size": -1}), "Value '-1' is out of range for parameter 'size'"),
        (json!({"size": i64::MAX}), "Value '9223372036854775807' is out of range for parameter 'size'"),
        (json!({"latency-ns": -1}), "Parameter 'latency-ns' expects an integer from 0 to 10000000000"),
        (json!({"latency-ns": i64::MAX}), "Parameter 'latency-ns' expects an integer from 0 to 10000000000"),
        (json!({"filename": "x"}), "Parameter 'filename' is unexpected"),
    ] {
        assert_eq!(open(options).err().as_deref(), Some(words));
    }
    assert!(open(json!({"size": "1G"})).is_err());
}

#[test]
fn map_answers_at_once_unless_there_is_a_latency() {
    let quick = open(json!({})).unwrap();
    let zeroes = open(json!({"read-zeroes": true})).unwrap();
    let slow = open(json!({"latency-ns": 1, "read-zeroes": true})).unwrap();
    for op in Op::ALL {
        assert!(matches!(quick.map(op, 0, 512), Map::Done { len: 512 }));
        assert!(matches!(slow.map(op, 0, 512), Map::Drive));
        match zeroes.map(op, 0, 512) {
            Map::Zero { len: 512 } => assert_eq!(op, Op::Read),
            Map::Done { len: 512 } => assert_ne!(op, Op::Read),
            _ => panic!("{op:?}"),
        }
    }
}
