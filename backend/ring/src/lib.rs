//! Guest memory and split virtqueues: the hostile side of the process, and the fast one.
//!
//! The export layer of `ringblk` is the caller. A vhost-user session builds a [`Memory`] from the regions a front end
//! sends, and one [`SplitQueue`] per ring from the addresses it names; an iothread then owns the queue and turns it:
//!
//! ```text
//! session thread                       iothread
//! Memory::map(regions) ──Arc──►  SplitQueue::new(mem, config)
//!                                loop { fetch() → pop(&mut chain) × n → … I/O …
//!                                       push_used(head, len) × n → publish() ─► Notifier::signal() }
//! ```
//!
//! Trust: everything that lives in guest memory changes at any moment, and so does everything a front end says. Each
//! descriptor, index and header is copied exactly once; the copy is validated; only the copy is used. What a caller
//! gets are host pointers that were inside one mapping when the chain was taken, and stay so for as long as the
//! [`Memory`] epoch they came from lives.
//!
//! Errors: a ring that breaks a rule gives a [`QueueError`] that says which, and from then on nothing else: that ring
//! is stopped, nobody else's. No function here panics on outside input, blocks, logs, or allocates on the path of a
//! request (a [`Chain`] keeps its storage from one request to the next).
//!
//! [`Slots`] is where chains meet the host layer: it holds the requests in flight and hands their segments to the kernel
//! while making sure that list and memory stay, so that the export layer needs no `unsafe`. Nothing else here knows that
//! there is a kernel.
//!
//! This crate knows virtqueues and guest memory. It must not know block devices, nodes, or the vhost-user messages. It is
//! one of the two places of the project that may hold `unsafe`.

// Pointers into guest memory are the subject of this crate; each block below argues its own case.
#![allow(unsafe_code)]

mod chain;
mod error;
mod eventfd;
mod inflight;
mod iov;
mod layout;
mod memory;
mod pinned;
mod region;
mod slots;
mod split;
#[cfg(test)]
mod testing;
mod vanish;
mod walk;

pub use chain::{Chain, MAX_SEGMENTS};
pub use error::{AccessError, MemoryError, QueueError};
pub use eventfd::{EventFdError, Kick, Notifier};
pub use inflight::{InflightError, InflightRegion, Tracker};
pub use iov::{GuestIov, slice_iovs};
pub use layout::{MAX_QUEUE_SIZE, RingAddresses};
pub use memory::{MAX_REGIONS, Memory};
pub use pinned::Pinned;
pub use region::Region;
pub use slots::{Part, Retired, Slots};
pub use split::{QueueState, SplitConfig, SplitQueue, UsedElement};
