//! References of persistent bitmaps: directory, tables, data clusters.
//!
//! Part of the counting walk; repairs nothing. A directory that cannot be read ends the check, as in QEMU.

use graph::BlockError;

use super::{Checker, Storage, read_words};
use crate::qcow2::format::bitmap::{self, TableEntry};

impl<S: Storage> Checker<'_, S> {
    pub(super) async fn count_bitmaps(&mut self) -> Result<(), BlockError> {
        let Some(ext) = self.header.bitmaps else { return Ok(()) };
        self.refer(ext.directory_offset, ext.directory_size)?;
        let mut bytes = vec![0; ext.directory_size as usize];
        self.storage.read(ext.directory_offset, &mut bytes).await?;
        let all = match bitmap::parse_directory(&bytes, ext.count, self.header.virtual_size(), self.geo) {
            Ok(all) => all,
            Err(e) => {
                self.report.corruptions += 1;
                self.say(format!("ERROR {}", e.message));
                return Err(e.into());
            }
        };
        drop(bytes);
        for b in all {
            self.refer(b.table_offset, u64::from(b.table_size) * 8)?;
            // A table has as many entries as 512 MiB of bitmap data have clusters, so 8 MiB at most.
            let table = read_words(self.storage, b.table_offset, b.table_size as usize).await?;
            for word in table {
                match TableEntry::decode(word, self.geo) {
                    Ok(TableEntry::Stored(offset)) => self.refer(offset, self.geo.cluster_size())?,
                    Ok(_) => {}
                    Err(e) => {
                        self.report.corruptions += 1;
                        self.say(format!("ERROR {}", e.message));
                        return Err(e.into());
                    }
                }
            }
        }
        Ok(())
    }
}
