//! The JSON reader: QEMU's verdicts, limits, and that how the bytes are cut makes no difference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use serde_json::json;

use super::*;

type Messages = Vec<Result<Value, String>>;

fn feed(framer: &mut Framer, bytes: &[u8], out: &mut Messages) {
    let used = framer.feed(bytes, &mut |m| {
        out.push(m);
        true
    });
    assert_eq!(used, bytes.len());
}

fn messages(bytes: &[u8]) -> Messages {
    let mut framer = Framer::new(Limits::default());
    let mut out = Vec::new();
    feed(&mut framer, bytes, &mut out);
    out
}

fn error(text: &str) -> Result<Value, String> {
    Err(text.to_owned())
}

#[test]
fn values_need_no_terminator_unless_they_have_no_end() {
    assert_eq!(messages(b"{}[]\"a\" 1 "), [Ok(json!({})), Ok(json!([])), Ok(json!("a")), Ok(json!(1))]);
    assert_eq!(messages(b"1"), []);
    assert_eq!(messages(b"true1 "), [Ok(json!(true)), Ok(json!(1))]);
    assert_eq!(messages(b" \t\r\n"), []);
    assert_eq!(messages(b"{\"a\": [1, {\"b\": null}]}"), [Ok(json!({"a": [1, {"b": null}]}))]);
}

#[test]
fn qemu_extensions_and_numbers() {
    assert_eq!(messages(b"'a\\'b\"'"), [Ok(json!("a'b\""))]);
    assert_eq!(messages(b"\"\\'\""), [Ok(json!("'"))]);
    assert_eq!(messages(br#""\u00e9\/\n\ud834\udd1e\u0000""#), [Ok(json!("\u{e9}/\n\u{1d11e}\0"))]);
    assert_eq!(
        messages(b"[-0,18446744073709551615,-9223372036854775808,1.5e3]"),
        [Ok(json!([0, u64::MAX, i64::MIN, 1500.0]))]
    );
    // Too large for 64 bits: a double, as in QEMU.
    assert_eq!(messages(b"18446744073709551616 "), [Ok(json!(18446744073709551616.0))]);
    assert_eq!(messages(b"1e999 "), [error("JSON parse error, number '1e999' is out of range")]);
}

/// Each line was put to QEMU 10.0.2's storage daemon; the words are its own.
#[test]
fn errors_are_qemus() {
    let value = "JSON parse error, expecting value";
    let cases: &[(&[u8], &[&str])] = &[
        (b"{\"a\" 1}", &["JSON parse error, missing : in object pair"]),
        (b"{\"a\"}", &["JSON parse error, missing : in object pair"]),
        (b"{\"a\":1,}", &[value]),
        (b"{,}", &[value]),
        (b"{\"a\":}", &[value]),
        (b"}", &[value]),
        (b"]", &[value]),
        (b":", &[value]),
        (b",", &[value]),
        (b"[1,]", &[value]),
        (b"[1 2]", &["JSON parse error, expected separator in list"]),
        (b"{\"a\":1 \"b\":2}", &["JSON parse error, expected separator in dict"]),
        (b"{\"a\":1]", &["JSON parse error, expected separator in dict"]),
        (b"{]", &[value]),
        (b"[}", &[value]),
        (b"{1:2}", &["JSON parse error, key is not a string in object"]),
        (b"{\"a\":1,\"a\":2}", &["JSON parse error, duplicate key"]),
        (b"foo ", &["JSON parse error, invalid keyword 'foo'"]),
        (b"{\"a\": tru}", &["JSON parse error, invalid keyword 'tru'"]),
        (b"{\"a\": 01}", &["JSON parse error, stray '01'", value]),
        (b"{\"a\": %d}", &["JSON parse error, stray '%'", value]),
        (b"{\"a\": @ }", &["JSON parse error, stray '@'", value]),
        (b"-\n", &["JSON parse error, stray '-\n'"]),
        (b"1.\n", &["JSON parse error, stray '1.\n'"]),
        (b".5\n", &["JSON parse error, stray '.'"]),
        (b"TRUE\n", &["JSON parse error, stray 'T'"]),
        (b"\"a\x01\"}", &["JSON parse error, stray '\"a\u{1}'", value]),
        (b"\"\xfe\" \n", &["JSON parse error, stray '\"\u{fffd}'"]),
        (b"\"\\x\"", &["JSON parse error, invalid escape sequence in string"]),
        (b"\"\xc0\xaf\"", &["JSON parse error, invalid UTF-8 sequence in string"]),
        (b"\"\\ud800\"", &["JSON parse error, \\ud800 is not a valid Unicode character"]),
        (b"\"\\ud800\\u0041\"", &["JSON parse error, \\ud800 is not a valid Unicode character"]),
        (b"\"\\u12\"", &["JSON parse error, \\u12\" is not a valid Unicode character"]),
        (b"\"\\u12G4\"", &["JSON parse error, \\u12G4 is not a valid Unicode character"]),
        (b"\x1b", &["JSON parse error, stray '\u{1b}'"]),
    ];
    for (bytes, expected) in cases {
        let expected: Messages = expected.iter().map(|e| error(e)).collect();
        assert_eq!(messages(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
    }
}

#[test]
fn an_error_costs_the_message_and_nothing_else() {
    assert_eq!(messages(b"{\"a\": @ \n{} "), [error("JSON parse error, stray '@'"), Ok(json!({}))]);
    // A line end inside a string is an error, and the line end after that a new beginning.
    assert_eq!(messages(b"{\"a\": \"b\n\n{}")[1..], [Ok(json!({}))]);
    assert_eq!(messages(b"%abc\t1 \n1 "), [error("JSON parse error, stray '%'"), Ok(json!(1))]);
    // The reset bytes, in the middle of a message and of a string.
    for start in [&b"{\"a\":"[..], b"{\"a\": \"text", b"[[[", b"12", b"@"] {
        let mut bytes = start.to_vec();
        bytes.extend_from_slice(b"\xff\n{\"b\":1}");
        assert_eq!(messages(&bytes).last(), Some(&Ok(json!({"b": 1}))), "{start:?}");
    }
}

#[test]
fn limits_cost_one_error_and_keep_in_step() {
    let limits = Limits { bytes: 64, tokens: 16, depth: 4 };
    let cases = [
        (format!("{{\"a\":\"{}\"}}", "x".repeat(100)), "JSON message size limit exceeded (64 bytes)"),
        (format!("\"{}\"", "x".repeat(100)), "JSON message size limit exceeded (64 bytes)"),
        ("[".repeat(5) + &"]".repeat(5), "JSON nesting depth limit exceeded"),
        (format!("[{}1]", "1,".repeat(20)), "JSON token count limit exceeded"),
        (format!("[[{}1],{{}}, \"]\"]", "1,".repeat(200)), "JSON token count limit exceeded"),
    ];
    for (text, expected) in cases {
        let mut framer = Framer::new(limits);
        let mut out = Vec::new();
        feed(&mut framer, text.as_bytes(), &mut out);
        feed(&mut framer, b"{} ", &mut out);
        assert_eq!(out, [error(expected), Ok(json!({}))], "{text}");
    }
    // Not a byte less: these fit.
    let mut framer = Framer::new(limits);
    let mut out = Vec::new();
    feed(&mut framer, format!("[[[[\"{}\"]]]]", "x".repeat(54)).as_bytes(), &mut out);
    assert!(out[0].is_ok(), "{out:?}");
}

#[test]
fn the_default_depth_is_qemus() {
    let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
    assert!(messages(nested(1024).as_bytes())[0].is_ok());
    assert_eq!(messages(nested(1025).as_bytes()), [error("JSON nesting depth limit exceeded")]);
}

#[test]
fn a_whole_text() {
    assert_eq!(parse("{\"a\": 1}\n"), Ok(json!({"a": 1})));
    assert_eq!(parse("12"), Ok(json!(12)));
    assert_eq!(parse("true"), Ok(json!(true)));
    assert_eq!(parse("{\"a\""), error("JSON parse error, premature EOI"));
    assert_eq!(parse("{\"a\": 1"), error("JSON parse error, premature EOI"));
    assert_eq!(parse("\"abc"), error("JSON parse error, stray '\"abc'"));
    assert_eq!(parse(""), error("JSON parse error, expecting value"));
    assert_eq!(parse("{} {}"), error("JSON parse error, more than one value"));
    assert_eq!(parse("{} ]"), error("JSON parse error, expecting value"));
}

#[test]
fn a_sink_that_is_full_gets_no_more() {
    let mut framer = Framer::new(Limits::default());
    let mut out = Vec::new();
    let bytes = b"{}{}{}";
    let used = framer.feed(bytes, &mut |m| {
        out.push(m);
        out.len() < 2
    });
    assert_eq!((used, out.len()), (4, 2));
}

/// Bytes that look like JSON more often than chance would have it.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(b"{".to_vec()),
        Just(b"}".to_vec()),
        Just(b"[".to_vec()),
        Just(b"]".to_vec()),
        Just(b":".to_vec()),
        Just(b",".to_vec()),
        Just(b"\"".to_vec()),
        Just(b"\\u12".to_vec()),
        Just(b"true".to_vec()),
        Just(b"\"a\":1".to_vec()),
        Just(b"-12.5e+3 ".to_vec()),
        Just(b"\n".to_vec()),
        Just(b"\xff".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..4),
    ];
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e100..1e100f64).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(any::<String>(), inner, 0..6)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn cuts_make_no_difference(bytes in noise(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let whole = messages(&bytes);
        let mut at: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        let mut framer = Framer::new(Limits::default());
        let mut out = Vec::new();
        for pair in at.windows(2) {
            feed(&mut framer, &bytes[pair[0]..pair[1]], &mut out);
        }
        prop_assert_eq!(out, whole);
    }

    #[test]
    fn what_serde_writes_is_read_back(value in value(), pretty: bool) {
        let text = if pretty { format!("{value:#} ") } else { format!("{value} ") };
        let read = messages(text.as_bytes());
        prop_assert_eq!(read.len(), 1);
        // Doubles that are whole numbers are written without a point by some; compare as text.
        prop_assert_eq!(read[0].as_ref().unwrap().to_string(), value.to_string());
    }

    #[test]
    fn after_a_reset_every_message_is_understood(bytes in noise(), value in value()) {
        let mut stream = bytes;
        stream.extend_from_slice(b"\xff\n");
        stream.extend_from_slice(format!("[{value}]").as_bytes());
        let read = messages(&stream);
        prop_assert_eq!(read.last().unwrap().as_ref().unwrap().to_string(), format!("[{value}]"));
    }

    #[test]
    fn limits_hold_whatever_comes(bytes in noise()) {
        let limits = Limits { bytes: 16, tokens: 8, depth: 3 };
        let mut framer = Framer::new(limits);
        let mut out = Vec::new();
        feed(&mut framer, &bytes, &mut out);
        for message in out.into_iter().flatten() {
            prop_assert!(message.to_string().len() <= 6 * 16, "{}", message);
        }
    }
}
