//! Test of the signals: one, since signals belong to the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn readable(signals: &Signals) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(signals, PollFlags::IN)], Some(&now)).unwrap() == 1
}

#[test]
fn signals_arrive_once_and_by_name() {
    let mut signals = Signals::install().unwrap();
    assert!(!readable(&signals));
    assert_eq!(signals.take(), None);
    for (number, signal) in
        [(SIGTERM, Signal::Terminate), (SIGINT, Signal::Interrupt), (SIGHUP, Signal::Hangup)]
    {
        // raise(3) returns after the handler has run.
        low_level::raise(number).unwrap();
        assert!(readable(&signals));
        assert_eq!(signals.take(), Some(signal));
        assert!(!readable(&signals));
        assert_eq!(signals.take(), None);
    }
    // More than the pipe holds: the handler must not block, and one report is enough.
    for _ in 0..2000 {
        low_level::raise(SIGTERM).unwrap();
    }
    assert_eq!(signals.take(), Some(Signal::Terminate));
    assert!(!readable(&signals));
}
