//! Tests of the rules, the configuration file and the limits. Requests are in the conformance suite and in
//! `drivers/tests/scrutiny/debug.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::options::parse_options;
use graph::{DebugEvent, Errno, Limits};
use serde_json::{Value, json};

use super::options::{BlkdebugOptions, IoType};
use super::rules::{Failure, Rules};
use super::{config, open};

fn options(more: Value) -> BlkdebugOptions {
    let mut options = json!({"image": "i"});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    parse_options(options).unwrap()
}

fn rules(inject: Value, set: Value) -> Rules {
    let options = options(json!({"inject-error": inject, "set-state": set}));
    Rules::new(&options.inject_error, options.set_state).unwrap()
}

/// The error number a request gets.
fn errno(rules: &Rules, kind: IoType, offset: u64, len: u64) -> Option<i32> {
    rules.check(kind, offset, len).map(|f| f.errno.raw())
}

#[test]
fn the_event_none_is_passed_from_the_start() {
    let r = rules(json!([{"event": "none", "errno": 28}]), json!([]));
    assert_eq!(errno(&r, IoType::Read, 0, 512), Some(28));
    assert_eq!(errno(&r, IoType::Flush, 0, 0), Some(28));
    assert_eq!(errno(&r, IoType::BlockStatus, 0, 512), None);
    let r = rules(json!([{"event": "none", "iotype": "block-status"}]), json!([]));
    assert_eq!(errno(&r, IoType::BlockStatus, 0, 512), Some(5));
    assert_eq!(errno(&r, IoType::Write, 0, 512), None);
}

#[test]
fn an_event_without_rules_changes_nothing() {
    let r = rules(json!([{"event": "l2_load"}, {"event": "l2_update", "errno": 28}]), json!([]));
    assert_eq!(errno(&r, IoType::Read, 0, 512), None);
    r.pass(DebugEvent::L2Load);
    r.pass(DebugEvent::ReadAio);
    assert_eq!(errno(&r, IoType::Read, 0, 512), Some(5));
    // The rules of another event take their place.
    r.pass(DebugEvent::L2Update);
    assert_eq!(errno(&r, IoType::Read, 0, 512), Some(28));
}

#[test]
fn sectors_and_order() {
    let r = rules(
        json!([{"event": "none", "sector": 3, "errno": 1}, {"event": "none", "sector": 3, "errno": 2},
               {"event": "none", "sector": 9, "errno": 0}, {"event": "none", "errno": 4, "iotype": "write"}]),
        json!([]),
    );
    assert_eq!(errno(&r, IoType::Read, 1536, 1), Some(1));
    assert_eq!(errno(&r, IoType::Read, 1024, 513), Some(1));
    assert_eq!(errno(&r, IoType::Read, 1024, 512), None);
    assert_eq!(errno(&r, IoType::Read, 1537, 5000), None);
    assert_eq!(errno(&r, IoType::Read, 1536, 0), None);
    // An errno of 0 hides what comes later.
    assert_eq!(errno(&r, IoType::Write, 0, 512), Some(4));
    assert_eq!(errno(&r, IoType::Write, 4608, 512), None);
}

#[test]
fn once_is_once_and_then_nothing_is_left() {
    let r = rules(json!([{"event": "none", "once": true, "immediately": true}]), json!([]));
    assert!(r.any());
    let failure = Failure { errno: Errno::EIO, immediately: true };
    assert_eq!(r.check(IoType::Read, 0, 1), Some(failure));
    assert_eq!(r.check(IoType::Read, 0, 1), None);
    assert!(!r.any());
    r.pass(DebugEvent::None);
    assert_eq!(r.check(IoType::Read, 0, 1), None);
}

#[test]
fn states_change_after_the_event_that_changes_them() {
    let r = rules(
        json!([{"event": "read_aio", "state": 1, "errno": 11}, {"event": "read_aio", "state": 2, "errno": 12},
               {"event": "write_aio", "state": 3, "errno": 13}]),
        json!([{"event": "read_aio", "state": 1, "new_state": 2}, {"event": "read_aio", "new_state": 7},
               {"event": "read_aio", "state": 2, "new_state": 3}]),
    );
    r.pass(DebugEvent::ReadAio);
    assert_eq!(errno(&r, IoType::Read, 0, 1), Some(11));
    // State 2 by the first rule that fits; the next event puts it to 7 by the second one.
    r.pass(DebugEvent::ReadAio);
    assert_eq!(errno(&r, IoType::Read, 0, 1), Some(12));
    r.pass(DebugEvent::WriteAio);
    assert_eq!(errno(&r, IoType::Read, 0, 1), Some(12));
    let r = rules(json!([{"event": "none", "state": 2}]), json!([]));
    assert_eq!(errno(&r, IoType::Read, 0, 1), None);
}

#[test]
fn numbers_out_of_range_are_refused() {
    for rule in [json!({"event": "none", "errno": -5}), json!({"event": "none", "errno": 4096})] {
        let options = options(json!({"inject-error": [rule]}));
        let e = Rules::new(&options.inject_error, Vec::new()).err().unwrap();
        assert_eq!(e.to_string(), "Parameter 'errno' expects a value between 0 and 4095");
    }
    for sector in [-2, i64::MAX] {
        let options = options(json!({"inject-error": [{"event": "none", "sector": sector}]}));
        let e = Rules::new(&options.inject_error, Vec::new()).err().unwrap();
        assert_eq!(e.to_string(), "Parameter 'sector' expects the number of a sector, or -1 for any");
    }
    let many: Vec<Value> = (0..1025).map(|_| json!({"event": "none"})).collect();
    let options = options(json!({"inject-error": many}));
    let e = Rules::new(&options.inject_error, Vec::new()).err().unwrap();
    assert_eq!(e.to_string(), "There are more than 1024 rules");
}

#[test]
fn a_configuration_file_says_what_the_options_say() {
    let text = "# comment\n\n[inject-error]\nevent = \"l2_load\"\niotype = \"write-zeroes\"\n  errno = \"0x1c\"\n\
                state  =  \"2\"\nsector = \"-1\"\nonce = \"on\"\nimmediately = \"off\"\n\
                [set-state \"an id\"]\nevent = \"cow_read\"\nnew_state = \"010\"\n";
    let (inject, set) = config::parse(text).unwrap();
    let same = options(json!({
        "inject-error": [{"event": "l2_load", "iotype": "write-zeroes", "errno": 28, "state": 2, "sector": -1,
                          "once": true, "immediately": false}],
        "set-state": [{"event": "cow_read", "new_state": 8}],
    }));
    assert_eq!((inject, set), (same.inject_error, same.set_state));
    assert_eq!(config::parse("").unwrap(), (Vec::new(), Vec::new()));
}

#[test]
fn a_configuration_file_is_refused_as_qemu_refuses_it() {
    let refused = |text: &str| config::parse(text).unwrap_err().to_string();
    let rule = |line: &str| refused(&format!("[inject-error]\nevent = \"none\"\n{line}\n"));
    assert_eq!(refused("[foo]\n"), "There is no option group 'foo'");
    assert_eq!(refused("event = \"none\"\n"), "no group defined");
    assert_eq!(refused("  [inject-error]\n"), "no group defined");
    assert_eq!(refused("[inject-error\n"), "parse error");
    assert_eq!(refused("[inject-error]\n \n"), "parse error");
    assert_eq!(refused("[inject-error]\nerrno = \"5\"\n"), "Missing event name for rule");
    assert_eq!(refused("[inject-error]\nevent none\n"), "invalid parameter value: ");
    assert_eq!(refused("[inject-error]\nevent = none\n"), "invalid parameter value: ");
    assert_eq!(refused("[inject-error]\nevent = \"nonex\"\n"), "invalid parameter value: nonex");
    assert_eq!(rule("foo = \"1\""), "Invalid parameter 'foo'");
    assert_eq!(rule("event=\"none\""), "Invalid parameter 'event=\"none\"'");
    assert_eq!(rule("once = \"maybe\""), "Parameter 'once' expects 'on' or 'off'");
    assert_eq!(rule("errno = \"x\""), "Parameter 'errno' expects a number");
    assert_eq!(rule("iotype = \"x\""), "invalid parameter value: x");
}

#[test]
fn limits_must_fit_each_other() {
    let limits = |more: Value, align: u32| open::limits(&options(more), align).map_err(|e| e.to_string());
    let refused = |more: Value| limits(more, 1).unwrap_err();
    assert_eq!(limits(json!({}), 512).unwrap(), Limits::default());
    assert_eq!(refused(json!({"align": 3})), "Cannot meet constraints with align 3");
    assert_eq!(refused(json!({"align": -1})), "Cannot meet constraints with align -1");
    assert_eq!(refused(json!({"align": 1i64 << 32})), "Cannot meet constraints with align 4294967296");
    assert_eq!(
        refused(json!({"align": 512, "max-transfer": 700})),
        "Cannot meet constraints with max-transfer 700"
    );
    assert_eq!(
        refused(json!({"align": 512, "max-write-zero": 5})),
        "Cannot meet constraints with max-write-zero 5"
    );
    assert_eq!(
        refused(json!({"opt-write-zero": 1024, "max-write-zero": 512})),
        "Cannot meet constraints with max-write-zero 512"
    );
    assert_eq!(
        refused(json!({"align": 512, "opt-discard": 3})),
        "Cannot meet constraints with opt-discard 3"
    );
    assert_eq!(
        limits(json!({"max-transfer": 512}), 4096).unwrap_err(),
        "Cannot meet constraints with max-transfer 512"
    );
    let all = json!({"align": 512, "max-transfer": 1024, "opt-write-zero": 2048, "max-write-zero": 4096,
                     "opt-discard": 8192, "max-discard": 16384});
    let expected = Limits {
        request_alignment: 512,
        max_transfer: 1024,
        write_zeroes_alignment: 2048,
        max_write_zeroes: 4096,
        discard_alignment: 8192,
        max_discard: 16384,
        ..Limits::default()
    };
    assert_eq!(limits(all, 1).unwrap(), expected);
}
