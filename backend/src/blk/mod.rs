//! The virtio-blk device: configuration space, requests, and one worker per queue.
//!
//! `device` is what the session and the export hold; `worker` lives on an iothread and turns one ring; `request`
//! parses; `config` answers for features and limits. Must not know the vhost-user protocol, QMP or file formats.

pub mod config;
pub mod device;
pub mod request;
pub mod stock;
pub mod worker;
