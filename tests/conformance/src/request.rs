//! One request, sent to a node in one of the two ways requests go.

use std::sync::Arc;

use graph::{BlockError, Errno, NodeIo, Op, Target, WriteFlags, ZeroFlags};
use host::{File, IoVecs};

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the asynchronous methods.
    Driven,
    /// By `View::resolve` as far as that answers, like a ring.
    Mapped,
}

/// What a read left in the bytes nobody wrote.
pub const UNTOUCHED: u8 = 0xa5;

/// Errors as numbers, as a guest sees them.
pub type Answer<T> = Result<T, Errno>;

/// A node and the way its requests go.
#[derive(Clone)]
pub struct Client {
    /// The root of a view.
    pub io: NodeIo,
    /// The way.
    pub way: Way,
}

fn errno(e: BlockError) -> Errno {
    e.errno()
}

fn from_io(e: std::io::Error) -> Errno {
    BlockError::from(e).errno()
}

/// Where a request ends without the driver.
enum End {
    File(Arc<File>, u64),
    Zero,
    Done,
}

impl Client {
    /// The other way to the same node.
    #[must_use]
    pub fn other(&self) -> Client {
        let way = match self.way {
            Way::Driven => Way::Mapped,
            Way::Mapped => Way::Driven,
        };
        Client { io: self.io.clone(), way }
    }

    /// Where the request goes: `None` for the driver.
    fn resolve(&self, op: Op, offset: u64, len: u64) -> Answer<Option<End>> {
        if self.way == Way::Driven {
            return Ok(None);
        }
        match self.io.view().resolve(op, offset, len).target {
            Target::File { file, offset } => Ok(Some(End::File(Arc::clone(file), offset))),
            Target::Zero => Ok(Some(End::Zero)),
            Target::Done => Ok(Some(End::Done)),
            Target::Drive => Ok(None),
            Target::Error(errno) => Err(errno),
        }
    }

    /// Reads into memory made of several pieces, none of them aligned to anything.
    ///
    /// # Errors
    /// What the node says.
    pub async fn read(&self, offset: u64, len: u64) -> Answer<Vec<u8>> {
        let bufs = IoVecs::from_vec(vec![UNTOUCHED; len as usize]);
        let _stay = self.io.stay();
        match self.resolve(Op::Read, offset, len)? {
            None => self.io.read(offset, &bufs).await.map_err(errno)?,
            Some(End::File(file, at)) => self.io.local().read(&file, &bufs, at).await.map_err(from_io)?,
            Some(End::Zero) => bufs.fill(0),
            Some(End::Done) => {}
        }
        Ok(bufs.to_vec())
    }

    /// Writes.
    ///
    /// # Errors
    /// What the node says.
    pub async fn write(&self, offset: u64, data: &[u8], fua: bool) -> Answer<()> {
        let bufs = IoVecs::from_vec(data.to_vec());
        let _stay = self.io.stay();
        match self.resolve(Op::Write, offset, data.len() as u64)? {
            None => {
                let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                self.io.write(offset, &bufs, flags).await.map_err(errno)
            }
            Some(End::File(file, at)) => self.io.local().write(&file, &bufs, at, fua).await.map_err(from_io),
            Some(End::Zero | End::Done) => Ok(()),
        }
    }

    /// Writes zeroes.
    ///
    /// # Errors
    /// What the node says.
    pub async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Answer<()> {
        let _stay = self.io.stay();
        match self.resolve(Op::WriteZeroes, offset, len)? {
            None => self.io.write_zeroes(offset, len, flags).await.map_err(errno),
            Some(End::Done) => Ok(()),
            Some(End::Zero | End::File(..)) => Err(Errno::EINVAL),
        }
    }

    /// Discards.
    ///
    /// # Errors
    /// What the node says.
    pub async fn discard(&self, offset: u64, len: u64) -> Answer<()> {
        let _stay = self.io.stay();
        match self.resolve(Op::Discard, offset, len)? {
            None => self.io.discard(offset, len).await.map_err(errno),
            Some(End::Done) => Ok(()),
            Some(End::Zero | End::File(..)) => Err(Errno::EINVAL),
        }
    }

    /// Flushes.
    ///
    /// # Errors
    /// What the node says.
    pub async fn flush(&self) -> Answer<()> {
        let _stay = self.io.stay();
        match self.resolve(Op::Flush, 0, 0)? {
            None => self.io.flush().await.map_err(errno),
            Some(End::File(file, _)) => self.io.local().fdatasync(&file).await.map_err(from_io),
            Some(End::Zero | End::Done) => Ok(()),
        }
    }
}

/// Runs futures on the calling iothread at the same time; their results in order.
pub async fn join_all<T: 'static>(
    io: &NodeIo,
    futures: impl IntoIterator<Item = impl Future<Output = T> + 'static>,
) -> Vec<Option<T>> {
    let waiting: Vec<_> = futures
        .into_iter()
        .map(|future| {
            let (tx, rx) = host::sync::oneshot::channel();
            io.local().spawn(async move {
                let _ = tx.send(future.await);
            });
            rx
        })
        .collect();
    let mut results = Vec::new();
    for rx in waiting {
        // None: the task panicked.
        results.push(rx.await.ok());
    }
    results
}
