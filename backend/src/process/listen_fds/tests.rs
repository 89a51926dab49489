//! Tests of inherited descriptors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

fn passed(open: &[RawFd], variables: &[(&str, &str)]) -> Result<PassedFds, FdError> {
    let variable =
        |name: &str| variables.iter().find(|(k, _)| *k == name).map(|(_, value)| (*value).to_owned());
    PassedFds::new(open.iter().copied().collect(), variable, |pid| pid == 42)
}

#[test]
fn names_follow_the_numbers() {
    let vars = [("LISTEN_PID", "42"), ("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "vhost:qmp:vhost")];
    let p = passed(&[3, 4, 5, 9], &vars).unwrap();
    assert_eq!(p.names().collect::<Vec<_>>(), ["vhost", "qmp", "vhost"]);
    assert_eq!(p.resolve("qmp"), Ok(4));
    assert_eq!(p.resolve("vhost"), Ok(3));
    assert_eq!(p.resolve("9"), Ok(9));
    assert!(p.resolve("nbd").unwrap_err().0.contains("no descriptor named 'nbd'"));
    assert!(p.resolve("1").unwrap_err().0.contains("standard stream"));
    assert!(p.resolve("99999999999").unwrap_err().0.contains("not a descriptor number"));
    assert!(p.resolve("3x").is_err());
}

#[test]
fn without_names_they_are_unknown() {
    let p = passed(&[3, 4], &[("LISTEN_PID", "42"), ("LISTEN_FDS", "2")]).unwrap();
    assert_eq!(p.names().collect::<Vec<_>>(), ["unknown", "unknown"]);
}

#[test]
fn variables_of_another_process_are_ignored() {
    for pid in ["41", "", "x", "-1"] {
        let p = passed(&[3], &[("LISTEN_PID", pid), ("LISTEN_FDS", "nonsense")]).unwrap();
        assert_eq!(p.names().count(), 0);
    }
    assert_eq!(passed(&[3], &[("LISTEN_FDS", "1")]).unwrap().names().count(), 0);
}

#[test]
fn contradictions_are_refused() {
    let e = |open: &[RawFd], fds, names| {
        passed(open, &[("LISTEN_PID", "42"), ("LISTEN_FDS", fds), ("LISTEN_FDNAMES", names)]).unwrap_err().0
    };
    assert!(e(&[3], "2", "a:b").contains("descriptor 4 is not open"));
    assert!(e(&[3], "1", "a:b").contains("2 names for 1 descriptors"));
    for bad in ["-1", "x", "1025", "99999999999"] {
        assert!(e(&[3], bad, "a").contains("a number from 0 to 1024"), "{bad}");
    }
}

#[test]
fn a_socket_is_taken_once_and_works() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let number = ours.as_raw_fd();
    let mut p = passed(&[number], &[]).unwrap();
    let designator = number.to_string();
    let Socket::Connected(mut stream) = p.take_socket(&designator).unwrap() else { panic!("not connected") };
    assert!(rustix::io::fcntl_getfd(&stream).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    peer.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    assert!(p.take_socket(&designator).unwrap_err().0.contains("in use already"));
    drop(ours);
}

#[test]
fn a_name_is_used_up_in_order() {
    let (a, b) = UnixStream::pair().unwrap();
    let mut p = PassedFds::default();
    for fd in [&a, &b] {
        p.open.insert(fd.as_raw_fd());
        p.named.push(Named { name: "vhost".into(), number: fd.as_raw_fd() });
    }
    p.take("vhost").unwrap();
    assert_eq!(p.named.len(), 1);
    assert_eq!(p.named[0].number, b.as_raw_fd());
    p.take("vhost").unwrap();
    assert!(p.take("vhost").is_err());
}

#[test]
fn listening_and_other_descriptors_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    assert!(matches!(classify(listener.into()), Ok(Socket::Listening(_))));
    let file = tempfile::tempfile().unwrap();
    assert_eq!(classify(file.into()).unwrap_err(), "is not a socket");
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    assert_eq!(classify(datagram.into()).unwrap_err(), "is not a unix stream socket");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(classify(tcp.into()).unwrap_err(), "is not a unix stream socket");
    let lone = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    assert!(classify(lone).unwrap_err().contains("neither listens"));
}

#[test]
fn only_what_was_open_at_the_start_is_handed_out() {
    let file = tempfile::tempfile().unwrap();
    assert!(open_descriptors().unwrap().contains(&file.as_raw_fd()));
    let mut p = passed(&[], &[]).unwrap();
    let e = p.take(&file.as_raw_fd().to_string()).unwrap_err();
    assert!(e.0.contains("was not passed"));
}

#[test]
fn a_closed_number_is_an_error() {
    // Above the kernel's limit of descriptors per process, so never open.
    let mut p = passed(&[RawFd::MAX], &[]).unwrap();
    assert!(p.take(&RawFd::MAX.to_string()).unwrap_err().0.contains("Bad file descriptor"));
}
