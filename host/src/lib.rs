//! The kernel boundary of ringblk: threads that run futures over io_uring, files, buffers, clocks and locks.
//!
//! Called by the graph, the drivers, the jobs and the process itself. It must not know nodes, virtio or QMP: an
//! [`iothread::Source`] is all it sees of a virtqueue, a [`file::File`] all it sees of an image.
//!
//! | module | subject |
//! |---|---|
//! | [`iothread`] | the thread: its loop, its handle, and [`Local`], what code running on it may do |
//! | [`exec`] | the single-threaded executor, and the one the main thread runs |
//! | [`mailbox`] | how other threads reach a sleeping one |
//! | [`mod@file`] | open files: alignment, sizes, OFD locks |
//! | [`buf`] | scatter lists over memory that may change under us |
//! | [`pool`] | threads for calls that block |
//! | [`sync`] | oneshot, mutex, wait queue, event: usable across executors |
//! | [`sim`] | the same loop under a virtual clock with injected faults |

// The kernel boundary: the one crate, next to the rings, where memory safety is argued.
#![allow(unsafe_code)]

pub mod buf;
mod clock;
pub mod exec;
pub mod file;
pub mod iothread;
pub mod mailbox;
mod pages;
pub mod pool;
mod primitive;
mod reactor;
mod resident;
pub mod sim;
pub mod sync;
mod timer;

pub use buf::IoVecs;
pub use file::{Alignment, File, FileKind, OpenOptions};
pub use iothread::{
    FallocMode, FastOp, Gone, IoThread, IoThreadOptions, Local, PollParams, Source, SourceId,
};
pub use pages::WordPages;
pub use resident::forget_program_pages;

/// How the operations of an iothread or of one file reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where the kernel lets us, else [`Engine::Threads`].
    #[default]
    Auto,
    /// io_uring, or an error when it cannot be had.
    IoUring,
    /// Blocking system calls on a small worker pool.
    Threads,
}
