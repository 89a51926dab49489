//! Tests of help made from schemas, with structs as the option parsers use them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use super::*;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Iothread {
    /// Longest busy wait in nanoseconds.
    ///
    /// A second paragraph.
    #[serde(default)]
    poll_max_ns: Option<u64>,
    /// Its name.
    id: String,
    /// How reads are cached.
    cache: Option<Cache>,
    mode: Mode,
    #[serde(default)]
    plain: bool,
    /// Node underneath.
    file: Reference,
    #[serde(default)]
    list: Vec<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Cache {
    /// Bypass the page cache.
    direct: Option<bool>,
    no_flush: bool,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    Off,
    Auto,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Reference {
    Name(String),
    Inline(Box<Iothread>),
}

#[test]
fn members_are_listed_as_they_are_written() {
    let schema = serde_json::to_value(schema_for!(Iothread)).unwrap();
    let text = members("iothread", &schema);
    let squeezed: Vec<String> =
        text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        squeezed,
        [
            "iothread options:",
            "file=<string|object> Node underneath. (required)",
            "id=<string> Its name. (required)",
            "mode=<off|auto> (required)",
            "cache.direct=<on|off> Bypass the page cache.",
            "cache.no-flush=<on|off>",
            "list=<list> (default [])",
            "plain=<on|off> (default off)",
            "poll-max-ns=<int> Longest busy wait in nanoseconds.",
        ]
    );
}

#[test]
fn hostile_schemas_end() {
    let looped = serde_json::json!({"$ref": "#"});
    assert_eq!(members("x", &looped), "x options:\n");
    let folded = serde_json::json!({"properties": {"a": {"$ref": "#/x"}}, "x": {"oneOf": [{"$ref": "#/x"}]}});
    assert!(members("x", &folded).contains("a=<any>"));
    let nested = serde_json::json!({"properties": {"a": {"$ref": "#"}}});
    assert!(members("x", &nested).contains("a.a.a"));
}

#[test]
fn lists_are_aligned() {
    assert_eq!(list("Types", [("a", "one"), ("b", "")]), "Types:\n  a                    one\n  b\n");
}
