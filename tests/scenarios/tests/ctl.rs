//! `ringblk ctl` beside a running daemon, ours and QEMU's: commands by words, scripts on stdin, drawings, the live table, and
//! what it says where nobody answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use client::Setup;
use client::daemon::Launch;
use ringblk_scenarios::rig::ringblk;
use ringblk_scenarios::{Rig, Wanted};
use serde_json::{Value, json};

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn ctl(socket: Option<&Path>, args: &[&str], stdin: Option<&str>) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "60"]).arg(ringblk()).arg("ctl").env_remove("RINGBLK_SOCKET");
    if let Some(socket) = socket {
        command.arg("--socket").arg(socket);
    }
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Some(input) = stdin else { return command.stdin(Stdio::null()).output().unwrap() };
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Has to succeed without a word on stderr; what it wrote.
fn good(socket: &Path, args: &[&str]) -> String {
    let output = ctl(Some(socket), args, None);
    assert_eq!(text(&output.stderr), "", "{args:?}");
    assert_eq!(output.status.code(), Some(0), "{args:?}");
    text(&output.stdout).to_owned()
}

/// Has to fail with this status and one line, which is returned.
fn refused(status: i32, socket: Option<&Path>, args: &[&str]) -> String {
    let output = ctl(socket, args, None);
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {line}");
    assert_eq!((line.lines().count(), text(&output.stdout)), (1, ""), "{args:?}: {line}");
    line.strip_prefix("ringblk ctl: ").unwrap_or_else(|| panic!("{line}")).trim_end().to_owned()
}

/// Parses a drawing as XML: elements in order, text and attributes escaped. Returns the names of its elements.
fn elements(xml: &str) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut names = Vec::new();
    let mut rest = xml.trim_end();
    while let Some(at) = rest.find('<') {
        let (before, tail) = rest.split_at(at);
        assert!(!before.contains('>') && (open.last().is_some() || before.trim().is_empty()), "{before}");
        for entity in before.split('&').skip(1) {
            let name = entity.split(';').next().unwrap();
            assert!(["amp", "lt", "gt", "quot", "apos"].contains(&name), "&{name}");
        }
        let end = tail.find('>').expect("a tag ends");
        let tag = &tail[1..end];
        rest = &tail[end + 1..];
        if tag.starts_with('?') {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "{xml}");
            continue;
        }
        let name = tag.split([' ', '/']).next().unwrap().to_owned();
        let attributes = tag[name.len()..].trim_end_matches('/').trim();
        assert_eq!(attributes.matches('"').count(), 2 * attributes.matches("=\"").count(), "<{tag}>");
        if !tag.ends_with('/') {
            open.push(name.clone());
        }
        names.push(name);
    }
    assert!(open.is_empty() && rest.is_empty(), "open: {open:?}, behind: {rest}");
    names
}

/// A daemon with two exports over one qcow2 chain.
fn chain() -> Rig {
    let more = [
        "--blockdev",
        "null-co,node-name=base,size=1M,read-zeroes=on",
        "--blockdev",
        "raw,node-name=window,file=base,offset=4096",
    ];
    Rig::start_with(&[Wanted::node("e", "raw,file=window"), Wanted::file("f", 1 << 20)], &more)
}

#[test]
fn commands_are_words_or_json_and_answers_are_text_or_json() {
    let mut rig = chain();
    let socket = rig.socket("qmp");
    assert_eq!(
        good(&socket, &["blockdev-add", "driver=null-co", "node-name=x", "size=1G", "read-zeroes=on"]),
        ""
    );
    let nodes = rig.command("query-named-block-nodes", json!({"flat": true}));
    let x = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "x").unwrap().clone();
    assert_eq!(x["image"]["virtual-size"], 1 << 30);
    // Nested members, and the same in JSON.
    good(&socket, &["blockdev-add", "driver=raw", "node-name=y", "file.driver=null-co", "file.size=4k"]);
    good(&socket, &["blockdev-del", r#"{"node-name": "y"}"#]);
    let shown = good(&socket, &["query-named-block-nodes", "flat=on"]);
    assert!(shown.contains("- active: true\n") || shown.contains("node-name: x\n"), "{shown}");
    let answer: Value =
        serde_json::from_str(&good(&socket, &["--json", "query-named-block-nodes", "flat=on"])).unwrap();
    assert!(answer.as_array().unwrap().iter().any(|n| n["node-name"] == "x"));
    // The daemon says no: its words, and status 1.
    assert_eq!(
        refused(1, Some(&socket), &["blockdev-del", "node-name=none"]),
        "Failed to find node with node-name='none'"
    );
    assert!(refused(1, Some(&socket), &["no-such-command"]).contains("no-such-command"));
    // What would not fit is said before anything is sent: status 2.
    let said = refused(2, Some(&socket), &["blockdev-add", "driver=nil-co", "node-name=z"]);
    assert!(said.contains("'driver' does not accept value 'nil-co'") && said.contains("null-co"), "{said}");
    let said = refused(2, Some(&socket), &["block_resize", "node-nam=x", "size=1M"]);
    assert!(said.contains("'node-nam' is unexpected") && said.contains("[node-name]"), "{said}");
    assert!(refused(2, Some(&socket), &["block_resize", "x"]).contains("expected key=value"));
    let output = ctl(Some(&socket), &["--json", "blockdev-del", "node-name=none"], None);
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &error["error"]["class"]), (Some(1), &json!("GenericError")));
}

#[test]
fn a_script_on_stdin_runs_until_something_fails() {
    let rig = chain();
    let socket = rig.socket("qmp");
    let script = "# nodes\nblockdev-add driver=null-co node-name='a b' size=1M\n\
                  blockdev-add driver=null-co node-name=ab size=1M\nhelp block_resize\n\
                  {\"execute\": \"blockdev-del\", \"arguments\": {\"node-name\": \"ab\"}}\nquery-version\n";
    let output = ctl(Some(&socket), &[], Some(script));
    // A blank is no part of a node's name.
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Invalid"), "{}", text(&output.stderr));
    let rest: String = script.lines().skip(2).map(|l| format!("{l}\n")).collect();
    let output = ctl(Some(&socket), &[], Some(&rest));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    assert!(shown.contains("  size=INT\n") && shown.contains("  [node-name=STRING]\n"), "{shown}");
    assert!(shown.contains("major: "), "{shown}");
}

#[test]
fn the_graph_is_drawn_in_every_form() {
    let rig = chain();
    let socket = rig.socket("qmp");
    let drawing = good(&socket, &["graph"]);
    for words in
        ["block export 'e'", "block export 'f'", "window (raw", "base (null-co, 1 MiB", "node-f (file, 1 MiB"]
    {
        assert_eq!(drawing.matches(words).count(), 1, "{words} in\n{drawing}");
    }
    let root = drawing.lines().find(|l| l.contains("node-e")).unwrap();
    assert!(root.starts_with("└─ root rw"), "{drawing}");
    let svg = good(&socket, &["graph", "--svg", "--interval", "0"]);
    let names = elements(&svg);
    assert_eq!(names[0], "svg");
    let picture: Value = serde_json::from_str(&good(&socket, &["graph", "--json"])).unwrap();
    let (nodes, edges) = (picture["nodes"].as_array().unwrap(), picture["edges"].as_array().unwrap());
    assert!(nodes.len() >= 6 && edges.len() >= 4, "{picture}");
    assert_eq!(names.iter().filter(|n| *n == "rect").count(), nodes.len());
    assert_eq!(names.iter().filter(|n| *n == "polyline").count(), edges.len());
    let dot = good(&socket, &["graph", "--dot"]);
    assert!(dot.starts_with("digraph ") && dot.matches('{').count() == dot.matches('}').count(), "{dot}");
    assert_eq!(dot.lines().filter(|l| l.contains(" -> ")).count(), edges.len());
    for line in dot.lines() {
        assert_eq!(line.replace("\\\"", "").matches('"').count() % 2, 0, "{line}");
    }
    if let Ok(mut graphviz) =
        Command::new("dot").arg("-Tplain").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()
    {
        graphviz.stdin.take().unwrap().write_all(dot.as_bytes()).unwrap();
        assert!(graphviz.wait().unwrap().success(), "graphviz refuses {dot}");
    }
}

#[test]
fn rates_and_latencies_are_of_what_happens_meanwhile() {
    let more = ["--object", "iothread,id=t0"];
    let wanted = Wanted::file("e", 1 << 20).options("writable=on,iothread=t0");
    let rig = Rig::start_with(&[wanted], &more);
    let socket = rig.socket("qmp");
    let mut disk = rig.disk("e", &Setup::default());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                disk.write(4096, &[1; 4096]).unwrap();
                disk.read(0, 4096).unwrap();
            }
        });
        let report: Value = serde_json::from_str(&good(&socket, &["top", "--once", "--json"])).unwrap();
        let table = good(&socket, &["top", "--once", "--interval", "0.2"]);
        let drawing = good(&socket, &["graph"]);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let node = report["nodes"].as_array().unwrap().iter().find(|n| n["node-name"] == "node-e").unwrap();
        for rate in ["read-iops", "read-bytes-per-second", "write-iops", "write-bytes-per-second"] {
            assert!(node[rate].as_f64().unwrap() > 0.0, "{rate} in {node}");
        }
        let at = |p: &str| node["latency-ns"][p].as_u64().unwrap();
        assert!(0 < at("p50") && at("p50") <= at("p99") && at("p99") <= at("p99.9"), "{node}");
        let thread = report["iothreads"].as_array().unwrap().iter().find(|t| t["id"] == "t0").unwrap();
        assert!(thread["requests-per-second"].as_f64().unwrap() > 0.0, "{thread}");
        assert!(thread["polling-share"].as_f64().is_none_or(|p| (0.0..=1.0).contains(&p)), "{thread}");
        let queue = report["queues"].as_array().unwrap()[0].clone();
        assert_eq!((&queue["export"], &queue["iothread"]), (&json!("e"), &json!("t0")));
        assert!(queue["requests-per-second"].as_f64().unwrap() > 0.0, "{queue}");
        for words in ["NODE", "EXPORT", "IOTHREAD", "P99.9", "node-e", "t0"] {
            assert!(table.contains(words), "{words} in\n{table}");
        }
        assert!(drawing.contains("read ") && drawing.contains("/s, write "), "{drawing}");
    });
    // Nothing more happens: no rate, no latency.
    let report: Value =
        serde_json::from_str(&good(&socket, &["top", "--once", "--json", "--interval", "0.2"])).unwrap();
    let node = report["nodes"].as_array().unwrap().iter().find(|n| n["node-name"] == "node-e").unwrap();
    assert_eq!((node["read-iops"].as_f64(), &node["latency-ns"]), (Some(0.0), &Value::Null));
}

#[test]
fn nobody_there_is_said_and_has_a_status_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(refused(3, Some(&at("none")), &["query-block"]).contains("there is no socket"));
    drop(std::os::unix::net::UnixListener::bind(at("dead")).unwrap());
    assert!(refused(3, Some(&at("dead")), &["graph"]).contains("nobody listens"));
    // Somebody who hangs up, and somebody who speaks something else.
    for (name, words, said) in
        [("mute", "", "closed the connection"), ("http", "HTTP/1.1 400\n", "is not JSON")]
    {
        let listener = std::os::unix::net::UnixListener::bind(at(name)).unwrap();
        let answer = std::thread::spawn(move || listener.accept().unwrap().0.write_all(words.as_bytes()));
        assert!(refused(3, Some(&at(name)), &["query-block"]).contains(said), "{name}");
        answer.join().unwrap().unwrap();
    }
    assert!(refused(2, None, &["query-block"]).contains("--socket"));
    let output = ctl(None, &["graph", "--nonsense"], None);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""));
    let script = ctl(None, &["completion", "bash"], None);
    assert_eq!(script.status.code(), Some(0));
    assert!(text(&script.stdout).contains("ringblk-ctl") && text(&script.stdout).contains("--socket"));
}

#[test]
fn qemus_daemon_is_drawn_and_measured_as_well() {
    let program = Path::new("/usr/bin/qemu-storage-daemon");
    if !program.exists() {
        eprintln!("skipped: {} is missing", program.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let args = [
        "--blockdev",
        "null-co,node-name=n,size=1048576",
        "--blockdev",
        "raw,node-name=r,file=n",
        "--export",
        &format!("vhost-user-blk,id=e,node-name=r,addr.type=unix,addr.path={}", at("e")),
        "--chardev",
        &format!("socket,id=c,path={},server=on,wait=off", at("qmp")),
        "--monitor",
        "c",
    ];
    let mut daemon = Launch::new(program).args(args).spawn().unwrap();
    let socket = folder.path().join("qmp");
    drop(daemon.connect(&socket).unwrap());
    let drawing = good(&socket, &["graph"]);
    assert!(drawing.contains("r (raw, 1 MiB") && drawing.contains("n (null-co, 1 MiB"), "{drawing}");
    elements(&good(&socket, &["graph", "--svg"]));
    let report: Value =
        serde_json::from_str(&good(&socket, &["top", "--once", "--json", "--interval", "0.1"])).unwrap();
    assert_eq!(report["nodes"].as_array().unwrap().len(), 2, "{report}");
    assert_eq!(good(&socket, &["blockdev-add", "driver=null-co", "node-name=x", "size=1M"]), "");
    daemon.kill().unwrap();
}

/// What a terminal is told when a prompt begins: that pasted text shall be marked.
const PROMPT: &str = "\u{1b}[?2004h";

/// Reads from a terminal until it has shown these words, and this many prompts; what is typed before is lost.
fn shows(out: &mut impl std::io::Read, so_far: &mut String, words: &str, prompts: usize) {
    let mut chunk = [0; 4096];
    while !so_far.contains(words) || so_far.matches(PROMPT).count() < prompts {
        let n = out.read(&mut chunk).unwrap();
        assert!(n > 0, "the prompt ended without '{words}': {so_far}");
        so_far.push_str(&String::from_utf8_lossy(&chunk[..n]));
    }
}

#[test]
fn the_prompt_completes_and_shows_events() {
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("skipped: script is not installed");
        return;
    }
    let mut rig = chain();
    let socket = rig.socket("qmp");
    let line = format!("{} ctl --socket {}", ringblk().display(), socket.display());
    // It makes a terminal, and ends with what runs in it.
    let mut child = Command::new("timeout")
        .args(["-k", "1", "60", "script", "-qfec", &line, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut shown = String::new();
    shows(&mut from, &mut shown, "ringblk> ", 1);
    to.write_all(b"query-vers\t\r").unwrap();
    shows(&mut from, &mut shown, "major: ", 2);
    to.write_all(b"blockdev-add driver=nul\tco node-n\tz size=1M\r").unwrap();
    shows(&mut from, &mut shown, "node-name=", 3);
    let nodes = rig.command("query-named-block-nodes", json!({"flat": true}));
    assert!(nodes.as_array().unwrap().iter().any(|n| n["node-name"] == "z"), "{shown}");
    to.write_all(b"block_resize node-name=z size=-1\r").unwrap();
    shows(&mut from, &mut shown, "Parameter 'size' expects", 4);
    rig.command("block-export-del", json!({"id": "f"}));
    shows(&mut from, &mut shown, "* BLOCK_EXPORT_DELETED", 4);
    to.write_all(b"exit\r").unwrap();
    assert!(child.wait().unwrap().success(), "{shown}");
    rig.command("query-version", json!({}));
}
