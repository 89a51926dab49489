//! Requests on a LUKS node: through a buffer of our own, so that neither the guest sees ciphertext nor the disk plaintext.
//!
//! Called by views and by the graph's asynchronous path. Works in pieces of at most [`PIECE`]; big ones are en- and decrypted
//! on the worker pool, where that pays.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverInfo, Errno, Limits, Map, Node, NodeIo, Op, OverlayPlace,
    Perm, Reopen, ReopenContext, Result, Roles, StatusFlags, Truncate, WriteFlags, default_child_perm,
};
use host::IoVecs;
use serde_json::{Value, json};

use super::{FILE, Luks, SECTOR, Volume};

/// Largest buffer of a request, bytes.
const PIECE: usize = 1 << 20;
/// What is en- or decrypted in one go on the iothread, bytes: stays in the processor's cache.
const SCRATCH: usize = 16 << 10;

impl Luks {
    /// The key, without which there is nothing to read or write.
    fn volume(&self) -> Result<&Arc<Volume>> {
        self.volume
            .as_ref()
            .ok_or_else(|| BlockError::new(Errno::EIO, "The image was opened without its key"))
    }

    /// Where a range lies in the child.
    fn at(&self, offset: u64, len: u64) -> std::result::Result<u64, Errno> {
        let at = offset.checked_add(self.payload).ok_or(Errno::EFBIG)?;
        at.checked_add(len).filter(|end| *end <= i64::MAX as u64).ok_or(Errno::EFBIG)?;
        Ok(at)
    }

    async fn read_pieces(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let (child, volume) = (io.child(FILE), self.volume()?);
        let mut done = 0;
        while done < bufs.len() {
            let len = (bufs.len() - done).min(PIECE);
            let at = offset + done as u64;
            let buffer = IoVecs::alloc(len, mem_align(&child))?;
            child.read(self.at(at, len as u64)?, &buffer).await?;
            let to = bufs.slice(done, len);
            let sector = at / SECTOR as u64;
            if len >= volume.offload_from() {
                let data = volume.decrypt_on(io.local(), sector, buffer.to_vec()).await;
                to.copy_from(0, &data);
            } else {
                let mut scratch = vec![0; len.min(SCRATCH)];
                for start in (0..len).step_by(SCRATCH) {
                    let part = &mut scratch[..(len - start).min(SCRATCH)];
                    buffer.copy_to(start, part);
                    volume.decrypt(sector + (start / SECTOR) as u64, part);
                    to.copy_from(start, part);
                }
            }
            done += len;
        }
        Ok(())
    }

    async fn write_pieces(&self, io: &NodeIo, offset: u64, bufs: &IoVecs, flags: WriteFlags) -> Result<()> {
        let (child, volume) = (io.child(FILE), self.volume()?);
        let mut done = 0;
        while done < bufs.len() {
            let len = (bufs.len() - done).min(PIECE);
            let at = offset + done as u64;
            let in_child = self.at(at, len as u64)?;
            let buffer = IoVecs::alloc(len, mem_align(&child))?;
            let from = bufs.slice(done, len);
            let sector = at / SECTOR as u64;
            if len >= volume.offload_from() {
                let data = volume.encrypt_on(io.local(), sector, from.to_vec()).await;
                buffer.copy_from(0, &data);
            } else {
                let mut scratch = vec![0; len.min(SCRATCH)];
                for start in (0..len).step_by(SCRATCH) {
                    let part = &mut scratch[..(len - start).min(SCRATCH)];
                    from.copy_to(start, part);
                    volume.encrypt(sector + (start / SECTOR) as u64, part);
                    buffer.copy_from(start, part);
                }
            }
            child.write(in_child, &buffer, flags).await?;
            if in_child + len as u64 > self.file_size.load(Acquire) {
                self.file_size.fetch_max(child.size(), AcqRel);
            }
            done += len;
        }
        Ok(())
    }

    async fn truncate_file(&self, io: &NodeIo, size: u64, how: Truncate) -> Result<()> {
        let file_size = size
            .checked_add(self.payload)
            .filter(|s| *s <= i64::MAX as u64)
            .ok_or_else(|| BlockError::new(Errno::EFBIG, "The requested file size is too large"))?;
        let child = io.child(FILE);
        let old = self.size();
        // What reads as zeroes below does not here.
        let result = child.truncate(file_size, Truncate { zero: false, ..how }).await;
        // Also after a failure: half of it may have happened.
        self.file_size.store(child.size(), Release);
        result?;
        if how.zero && size > old {
            self.fill_with_zeroes(io, old - old % SECTOR as u64, size, old).await?;
        }
        Ok(())
    }

    /// Encrypted zeroes over `start..end`; `keep` says up to where the first sector holds data.
    async fn fill_with_zeroes(&self, io: &NodeIo, start: u64, end: u64, keep: u64) -> Result<()> {
        let mut at = start;
        while at < end {
            let len = (end - at).next_multiple_of(SECTOR as u64).min(PIECE as u64) as usize;
            let zeroes = IoVecs::alloc(len, SECTOR)?;
            if at < keep {
                self.read_pieces(io, at, &zeroes.slice(0, SECTOR)).await?;
                let kept = (keep - at) as usize;
                zeroes.slice(kept, SECTOR - kept).fill(0);
            }
            self.write_pieces(io, at, &zeroes, WriteFlags::empty()).await?;
            at += len as u64;
        }
        Ok(())
    }
}

/// What memory the child likes.
fn mem_align(child: &NodeIo) -> usize {
    let limits = child.limits();
    limits.mem_alignment.max(limits.request_alignment).clamp(512, 1 << 16) as usize
}

impl Driver for Luks {
    #[inline]
    fn map(&self, op: Op, _: u64, len: u64) -> Map<'_> {
        match op {
            Op::Flush => Map::Child { child: FILE, offset: 0, len },
            // Not passed on, as in QEMU: it would show which sectors are in use.
            Op::Discard => Map::Done { len },
            Op::Read | Op::Write | Op::WriteZeroes => Map::Drive,
        }
    }

    fn size(&self) -> u64 {
        self.file_size.load(Acquire).saturating_sub(self.payload)
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: SECTOR as u32, ..Limits::default() }
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(self.read_pieces(io, offset, bufs))
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        Box::pin(self.write_pieces(io, offset, bufs, flags))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(async move { io.child(FILE).flush().await })
    }

    fn block_status<'a>(&'a self, _: &'a NodeIo, _: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        let flags = StatusFlags::DATA | StatusFlags::ALLOCATED;
        Box::pin(std::future::ready(Ok(BlockStatus { flags, len, location: None })))
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.truncate_file(io, size, how))
    }

    fn supports_fua(&self) -> bool {
        // The child sees to it, by itself or by a flush.
        true
    }

    fn child_changed(&self, index: usize, child: Option<(&str, &Arc<Node>)>) {
        if index == FILE {
            self.file_size.store(child.map_or(0, |(_, node)| node.size()), Release);
        }
    }

    fn overlay_place(&self) -> OverlayPlace {
        OverlayPlace::BelowFormat
    }

    fn replaceable_children(&self) -> &'static [&'static str] {
        &["file"]
    }

    fn reopen<'a>(&'a self, cx: &'a ReopenContext, own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(super::reopen::reopen(cx, own))
    }

    fn child_perm(&self, _: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm) {
        let writes = Perm::WRITE | Perm::RESIZE;
        // The default for metadata is for formats that write theirs and move the end of the file. Here the header is only
        // read, and the data changes when the node's does.
        let (mut used, mut below) = default_child_perm(role, perm, shared, perm.writes());
        used.remove(writes);
        if role.contains(Roles::DATA) {
            used |= perm & writes;
        }
        below |= shared & writes;
        (used, below)
    }

    fn info(&self) -> DriverInfo {
        let specific = json!({"type": "luks", "data": self.info});
        DriverInfo {
            supports_fua: true,
            encrypted: true,
            format_specific: Some(specific),
            ..DriverInfo::default()
        }
    }
}
