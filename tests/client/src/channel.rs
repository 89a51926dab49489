//! The backend's own request channel (VHOST_USER_PROTOCOL_F_BACKEND_REQ).
//!
//! Made by `Frontend::open_channel`; used by tests of resize. It only receives and acknowledges: what a front end
//! does about a message (read the configuration again) is the test's business.

use std::time::Duration;

use crate::connection::{Connection, Message};
use crate::error::{Error, Result};
use crate::wire::{FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, backend_request};

/// Our end of the channel.
#[derive(Debug)]
pub struct Channel {
    connection: Connection,
}

impl Channel {
    pub(crate) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    /// The socket, for tests that close or stuff it.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The next request of the backend.
    ///
    /// # Errors
    /// Those of `Connection::recv_within`.
    pub fn recv(&self, limit: Duration) -> Result<Message> {
        self.connection.recv_within(limit)
    }

    /// Answers `message` with `status` if it asked for an answer.
    ///
    /// # Errors
    /// Those of `Connection::send`.
    pub fn acknowledge(&self, message: &Message, status: u64) -> Result<()> {
        if message.flags & FLAG_NEED_REPLY == 0 {
            return Ok(());
        }
        self.connection.send(message.request, FLAG_VERSION | FLAG_REPLY, &status.to_le_bytes(), &[])
    }

    /// Waits for CONFIG_CHANGE_MSG and acknowledges it.
    ///
    /// # Errors
    /// `Protocol` when another message comes first, and those of `recv`.
    pub fn expect_config_change(&self, limit: Duration) -> Result<()> {
        let message = self.recv(limit)?;
        if message.request != backend_request::CONFIG_CHANGE_MSG {
            return Err(Error::Protocol(format!(
                "backend request {} instead of a config change",
                message.request
            )));
        }
        self.acknowledge(&message, 0)
    }
}
