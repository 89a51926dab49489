//! The walk over what refers to host clusters: first what does not change, then the active tables.
//!
//! Called piece by piece. Says nothing of what it finds in the active tables: it notes where something is odd, and `end.rs` looks
//! again when nothing moves.

use graph::{CheckFix, NodeIo, Result};

use super::{Checker, Online, Phase};
use crate::qcow2::check::references::Walk;
use crate::qcow2::check::{NodeStorage, Storage};
use crate::qcow2::format::{COMPRESSED, COPIED, L1Entry, OFFSET_MASK, be64, entry::compressed_range};
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::open::{read_bytes, words};
use crate::qcow2::table::watch::Counted;

/// Metadata read in one piece, bytes; at least one table.
const PIECE: u64 = 2 << 20;
/// L1 entries looked at in one piece.
const ENTRIES: u64 = 1 << 14;

/// What the walk of one table finds out.
#[derive(Default)]
struct Seen {
    odd: bool,
    allocated: u64,
    fragmented: u64,
    compressed: u64,
    /// Where the next cluster lies if it is not a fragment.
    expected: u64,
}

impl Seen {
    /// Looks at an entry as it is counted.
    fn entry(&mut self, node: &Qcow2, file: u64, word: u64, bitmap: u64) {
        if word == 0 && bitmap == 0 {
            return;
        }
        let geo = node.geo;
        if !node.tables.decoder().valid(word, bitmap) {
            self.odd = true;
            return;
        }
        let host = word & OFFSET_MASK;
        let (offset, len) = match word & COMPRESSED {
            0 if host == 0 && !(geo.data_file() && word & COPIED != 0) => return,
            0 => (host, geo.cluster_size()),
            _ => compressed_range(word, geo),
        };
        self.allocated += 1;
        if word & COMPRESSED != 0 {
            self.compressed += 1;
            self.fragmented += 1;
        } else {
            self.fragmented += u64::from(self.expected != 0 && host != self.expected);
            self.expected = host + geo.cluster_size();
        }
        if geo.data_file() {
            // There it has to be set; nobody else refers to these clusters.
            self.odd |= word & COPIED == 0;
        } else {
            self.odd |= offset.saturating_add(len) > file;
        }
    }
}

impl Online {
    /// Snapshots, then what else stays as it is.
    pub(super) async fn snapshots(
        &mut self,
        node: &Qcow2,
        checker: &mut Checker<'_, NodeStorage>,
    ) -> Result<()> {
        let cluster = node.geo.cluster_size();
        let Phase::Snapshots { which, table } = &mut self.phase else { return Ok(()) };
        if *which < checker.snapshots.len() {
            let (entries, at) = match table {
                Some(table) => table,
                None => table.insert((checker.snapshot_l1(*which).await?, 0)),
            };
            let (mut read, mut looked) = (0, 0);
            while let Some(&word) = entries.get(*at).filter(|_| read < PIECE && looked < ENTRIES) {
                checker.walk_l1_entry(L1Entry(word), Walk { active: false, fix: CheckFix::NONE }).await?;
                *at += 1;
                looked += 1;
                read += if word == 0 { 0 } else { cluster };
            }
            self.done += looked * cluster;
            if *at >= entries.len() {
                *which += 1;
                *table = None;
            }
            return Ok(());
        }
        let header = &checker.header;
        let (l1, snapshots, crypto) =
            ((header.l1_offset, header.l1_bytes()), header.snapshots_offset, header.crypto);
        checker.refer(0, cluster)?;
        checker.refer(l1.0, l1.1)?;
        checker.refer(snapshots, checker.snapshots_bytes)?;
        if let Some(crypto) = crypto {
            checker.refer(crypto.offset, crypto.length)?;
        }
        checker.count_bitmaps().await?;
        self.phase = Phase::Tables(0);
        Ok(())
    }

    /// Some of the active tables.
    pub(super) async fn tables(
        &mut self,
        node: &Qcow2,
        io: &NodeIo,
        checker: &mut Checker<'_, NodeStorage>,
    ) -> Result<()> {
        let cluster = node.geo.cluster_size();
        let Phase::Tables(index) = &mut self.phase else { return Ok(()) };
        let (mut read, mut looked) = (0, 0);
        while *index < u64::from(node.tables.l1_len()) && read < PIECE && looked < ENTRIES {
            if let Some(entry) = node.tables.begin_table(*index) {
                read += cluster;
                let seen = walk_table(node, io, *index, entry).await?;
                if seen.odd {
                    self.odd.push(*index);
                }
                checker.report.allocated_clusters += seen.allocated;
                checker.report.fragmented_clusters += seen.fragmented;
                checker.report.compressed_clusters += seen.compressed;
            }
            *index += 1;
            looked += 1;
            self.done += cluster;
        }
        if *index >= u64::from(node.tables.l1_len()) {
            self.begin_blocks(node);
        }
        Ok(())
    }
}

/// Counts a table, whatever happens to it meanwhile.
async fn walk_table(node: &Qcow2, io: &NodeIo, index: u64, l1: u64) -> Result<Seen> {
    let tables = &node.tables;
    let file = io.child(FILE);
    let bytes = tables.slice_bytes();
    let first = index * tables.slices_per_table();
    let mut seen = Seen { odd: l1 & !COPIED & !OFFSET_MASK != 0, ..Seen::default() };
    let mut l1 = l1;
    let mut at = 0;
    // From here on the table, or what is left of it, is read as a whole.
    'whole: loop {
        let table = l1 & OFFSET_MASK;
        seen.odd |= node.geo.in_cluster(table) != 0 || table >= file.size();
        let rest = at..tables.slices_per_table();
        let unsteady: Vec<u128> = rest.clone().map(|i| tables.steady(first + i)).collect();
        let start = table + at * bytes as u64;
        let raw = read_bytes(&file, start, (rest.end - rest.start) * bytes as u64).await?;
        for (piece, mut unsteady) in raw.chunks(bytes).zip(unsteady) {
            let mut disk = words(piece);
            loop {
                let size = file.size();
                let see = |word, bitmap| seen.entry(node, size, word, bitmap);
                match tables.count_slice(first + at, l1, &mut disk, unsteady, see) {
                    Counted::Yes { differs } => {
                        seen.odd |= differs;
                        at += 1;
                        break;
                    }
                    Counted::Again => {
                        unsteady = tables.steady(first + at);
                        disk = words(&read_bytes(&file, table + at * bytes as u64, bytes as u64).await?);
                    }
                    Counted::Moved => match tables.begin_table(index) {
                        Some(entry) => {
                            l1 = entry;
                            continue 'whole;
                        }
                        // Tables go in drained sections only, and those begin the check again.
                        None => return Ok(seen),
                    },
                }
            }
        }
        return Ok(seen);
    }
}

impl<S: Storage> Checker<'_, S> {
    /// Words of a table on disk.
    pub(super) async fn words_at(&self, offset: u64, bytes: usize) -> Result<Vec<u64>> {
        let mut raw = vec![0; bytes];
        self.storage.read(offset, &mut raw).await?;
        Ok((0..bytes / 8).map(|i| be64(&raw, i * 8).unwrap_or(0)).collect())
    }
}
