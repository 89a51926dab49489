//! The back-end request channel: how the device tells its front end that the configuration changed.
//!
//! `connection` catches the socket when SET_BACKEND_REQ_FD passes by (the `vhost` crate wraps it in a type that
//! cannot send this message); the export calls [`Channel::config_changed`] after a resize. Must not block: a front
//! end that does not read loses the notice, and is told so in the log.

use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::SendFlags;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG` (vhost-user protocol, "Back-end message types").
const CONFIG_CHANGE_MSG: u32 = 2;
/// Header flags: protocol version 1, no reply wanted. Asking for one would deadlock: the front end answers by
/// reading the configuration on the main channel first.
const FLAGS: u32 = 1;

#[derive(Debug, Default)]
struct State {
    socket: Option<UnixStream>,
    /// A change that could not be told because all rings were stopped or no channel was there.
    pending: bool,
    /// Rings running now. The protocol forbids back-end messages while a device is suspended.
    running: usize,
}

/// The channel of one device; survives connections. Its lock is a leaf: nothing else is locked while it is held.
#[derive(Debug, Default)]
pub struct Channel(Mutex<State>);

impl Channel {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is valid between any two statements, so a panicking holder leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The front end handed over its socket.
    pub fn set(&self, socket: UnixStream) {
        let mut s = self.state();
        s.socket = Some(socket);
        s.try_send();
    }

    /// The connection ended. What was pending dies with it: the next front end reads the configuration afresh.
    pub fn clear(&self) {
        *self.state() = State::default();
    }

    /// A ring started: whatever changed while the device was suspended is told now.
    pub fn ring_started(&self) {
        let mut s = self.state();
        s.running += 1;
        s.try_send();
    }

    /// A ring stopped.
    pub fn ring_stopped(&self) {
        let mut s = self.state();
        s.running = s.running.saturating_sub(1);
    }

    /// The configuration space changed (a resize).
    pub fn config_changed(&self) {
        let mut s = self.state();
        s.pending = true;
        s.try_send();
    }
}

impl State {
    fn try_send(&mut self) {
        let Some(socket) = &self.socket else { return };
        if !self.pending || self.running == 0 {
            return;
        }
        let mut msg = [0u8; 12];
        for (field, value) in msg.chunks_exact_mut(4).zip([CONFIG_CHANGE_MSG, FLAGS, 0]) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
        match rustix::net::send(socket, &msg, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) if n == msg.len() => self.pending = false,
            other => {
                // Half a message would garble the channel, a full one means that nobody reads: give it up.
                log::warn!("the front end does not take configuration changes ({other:?}); channel closed");
                self.socket = None;
            }
        }
    }
}
