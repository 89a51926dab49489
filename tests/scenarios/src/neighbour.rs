//! The disk next door: another export of the same daemon, on the same iothread, that must not notice anything.
//!
//! Called by hostile tests before and after each misdeed.

use client::{Disk, Setup};

use crate::{Rig, Wanted, pattern};

/// Id of the export.
const ID: &str = "neighbour";
/// Bytes of its disk.
const SIZE: u64 = 4 << 20;
/// Bytes of each check.
const LEN: u32 = 64 << 10;

/// A connected disk that is written and read back.
#[derive(Debug)]
pub struct Neighbour {
    disk: Disk,
    round: u64,
}

impl Neighbour {
    /// What to ask the rig for.
    #[must_use]
    pub fn wanted() -> Wanted {
        Wanted::file(ID, SIZE)
    }

    /// Connects; stays connected.
    #[must_use]
    pub fn connect(rig: &Rig) -> Self {
        let mut neighbour = Self { disk: rig.disk(ID, &Setup::default()), round: 0 };
        neighbour.check("before anything happened");
        neighbour
    }

    /// Writes, flushes and reads back; the connection made at the start must still be good.
    pub fn check(&mut self, after: &str) {
        self.round += 1;
        let data = pattern(self.round, LEN as usize);
        let offset = self.round * u64::from(LEN) % (SIZE - u64::from(LEN)) / 512 * 512;
        self.disk
            .write(offset, &data)
            .unwrap_or_else(|e| panic!("after {after}, the neighbour cannot write: {e}"));
        self.disk.flush().unwrap_or_else(|e| panic!("after {after}, the neighbour cannot flush: {e}"));
        let back = self
            .disk
            .read(offset, LEN)
            .unwrap_or_else(|e| panic!("after {after}, the neighbour cannot read: {e}"));
        assert!(back == data, "after {after}, the neighbour reads something else");
    }
}
