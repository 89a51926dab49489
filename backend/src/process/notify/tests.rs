//! Tests of the notifications against sockets of our own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn received(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn speaks_to_a_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let notifier = Notifier::new(Some(path.as_os_str())).unwrap();
    notifier.ready("serving").unwrap();
    assert_eq!(received(&manager), format!("READY=1\nMAINPID={}\nSTATUS=serving\n", std::process::id()));
    notifier.stopping("bye").unwrap();
    assert_eq!(received(&manager), "STOPPING=1\nSTATUS=bye\n");
}

#[test]
fn speaks_to_an_abstract_name() {
    let name = format!("ringblk-notify-test-{}", std::process::id());
    let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let notifier = Notifier::new(Some(OsStr::new(&format!("@{name}")))).unwrap();
    notifier.stopping("one\nREADY=1").unwrap();
    assert_eq!(received(&manager), "STOPPING=1\nSTATUS=one READY=1\n");
}

#[test]
fn long_texts_are_cut_between_characters() {
    let text = one_line(&"ä".repeat(MAX_STATUS));
    assert_eq!(text.len(), MAX_STATUS);
    assert_eq!(one_line(&format!("x{}", "ä".repeat(MAX_STATUS))).len(), MAX_STATUS - 1);
}

#[test]
fn says_nothing_to_nobody() {
    for nobody in [None, Some(OsStr::new(""))] {
        Notifier::new(nobody).unwrap().ready("x").unwrap();
    }
}

#[test]
fn refuses_other_addresses_and_reports_a_dead_manager() {
    assert!(Notifier::new(Some(OsStr::new("relative"))).is_err());
    assert!(Notifier::new(Some(OsStr::new("vsock:2:1"))).is_err());
    assert!(Notifier::new(Some(OsStr::new(&format!("/{}", "a".repeat(200))))).is_err());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gone");
    assert!(Notifier::new(Some(path.as_os_str())).unwrap().ready("x").is_err());
}
