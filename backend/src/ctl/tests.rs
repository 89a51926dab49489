//! Tests of what needs no daemon: words, types, completion, and drawings of odd graphs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use clap::CommandFactory;
use serde_json::{Value, json};

use super::cli::Cli;
use super::graph::{dot, fetch, svg, text};
use super::schema::Schema;
use super::words::{self, Arguments};
use super::{output, prompt};

/// A command with everything: a union by driver, nested, with lists, enums and alternates.
fn schema() -> Schema {
    Schema::read(&json!([
        {"name": "add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
        {"name": "address", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
        {"name": "any", "meta-type": "builtin", "json-type": "value"},
        {"name": "0", "meta-type": "object", "members": []},
        {"name": "1", "meta-type": "object", "tag": "driver",
         "members": [{"name": "driver", "type": "2"}, {"name": "node-name", "type": "str", "default": null}],
         "variants": [{"case": "file", "type": "3"}, {"case": "raw", "type": "4"}]},
        {"name": "2", "meta-type": "enum", "values": ["file", "raw"], "members": []},
        {"name": "3", "meta-type": "object", "members": [
            {"name": "filename", "type": "str"}, {"name": "size", "type": "int", "default": null},
            {"name": "direct", "type": "bool", "default": null}, {"name": "extra", "type": "any", "default": null},
            {"name": "vqs", "type": "[int]", "default": null}]},
        {"name": "4", "meta-type": "object", "members": [{"name": "file", "type": "5"}]},
        {"name": "5", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "1"}]},
        {"name": "[int]", "meta-type": "array", "element-type": "int"},
    ]))
}

fn typed(words: &[&str]) -> Result<Value, String> {
    let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
    match words::parse(&words) {
        Ok(Arguments::Words(tree)) => schema().arguments("add", tree),
        Ok(Arguments::Json(value)) => Ok(value),
        Ok(Arguments::None) => Ok(Value::Null),
        Err(failure) => Err(format!("{failure:?}")),
    }
}

#[test]
fn words_get_the_types_of_the_schema() {
    assert_eq!(
        typed(&[
            "driver=raw",
            "file.driver=file",
            "file.filename=a,b",
            "file.size=1.5k",
            "file.direct=on",
            "file.vqs.0=7"
        ]),
        Ok(
            json!({"driver": "raw", "file": {"driver": "file", "filename": "a,b", "size": 1536, "direct": true, "vqs": [7]}})
        )
    );
    assert_eq!(typed(&["driver=raw", "file=n0"]), Ok(json!({"driver": "raw", "file": "n0"})));
    assert_eq!(
        typed(&["driver=file", "filename=12", "size=12", "extra=[1]"]),
        Ok(json!({"driver": "file", "filename": "12", "size": 12, "extra": [1]}))
    );
    assert_eq!(typed(&["{\"a\":", "1}"]), Ok(json!({"a": 1})));
}

#[test]
fn what_does_not_fit_is_said_with_what_would() {
    let said = |words: &[&str]| typed(words).unwrap_err();
    assert_eq!(
        said(&["driver=file", "nam=x"]),
        "Parameter 'nam' is unexpected: there are driver, [node-name], filename, [size], [direct], [extra], [vqs]"
    );
    assert_eq!(said(&["driver=nbd"]), "Parameter 'driver' does not accept value 'nbd': one of file, raw");
    assert_eq!(said(&["driver=file", "direct=maybe"]), "Parameter 'direct' expects on or off");
    assert!(said(&["driver=file", "size=big"]).contains("'size' expects an integer"));
    assert!(said(&["driver=file", "vqs=1"]).contains("vqs.0=..."));
    assert!(said(&["driver=raw", "file.driver=file", "file.size=x"]).contains("file.size"));
    assert!(said(&["driver"]).contains("expected key=value"));
    let gone = schema().arguments("adr", json!({})).unwrap_err();
    assert_eq!(gone, "The command adr has not been found; did you mean add?");
}

#[test]
fn lines_are_split_at_blanks_outside_of_quotes() {
    let split = |line: &str| words::split(line).0;
    assert_eq!(split(r#"a  'b c'=d "e \" f" g\ h"#), ["a", "b c=d", r#"e " f"#, "g h"]);
    assert_eq!(split(r#"cmd {"a": "x y"}"#), ["cmd", r#"{"a": "x y"}"#]);
    assert!(words::split("a").1 && !words::split("a ").1);
}

#[test]
fn tab_knows_commands_members_and_values() {
    let found = |line: &str| prompt::candidates(schema(), line);
    assert_eq!(found("ad"), (0, vec!["add ".to_owned(), "address ".to_owned()]));
    assert_eq!(found("add d"), (4, vec!["driver=".to_owned()]));
    assert_eq!(found("add driver=r"), (4, vec!["driver=raw".to_owned()]));
    assert_eq!(
        found("add driver=raw f"),
        (15, vec!["file.".to_owned()]),
        "an alternate reaches into its object"
    );
    assert_eq!(found("add driver=raw file.d"), (15, vec!["file.driver=".to_owned()]));
    assert_eq!(found("add driver=raw file.driver=file file.di"), (32, vec!["file.direct=".to_owned()]));
    assert_eq!(
        found("add driver=file direct=o"),
        (16, vec!["direct=on".to_owned(), "direct=off".to_owned()])
    );
    assert_eq!(found("add driver=file vqs.0=1 vqs."), (24, vec!["vqs.1=".to_owned()]));
    assert_eq!(found("nothing x").1, Vec::<String>::new());
}

#[test]
fn results_are_lines_without_control_characters() {
    let value = json!([{"a": "x\u{1b}[2J", "b": {"c": [1, 2], "d": []}}, {"a": 2}]);
    assert_eq!(output::text(&value), "- a: x\\u{1b}[2J\n  b:\n    c: 1, 2\n    d: []\n- a: 2\n");
    assert_eq!(output::text(&json!({})), "");
    assert_eq!(output::text(&json!("one")), "one\n");
}

/// A diamond with a line that passes a layer, a frozen edge, drained nodes and names that need escaping.
fn diamond() -> Value {
    let node = |id: u64, name: &str, driver: &str| {
        json!({"id": id, "node-name": name, "driver": driver, "kind": "format", "size": 1_u64 << 30, "read-only": id == 4,
               "drained": id == 1, "counters": {"rd-operations": 0, "rd-bytes": 0}})
    };
    let edge = |parent: u64, child: u64, name: &str, frozen: &[&str]| {
        json!({"parent": parent, "child": child, "name": name, "roles": [], "perm": ["consistent-read", "write"],
               "shared-perm": ["consistent-read"], "frozen-by": frozen})
    };
    json!({
        "time-ns": 5,
        "users": [{"id": 9, "description": "block export '<&\"'", "drained": true}],
        "nodes": [node(1, "top", "qcow2"), node(2, "left \"q\" \\", "raw"), node(3, "right", "raw"), node(4, "base\u{7}", "file")],
        "edges": [edge(9, 1, "root", &[]), edge(1, 2, "file", &["job 'c'"]), edge(1, 4, "backing", &[]),
                  edge(2, 3, "x", &[]), edge(3, 4, "file", &[])],
    })
}

#[test]
fn a_shared_node_is_drawn_once() {
    let drawing = text::draw(&fetch::whole(&diamond()));
    assert_eq!(drawing.matches("qcow2, 1 GiB, drained").count(), 1, "{drawing}");
    assert_eq!(drawing.matches("(see above)").count(), 1, "{drawing}");
    assert!(drawing.contains("file rw--/r--- [frozen by job 'c'] [drained] → left"), "{drawing}");
    assert!(drawing.contains("root rw--/r--- [drained] → top"), "{drawing}");
    assert!(!drawing.contains('\u{7}'), "{drawing}");
}

/// Whether tags open and close in order and nothing stands outside; a drawing uses no more of XML than that.
fn well_formed(xml: &str) -> Result<usize, String> {
    let mut open: Vec<&str> = Vec::new();
    let mut elements = 0;
    let mut rest = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").ok_or("no declaration")?;
    while let Some(at) = rest.find('<') {
        let (text, tail) = rest.split_at(at);
        let bad_entity = |t: &str| {
            t.split('&')
                .skip(1)
                .any(|e| !["amp;", "lt;", "gt;", "quot;", "apos;"].iter().any(|k| e.starts_with(k)))
        };
        if text.contains('>') || bad_entity(text) || (open.is_empty() && !text.trim().is_empty()) {
            return Err(format!("text {text:?}"));
        }
        let end = tail.find('>').ok_or("a tag without an end")?;
        let tag = &tail[1..end];
        rest = &tail[end + 1..];
        if tag.matches('"').count() % 2 != 0 || bad_entity(tag) {
            return Err(format!("attributes of <{tag}>"));
        }
        match tag.strip_prefix('/') {
            Some(name) if open.pop() != Some(name) => return Err(format!("</{name}> out of place")),
            Some(_) => {}
            None => {
                elements += 1;
                if !tag.ends_with('/') {
                    open.push(tag.split_whitespace().next().unwrap_or_default());
                }
            }
        }
    }
    if open.is_empty() && rest.trim().is_empty() { Ok(elements) } else { Err(format!("open: {open:?}")) }
}

#[test]
fn drawings_are_well_formed_and_show_everything() {
    let picture = fetch::whole(&diamond());
    let drawing = svg::draw(&picture);
    assert!(well_formed(&drawing).is_ok_and(|n| n > 20), "{:?}\n{drawing}", well_formed(&drawing));
    assert_eq!(drawing.matches("<rect").count(), 5);
    assert_eq!(drawing.matches("<polyline").count(), 5);
    assert!(
        drawing.contains("class=\"edge frozen drained\"")
            && drawing.contains("block export &apos;&lt;&amp;&quot;&apos;")
    );
    let dot = dot::draw(&picture);
    assert_eq!(dot.matches('{').count(), dot.matches('}').count());
    assert_eq!(dot.lines().filter(|l| l.contains(" -> ")).count(), 5);
    assert!(dot.contains(r#"left \"q\" \\"#), "{dot}");
    for line in dot.lines() {
        let plain = line.replace("\\\\", "").replace("\\\"", "");
        assert_eq!(plain.matches('"').count() % 2, 0, "{line}");
    }
}

#[test]
fn no_boxes_overlap_and_children_are_below_their_parents() {
    let picture = fetch::whole(&diamond());
    let layout = super::graph::layout::layout(&picture, |id| (60.0 + id as f64 * 10.0, 40.0));
    let boxes: Vec<_> = layout.boxes.iter().collect();
    assert_eq!(boxes.len(), 5);
    for (at, (a, p)) in boxes.iter().enumerate() {
        for (b, q) in boxes.iter().skip(at + 1) {
            let apart = p.x + p.width <= q.x
                || q.x + q.width <= p.x
                || p.y + p.height <= q.y
                || q.y + q.height <= p.y;
            assert!(apart, "{a} and {b} overlap");
        }
        assert!(p.x >= 0.0 && p.x + p.width <= layout.width && p.y + p.height <= layout.height);
    }
    for edge in &picture.edges {
        assert!(layout.boxes[&edge.parent].y < layout.boxes[&edge.child].y);
    }
    assert_eq!(layout.lines[2].len(), 6, "past two layers: the ends and two points in each");
}

#[test]
fn circles_and_loose_ends_are_drawn_all_the_same() {
    let circle = json!({"nodes": [{"id": 1, "node-name": "a", "driver": "raw"}, {"id": 2, "node-name": "b", "driver": "raw"}],
                        "edges": [{"parent": 1, "child": 2, "name": "x"}, {"parent": 2, "child": 1, "name": "y"},
                                  {"parent": 7, "child": 8, "name": "z"}]});
    let picture = fetch::whole(&circle);
    assert!(well_formed(&svg::draw(&picture)).is_ok());
    let drawing = text::draw(&picture);
    assert!(drawing.contains("a (raw)") && drawing.contains("b (raw)"), "{drawing}");
    assert_eq!(text::draw(&fetch::whole(&json!({}))), "There are no nodes.\n");
}

#[test]
fn qemus_answers_make_the_same_picture() {
    let graph = json!({
        "nodes": [{"id": 1, "name": "n", "type": "block-driver"}, {"id": 2, "name": "", "type": "block-backend"},
                  {"id": 3, "name": "j", "type": "block-job"}],
        "edges": [{"parent": 2, "child": 1, "name": "root", "perm": ["write"], "shared-perm": []}],
    });
    let named = json!([{"node-name": "n", "drv": "null-co", "ro": true, "image": {"virtual-size": 4096}}]);
    let stats = |n: u64| json!([{"node-name": "n", "stats": {"rd_operations": n, "rd_bytes": n * 512}}]);
    let before = fetch::assembled(&graph, &named, &stats(10), 0);
    let mut now = fetch::assembled(&graph, &named, &stats(30), 2_000_000_000);
    now.rate(&before);
    let drawing = text::draw(&now);
    assert!(
        drawing.contains("root -w--/---- → n (null-co, 4 KiB, read-only)  read 10/s 5 KiB/s"),
        "{drawing}"
    );
    assert!(drawing.contains("block-backend\n") && drawing.contains("job 'j'\n"), "{drawing}");
}

/// What has to be said besides the arguments.
const HEAD: &str = "# ringblk ctl

Generated from the program's own help; do not edit. It speaks QMP on the socket of a running daemon's control channel; what can be \
asked, and with which arguments, it learns from the other side (`query-qmp-schema`), so that it serves qemu-storage-daemon and \
QEMU as well.

* **Arguments** are `key=value`: dots reach into objects (`file.driver=file`) and lists (`vqs.0=1`), sizes may have a suffix \
(`10G`), booleans are `on` and `off`. Or one JSON object. What does not fit is said before anything is sent.
* **Results** are indented lines; `--json` writes what the command returned, on one line.
* **The prompt** completes commands, members and values by TAB, and shows events as they come. `exit` leaves it; the daemon \
goes on. History is forgotten at the end, since lines may hold secrets. Where stdin is no terminal, each line is a command, and \
the first that fails ends the script.
* **`graph`** draws users on top and what they use below; what several use is drawn once. On each edge: its name, what is used \
and what others may do meanwhile (`rw--/r---`: r consistent read, w write, u write unchanged, z resize), who has frozen it, whether \
it is drained. Nodes show what goes through them each second. `--svg` needs no other program.
* **`top`** shows rates between two samples. Latencies are upper boundaries of the daemon's histograms (powers of two). POLLING: \
of the times an iothread ran out of work, how often polling found some before it slept.
";

#[test]
fn the_reference_is_fresh() {
    let mut page = HEAD.to_owned();
    let mut command = Cli::command();
    command.build();
    let mut section = |title: &str, text: &str| {
        // Empty lines carry blanks.
        let lines: Vec<_> = text.trim_end().lines().map(str::trim_end).collect();
        page.push_str(&format!("\n## `{title}`\n\n```text\n{}\n```\n", lines.join("\n")));
    };
    section("ringblk ctl --help", &command.render_long_help().to_string());
    for sub in command.get_subcommands_mut() {
        section(&format!("ringblk ctl {} --help", sub.get_name()), &sub.render_long_help().to_string());
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/ctl.md");
    if std::env::var_os("RINGBLK_BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == page, "docs/reference/ctl.md is stale: run the tests with RINGBLK_BLESS=1");
}

#[test]
fn the_arguments_are_sound() {
    Cli::command().debug_assert();
}
