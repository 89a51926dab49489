//! The session state machine: envelope, order, bounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn session() -> Session {
    let mut s = Session::new(SessionOptions::default(), &json!({"QMP": {}}));
    assert_eq!(s.output(), b"{\"QMP\":{}}\r\n");
    s.consume(s.output().len());
    s
}

/// Takes everything that was written.
fn lines(s: &mut Session) -> Vec<Value> {
    let text = String::from_utf8(s.output().to_vec()).unwrap();
    s.consume(text.len());
    text.split_terminator("\r\n").map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn envelopes_that_are_wrong_are_answered_in_qemus_words() {
    let cases = [
        ("[1]", "QMP input must be a JSON object"),
        ("1 ", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ("{\"execute\": 1}", "QMP input member 'execute' must be a string"),
        ("{\"execute\": \"a\", \"arguments\": []}", "QMP input member 'arguments' must be an object"),
        ("{\"execute\": \"a\", \"foo\": 1}", "QMP input member 'foo' is unexpected"),
        ("{\"exec-oob\": \"a\"}", "QMP input member 'exec-oob' is unexpected"),
        ("{\"a\" 1}", "JSON parse error, missing : in object pair"),
    ];
    for (text, expected) in cases {
        let mut s = session();
        s.receive(text.as_bytes());
        assert_eq!(s.next_name(), None, "{text}");
        assert_eq!(lines(&mut s), [json!({"error": {"class": "GenericError", "desc": expected}})], "{text}");
    }
    let mut s = session();
    s.receive(b"{\"id\": {\"a\": [null]}, \"foo\": 1}");
    assert_eq!(s.next_name(), None);
    assert_eq!(lines(&mut s)[0]["id"], json!({"a": [null]}));
}

#[test]
fn a_full_queue_stops_reading_and_loses_nothing() {
    let mut s = session();
    let mut sent = String::new();
    for i in 0..100 {
        sent += &format!("{{\"execute\": \"c\", \"id\": {i}}}\n");
    }
    s.receive(sent.as_bytes());
    assert!(!s.wants_input());
    assert_eq!(s.queue.len(), MAX_QUEUED);
    for i in 0..100 {
        assert_eq!(s.next_name(), Some("c"));
        assert_eq!(s.take_request().unwrap().id, Some(json!(i)));
    }
    assert_eq!(s.next_name(), None);
    assert!(s.wants_input());
}

#[test]
fn a_client_that_does_not_read_gets_no_further_request_started() {
    let mut s = session();
    s.receive(b"{\"execute\": \"a\"}{\"execute\": \"b\"}@\n");
    assert_eq!(s.next_name(), Some("a"));
    let request = s.take_request().unwrap();
    s.respond(request.id, Ok(json!("x".repeat(OUTPUT_PAUSE))));
    assert_eq!(s.next_name(), None);
    assert_eq!(lines(&mut s).len(), 1);
    assert_eq!(s.next_name(), Some("b"));
}

#[test]
fn events_are_dropped_and_then_the_session_ends() {
    let mut s = session();
    let event = json!({"event": "E", "data": {"text": "x".repeat(1000)}});
    s.event(&event);
    assert!(s.output().is_empty(), "no events before the negotiation");
    s.set_running();
    let mut sent = 0;
    while s.dropped_events() == 0 {
        s.event(&event);
        sent += 1;
        assert!(sent < 2 * EVENT_LIMIT / 1000);
    }
    assert!(s.output().len() < EVENT_LIMIT + 2000);
    for _ in 1..MAX_DROPPED - 1 {
        s.event(&event);
    }
    assert!(!s.is_closed());
    s.event(&event);
    assert!(s.is_closed() && s.is_finished() && s.output().is_empty());
}

#[test]
fn what_came_before_the_end_is_still_served() {
    let mut s = session();
    s.receive(b"{\"execute\": \"a\"}");
    s.receive_end();
    assert!(!s.wants_input() && !s.is_finished());
    assert_eq!(s.next_name(), Some("a"));
    let request = s.take_request().unwrap();
    s.respond(request.id, Ok(json!({})));
    assert!(!s.is_finished());
    assert_eq!(lines(&mut s), [json!({"return": {}})]);
    assert!(s.is_finished());
}

#[test]
fn pretty_messages_are_the_same_messages() {
    let mut s = Session::new(SessionOptions { pretty: true }, &json!({"QMP": {"a": 1}}));
    let text = String::from_utf8(s.output().to_vec()).unwrap();
    assert!(text.contains("\n  \"QMP\""));
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), json!({"QMP": {"a": 1}}));
    s.consume(1);
    assert_eq!(s.output(), &text.as_bytes()[1..]);
}

proptest! {
    #[test]
    fn cuts_and_pauses_make_no_difference(
        kinds in proptest::collection::vec(0..4_u8, 1..40),
        cuts in proptest::collection::vec(1..60_usize, 1..40),
    ) {
        let mut text = String::new();
        let mut expected = Vec::new();
        for (i, kind) in kinds.iter().enumerate() {
            match kind {
                0 => text += &format!("{{\"execute\": \"c\", \"id\": {i}}}"),
                1 => text += &format!("{{'execute': 'c', 'id': {i}}}\n"),
                2 => text += &format!("{{\"id\": {i}}}\r\n"),
                _ => text += "]",
            }
            expected.push(match kind { 0 | 1 => json!(["run", i]), 2 => json!(["error", i]), _ => json!(["error", null]) });
        }
        let mut s = session();
        let mut got = Vec::new();
        let mut bytes = text.as_bytes();
        let mut cuts = cuts.iter().cycle();
        while !bytes.is_empty() || !s.queue.is_empty() || !s.backlog.is_empty() {
            if s.wants_input() && !bytes.is_empty() {
                let n = (*cuts.next().unwrap()).min(bytes.len());
                s.receive(&bytes[..n]);
                bytes = &bytes[n..];
            }
            // Serves one request at most, so that the queue fills.
            let ready = s.next_name().is_some();
            got.extend(lines(&mut s).into_iter().map(|l| json!(["error", l.get("id").cloned()])));
            if ready {
                got.push(json!(["run", s.take_request().unwrap().id]));
            }
        }
        prop_assert_eq!(got, expected);
    }
}
