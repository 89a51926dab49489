//! The process: its command line and exit status, sockets that are passed to it, the service manager, the way to the
//! background, its end with requests in flight, and what it costs when nothing happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cmdline;
mod idle;
mod life;
mod passing;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use ringblk_scenarios::rig::ringblk;

/// Longest wait for something that is sure to happen.
const LIMIT: Duration = Duration::from_secs(30);

/// Runs the program to its end. A status of 124 means that it did not come to it.
fn run<S: AsRef<OsStr>>(args: &[S]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "20"]).arg(ringblk()).args(args).stdin(Stdio::null());
    command.env_remove("NOTIFY_SOCKET").output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A refused start: status 1, nothing on stdout, one line on stderr, which is returned without the program's name.
fn refused<S: AsRef<OsStr>>(args: &[S]) -> String {
    let output = run(args);
    let line = text(&output.stderr).to_owned();
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert_eq!(text(&output.stdout), "");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.ends_with('\n'), "{line}");
    line.strip_prefix("ringblk: ").unwrap_or_else(|| panic!("{line}")).trim_end().to_owned()
}

/// Makes an image of one MiB.
fn image(path: &Path) -> String {
    ringblk_scenarios::image::create(path, 1 << 20);
    path.display().to_string()
}
