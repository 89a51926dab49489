//! What is accepted as a kick or call, and that using it neither blocks nor fails when it is full.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use rustix::event::{EventfdFlags, eventfd};

use super::*;

fn read(fd: &impl AsFd) -> Option<u64> {
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).ok().map(|_| u64::from_ne_bytes(count))
}

#[test]
#[cfg_attr(miri, ignore = "eventfds")]
fn an_eventfd_is_accepted_and_made_harmless() {
    let fd = eventfd(0, EventfdFlags::empty()).unwrap();
    let peer = fd.try_clone().unwrap();
    let call = Notifier::new(fd).unwrap();
    assert!(rustix::fs::fcntl_getfl(&call).unwrap().contains(OFlags::NONBLOCK));
    assert!(rustix::io::fcntl_getfd(&call).unwrap().contains(FdFlags::CLOEXEC));
    call.signal().unwrap();
    call.signal().unwrap();
    assert_eq!(read(&peer), Some(2));
    assert_eq!(read(&peer), None);
}

#[test]
#[cfg_attr(miri, ignore = "eventfds")]
fn a_full_counter_is_no_error_and_does_not_block() {
    let fd = eventfd(0, EventfdFlags::empty()).unwrap();
    let peer = fd.try_clone().unwrap();
    rustix::io::write(&peer, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let call = Notifier::new(fd).unwrap();
    call.signal().unwrap();
    call.signal().unwrap();
    assert_eq!(read(&peer), Some(u64::MAX - 1));
}

#[test]
#[cfg_attr(miri, ignore = "eventfds")]
fn a_kick_is_drained_once() {
    let fd = eventfd(0, EventfdFlags::empty()).unwrap();
    let peer = fd.try_clone().unwrap();
    let kick = Kick::new(fd).unwrap();
    assert!(!kick.drain().unwrap());
    rustix::io::write(&peer, &5_u64.to_ne_bytes()).unwrap();
    assert!(kick.drain().unwrap());
    assert!(!kick.drain().unwrap());
}

#[test]
#[cfg_attr(miri, ignore = "eventfds")]
fn anything_else_is_refused() {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let (left, right) = std::os::unix::net::UnixStream::pair().unwrap();
    let timer = rustix::time::timerfd_create(
        rustix::time::TimerfdClockId::Monotonic,
        rustix::time::TimerfdFlags::empty(),
    );
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).unwrap();
    let memfd = rustix::fs::memfd_create("eventfd-count:", rustix::fs::MemfdFlags::empty()).unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    for fd in [read, write, left.into(), right.into(), timer.unwrap(), epoll, memfd, null.into()] {
        let copy = fd.try_clone().unwrap();
        assert!(matches!(Notifier::new(fd), Err(EventFdError::NotAnEventFd)));
        assert!(matches!(Kick::new(copy), Err(EventFdError::NotAnEventFd)));
    }
}

/// The way that is taken where /proc is missing gives the same verdicts.
#[test]
#[cfg_attr(miri, ignore = "eventfds")]
fn what_a_descriptor_does_tells_as_much_as_what_proc_says() {
    let fd = eventfd(3, EventfdFlags::empty()).unwrap();
    assert!(takes_nothing(&fd));
    assert_eq!(read(&fd), Some(3));
    let timer = rustix::time::timerfd_create(
        rustix::time::TimerfdClockId::Monotonic,
        rustix::time::TimerfdFlags::empty(),
    );
    assert!(!takes_nothing(&timer.unwrap()));
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).unwrap();
    assert!(!takes_nothing(&epoll));
}
