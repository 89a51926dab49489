//! Tests of output.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use serde_json::json;

use super::{json, json_line, tree};

#[test]
fn json_is_laid_out_as_qemu_img_does() {
    let value = json!({"format": "file", "children": [], "filename": "a \"b\"", "format-specific": {"data": {}, "type": "file"}});
    let expected = "{\n    \"children\": [\n    ],\n    \"filename\": \"a \\\"b\\\"\",\n    \"format\": \"file\",\n    \
                    \"format-specific\": {\n        \"type\": \"file\",\n        \"data\": {\n        }\n    }\n}\n";
    assert_eq!(json(&value), expected);
}

#[test]
fn a_line_of_json_has_spaces() {
    let value = json!({"file": {"filename": "x", "driver": "file"}, "driver": "raw"});
    let expected = r#"{"driver": "raw", "file": {"driver": "file", "filename": "x"}}"#;
    assert_eq!(json_line(&value), expected);
}

#[test]
fn a_tree_shows_lists_and_nested_members() {
    let mut out = String::new();
    tree(
        &mut out,
        &json!({"corrupt": false, "bitmaps": [{"flags": ["auto"], "name": "b0"}], "compat": "1.1"}),
        1,
    );
    let expected = "    compat: 1.1\n    bitmaps:\n        [0]:\n            flags:\n                [0]: auto\n            \
                    name: b0\n    corrupt: false\n";
    assert_eq!(out, expected);
}
