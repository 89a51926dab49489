//! ringblk: a vhost-user-blk backend. This file wires and does nothing else.
#![forbid(unsafe_code)]

mod blk;
mod vhost_user;

fn main() {}
