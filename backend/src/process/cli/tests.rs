//! Tests of the command line, and a comparison with qemu-storage-daemon where it is installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use super::super::chardev::ChardevAddress;
use super::*;
use serde_json::{Value, json};

fn args(line: &[&str]) -> Vec<OsString> {
    line.iter().map(OsString::from).collect()
}

fn run(line: &[&str]) -> Plan {
    match parse(args(line)) {
        Ok(Invocation::Run(plan)) => plan,
        other => panic!("{line:?}: {other:?}"),
    }
}

fn print(line: &[&str]) -> String {
    match parse(args(line)) {
        Ok(Invocation::Print(text)) => text,
        other => panic!("{line:?}: {other:?}"),
    }
}

fn refused(line: &[&str]) -> String {
    match parse(args(line)) {
        Err(e) => e.to_string(),
        other => panic!("{line:?}: {other:?}"),
    }
}

fn topic(line: &[&str]) -> (&'static str, Option<String>) {
    match parse(args(line)) {
        Ok(Invocation::Help(topic)) => (topic.option, topic.subject),
        other => panic!("{line:?}: {other:?}"),
    }
}

const CHARDEV: &str = "socket,id=a,path=/run/a,server=on,wait=off";

#[test]
fn steps_keep_their_order_and_both_spellings_work() {
    let plan = run(&[
        "--object",
        "iothread,id=io0",
        "--blockdev=file,node-name=f,filename=/x",
        "--chardev",
        CHARDEV,
        "--monitor=a",
        "--export",
        "vhost-user-blk,id=e,node-name=f",
        "--blockdev",
        r#"{"driver":"raw","node-name":"late","file":"f"}"#,
        "-T",
        "graph",
        "-Tqmp",
    ]);
    let labels: Vec<_> = plan.steps.iter().map(|s| s.label.as_str()).collect();
    assert_eq!(
        labels,
        [
            "--object io0",
            "--blockdev f",
            "--chardev a",
            "--monitor a",
            "--export e",
            "--blockdev late",
            "--trace",
            "--trace"
        ]
    );
    let Action::Blockdev(text) = &plan.steps[1].action else { panic!() };
    assert_eq!((text.text.as_str(), text.implied_key), ("file,node-name=f,filename=/x", "driver"));
    let Action::Chardev(chardev) = &plan.steps[2].action else { panic!() };
    assert_eq!(chardev.address, ChardevAddress::Path("/run/a".into()));
    assert_eq!(plan.steps[1].error("no").to_string(), "--blockdev f: no");
    assert!(!plan.daemonize && plan.pidfile.is_none());
}

#[test]
fn process_options() {
    let plan = run(&["--daemonize", "--pidfile", "/a", "--pidfile=/b"]);
    assert!(plan.daemonize);
    assert_eq!(plan.pidfile, Some(PathBuf::from("/b")));
    assert!(refused(&["--pidfile="]).contains("empty"));
}

#[test]
fn an_option_takes_the_next_argument_whatever_it_looks_like() {
    assert_eq!(run(&["--pidfile", "--help"]).pidfile, Some(PathBuf::from("--help")));
    assert!(refused(&["--blockdev"]).contains("option '--blockdev' requires an argument"));
    assert!(refused(&["-T"]).contains("option requires an argument -- 'T'"));
    assert!(refused(&["--daemonize=yes"]).contains("option '--daemonize' doesn't allow an argument"));
}

#[test]
fn help_and_version_come_before_later_errors_only() {
    assert!(print(&["--help", "--bad"]).starts_with("Usage: ringblk"));
    assert!(print(&["foo", "-V"]).starts_with("ringblk version "));
    assert!(print(&["-hx"]).starts_with("Usage"));
    assert!(print(&["-VT"]).starts_with("ringblk version"));
    assert!(print(&["--monitor", "nope", "--help"]).starts_with("Usage"));
    assert!(refused(&["--bad", "--help"]).contains("'--bad'"));
}

#[test]
fn unknown_options_and_arguments() {
    assert!(refused(&["--pidf"]).contains("did you mean '--pidfile'?"));
    assert!(refused(&["-blockdev"]).contains("did you mean '--blockdev'?"));
    assert!(refused(&["-x"]).contains("invalid option -- 'x'"));
    assert_eq!(refused(&["foo"]), "foo: Unexpected argument: options start with '--'");
    assert!(refused(&["--", "--help"]).contains("--help: Unexpected argument"));
    assert!(refused(&["-"]).contains("-: Unexpected argument"));
    assert!(refused(&["--nbd-server", "addr.type=unix"]).contains("not supported by this build"));
    use std::os::unix::ffi::OsStringExt;
    let raw = parse([OsString::from_vec(vec![b'-', 0xff])]).unwrap_err();
    assert!(raw.to_string().contains("not UTF-8"));
}

#[test]
fn errors_are_one_line() {
    let text = refused(&["a\nb\x1b[31m"]);
    assert!(!text.contains('\n') && !text.contains('\x1b'), "{text}");
}

#[test]
fn errors_do_not_repeat_secrets() {
    let plan = run(&["--object", "secret,id=s0,data=hunter2"]);
    assert_eq!(plan.steps[0].error("no").to_string(), "--object s0: no");
    let plan = run(&["--object", "secret,data=hunter2"]);
    assert_eq!(plan.steps[0].error("no").to_string(), "--object: no");
}

#[test]
fn every_option_is_in_the_help_once_and_fits() {
    let text = options::help_text();
    let (help, _) = text.split_once("Examples:").unwrap();
    for def in OPTIONS {
        let name = format!("--{}", def.long);
        let lines = help.lines().filter(|l| {
            let mut words = l.split_whitespace();
            words.next().is_some_and(|w| w == name || (w.len() == 3 && words.next() == Some(&name)))
        });
        assert_eq!(lines.count(), 1, "{name}\n{help}");
        assert!(!def.help.is_empty());
    }
    for line in text.lines() {
        assert!(line.len() <= 110, "{line}");
    }
}

#[test]
fn option_names_are_unique() {
    for (index, def) in OPTIONS.iter().enumerate() {
        assert!(OPTIONS[index + 1..].iter().all(|other| other.long != def.long), "{}", def.long);
        let same = |other: &OptionDef| other.short.is_some() && other.short == def.short;
        assert!(!OPTIONS[index + 1..].iter().any(same), "{}", def.long);
    }
}

#[test]
fn help_topics() {
    assert_eq!(topic(&["--object", "help"]), ("object", None));
    assert_eq!(topic(&["--object", "iothread,help"]), ("object", Some("iothread".into())));
    assert_eq!(topic(&["--object", "qom-type=iothread,?"]), ("object", Some("iothread".into())));
    assert_eq!(topic(&["--blockdev", "?"]), ("blockdev", None));
    assert_eq!(topic(&["--blockdev", "driver=qcow2,help"]), ("blockdev", Some("qcow2".into())));
    assert_eq!(topic(&["--export", "vhost-user-blk,help"]), ("export", Some("vhost-user-blk".into())));
    assert!(print(&["--chardev", "help"]).contains("socket"));
    assert!(print(&["-T", "help"]).contains("session"));
    assert!(refused(&["--monitor", "help"]).contains("Help is not available"));
    assert_eq!(run(&["--object", "iothread,id=help"]).steps.len(), 1);
}

#[test]
fn chardevs_and_monitors_are_checked_against_each_other() {
    assert!(refused(&["--chardev", CHARDEV, "--chardev", CHARDEV]).contains("Duplicate ID 'a'"));
    assert!(refused(&["--monitor", "a", "--chardev", CHARDEV]).contains("chardev \"a\" not found"));
    assert!(refused(&["--chardev", CHARDEV, "--monitor", "a", "--monitor", "a"]).contains("already in use"));
}

#[test]
fn capabilities_come_before_everything() {
    for line in [&["--print-capabilities"][..], &["--bad", "foo", "--print-capabilities", "--help"]] {
        let value: Value = serde_json::from_str(&print(line)).unwrap();
        assert_eq!(value, json!({"type": "block", "features": ["read-only", "blk-file"]}));
    }
}

fn expanded(plan: &Plan) -> Vec<Value> {
    let text = |step: &Step| match &step.action {
        Action::Blockdev(t) | Action::Export(t) => serde_json::from_str(&t.text).unwrap(),
        other => panic!("{other:?}"),
    };
    plan.steps.iter().map(text).collect()
}

#[test]
fn conventions_expand_to_equal_options() {
    let plan = run(&["--socket-path=/run/v,v.sock", "--blk-file", "/no/such/disk"]);
    assert_eq!(
        expanded(&plan),
        [
            json!({"driver": "file", "node-name": "blk-file", "filename": "/no/such/disk", "read-only": false}),
            json!({"driver": "raw", "node-name": "blk", "file": "blk-file", "read-only": false}),
            json!({"type": "vhost-user-blk", "id": "vhost", "node-name": "blk", "writable": true,
                   "addr": {"type": "unix", "path": "/run/v,v.sock"}}),
        ]
    );
    assert!(!plan.daemonize);
    let plan = run(&["--fd=3", "--read-only", "--blk-file=/d"]);
    let named = expanded(&run(&["--fd=vhost", "--blk-file=/d"]));
    assert_eq!(named[2]["addr"], json!({"type": "fd", "str": "vhost"}));
    let [storage, disk, export] = &expanded(&plan)[..] else { panic!() };
    assert_eq!(export["addr"], json!({"type": "fd", "str": "3"}));
    assert_eq!(export["writable"], false);
    assert!(storage["read-only"] == true && disk["read-only"] == true);
}

#[test]
fn conventions_come_after_the_other_steps() {
    let plan = run(&["--socket-path=/s", "--blk-file=/d", "--object", "iothread,id=i"]);
    assert!(matches!(plan.steps[0].action, Action::Object(_)));
    assert_eq!(plan.steps[3].label, "--socket-path");
}

#[test]
fn incomplete_conventions_say_what_is_missing() {
    assert!(refused(&["--socket-path=/s"]).contains("--socket-path: needs a disk: add --blk-file"));
    assert!(refused(&["--fd=3"]).contains("--fd: needs a disk"));
    assert!(refused(&["--blk-file=/d"]).contains("--blk-file: needs a socket"));
    assert!(refused(&["--read-only"]).contains("--read-only: needs a socket"));
    assert!(refused(&["--socket-path=/s", "--fd=3", "--blk-file=/d"]).contains("--fd: excludes"));
    assert!(refused(&["--socket-path=/s", "--socket-path=/t", "--blk-file=/d"]).contains("given twice"));
    assert!(refused(&["--socket-path=", "--blk-file=/d"]).contains("empty"));
    assert!(refused(&["--fd=1", "--blk-file=/d"]).contains("standard stream"));
    assert!(refused(&["--fd=3x", "--blk-file=/d"]).contains("not a descriptor number"));
    assert!(refused(&["--fd=-1", "--blk-file=/d"]).contains("neither a descriptor number nor a name"));
    let long = format!("--socket-path={}", "s".repeat(108));
    assert!(refused(&[&long, "--blk-file=/d"]).contains("too long"));
}

/// The same lines given to qemu-storage-daemon: it must refuse them with the same status and the same words.
#[test]
fn refusals_are_those_of_qemu_storage_daemon() {
    const PEER: &str = "qemu-storage-daemon";
    if std::process::Command::new(PEER).arg("--version").output().is_err() {
        println!("skipped: {PEER} is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let chardev = format!("socket,id=a,path={}/s,server=on,wait=off", dir.path().display());
    let with = |more: &str| format!("{chardev},{more}");
    let (bogus, maybe) = (with("bogus=1"), with("server=maybe"));
    let long = format!("socket,id=a,path={},server=on,wait=off", "a".repeat(120));
    let cases: &[(&[&str], &str)] = &[
        (&["foo"], "foo: Unexpected argument"),
        (&["--bad"], "unrecognized option '--bad'"),
        (&["-x"], "invalid option -- 'x'"),
        (&["--bad", "--help"], "unrecognized option '--bad'"),
        (&["--help=3"], "option '--help' doesn't allow an argument"),
        (&["--blockdev"], "option '--blockdev' requires an argument"),
        (&["-T"], "option requires an argument -- 'T'"),
        (&["-T", "enable=foo,bar=3"], "Invalid parameter 'bar'"),
        (&["--monitor", "help"], "Help is not available for this option"),
        (&["--monitor", "nope"], "chardev \"nope\" not found"),
        (&["--monitor", "mode=control"], "Parameter 'chardev' is missing"),
        (&["--monitor", r#"{"chardev":3}"#], "Invalid parameter type for 'chardev', expected: string"),
        (&["--chardev", "socket"], "chardev: no id specified"),
        (&["--chardev", "id=a"], "chardev: \"a\" missing backend"),
        (&["--chardev", "nosuch,id=a"], "'nosuch' is not a valid char driver name"),
        (&["--chardev", "socket,id=1a,path=/x"], "Parameter 'id' expects an identifier"),
        (&["--chardev", &long], "is too long"),
        (&["--chardev", &bogus], "Invalid parameter 'bogus'"),
        (&["--chardev", &maybe], "Parameter 'server' expects 'on' or 'off'"),
        (
            &["--chardev", "socket,id=a,path=/x,wait=off"],
            "'wait' option is incompatible with socket in client connect mode",
        ),
        (&["--chardev", &chardev, "--monitor", "a,mode=readline"], "Only QMP is supported"),
        (&["--chardev", &chardev, "--monitor", "a,mode=x"], "Parameter 'mode' does not accept value 'x'"),
        (&["--chardev", &chardev, "--monitor", "a,pretty"], "Expected '=' after parameter 'pretty'"),
        (&["--chardev", &chardev, "--monitor", "a,pretty=x"], "Parameter 'pretty' expects 'on' or 'off'"),
        (&["--chardev", &chardev, "--monitor", "a,bogus=1"], "Parameter 'bogus' is unexpected"),
        (&["--chardev", &chardev, "--monitor", "a", "--monitor", "a"], "chardev 'a' is already in use"),
    ];
    for (line, words) in cases {
        let peer = std::process::Command::new(PEER).args(*line).output().unwrap();
        let theirs = String::from_utf8_lossy(&peer.stderr).into_owned();
        assert_eq!(peer.status.code(), Some(i32::from(super::super::EXIT_FAILURE)), "{line:?}");
        assert!(theirs.contains(words), "{line:?}: theirs: {theirs}");
        let ours = refused(line);
        assert!(ours.contains(words), "{line:?}: ours: {ours}");
    }
}

#[test]
fn labels_prefer_what_the_option_defines() {
    for (line, label) in [
        (["--export", "vhost-user-blk,node-name=n,id=e"], "--export e"),
        (["--export", r#"{"type":"vhost-user-blk","node-name":"n","id":"e"}"#], "--export e"),
        (["--blockdev", "null-co,node-name=n"], "--blockdev n"),
        (["--blockdev", "{broken"], "--blockdev"),
        (["--blockdev", "null-co,node-name=bad name"], "--blockdev"),
    ] {
        assert_eq!(run(&line).steps[0].label, label);
    }
}

#[test]
fn suggestions_are_close() {
    assert!(refused(&["--blockdevs"]).contains("did you mean '--blockdev'?"));
    assert!(!refused(&["--fdset"]).contains("did you mean"));
}
