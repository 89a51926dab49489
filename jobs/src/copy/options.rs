//! What can be asked of a copy and what it reports.

use graph::Errno;

/// Most tasks of one iothread.
pub const MAX_TASKS: usize = 16;

/// Most unreadable ranges that are listed one by one; all are counted.
pub const MAX_REPORTED: usize = 1024;

/// What is known about the target before the copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetZero {
    /// Nothing: zeroes are written.
    #[default]
    No,
    /// It reads as zeroes: zeroes are left out.
    Yes,
    /// Nothing; if all of it can be zeroed at once without writing buffers, that is done first.
    Try,
}

/// How to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// Longest request, bytes: a multiple of 64 KiB, up to 64 MiB; with `compressed` exactly the target's cluster size.
    pub buffer: u64,
    /// Requests in flight per iothread, 1 to [`MAX_TASKS`].
    pub tasks: usize,
    /// Writes start in the order of their offsets, one after the other: images grow sequentially. Reads overlap all the same.
    pub ordered: bool,
    /// Shortest run of zero bytes inside data that becomes a hole. 0: everything is written as data, holes as well.
    pub min_sparse: u64,
    /// What is known about the target.
    pub target_zero: TargetZero,
    /// The target has a backing file of so many bytes with the content below the source's top image: only what the top
    /// image itself holds is copied (one source).
    pub target_backing: Option<u64>,
    /// Write compressed clusters.
    pub compressed: bool,
    /// Sectors that cannot be read become zeroes and are reported.
    pub salvage: bool,
    /// Make the target durable at the end.
    pub flush: bool,
}

impl Default for CopyOptions {
    fn default() -> CopyOptions {
        CopyOptions {
            buffer: 2 << 20,
            tasks: 8,
            ordered: true,
            min_sparse: 4096,
            target_zero: TargetZero::No,
            target_backing: None,
            compressed: false,
            salvage: false,
            flush: false,
        }
    }
}

/// A range that could not be read, and now is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// In the sources put one after the other, bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub errno: Errno,
}

/// What a copy did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Bytes written as data.
    pub written: u64,
    /// Bytes made zero.
    pub zeroed: u64,
    /// Bytes that needed nothing.
    pub skipped: u64,
    /// Bytes that could not be read.
    pub unreadable_bytes: u64,
    /// The first [`MAX_REPORTED`] ranges of them, by offset.
    pub unreadable: Vec<Unreadable>,
}
