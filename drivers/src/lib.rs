//! The block drivers of ringblk: one folder each, and the list they are registered by.
//!
//! The process hands [`ALL`] to the graph; nobody else names a driver. Drivers know the graph's `Driver` trait and the
//! host's files; they must not know each other, virtio or QMP. A new driver is a new folder and its line in the list. One
//! folder is more than a driver: the ciphers of `luks` are also those of encrypted qcow2 images.
//!
//! Every folder has the same files: `mod.rs` (what it is, its state, its [`DriverDef`]), `options.rs` (its options; their
//! comments are the reference), `open.rs`, `io.rs`, `tests.rs`.

#![forbid(unsafe_code)]

use graph::DriverDef;

mod blkdebug;
mod blklogwrites;
mod blkverify;
mod cache;
mod child_size;
mod compress;
mod cor;
mod file;
mod filter;
mod luks;
mod null;
mod preallocate;
mod qcow2;
mod quorum;
mod raw;
pub mod throttle;
mod to_the_end;

/// Every driver, in the order the reference lists them.
pub const ALL: &[DriverDef] = &[
    blkdebug::BLKDEBUG,
    blklogwrites::BLKLOGWRITES,
    blkverify::BLKVERIFY,
    cache::CACHE,
    compress::COMPRESS,
    cor::COPY_ON_READ,
    file::FILE,
    file::HOST_DEVICE,
    luks::LUKS,
    null::NULL_AIO,
    null::NULL_CO,
    preallocate::PREALLOCATE,
    qcow2::QCOW2,
    quorum::QUORUM,
    raw::RAW,
    throttle::THROTTLE,
];

/// Images without a node: what test tools and offline tools need of a format that this crate knows.
pub mod image {
    /// LUKS: the header on disk.
    pub mod luks {
        pub use crate::luks::header;
    }
    /// qcow2: the format on disk, its compressed clusters, checking and repairing.
    pub mod qcow2 {
        pub use crate::qcow2::{check, codec, format};
    }
}
