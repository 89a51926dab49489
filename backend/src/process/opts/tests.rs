//! Tests of the flat option syntax.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[test]
fn commas_split_and_double_commas_stay() {
    assert_eq!(split_commas("a=1,b=2"), ["a=1", "b=2"]);
    assert_eq!(split_commas("a=1,,2,b"), ["a=1,2", "b"]);
    assert_eq!(split_commas("a,,,b"), ["a,", "b"]);
    assert_eq!(split_commas("a,"), ["a"]);
    assert_eq!(split_commas(""), Vec::<String>::new());
}

#[test]
fn the_first_bare_member_is_the_implied_key() {
    let mut m = Members::parse("socket,id=x", "backend", Bare::Refused).unwrap();
    assert_eq!(m.take("backend").as_deref(), Some("socket"));
    assert_eq!(m.first_left(), Some("id"));
    assert_eq!(m.take("id").as_deref(), Some("x"));
    assert_eq!(m.first_left(), None);
}

#[test]
fn the_last_of_two_values_counts() {
    let mut m = Members::parse("id=x,id=y", "backend", Bare::Refused).unwrap();
    assert_eq!(m.take("id").as_deref(), Some("y"));
    assert_eq!(m.take("id"), None);
}

#[test]
fn bare_members_are_flags_only_where_allowed() {
    let mut m = Members::parse("socket,server,nowait", "backend", Bare::Flag).unwrap();
    assert_eq!(m.take_bool("server").unwrap(), Some(true));
    assert_eq!(m.take_bool("wait").unwrap(), Some(false));
    let e = Members::parse("a,pretty", "chardev", Bare::Refused).unwrap_err();
    assert_eq!(e.0, "Expected '=' after parameter 'pretty'");
}

#[test]
fn booleans_take_qemus_words_alone() {
    for (word, value) in [("on", true), ("yes", true), ("y", true), ("off", false), ("n", false)] {
        let mut m = Members::parse(&format!("a,b={word}"), "x", Bare::Refused).unwrap();
        assert_eq!(m.take_bool("b").unwrap(), Some(value));
    }
    let mut m = Members::parse("a,b=1", "x", Bare::Refused).unwrap();
    assert_eq!(m.take_bool("b").unwrap_err().0, "Parameter 'b' expects 'on' or 'off'");
}

#[test]
fn hostile_texts_are_refused() {
    assert!(Members::parse("a,=b", "x", Bare::Flag).is_err());
    assert!(Members::parse("a\0b", "x", Bare::Flag).is_err());
    assert!(Members::parse(&"a".repeat(MAX_TEXT + 1), "x", Bare::Flag).is_err());
}

#[test]
fn help_is_a_member_of_its_own() {
    assert!(asks_for_help("help"));
    assert!(asks_for_help("?"));
    assert!(asks_for_help("iothread,help"));
    assert!(!asks_for_help("iothread,help=x"));
    assert!(!asks_for_help("id=help"));
    assert!(!asks_for_help(r#"{"a":1,help"#));
}

#[test]
fn identifiers() {
    for good in ["a", "a1", "A.b-c_d"] {
        assert!(check_id(good).is_ok(), "{good}");
    }
    for bad in ["", "1a", "-a", "a b", "a/b", "ä"] {
        assert!(check_id(bad).is_err(), "{bad}");
    }
}
