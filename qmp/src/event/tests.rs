//! Events: form, rate limit, bounds. Time is given, never waited for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn error(device: &str, reason: &str) -> BlockIoError {
    BlockIoError {
        qom_path: device.to_owned(),
        device: device.to_owned(),
        node_name: None,
        operation: IoOperationType::Write,
        action: BlockErrorAction::Report,
        nospace: Some(true),
        reason: reason.to_owned(),
    }
}

fn reasons(events: &[Emitted]) -> Vec<&str> {
    events.iter().map(|e| e.message["data"]["reason"].as_str().unwrap()).collect()
}

#[test]
fn the_message() {
    let events = Events::new();
    let wall = UNIX_EPOCH + Duration::new(5, 6_007_000);
    events.emit_at(&BlockExportDeleted { id: "e".into() }, Instant::now(), wall);
    let taken = events.take(Instant::now());
    assert_eq!(
        taken[0].message,
        json!({"timestamp": {"seconds": 5, "microseconds": 6007}, "event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}})
    );
    assert!(events.take(Instant::now()).is_empty());
    let taken = {
        events.emit(&error("d", "r"));
        events.take(Instant::now())
    };
    assert_eq!(
        taken[0].message["data"],
        json!({"qom-path": "d", "device": "d", "operation": "write", "action": "report", "nospace": true, "reason": "r"})
    );
}

#[test]
fn a_limited_event_comes_first_and_last() {
    let events = Events::new();
    let start = Instant::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    let emit =
        |ms: u64, device: &str, reason: &str| events.emit_at(&error(device, reason), at(ms), UNIX_EPOCH);
    emit(0, "d", "one");
    assert_eq!(events.deadline(), None);
    assert_eq!(reasons(&events.take(at(0))), ["one"]);
    emit(100, "d", "two");
    emit(200, "d", "three");
    emit(300, "e", "other key");
    assert_eq!(reasons(&events.take(at(300))), ["other key"]);
    assert_eq!(events.deadline(), Some(at(1000)));
    assert!(events.take(at(999)).is_empty());
    assert_eq!(reasons(&events.take(at(1000))), ["three"]);
    // The one that was late begins a new interval.
    emit(1500, "d", "four");
    assert!(events.take(at(1500)).is_empty());
    assert_eq!(events.deadline(), Some(at(2000)));
    assert_eq!(reasons(&events.take(at(2500))), ["four"]);
    // A quiet interval: nothing is remembered, the next one goes out at once.
    assert!(events.take(at(9000)).is_empty());
    assert_eq!(events.deadline(), None);
    emit(9001, "d", "five");
    assert_eq!(reasons(&events.take(at(9001))), ["five"]);
}

#[test]
fn memory_is_bounded() {
    let events = Events::new();
    let now = Instant::now();
    for i in 0..MAX_QUEUED + 10 {
        events.emit_at(&BlockExportDeleted { id: i.to_string() }, now, UNIX_EPOCH);
    }
    assert_eq!(events.dropped(), 10);
    assert_eq!(events.take(now).len(), MAX_QUEUED);
    // Keys beyond the limit share one: at most one more entry, and one more event.
    for i in 0..MAX_KEYS + 500 {
        events.emit_at(&error(&i.to_string(), "r"), now, UNIX_EPOCH);
    }
    assert_eq!(events.take(now).len(), MAX_KEYS + 1);
    assert_eq!(events.hub.borrow().limited.len(), MAX_KEYS + 1);
}
