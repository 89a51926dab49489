//! Single L2 entries that are repaired while references are counted, and the look before every such write.
//!
//! Called by the walk and by the COPIED pass. A damaged table may point at other metadata: that is never overwritten.

use graph::{BlockError, Errno};

use super::{Checker, Storage};
use crate::qcow2::format::{RtEntry, SubBitmap, ZERO};

/// What is about to be written, and so may be where it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Except {
    L1,
    ActiveL2,
}

fn touches(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    a_len != 0 && b_len != 0 && a < b.saturating_add(b_len) && b < a.saturating_add(a_len)
}

impl<S: Storage> Checker<'_, S> {
    /// Whether a range lies in metadata other than the kind that is written: header, active L1, refcount table and
    /// blocks, snapshot table, the snapshots' L1 tables, bitmap directory, and (for an L1 entry) active L2 tables.
    pub(super) fn overlaps(&self, offset: u64, len: u64, except: Except) -> bool {
        let cluster = self.geo.cluster_size();
        let h = &self.header;
        let hit = |at: u64, size: u64| touches(offset, len, at, size);
        hit(0, cluster)
            || (except != Except::L1 && hit(h.l1_offset, h.l1_bytes()))
            || hit(h.reftable_offset, h.reftable_bytes())
            || hit(h.snapshots_offset, self.snapshots_bytes)
            || h.bitmaps.is_some_and(|b| hit(b.directory_offset, b.directory_size))
            || h.crypto.is_some_and(|c| hit(c.offset, c.length))
            || self.snapshots.iter().any(|s| hit(s.l1_offset, u64::from(s.l1_size) * 8))
            || self
                .blocks
                .table
                .iter()
                .any(|&e| RtEntry(e).offset() != 0 && hit(RtEntry(e).offset(), cluster))
            || (except != Except::ActiveL2
                && self.l1.iter().any(|e| e.offset() != 0 && hit(e.offset(), cluster)))
    }

    /// Makes an L2 entry read as zeroes without a place. Answers whether it was done; if not, the error is counted.
    ///
    /// # Errors
    /// `EIO` where the table lies on other metadata: then nothing it says can be trusted.
    pub(super) async fn zero_l2_entry(&mut self, place: u64, bitmap: SubBitmap) -> Result<bool, BlockError> {
        let mut entry = [0u8; 16];
        if self.geo.extended_l2() {
            // What was allocated reads as zeroes from now on, what was not stays as it is.
            let zero = SubBitmap::new(0, bitmap.zero() | bitmap.allocated());
            entry[8..].copy_from_slice(&zero.0.to_be_bytes());
        } else {
            entry[..8].copy_from_slice(&ZERO.to_be_bytes());
        }
        let len = self.geo.l2_entry_size();
        if self.overlaps(place, len, Except::ActiveL2) {
            self.say("ERROR: Overlap check failed".into());
            self.report.check_errors += 1;
            return Err(Errno::EIO.into());
        }
        if let Err(e) = self.write(place, &entry[..len as usize]).await {
            self.say(format!("ERROR: Failed to overwrite L2 table entry: {}", e.errno()));
            self.report.check_errors += 1;
            return Ok(false);
        }
        self.storage.flush().await?;
        self.report.corruptions -= 1;
        self.report.corruptions_fixed += 1;
        Ok(true)
    }
}
