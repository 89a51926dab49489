//! Whole block requests over a session: what a guest's block layer does.
//!
//! Used by integration tests. Requests may be submitted in any number and completed in any order; the short
//! functions (`read`, `write`, ...) submit one and wait for it. Data are copied in and out of guest memory.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::blk::{SECTOR, Segment, op, status};
use crate::error::{Error, Result};
use crate::queue::Buffer;
use crate::session::{Guest, Session, Setup};
use crate::wire::feature;

/// What a request carries besides its header.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Nothing (flush).
    None,
    /// Bytes for the device.
    Out(Vec<u8>),
    /// Room for so many bytes from the device.
    In(u32),
}

/// A request to submit.
#[derive(Clone, Debug)]
pub struct Request {
    /// Request type, known or not.
    pub op: u32,
    /// First sector (512 bytes each).
    pub sector: u64,
    /// Data.
    pub payload: Payload,
    /// Lengths the data are cut into, one descriptor each; empty = one descriptor. The last takes the rest.
    pub cuts: Vec<u32>,
}

impl Request {
    /// A request with its data in one descriptor.
    #[must_use]
    pub fn new(op: u32, sector: u64, payload: Payload) -> Self {
        Self { op, sector, payload, cuts: Vec::new() }
    }
}

/// Names a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// Ring.
    pub queue: u16,
    /// Head of its chain.
    pub head: u16,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Which one.
    pub token: Token,
    /// Status byte; 0xff if the device did not write one.
    pub status: u8,
    /// Length the device put into the used ring.
    pub used_len: u32,
    /// What the device wrote, for `Payload::In`.
    pub data: Vec<u8>,
}

#[derive(Debug)]
struct Pending {
    block: u64,
    block_len: u64,
    data: u64,
    data_len: u32,
    device_writes: bool,
    status: u64,
}

/// A disk behind a vhost-user-blk backend.
#[derive(Debug)]
pub struct Disk {
    session: Session,
    pending: HashMap<Token, Pending>,
    finished: HashMap<Token, Completion>,
    indirect: bool,
    limit: Duration,
}

impl Disk {
    /// Connects with `setup`.
    ///
    /// # Errors
    /// Those of the session.
    pub fn connect(socket: &Path, setup: &Setup) -> Result<Self> {
        Ok(Self::new(Session::connect(socket, setup)?))
    }

    /// Drives an established session, with indirect descriptors if they were negotiated.
    #[must_use]
    pub fn new(session: Session) -> Self {
        let indirect = session.guest.features & feature::INDIRECT_DESC != 0;
        let limit = session.setup().limit;
        Self { session, pending: HashMap::new(), finished: HashMap::new(), indirect, limit }
    }

    /// The session below.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session below, to stop it, change its memory or read its configuration.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Chooses indirect tables or chains in the ring itself.
    pub fn set_indirect(&mut self, on: bool) {
        self.indirect = on;
    }

    /// Loses the connection and makes a new one to `socket` with the same guest. Requests in flight stay pending:
    /// a backend with an in-flight area finishes them.
    ///
    /// # Errors
    /// Those of `Session::reconnect`; the disk is gone then.
    pub fn reconnect(self, socket: &Path) -> Result<Self> {
        let setup = self.session.setup().clone();
        let Self { session, pending, finished, indirect, limit } = self;
        let session = Session::reconnect(socket, session.disconnect(), &setup)?;
        Ok(Self { session, pending, finished, indirect, limit })
    }

    /// Adds a request to ring `queue` without telling the device; `kick` does that.
    ///
    /// # Errors
    /// `Usage` when memory or descriptors are used up.
    pub fn submit(&mut self, queue: u16, request: &Request) -> Result<Token> {
        let (data_len, device_writes) = match &request.payload {
            Payload::None => (0, false),
            Payload::Out(bytes) => (bytes.len() as u32, false),
            Payload::In(len) => (*len, true),
        };
        let Guest { memory, queues, .. } = &mut self.session.guest;
        let ring =
            queues.get_mut(usize::from(queue)).ok_or_else(|| Error::Usage(format!("no queue {queue}")))?;
        // One block: data first (so that they are page aligned when large), then header, then status.
        let block_len = u64::from(data_len).next_multiple_of(16) + 32;
        let block = memory.block(block_len)?;
        let header = block + u64::from(data_len).next_multiple_of(16);
        let status = header + 16;
        let mut bytes = request.op.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&request.sector.to_le_bytes());
        // An unwritten status must not look like success.
        bytes.push(0xff);
        memory.write(header, &bytes)?;
        if let Payload::Out(data) = &request.payload {
            memory.write(block, data)?;
        }
        let mut buffers = vec![Buffer { addr: header, len: 16, write: false }];
        let mut at = 0;
        for cut in request.cuts.iter().copied().chain([u32::MAX]) {
            let len = cut.min(data_len - at);
            if len > 0 {
                buffers.push(Buffer { addr: block + u64::from(at), len, write: device_writes });
            }
            at += len;
        }
        buffers.push(Buffer { addr: status, len: 1, write: true });
        let head = match ring.add(&buffers, self.indirect) {
            Ok(head) => head,
            Err(error) => {
                memory.release(block, block_len);
                return Err(error);
            }
        };
        let token = Token { queue, head };
        self.pending
            .insert(token, Pending { block, block_len, data: block, data_len, device_writes, status });
        Ok(token)
    }

    /// Publishes what was submitted to `queue` and kicks if the device wants it.
    ///
    /// # Errors
    /// `Usage` without such a ring, `Io` when the kick fails.
    pub fn kick(&mut self, queue: u16) -> Result<bool> {
        self.ring(queue)?.publish()
    }

    fn ring(&mut self, queue: u16) -> Result<&mut crate::queue::Queue> {
        self.session
            .guest
            .queues
            .get_mut(usize::from(queue))
            .ok_or_else(|| Error::Usage(format!("no queue {queue}")))
    }

    /// Takes the next completion of `queue`, if there is one.
    ///
    /// # Errors
    /// `Protocol` when the device breaks the ring.
    pub fn poll(&mut self, queue: u16) -> Result<Option<Completion>> {
        match self.ring(queue)?.pop()? {
            Some(used) => self.finish(queue, used).map(Some),
            None => Ok(None),
        }
    }

    fn finish(&mut self, queue: u16, used: crate::queue::Used) -> Result<Completion> {
        let token = Token { queue, head: used.id as u16 };
        let pending = self
            .pending
            .remove(&token)
            .ok_or_else(|| Error::Protocol(format!("completion of unknown request {token:?}")))?;
        let memory = &mut self.session.guest.memory;
        let mut status = [0];
        memory.read(pending.status, &mut status)?;
        let mut data = vec![0; if pending.device_writes { pending.data_len as usize } else { 0 }];
        memory.read(pending.data, &mut data)?;
        memory.release(pending.block, pending.block_len);
        Ok(Completion { token, status: status[0], used_len: used.len, data })
    }

    /// Waits for any completion of `queue`, within the session's limit.
    ///
    /// # Errors
    /// `Timeout`, `Protocol`.
    pub fn wait_any(&mut self, queue: u16) -> Result<Completion> {
        let limit = self.limit;
        let used = self.ring(queue)?.pop_within(limit)?;
        self.finish(queue, used)
    }

    /// Waits for this request, keeping other completions for their own `wait`.
    ///
    /// # Errors
    /// `Timeout`, `Protocol`.
    pub fn wait(&mut self, token: Token) -> Result<Completion> {
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(done) = self.finished.remove(&token) {
                return Ok(done);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let used = self.ring(token.queue)?.pop_within(left)?;
            let done = self.finish(token.queue, used)?;
            self.finished.insert(done.token, done);
        }
    }

    /// Requests submitted and not yet completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Submits, kicks, waits.
    ///
    /// # Errors
    /// Those of the steps; a status other than 0 is no error here.
    pub fn run(&mut self, queue: u16, request: &Request) -> Result<Completion> {
        let token = self.submit(queue, request)?;
        self.kick(queue)?;
        self.wait(token)
    }

    fn run_ok(&mut self, request: &Request) -> Result<Completion> {
        let done = self.run(0, request)?;
        if done.status == status::OK { Ok(done) } else { Err(Error::Status(done.status)) }
    }

    /// Reads `len` bytes from byte `offset` (a multiple of 512) through ring 0.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        Ok(self.run_ok(&Request::new(op::IN, offset / SECTOR, Payload::In(len)))?.data)
    }

    /// Writes `data` at byte `offset` (a multiple of 512) through ring 0.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.run_ok(&Request::new(op::OUT, offset / SECTOR, Payload::Out(data.to_vec()))).map(drop)
    }

    /// Flushes.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn flush(&mut self) -> Result<()> {
        self.run_ok(&Request::new(op::FLUSH, 0, Payload::None)).map(drop)
    }

    /// The serial, without trailing zeroes.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn get_id(&mut self) -> Result<String> {
        let data = self.run_ok(&Request::new(op::GET_ID, 0, Payload::In(20)))?.data;
        let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
        Ok(String::from_utf8_lossy(data.get(..end).unwrap_or_default()).into_owned())
    }

    /// Discards these segments in one request.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn discard(&mut self, segments: &[Segment]) -> Result<()> {
        self.segments(op::DISCARD, segments)
    }

    /// Writes zeroes to these segments in one request.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn write_zeroes(&mut self, segments: &[Segment]) -> Result<()> {
        self.segments(op::WRITE_ZEROES, segments)
    }

    fn segments(&mut self, op: u32, segments: &[Segment]) -> Result<()> {
        let bytes = segments.iter().flat_map(Segment::encode).collect();
        self.run_ok(&Request::new(op, 0, Payload::Out(bytes))).map(drop)
    }
}
