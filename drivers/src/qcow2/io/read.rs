//! Driven reads: what `map` could not answer in one piece.
//!
//! Called by the graph, and by writes for the surroundings they copy. Pieces of one request run at the same time.

use graph::{BlockError, DebugEvent, NodeIo, Result};
use host::IoVecs;

use super::join::Pieces;
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::table::{Kind, Run};

/// Encrypted data goes through a buffer of at most this size, bytes.
pub(super) const MAX_BOUNCE: u64 = 1 << 20;

impl Qcow2 {
    /// Reads; what lies past the end of the disk reads as zeroes.
    pub(crate) async fn read_range(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let len = bufs.len() as u64;
        let inside = self.size().saturating_sub(offset).min(len);
        if inside < len {
            bufs.slice(inside as usize, (len - inside) as usize).fill(0);
        }
        let mut pieces = Pieces::default();
        let mut done = 0;
        let mut found = Ok(());
        while done < inside && !pieces.failed() {
            let at = offset + done;
            let run = match pieces.during(self.tables.find(self, io, at, inside - done)).await {
                Ok(run) => run,
                Err(e) => {
                    found = Err(e);
                    break;
                }
            };
            let part = bufs.slice(done as usize, run.len as usize);
            done += run.len;
            match run.kind {
                Kind::Zero => part.fill(0),
                Kind::Unallocated if self.backing_size().is_none_or(|size| at >= size) => part.fill(0),
                // The last piece needs no company.
                _ if done >= inside && pieces.is_idle() => {
                    return self.read_run(io, at, run, part).await;
                }
                _ => pieces.add(Box::pin(self.read_run(io, at, run, part))).await,
            }
        }
        pieces.finish().await.and(found)
    }

    async fn read_run(&self, io: &NodeIo, at: u64, run: Run, part: IoVecs) -> Result<()> {
        match (run.kind, run.host, self.backing) {
            (Kind::Normal, Some(host), _) => {
                io.child(FILE).debug_event(DebugEvent::ReadAio);
                self.read_host(io, at, host, &part).await
            }
            // Past its end the child reads as zeroes.
            (Kind::Unallocated, _, Some(backing)) => {
                io.child(FILE).debug_event(DebugEvent::ReadBackingAio);
                io.child(backing).read(at, &part).await
            }
            (Kind::Compressed, ..) => self.read_compressed(io, at, run.entry, &part).await,
            (Kind::Zero | Kind::Unallocated, ..) => {
                part.fill(0);
                Ok(())
            }
            (Kind::Invalid | Kind::Normal, ..) => Err(self.invalid_entry(io, at, run.entry).await),
        }
    }

    /// The error for an entry that is not valid; the image is marked.
    pub(super) async fn invalid_entry(&self, io: &NodeIo, at: u64, entry: u64) -> BlockError {
        self.corrupt(io, self.tables.complaint(at, entry), None, None).await
    }

    /// Reads guest data from where it lies, deciphered. `at` is the guest offset.
    pub(super) async fn read_host(&self, io: &NodeIo, at: u64, host: u64, part: &IoVecs) -> Result<()> {
        let child = io.child(self.data);
        let Some(crypt) = &self.crypt else { return child.read(host, part).await };
        let len = part.len() as u64;
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(MAX_BOUNCE);
            // Whole sectors, whatever is wanted of them: guest and host offset agree below the cluster size.
            let skip = (host + done) & 511;
            let start = host + done - skip;
            let end = (host + done + piece).next_multiple_of(512);
            let buffer = IoVecs::alloc((end - start) as usize, 4096).map_err(BlockError::from)?;
            child.read(start, &buffer).await?;
            let sector = crypt.sector(at + done - skip, start);
            let data = crypt.volume.decrypt_on(io.local(), sector, buffer.to_vec()).await;
            let plain = data.get(skip as usize..(skip + piece) as usize).unwrap_or(&[]);
            part.slice(done as usize, piece as usize).copy_from(0, plain);
            done += piece;
        }
        Ok(())
    }
}
