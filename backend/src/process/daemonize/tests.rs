//! Tests of launcher and daemon; the daemon is a child, this test program itself or a shell.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

#[test]
fn the_launcher_mirrors_the_daemons_start() {
    assert_eq!(launch(shell(r"printf '\006'")).unwrap(), 0);
    assert_eq!(launch(shell(r"echo noise; printf '\006'; exit 3")).unwrap(), 0);
    assert_eq!(launch(shell("exit 3")).unwrap(), 3);
    assert_eq!(launch(shell("kill -9 $$")).unwrap(), 137);
}

#[test]
fn ending_without_news_is_a_failure_even_with_status_0() {
    assert_eq!(launch(shell("exit 0")).unwrap(), EXIT_FAILURE);
    assert_eq!(launch(shell("echo ready")).unwrap(), EXIT_FAILURE);
}

#[test]
fn a_program_that_cannot_start_is_an_error() {
    assert!(launch(Command::new("/nonexistent/program")).is_err());
}

/// Runs in a child, for the test below: a daemon that reports what it is to a file.
#[test]
fn child_daemon() {
    let Ok(report) = std::env::var("DAEMON_REPORT") else { return };
    let args = std::env::args_os().collect::<Vec<_>>();
    match begin(args).unwrap() {
        Role::Launcher(status) => std::process::exit(i32::from(status)),
        Role::Daemon(ready) => {
            assert!(launched_by(std::env::var(MARKER).unwrap().parse().unwrap()));
            assert!(!launched_by(std::process::id()));
            if report == "fail" {
                std::process::exit(7);
            }
            let sid = rustix::process::getsid(None).unwrap();
            // Written before the announcement: the launcher's end means that it is there.
            std::fs::write(&report, format!("{}", sid == rustix::process::getpid())).unwrap();
            ready.announce().unwrap();
            let null = rustix::fs::stat("/dev/null").unwrap();
            let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
            let all_null = streams.iter().all(|s| rustix::fs::fstat(s).unwrap().st_rdev == null.st_rdev);
            let cwd = std::env::current_dir().unwrap();
            std::fs::write(format!("{report}.after"), format!("{all_null} {}", cwd.display())).unwrap();
            std::fs::rename(format!("{report}.after"), format!("{report}.done")).unwrap();
            std::process::exit(0);
        }
    }
}

fn run_daemon(report: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["child_daemon", "--nocapture"])
        .env("DAEMON_REPORT", report)
        .env_remove(MARKER)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
}

#[test]
fn a_daemon_leads_a_session_and_lets_go_of_its_streams() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report");
    let status = run_daemon(report.to_str().unwrap());
    assert!(status.success(), "{status}");
    assert_eq!(std::fs::read_to_string(&report).unwrap(), "true");
    let done = dir.path().join("report.done");
    while !done.exists() {
        std::thread::yield_now();
    }
    assert_eq!(std::fs::read_to_string(&done).unwrap(), "true /");
}

#[test]
fn a_daemon_that_fails_to_start_hands_on_its_status() {
    assert_eq!(run_daemon("fail").code(), Some(7));
}
