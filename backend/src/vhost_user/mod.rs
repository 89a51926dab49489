//! The vhost-user session: one connection, from SET_OWNER to the lost socket.
//!
//! `connection` runs the thread that blocks in the protocol; `session` turns its messages into changes of the
//! device's queues; `channel` is the way back to the front end (configuration changes). Everything that touches a
//! ring is done by the ring's iothread and acknowledged before the protocol reply goes out.
//! Must not know nodes, drivers or QMP.

pub mod channel;
pub mod connection;
pub mod session;
