//! COPIED flags of the active tables as the refcounts have them: set where the count is 1, and only there.
//!
//! Called when refcounts are durable (a flag must not say "1" before the disk does). Works on the disk; memory is told at
//! the end.

use graph::{NodeIo, Result, WriteFlags};
use host::IoVecs;

use crate::qcow2::commit::{MetaWrite, write_all};
use crate::qcow2::format::{COMPRESSED, COPIED, OFFSET_MASK};
use crate::qcow2::node::{FILE, Qcow2};

/// The unit the disk is trusted to write as a whole.
const SECTOR: usize = 512;

impl Qcow2 {
    /// See the module's words. Entries change one bit each, so that any mixture of old and new sectors is valid.
    pub(super) async fn refresh_copied(&self, io: &NodeIo) -> Result<()> {
        let file = io.child(FILE);
        let mut l1 = self.tables.l1_entries();
        let mut changed = false;
        for (index, entry) in l1.iter_mut().enumerate().filter(|(_, e)| **e & OFFSET_MASK != 0) {
            let mut table = self.read_l2(io, index, *entry).await?;
            self.refresh_table(io, *entry & OFFSET_MASK, &mut table).await?;
            let new = self.flagged(io, *entry).await?;
            changed |= new != *entry;
            *entry = new;
        }
        let offset = self.tables.l1_offset();
        if changed {
            let raw: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write(offset, &IoVecs::from_vec(raw), WriteFlags::empty()).await?;
        }
        self.commits.barrier(self, io).await?;
        self.tables.replace_l1(offset, &l1);
        Ok(())
    }

    async fn refresh_table(&self, io: &NodeIo, offset: u64, table: &mut [u64]) -> Result<()> {
        let file = io.child(FILE);
        let step = self.l2_step();
        // Others share it: its flags do not count, and it is not ours to change.
        let shared = self.space.refcount(&file, offset).await? > 1;
        let mut first = usize::MAX;
        let mut end = 0;
        for (i, word) in table.iter_mut().enumerate().step_by(step) {
            if *word & COMPRESSED != 0 || *word & OFFSET_MASK == 0 {
                continue;
            }
            let new = if shared { *word & !COPIED } else { self.flagged(io, *word).await? };
            if new != *word {
                *word = new;
                first = first.min(i);
                end = i + 1;
            }
        }
        if end == 0 {
            return Ok(());
        }
        let first = first * 8 / SECTOR * SECTOR;
        let end = (end * 8).next_multiple_of(SECTOR).min(table.len() * 8);
        let raw = table.get(first / 8..end / 8).unwrap_or_default();
        let data = raw.iter().flat_map(|w| w.to_be_bytes()).collect();
        write_all(&file, vec![MetaWrite { offset: offset + first as u64, data }]).await
    }

    /// An entry with the flag that its cluster's refcount asks for.
    async fn flagged(&self, io: &NodeIo, entry: u64) -> Result<u64> {
        let count = self.space.refcount(&io.child(FILE), entry & OFFSET_MASK).await?;
        Ok(if count == 1 { entry | COPIED } else { entry & !COPIED })
    }
}
