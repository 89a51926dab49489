//! `file` and `host_device`: an image that is a file, a block or a character device of the host. The end of most graphs.
//!
//! Called by the graph: `map` and the requests on iothreads, permissions on the main thread. Must not interpret the
//! content, and must not reach the kernel but through `host`.
//!
//! **Two descriptors.** A node with `auto-read-only=on` is opened for reading, and again for writing when its first
//! writer comes (`perm`). The first descriptor stays open for the life of the node, since OFD locks belong to the
//! descriptor that took them: the lock bytes never have to be carried over, and there is no moment without them. The second
//! one is set once and stays as well, so that a request finds it with one atomic load; a node that lost its last writer
//! costs a descriptor until it is deleted. Without `auto-read-only` there is one descriptor, writable unless `read-only=on`.
//!
//! **Reopening** makes another node of the same file, with descriptors of its own, and hands the lock bytes over
//! (`reopen`).
//!
//! **Sizes.** A node is as large as its file, rounded up to whole sectors of 512 bytes as in QEMU; what the file does not
//! have reads as zeroes. `length` is how far the file surely reaches (it only falls behind, never ahead): reads below it go
//! straight to the file, others are driven, where `host` fills in zeroes past the end.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use graph::{CreateDef, DriverDef, DriverKind};
use host::{File, OpenOptions};

mod create;
mod io;
mod lock;
mod open;
mod options;
mod perm;
mod reopen;
mod size;
mod status;
#[cfg(test)]
mod tests;

use lock::Locks;
use options::FileOptions;

/// Granularity of visible sizes, bytes.
const SECTOR: u64 = 512;

/// `file`.
pub(crate) const FILE: DriverDef = DriverDef {
    name: "file",
    kind: DriverKind::Protocol,
    schema: || schemars::schema_for!(FileOptions),
    open: |cx, value| Box::pin(open::open(Wanted::File, cx, value)),
    create: Some(CreateDef {
        schema: || schemars::schema_for!(create::FileCreateOptions),
        create: |cx, value| Box::pin(create::create(cx, value)),
    }),
};

/// `host_device`.
pub(crate) const HOST_DEVICE: DriverDef = DriverDef {
    name: "host_device",
    kind: DriverKind::Protocol,
    schema: || schemars::schema_for!(FileOptions),
    open: |cx, value| Box::pin(open::open(Wanted::HostDevice, cx, value)),
    create: None,
};

/// Which of the two drivers it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    File,
    HostDevice,
}

impl Wanted {
    fn name(self) -> &'static str {
        match self {
            Wanted::File => FILE.name,
            Wanted::HostDevice => HOST_DEVICE.name,
        }
    }
}

/// What the file system or device turned out not to be able to do; asked once, remembered.
#[derive(Default)]
struct Lacks {
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
    allocate: AtomicBool,
}

/// `driver-specific` of the statistics.
#[derive(Default)]
struct Counters {
    discards: AtomicU64,
    discards_failed: AtomicU64,
    discarded: AtomicU64,
}

/// A file or device.
struct FileNode {
    wanted: Wanted,
    /// As the user gave it.
    filename: String,
    /// The descriptor that is there from open to close; carries the locks.
    first: Arc<File>,
    /// The writable one, where `first` is not and a writer has come.
    writer: OnceLock<Arc<File>>,
    /// How to open `writer`; `None` when the node has all it will ever have.
    reopen: Option<OpenOptions>,
    locks: Arc<Locks<Arc<File>>>,
    /// Visible size, bytes.
    size: AtomicU64,
    /// Bytes the file surely has; at most `size`.
    length: AtomicU64,
    lacks: Lacks,
    counters: Arc<Counters>,
}
