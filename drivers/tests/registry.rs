//! The list of drivers and the schemas of their options, from which reference and introspection are made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use graph::options::COMMON_MEMBERS;
use ringblk_drivers::ALL;
use serde_json::Value;

#[test]
fn names_are_unique() {
    let names: BTreeSet<_> = ALL.iter().map(|d| d.name).collect();
    assert_eq!(names.len(), ALL.len());
    assert_eq!(common::registry().iter().count(), ALL.len());
}

#[test]
fn every_option_is_described_and_none_shadows_a_common_one() {
    for def in ALL {
        let schema = (def.schema)().to_value();
        assert_eq!(schema["additionalProperties"], Value::Bool(false), "{}", def.name);
        let empty = serde_json::Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&empty);
        for (name, property) in properties {
            let at = format!("{} {name}", def.name);
            assert!(property["description"].as_str().is_some_and(|d| d.len() > 20), "{at}: no description");
            assert!(!COMMON_MEMBERS.contains(&name.as_str()), "{at}: has the name of a common option");
            let kebab = name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
            assert!(kebab, "{at}: not in the style of names");
        }
    }
}
