//! Tests of the pid file. Record locks do not conflict within a process, so the living holder is a child.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use super::*;
use std::process::{Command, Stdio};

/// Runs in a child, for the test below: holds the pid file named in the environment until stdin ends.
#[test]
fn child_holds_the_pidfile() {
    let Ok(path) = std::env::var("PIDFILE_UNDER_TEST") else { return };
    let _held = Pidfile::create(Path::new(&path)).unwrap();
    println!("held");
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn holds_the_pid_and_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pid");
    // Left behind by a longer pid of a dead process.
    std::fs::write(&path, "99999999999\n").unwrap();
    let pidfile = Pidfile::create(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    drop(pidfile);
    assert!(!path.exists());
}

#[test]
fn leaves_a_file_that_is_no_longer_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pid");
    let pidfile = Pidfile::create(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "other").unwrap();
    drop(pidfile);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "other");
}

#[test]
fn new_files_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pid");
    let _pidfile = Pidfile::create(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn failures_name_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no/pid");
    let text = Pidfile::create(&missing).unwrap_err().to_string();
    assert!(text.contains(missing.to_str().unwrap()) && text.contains("No such file"), "{text}");
    assert!(Pidfile::create(dir.path()).unwrap_err().to_string().contains("directory"));
    assert!(Pidfile::create(Path::new("/dev/null")).unwrap_err().to_string().contains("regular file"));
}

#[test]
fn a_living_holder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pid");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child_holds_the_pidfile", "--nocapture"])
        .env("PIDFILE_UNDER_TEST", &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = String::new();
    let stdout = child.stdout.as_mut().unwrap();
    while !seen.contains("held\n") {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        seen.push(byte[0] as char);
    }
    let text = Pidfile::create(&path).unwrap_err().to_string();
    assert!(text.contains(&format!("process {} holds it", child.id())), "{text}");
    drop(child.stdin.take());
    io::copy(&mut child.stdout.take().unwrap(), &mut io::sink()).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!path.exists());
    Pidfile::create(&path).unwrap();
}
