//! The control channel of a running daemon: sessions, the schema against what is really accepted and returned,
//! commands and events, and everything that must be refused without a trace.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bitmaps;
mod compatible;
mod corruption;
mod events;
mod limits;
mod locks;
mod refusals;
mod schema;
mod session;
mod state;

use std::path::Path;

use client::{Error, qmp};
use serde_json::Value;

/// Runs a command that must fail; its class and description.
fn refusal(client: &mut qmp::Client, command: &str, arguments: Value) -> (String, String) {
    match client.execute(command, arguments.clone()) {
        Err(Error::Qmp { class, desc, .. }) => (class, desc),
        other => panic!("{command} {arguments} is not refused: {other:?}"),
    }
}

/// The program that many answers are compared with, if it is installed.
fn peer() -> Option<&'static Path> {
    let path = Path::new("/usr/bin/qemu-storage-daemon");
    if path.exists() {
        return Some(path);
    }
    eprintln!("without comparison: {} is missing", path.display());
    None
}
