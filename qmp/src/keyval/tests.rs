//! The keyval parser: QEMU's verdicts, limits, and that what is written is read back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn keyval(text: &str) -> Result<Value, String> {
    match parse(text, &Dialect::implied("driver")) {
        Ok(Parsed::Keyval(value)) => Ok(value),
        Ok(other) => panic!("{other:?}"),
        Err(e) => Err(e.desc),
    }
}

#[test]
fn members_nest_and_make_arrays() {
    assert_eq!(
        keyval("qcow2,file.driver=file,file.filename=a,,b=c,cache.direct=on,x.1.y=2,x.0.y=1").unwrap(),
        json!({"driver": "qcow2", "file": {"driver": "file", "filename": "a,b=c"}, "cache": {"direct": "on"},
            "x": [{"y": "1"}, {"y": "2"}]})
    );
    assert_eq!(keyval("").unwrap(), json!({}));
    assert_eq!(keyval("driver=file,").unwrap(), json!({"driver": "file"}));
    assert_eq!(keyval("file,a=,b=1").unwrap(), json!({"driver": "file", "a": "", "b": "1"}));
    assert_eq!(keyval("a=1,a=2").unwrap(), json!({"a": "2"}));
    assert_eq!(keyval("[1]").unwrap(), json!({"driver": "[1]"}));
    assert_eq!(keyval("__com.x_y=1").unwrap(), json!({"__com.x_y": "1"}));
    assert_eq!(keyval("c.00=a").unwrap(), json!({"c": ["a"]}));
    assert_eq!(keyval("file=x,filename=y").unwrap(), json!({"file": "x", "filename": "y"}));
}

/// Put to QEMU 10.0.2's storage daemon; the words are its own.
#[test]
fn errors_are_qemus() {
    let cases = [
        ("null-co,read-zeroes", "Expected '=' after parameter 'read-zeroes'"),
        ("=x", "Invalid parameter ''"),
        (",", "Invalid parameter ''"),
        ("null-co,a..b=1", "Invalid parameter 'a..b'"),
        ("null-co,.a=1", "Invalid parameter '.a'"),
        ("null-co,1a=2", "Invalid parameter '1a'"),
        ("null-co,a b=2", "Invalid parameter 'a b'"),
        ("null-co,_x=1", "Invalid parameter '_x'"),
        ("null-co,0=1", "Invalid parameter '0'"),
        ("null-co,n=a,n.b=1", "Parameters 'n.*' used inconsistently"),
        ("null-co,n.b=1,n=a", "Parameters 'n.*' used inconsistently"),
        ("null-co,n.0=1,n.x=2", "Parameters 'n.*' used inconsistently"),
        ("null-co,n.0=1,n.2=2", "Parameter 'n.1' missing"),
        ("null-co,n.1000000=a", "Parameter 'n.0' missing"),
    ];
    for (text, expected) in cases {
        assert_eq!(keyval(text), Err(expected.to_owned()), "{text}");
    }
}

#[test]
fn limits() {
    let long = "a".repeat(MAX_FRAGMENT);
    assert!(keyval(&format!("{long}=1")).is_ok());
    assert_eq!(keyval(&format!("{long}a=1")), Err(format!("Parameter '{long}a' is too long")));
    let deep = vec!["a"; MAX_DEPTH].join(".");
    assert!(keyval(&format!("{deep}=1")).is_ok());
    assert!(keyval(&format!("{deep}.a=1")).unwrap_err().ends_with("levels deep"));
    assert!(keyval(&"x".repeat(MAX_TEXT + 1)).unwrap_err().starts_with("Option is longer"));
    assert_eq!(
        keyval("n.99999999999999999999999=1"),
        Err("Invalid parameter 'n.99999999999999999999999'".into())
    );
}

#[test]
fn json_help_and_flags() {
    let dialect = Dialect::implied("driver");
    assert_eq!(parse("{\"a\": 1}", &dialect), Ok(Parsed::Json(json!({"a": 1}))));
    assert_eq!(parse("{\"a\": 1", &dialect).unwrap_err().desc, "JSON parse error, premature EOI");
    for text in ["help", "?", "file,help", "file,help,a=1"] {
        assert_eq!(parse(text, &dialect), Ok(Parsed::Help), "{text}");
    }
    let chardev = Dialect { implied: Some("backend"), bare: Bare::Flag };
    assert_eq!(
        parse("socket,server,nowait,nodelay,path=x", &chardev),
        Ok(Parsed::Keyval(
            json!({"backend": "socket", "server": "on", "wait": "off", "nodelay": "on", "path": "x"})
        ))
    );
    // Without an implied key the first member needs its `=`, too.
    assert_eq!(parse("a", &Dialect::default()).unwrap_err().desc, "Expected '=' after parameter 'a'");
}

/// Writes a tree of strings as keyval; `None` for what keyval cannot say (empty objects and arrays).
fn write(value: &Value, prefix: &str, out: &mut Vec<String>) -> Option<()> {
    let join = |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
    match value {
        Value::String(text) => out.push(format!("{prefix}={}", text.replace(',', ",,"))),
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                write(value, &join(key), out)?;
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, value) in list.iter().enumerate() {
                write(value, &join(&index.to_string()), out)?;
            }
        }
        _ => return None,
    }
    Some(())
}

fn tree() -> impl Strategy<Value = Value> {
    let object = |inner: BoxedStrategy<Value>| {
        proptest::collection::btree_map("[a-zA-Z][a-zA-Z0-9_-]{0,6}", inner, 1..5)
            .prop_map(|m| Value::Object(m.into_iter().collect()))
    };
    let leaf = any::<String>().prop_map(Value::from).boxed();
    let inner = leaf.prop_recursive(4, 30, 5, move |inner| {
        prop_oneof![object(inner.clone()), proptest::collection::vec(inner, 1..5).prop_map(Value::from)]
    });
    object(inner.boxed())
}

proptest! {
    #[test]
    fn what_is_written_is_read(tree in tree(), seed: u64) {
        let mut members = Vec::new();
        write(&tree, "", &mut members).unwrap();
        // Order is the user's business.
        let n = members.len() as u64;
        members.rotate_left((seed % n) as usize);
        let read = keyval(&members.join(","));
        prop_assert_eq!(read.map(|v| sorted(&v)), Ok(sorted(&tree)));
    }

    #[test]
    fn nothing_panics(text in "[a-c0-2.,={}\\[\\]_\" -]{0,40}") {
        let _ = parse(&text, &Dialect::implied("driver"));
        let _ = parse(&text, &Dialect { implied: None, bare: Bare::Flag });
    }
}

/// Equality of objects does not depend on order; of text it would.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(list) => list.iter().map(sorted).collect(),
        other => other.clone(),
    }
}
