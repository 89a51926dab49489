//! One function per vhost-user message, with the reply rules of the specification.
//!
//! Used by `session` and by tests that choose their own order. It remembers what was negotiated (that decides
//! which messages are acknowledged) and nothing else; it does not check an order or a value: the backend must.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::channel::Channel;
use crate::connection::{Connection, Message};
use crate::error::{Error, Result};
use crate::wire::{
    self, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, MemoryRegion, VRING_NO_FD, VringAddr, feature, protocol,
    request,
};

/// Bytes of `struct VhostUserInflight` on the wire, with the padding QEMU's structure has.
const INFLIGHT_SIZE: usize = 24;

/// GET_INFLIGHT_FD's answer and SET_INFLIGHT_FD's argument (VU "Inflight description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightDescription {
    /// Bytes of the area.
    pub mmap_size: u64,
    /// Where it starts in the descriptor.
    pub mmap_offset: u64,
    /// Number of rings.
    pub num_queues: u16,
    /// Entries per ring.
    pub queue_size: u16,
}

impl InflightDescription {
    /// The 24 bytes of the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = wire::words(&[self.mmap_size, self.mmap_offset]);
        out.extend_from_slice(&self.num_queues.to_le_bytes());
        out.extend_from_slice(&self.queue_size.to_le_bytes());
        out.resize(INFLIGHT_SIZE, 0);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            mmap_size: wire::u64_at(bytes, 0)?,
            mmap_offset: wire::u64_at(bytes, 8)?,
            num_queues: wire::u16_at(bytes, 16)?,
            queue_size: wire::u16_at(bytes, 18)?,
        })
    }
}

/// A front end on one connection.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    /// Features the backend offered last (GET_FEATURES).
    pub offered: u64,
    /// Features sent last (SET_FEATURES).
    pub acked: u64,
    /// Protocol features the backend offered last.
    pub protocol_offered: u64,
    /// Protocol features sent last; REPLY_ACK in here makes every message acknowledged.
    pub protocol_acked: u64,
}

impl Frontend {
    /// A front end that has negotiated nothing yet.
    #[must_use]
    pub fn new(connection: Connection) -> Self {
        Self { connection, offered: 0, acked: 0, protocol_offered: 0, protocol_acked: 0 }
    }

    /// The connection, for messages made by hand.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The connection, to change its limit.
    pub fn connection_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Sends a message that the specification always answers, and returns the answer.
    ///
    /// # Errors
    /// Those of the connection; `Protocol` when the answer is to another message or is no answer.
    pub fn ask(&self, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        self.connection.send(number, FLAG_VERSION, payload, fds)?;
        self.answer(number)
    }

    fn answer(&self, number: u32) -> Result<Message> {
        let reply = self.connection.recv()?;
        if reply.request != number || reply.flags & (FLAG_REPLY | 3) != FLAG_REPLY | FLAG_VERSION {
            return Err(Error::Protocol(format!(
                "asked {number}, got message {} with flags {:#x}",
                reply.request, reply.flags
            )));
        }
        Ok(reply)
    }

    /// Sends a message that is answered only under REPLY_ACK; waits for that acknowledgement if negotiated.
    ///
    /// # Errors
    /// `Refused` when the acknowledgement is not zero, and those of `ask`.
    pub fn tell(&self, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if self.protocol_acked & protocol::REPLY_ACK == 0 {
            return self.connection.send(number, FLAG_VERSION, payload, fds);
        }
        self.connection.send(number, FLAG_VERSION | FLAG_NEED_REPLY, payload, fds)?;
        match self.answer(number)?.u64()? {
            0 => Ok(()),
            status => Err(Error::Refused { request: number, status }),
        }
    }

    /// GET_FEATURES.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn get_features(&mut self) -> Result<u64> {
        self.offered = self.ask(request::GET_FEATURES, &[], &[])?.u64()?;
        Ok(self.offered)
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.acked = features;
        self.tell(request::SET_FEATURES, &wire::words(&[features]), &[])
    }

    /// Whether rings wait for SET_VRING_ENABLE (VHOST_USER_F_PROTOCOL_FEATURES acknowledged).
    #[must_use]
    pub fn rings_start_disabled(&self) -> bool {
        self.acked & feature::VHOST_USER_PROTOCOL_FEATURES != 0
    }

    /// GET_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn get_protocol_features(&mut self) -> Result<u64> {
        self.protocol_offered = self.ask(request::GET_PROTOCOL_FEATURES, &[], &[])?.u64()?;
        Ok(self.protocol_offered)
    }

    /// SET_PROTOCOL_FEATURES. Sent without asking for an acknowledgement, as QEMU does: REPLY_ACK is only being
    /// negotiated by it.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.connection.send(request::SET_PROTOCOL_FEATURES, FLAG_VERSION, &wire::words(&[features]), &[])?;
        self.protocol_acked = features;
        Ok(())
    }

    /// SET_OWNER.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_owner(&self) -> Result<()> {
        self.tell(request::SET_OWNER, &[], &[])
    }

    /// RESET_DEVICE.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn reset_device(&self) -> Result<()> {
        self.tell(request::RESET_DEVICE, &[], &[])
    }

    /// GET_QUEUE_NUM.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn get_queue_num(&self) -> Result<u64> {
        self.ask(request::GET_QUEUE_NUM, &[], &[])?.u64()
    }

    /// GET_MAX_MEM_SLOTS.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn get_max_mem_slots(&self) -> Result<u64> {
        self.ask(request::GET_MAX_MEM_SLOTS, &[], &[])?.u64()
    }

    /// SET_MEM_TABLE.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_mem_table(&self, regions: &[(MemoryRegion, BorrowedFd<'_>)]) -> Result<()> {
        let table: Vec<MemoryRegion> = regions.iter().map(|(region, _)| *region).collect();
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|(_, fd)| *fd).collect();
        self.tell(request::SET_MEM_TABLE, &wire::memory_table(&table), &fds)
    }

    /// ADD_MEM_REG.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn add_mem_reg(&self, region: &MemoryRegion, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(request::ADD_MEM_REG, &wire::single_region(region), &[fd])
    }

    /// REM_MEM_REG.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn rem_mem_reg(&self, region: &MemoryRegion) -> Result<()> {
        self.tell(request::REM_MEM_REG, &wire::single_region(region), &[])
    }

    /// SET_VRING_NUM: entries of ring `index`.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_num(&self, index: u32, entries: u32) -> Result<()> {
        self.tell(request::SET_VRING_NUM, &wire::state(index, entries), &[])
    }

    /// SET_VRING_BASE: next available entry of ring `index`.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.tell(request::SET_VRING_BASE, &wire::state(index, base), &[])
    }

    /// GET_VRING_BASE: stops ring `index` and returns its next available entry.
    ///
    /// # Errors
    /// Those of `ask`; `Protocol` when the reply names another ring.
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        let reply = self.ask(request::GET_VRING_BASE, &wire::state(index, 0), &[])?;
        match (wire::u32_at(&reply.payload, 0), wire::u32_at(&reply.payload, 4)) {
            (Some(ring), Some(base)) if ring == index => Ok(base),
            _ => Err(Error::Protocol(format!("GET_VRING_BASE {index}: {:?}", reply.payload))),
        }
    }

    /// SET_VRING_ADDR.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_addr(&self, addr: &VringAddr) -> Result<()> {
        self.tell(request::SET_VRING_ADDR, &addr.encode(), &[])
    }

    fn set_vring_fd(&self, number: u32, index: u8, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let value = u64::from(index) | if fd.is_none() { VRING_NO_FD } else { 0 };
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        self.tell(number, &wire::words(&[value]), &fds)
    }

    /// SET_VRING_KICK; `None` asks the backend to poll.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_kick(&self, index: u8, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(request::SET_VRING_KICK, index, fd)
    }

    /// SET_VRING_CALL; `None` when the guest has no interrupt for the ring.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_call(&self, index: u8, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(request::SET_VRING_CALL, index, fd)
    }

    /// SET_VRING_ERR.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_err(&self, index: u8, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(request::SET_VRING_ERR, index, fd)
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.tell(request::SET_VRING_ENABLE, &wire::state(index, u32::from(enable)), &[])
    }

    /// GET_CONFIG: `size` bytes from `offset`, `flags` as VU says (CH sends 1, writable).
    ///
    /// # Errors
    /// `Refused` when the backend sends back no bytes, `Protocol` when it sends another range.
    pub fn get_config(&self, offset: u32, size: u32, flags: u32) -> Result<Vec<u8>> {
        let reply =
            self.ask(request::GET_CONFIG, &wire::config(offset, flags, &vec![0; size as usize]), &[])?;
        if reply.payload.is_empty() || wire::u32_at(&reply.payload, 4) == Some(0) {
            return Err(Error::Refused { request: request::GET_CONFIG, status: 0 });
        }
        if wire::u32_at(&reply.payload, 0) != Some(offset)
            || wire::u32_at(&reply.payload, 4) != Some(size)
            || reply.payload.len() != 12 + size as usize
        {
            return Err(Error::Protocol(format!("GET_CONFIG answered {} bytes", reply.payload.len())));
        }
        Ok(reply.payload.get(12..).unwrap_or_default().to_vec())
    }

    /// SET_CONFIG: `bytes` at `offset`; flags 0 = written by the guest, 1 = live migration.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_config(&self, offset: u32, flags: u32, bytes: &[u8]) -> Result<()> {
        self.tell(request::SET_CONFIG, &wire::config(offset, flags, bytes), &[])
    }

    /// SET_BACKEND_REQ_FD with a fresh socket pair; returns our end of it.
    ///
    /// # Errors
    /// `Io` when no pair can be made, and those of `tell`.
    pub fn open_channel(&self) -> Result<Channel> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(Error::io("socketpair"))?;
        self.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Ok(Channel::new(Connection::new(ours)))
    }

    /// GET_INFLIGHT_FD: asks the backend to make an area for these rings.
    ///
    /// # Errors
    /// Those of `ask`; `Protocol` without a descriptor or with a short payload.
    pub fn get_inflight_fd(
        &self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(InflightDescription, OwnedFd)> {
        let question = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues, queue_size };
        let mut reply = self.ask(request::GET_INFLIGHT_FD, &question.encode(), &[])?;
        match (InflightDescription::decode(&reply.payload), reply.fds.pop()) {
            (Some(description), Some(fd)) => Ok((description, fd)),
            _ => Err(Error::Protocol("GET_INFLIGHT_FD came back without an area".into())),
        }
    }

    /// SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// Those of `tell`.
    pub fn set_inflight_fd(&self, description: &InflightDescription, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(request::SET_INFLIGHT_FD, &description.encode(), &[fd])
    }

    /// SET_LOG_BASE with a shared log (LOG_SHMFD): always answered, whatever REPLY_ACK says.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn set_log_base(&self, size: u64, offset: u64, fd: BorrowedFd<'_>) -> Result<()> {
        self.ask(request::SET_LOG_BASE, &wire::words(&[size, offset]), &[fd]).map(drop)
    }

    /// SET_DEVICE_STATE_FD: direction 0 save, 1 load; phase 0 stopped. Returns a descriptor if the backend chose
    /// one of its own.
    ///
    /// # Errors
    /// `Refused` when the low byte of the reply says so, and those of `ask`.
    pub fn set_device_state_fd(
        &self,
        direction: u32,
        phase: u32,
        fd: BorrowedFd<'_>,
    ) -> Result<Option<OwnedFd>> {
        let number = request::SET_DEVICE_STATE_FD;
        let mut reply = self.ask(number, &wire::state(direction, phase), &[fd])?;
        match reply.u64()? {
            status if status & 0xff != 0 => Err(Error::Refused { request: number, status }),
            status if status & 0x100 != 0 => Ok(None),
            _ => Ok(reply.fds.pop()),
        }
    }

    /// CHECK_DEVICE_STATE.
    ///
    /// # Errors
    /// `Refused` when the transfer failed, and those of `ask`.
    pub fn check_device_state(&self) -> Result<()> {
        match self.ask(request::CHECK_DEVICE_STATE, &[], &[])?.u64()? {
            0 => Ok(()),
            status => Err(Error::Refused { request: request::CHECK_DEVICE_STATE, status }),
        }
    }
}
