//! An export that is maltreated, and everything that must hold afterwards: its neighbour works, it serves the next front
//! end, nothing is left behind.
//!
//! Called by the hostile tests. The misdeeds are theirs.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use client::wire::FLAG_VERSION;
use client::{Disk, Frontend, Setup};
use rustix::event::{EventfdFlags, eventfd};

use crate::{Holdings, Neighbour, Rig, Wanted};

/// Longest wait for a connection's end.
pub const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of the victim's disk.
pub const SIZE: u64 = 1 << 20;

/// A front end with little memory.
#[must_use]
pub fn setup() -> Setup {
    Setup { memory: vec![(0, 8 << 20)], ..Setup::default() }
}

/// A front end that has negotiated features and protocol, and nothing else.
#[must_use]
pub fn negotiated(rig: &Rig) -> Frontend {
    let mut f = Frontend::new(rig.connection("victim"));
    let offered = f.get_features().unwrap();
    let accepted = f.get_protocol_features().unwrap() & setup().protocol;
    f.set_protocol_features(accepted).unwrap();
    f.set_features(offered & setup().features).unwrap();
    f
}

/// A daemon with an export to be maltreated and its neighbour.
#[derive(Debug)]
pub struct Victim {
    /// The daemon; the export is `victim`.
    pub rig: Rig,
    /// The other export.
    pub neighbour: Neighbour,
}

impl Victim {
    /// Starts it and sees that all is well.
    #[must_use]
    pub fn start() -> Self {
        let rig = Rig::start(&[Wanted::file("victim", SIZE), Neighbour::wanted()]);
        let neighbour = Neighbour::connect(&rig);
        let mut victim = Self { rig, neighbour };
        victim.serves("nothing");
        victim
    }

    /// The victim serves a new connection.
    pub fn serves(&mut self, after: &str) {
        let mut disk = Disk::connect(&self.rig.socket("victim"), &setup())
            .unwrap_or_else(|e| panic!("after {after}, no new session: {e}: {}", self.rig.daemon.stderr()));
        disk.write(0, &[7; 4096]).unwrap_or_else(|e| panic!("after {after}, no write: {e}"));
        assert!(disk.read(0, 4096).unwrap() == [7; 4096], "after {after}, other data");
        drop(disk);
        self.rig.wait_disconnected("victim");
    }

    /// The misdeed must end its connection; afterwards all is as before.
    pub fn closes(&mut self, name: &str, misdeed: impl FnOnce(&Rig) -> Frontend) {
        let before = self.rig.holdings();
        let front = misdeed(&self.rig);
        front
            .connection()
            .wait_closed(LIMIT)
            .unwrap_or_else(|e| panic!("{name}: {e}: {}", self.rig.daemon.stderr()));
        drop(front);
        self.after(name, before);
    }

    /// The misdeed is tolerated or ends its connection; afterwards all is as before.
    pub fn bears(&mut self, name: &str, misdeed: impl FnOnce(&Rig)) {
        let before = self.rig.holdings();
        misdeed(&self.rig);
        self.after(name, before);
    }

    /// What must hold after any misdeed.
    pub fn after(&mut self, name: &str, before: Holdings) {
        self.neighbour.check(name);
        self.rig.wait_disconnected("victim");
        self.serves(name);
        self.rig.wait_holdings(before);
        self.rig.assert_running();
    }
}

/// Sends a message that the daemon may refuse by closing, even while it is sent.
pub fn send(front: &Frontend, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    // The daemon may have closed already: that is the point.
    match front.connection().send(number, FLAG_VERSION, payload, fds) {
        Err(e) if !e.is_closed() => panic!("{e}"),
        _ => {}
    }
}

/// A memfd of `len` bytes that is not sealed.
#[must_use]
pub fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("area", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// An eventfd as front ends make them.
#[must_use]
pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}
