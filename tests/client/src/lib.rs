//! The test side of ringblk: everything that sits opposite a backend.
//!
//! Called by the benchmark and by the integration tests; never linked into the daemon. It plays the front end
//! (VMM) and the guest driver against *any* vhost-user-blk backend, so that the same test judges ringblk and
//! qemu-storage-daemon.
//!
//! ```text
//! disk      blk requests, data in and out                 (what a guest's block layer does)
//! session   whole set-up in QEMU's or cloud-hypervisor's order, stop, reconnect
//! queue     driver side of a split virtqueue, raw access   fast: preformatted slots for benchmarks
//! frontend  one function per vhost-user message            channel: the backend's own requests
//! connection  frames and descriptors, well formed or not   memory: guest RAM in memfds
//! qmp       control client          daemon: child process, its memory, threads, processor time
//! ```
//!
//! It is written to be able to misbehave: wherever a layer checks, the layer below lets a test send what the
//! check would have refused. Every wait has a limit; nothing here judges by elapsed time. It does no I/O model of
//! its own: calls block the calling thread until done or until the limit.
//!
//! Unsafe code is confined to `memory` (mapping guest RAM), `clock` (reading the cycle counter), `process`
//! (processor clock of another process) and `daemon` (work between fork and exec).

#![deny(unsafe_code)]

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!("the client writes virtio's little-endian structures as native integers of a 64-bit host");

pub mod blk;
pub mod channel;
pub mod clock;
pub mod connection;
pub mod daemon;
pub mod disk;
pub mod error;
pub mod fast;
pub mod frontend;
pub mod inflight;
pub mod loopback;
pub mod memory;
pub mod process;
pub mod qmp;
pub mod queue;
pub mod session;
pub mod wire;

pub use connection::Connection;
pub use daemon::Daemon;
pub use disk::Disk;
pub use error::{Error, Result};
pub use frontend::Frontend;
pub use session::{Guest, Order, Session, Setup};
