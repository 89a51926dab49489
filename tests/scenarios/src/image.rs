//! Image files and their contents. Called by tests that compare what a guest sees with what lies in the file; must not
//! go through the daemon.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes that differ between seeds and between positions, so that a misplaced block shows.
#[must_use]
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    crate::Rng::new(seed).bytes(len)
}

/// Makes a sparse file of `size` bytes.
pub fn create(path: &Path, size: u64) {
    File::create(path).expect("the image can be made").set_len(size).expect("the image can be sized");
}

/// Reads `len` bytes at `offset` from the file itself.
#[must_use]
pub fn read_at(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    File::open(path).expect("the image opens").read_exact_at(&mut out, offset).expect("the image reads");
    out
}
