//! What an image is checked on: a file in memory, or the image file of a node.
//!
//! The checker and whoever starts it use [`Storage`]; crash harnesses and fuzzers use [`Memory`] through
//! [`super::check_memory`], nodes use [`NodeStorage`]. Knows nothing of the format.

use std::future::Future;

use graph::{BlockError, Errno, NodeIo, Prealloc, Result, Truncate, WriteFlags};
use host::IoVecs;

/// Bytes with a length. Reads past the end give zeroes, writes past it make it longer.
pub trait Storage {
    /// Length, bytes.
    fn size(&self) -> u64;
    /// Fills `buf`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> impl Future<Output = Result<()>>;
    /// Writes all of `data`.
    fn write(&self, offset: u64, data: &[u8]) -> impl Future<Output = Result<()>>;
    /// Makes everything written before durable.
    fn flush(&self) -> impl Future<Output = Result<()>>;
    /// Makes it at least this long.
    fn grow(&self, size: u64) -> impl Future<Output = Result<()>>;
    /// Gives a range up whose content nobody needs; may do nothing.
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>>;
}

/// An image in memory. `limit` is what it may grow to.
pub struct Memory {
    bytes: std::cell::RefCell<Vec<u8>>,
    limit: u64,
}

impl Memory {
    /// Takes the bytes; writes up to `limit` make it longer.
    pub fn new(bytes: Vec<u8>, limit: u64) -> Memory {
        Memory { bytes: std::cell::RefCell::new(bytes), limit }
    }

    /// Gives the bytes back.
    pub fn into_inner(self) -> Vec<u8> {
        self.bytes.into_inner()
    }

    fn end(&self, offset: u64, len: usize) -> Result<u64> {
        offset
            .checked_add(len as u64)
            .filter(|&end| end <= self.limit)
            .ok_or_else(|| BlockError::new(Errno::EFBIG, "The image in memory is full"))
    }
}

impl Storage for Memory {
    fn size(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.borrow();
        let rest = usize::try_from(offset).ok().and_then(|o| bytes.get(o..)).unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        buf[n..].fill(0);
        Ok(())
    }

    async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let end = self.end(offset, data.len())? as usize;
        let mut bytes = self.bytes.borrow_mut();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[end - data.len()..end].copy_from_slice(data);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn grow(&self, size: u64) -> Result<()> {
        let end = self.end(size, 0)? as usize;
        let mut bytes = self.bytes.borrow_mut();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }

    async fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
}

/// The image file of a node: a child, as its parent uses it.
pub struct NodeStorage {
    io: NodeIo,
}

impl NodeStorage {
    /// `io` is the child with the image file (`io.child(…)` of the format node).
    pub fn new(io: NodeIo) -> NodeStorage {
        NodeStorage { io }
    }
}

impl Storage for NodeStorage {
    fn size(&self) -> u64 {
        self.io.size()
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bufs = IoVecs::from_vec(vec![0; buf.len()]);
        self.io.read(offset, &bufs).await?;
        bufs.copy_to(0, buf);
        Ok(())
    }

    async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.io.write(offset, &IoVecs::from_vec(data.to_vec()), WriteFlags::empty()).await
    }

    async fn flush(&self) -> Result<()> {
        self.io.flush().await
    }

    async fn grow(&self, size: u64) -> Result<()> {
        if self.io.size() >= size {
            return Ok(());
        }
        self.io.truncate(size, Truncate { exact: false, prealloc: Prealloc::Off, zero: false }).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.io.discard(offset, len).await
    }
}
