//! The COPIED flags of the active tables: set exactly where the refcount is 1.
//!
//! Last look at the mapping, after the refcounts were put right. Writes whole L2 tables and single L1 entries, after
//! checking that no other metadata lies there.

use graph::{BlockError, Errno};

use super::fixes::Except;
use super::{Checker, Storage};
use crate::qcow2::format::{COMPRESSED, COPIED, L1Entry, OFFSET_MASK, be64};

impl<S: Storage> Checker<'_, S> {
    pub(super) async fn check_copied(&mut self) -> Result<(), BlockError> {
        let bad = self.report.check_errors != 0 || self.report.corruptions != 0 || self.report.leaks != 0;
        // Without leave to fix errors only where the counts are known to be right.
        let repair = self.fix.errors || (self.fix.leaks && !bad);
        if self.fixing() && self.modified {
            // A flag may say 1 only after the count does.
            self.storage.flush().await?;
        }
        for i in 0..self.l1.len() {
            let Some(&entry) = self.l1.get(i) else { continue };
            let table = entry.offset();
            if table == 0 {
                continue;
            }
            let Ok(refcount) = self.refcount(table >> self.geo.cluster_bits()).await else { continue };
            if (refcount == 1) != entry.copied() {
                self.l1_flag(i, entry, refcount, repair).await?;
            }
            self.l2_flags(table, repair).await?;
        }
        Ok(())
    }

    async fn l1_flag(
        &mut self,
        i: usize,
        entry: L1Entry,
        refcount: u64,
        repair: bool,
    ) -> Result<(), BlockError> {
        self.report.corruptions += 1;
        let verb = if repair { "Repairing" } else { "ERROR" };
        self.say(format!(
            "{verb} OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={:x} refcount={refcount}",
            entry.0
        ));
        if !repair {
            return Ok(());
        }
        let word = if refcount == 1 { entry.0 | COPIED } else { entry.0 & !COPIED };
        let place = self.header.l1_offset + i as u64 * 8;
        if self.overlaps(place, 8, Except::L1) {
            self.report.check_errors += 1;
            return Err(Errno::EIO.into());
        }
        self.write(place, &word.to_be_bytes()).await.inspect_err(|_| self.report.check_errors += 1)?;
        if let Some(e) = self.l1.get_mut(i) {
            *e = L1Entry(word);
        }
        self.report.corruptions -= 1;
        self.report.corruptions_fixed += 1;
        Ok(())
    }

    pub(super) async fn l2_flags(&mut self, table: u64, repair: bool) -> Result<(), BlockError> {
        let mut bytes = vec![0; self.geo.cluster_size() as usize];
        if let Err(e) = self.storage.read(table, &mut bytes).await {
            self.say("ERROR: I/O error in check_oflag_copied".into());
            self.report.check_errors += 1;
            return Err(e);
        }
        let size = self.geo.l2_entry_size() as usize;
        let mut changed = 0;
        for at in (0..bytes.len()).step_by(size) {
            let word = be64(&bytes, at).unwrap_or(0);
            let host = word & OFFSET_MASK;
            let data_file = self.header.has_data_file();
            if word & COMPRESSED != 0 || (host == 0 && !(data_file && word & COPIED != 0)) {
                continue;
            }
            let refcount = match data_file {
                true => 1,
                false => match self.blocks.known(host >> self.geo.cluster_bits()) {
                    Some(n) => n,
                    None => match self.refcount(host >> self.geo.cluster_bits()).await {
                        Ok(n) => n,
                        Err(_) => continue,
                    },
                },
            };
            if (refcount == 1) == (word & COPIED != 0) {
                continue;
            }
            self.report.corruptions += 1;
            let verb = if repair { "Repairing" } else { "ERROR" };
            self.say(format!("{verb} OFLAG_COPIED data cluster: l2_entry={word:x} refcount={refcount}"));
            if repair {
                let word = if refcount == 1 { word | COPIED } else { word & !COPIED };
                if let Some(place) = bytes.get_mut(at..at + 8) {
                    place.copy_from_slice(&word.to_be_bytes());
                }
                changed += 1;
            }
        }
        if changed > 0 {
            if self.overlaps(table, self.geo.cluster_size(), Except::ActiveL2) {
                self.say(
                    "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error"
                        .into(),
                );
                self.report.check_errors += 1;
                return Err(Errno::EIO.into());
            }
            if let Err(e) = self.write(table, &bytes).await {
                self.say(format!("ERROR: Could not write L2 table: {}", e.errno()));
                self.report.check_errors += 1;
                return Err(e);
            }
            self.report.corruptions -= changed;
            self.report.corruptions_fixed += changed;
        }
        Ok(())
    }
}
