//! Work in the background of the block graph: the state machine of jobs, the copy engine they share, and the jobs.
//!
//! Called by the control channel (commands, queries) and by the image tool (which runs a copy without a job around it).
//! Everything here lives on the main thread; data moves on iothreads, through users of nodes ([`Hold`]) that a drain can
//! stop. Must not know virtio, sockets or the control channel's syntax, and names no driver.
//!
//! | module | subject |
//! |---|---|
//! | [`control`] | what a piece of work and its owner share across threads: progress, rate, pausing, cancelling |
//! | [`hold`] | a job's use of a node, with its requests bracketed so that drains end |
//! | [`copy`] | the copy engine |
//! | [`check`] | checking an image that is in use |
//! | [`create`] | creating images |
//! | [`warm`] | filling caches |
//! | [`job`] | states, verbs, groups, queries and events |

#![forbid(unsafe_code)]

pub mod check;
pub mod control;
pub mod copy;
pub mod create;
pub mod hold;
pub mod job;
pub mod warm;

pub use control::Control;
pub use hold::Hold;
pub use job::{Job, JobEvent, JobOptions, Jobs};
