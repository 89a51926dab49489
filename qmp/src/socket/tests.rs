//! Listening sockets: dead and live ones at the path, limits, inheritance, removal.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    // std's listener does not remove its path.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let live = Listener::bind(&path, None).unwrap();
    UnixStream::connect(&path).unwrap();
    let error = Listener::bind(&path, None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("Address already in use"), "{error}");
    // The attempt did no harm.
    UnixStream::connect(&path).unwrap();
    drop(live);
    assert!(!path.exists());
}

#[test]
fn a_server_that_accepts_nobody_is_live_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = SocketAddrUnix::new(&path).unwrap();
    let make = || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let busy = make();
    bind(&busy, &address).unwrap();
    listen(&busy, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = make();
        match rustix::net::connect(&client, &address) {
            Ok(()) => waiting.push(client),
            Err(e) => break assert_eq!(e, Errno::AGAIN),
        }
    }
    let error = Listener::bind(&path, None).unwrap_err();
    assert!(error.to_string().contains("another process serves it"), "{error}");
}

#[test]
fn anything_but_a_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "data").unwrap();
    let error = Listener::bind(&path, None).unwrap_err();
    assert!(error.to_string().ends_with("the path exists and is not a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_path_that_now_belongs_to_another_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = Listener::bind(&path, None).unwrap();
    std::fs::rename(&path, dir.path().join("away")).unwrap();
    let second = Listener::bind(&path, None).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn the_length_limit_is_the_kernels() {
    let dir = tempfile::tempdir().unwrap();
    let room = MAX_PATH - dir.path().as_os_str().len() - 1;
    let fits = dir.path().join("x".repeat(room));
    Listener::bind(&fits, None).unwrap();
    let error = Listener::bind(&dir.path().join("x".repeat(room + 1)), None).unwrap_err();
    assert!(error.to_string().contains("is too long: 108 bytes, at most 107"), "{error}");
    let error = Listener::bind(&dir.path().join("no/such/dir"), None).unwrap_err();
    assert!(error.to_string().contains("Failed to bind UNIX socket"), "{error}");
}

#[test]
fn permissions() {
    let dir = tempfile::tempdir().unwrap();
    for (mode, expected) in [(None, 0o600), (Some(0o660), 0o660)] {
        let path = dir.path().join("s");
        let _listener = Listener::bind(&path, mode).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, expected);
    }
}

#[test]
fn inherited_descriptors_are_examined() {
    let dir = tempfile::tempdir().unwrap();
    let listening = UnixListener::bind(dir.path().join("s")).unwrap();
    assert!(Listener::from_fd(listening.into()).is_ok());
    let (a, _b) = UnixStream::pair().unwrap();
    assert!(Listener::from_fd(a.into()).unwrap_err().to_string().contains("not listening"));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(Listener::from_fd(file.into()).is_err());
}
