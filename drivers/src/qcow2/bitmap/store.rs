//! Writing bitmaps into the image, and taking one out of it.
//!
//! Called inside drained sections: when the image is closed, and for `block-dirty-bitmap-remove`. The header switches from
//! one directory to another; what it leaves is given up, what it goes to was durable before.

use std::collections::HashMap;

use graph::{Bitmap, BlockError, Errno, NodeIo, Result};

use super::load::read_table;
use crate::qcow2::alloc::{FreeKind, Kind};
use crate::qcow2::format::bitmap::{DirEntry, FLAG_AUTO, FLAG_IN_USE, TableEntry, serialise_directory};
use crate::qcow2::format::{AUTOCLEAR_BITMAPS, BitmapsExt};
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::snapshot::Unlinked;

/// Most bitmap data written at once, bytes; a multiple of the largest cluster size.
const PIECE: u64 = 2 << 20;

/// Clusters that are referred to from the header now, or were until now.
type Places = Vec<(u64, u64)>;

impl Qcow2 {
    /// Stores the node's persistent bitmaps. They are consistent in the image afterwards: the node has to be closed then.
    ///
    /// # Errors
    /// The image is damaged or full, or what the disk says; what it held before is marked as in use then.
    pub(crate) async fn store_bitmaps(&self, io: &NodeIo) -> Result<()> {
        if self.settings.read_only {
            return Ok(());
        }
        let stored: Vec<_> = self.bitmaps.set.persistent();
        let stored: Vec<_> = stored.iter().filter(|b| !b.inconsistent() && !b.readonly()).collect();
        if stored.is_empty() {
            return Ok(());
        }
        self.commits.check()?;
        let mut directory = self.bitmaps.directory().clone();
        let mut new: Vec<Unlinked<'_>> = Vec::new();
        let mut old = Places::new();
        // There may be tens of thousands.
        let known: HashMap<Vec<u8>, usize> =
            directory.iter().enumerate().map(|(at, e)| (e.name.clone(), at)).collect();
        for bitmap in stored {
            let name = bitmap.name();
            let failed = |e: BlockError| e.context(format!("Failed to store bitmap '{name}'"));
            let at = known.get(name.as_bytes()).copied();
            if let Some(entry) = at.and_then(|at| directory.get(at)) {
                if !entry.in_use() {
                    let text = format!("Bitmap '{name}' already exists in the image");
                    return Err(BlockError::new(Errno::EEXIST, text));
                }
                old.extend(self.places_of(io, entry).await.map_err(failed)?);
            }
            let entry = self.write_bitmap(io, bitmap, &mut new).await.map_err(failed)?;
            match at.and_then(|at| directory.get_mut(at)) {
                Some(place) => *place = entry,
                None => directory.push(entry),
            }
        }
        self.switch_directory(io, directory, new, old).await
    }

    /// Takes a bitmap out of the image; nothing happens where it is not there.
    ///
    /// # Errors
    /// The image is damaged or full, or what the disk says; the bitmap is still there then.
    pub(crate) async fn remove_bitmap(&self, io: &NodeIo, name: &str) -> Result<()> {
        let mut directory = self.bitmaps.directory().clone();
        let Some(at) = directory.iter().position(|e| e.name == name.as_bytes()) else { return Ok(()) };
        if self.settings.read_only {
            return Err(BlockError::new(Errno::EPERM, format!("Bitmap '{name}' is in a read-only image")));
        }
        self.commits.check()?;
        let entry = directory.remove(at);
        // One whose table makes no sense leaks; a check finds it.
        let old = self.places_of(io, &entry).await.unwrap_or_else(|e| {
            log::warn!("what bitmap '{name}' holds is not given up: {e}");
            Places::new()
        });
        self.switch_directory(io, directory, Vec::new(), old).await
    }

    /// All clusters of a bitmap: (offset, bytes).
    async fn places_of(&self, io: &NodeIo, entry: &DirEntry) -> Result<Places> {
        let header = self.header().clone();
        let mut places = vec![(entry.table_offset, u64::from(entry.table_size) * 8)];
        for entry in read_table(&io.child(FILE), &header, entry).await? {
            if let TableEntry::Stored(offset) = entry {
                places.push((offset, self.geo.cluster_size()));
            }
        }
        Ok(places)
    }

    /// Writes data and table of a bitmap to new clusters.
    async fn write_bitmap<'a>(
        &'a self,
        io: &NodeIo,
        bitmap: &Bitmap,
        new: &mut Vec<Unlinked<'a>>,
    ) -> Result<DirEntry> {
        let size = self.geo.cluster_size();
        let len = bitmap.serialised_len();
        let clusters = self.geo.clusters(len);
        let mut table = vec![0u64; clusters as usize];
        let mut at = 0;
        while at < clusters {
            if bitmap.serialised_is_zero(at * size, size) {
                at += 1;
                continue;
            }
            let mut end = at + 1;
            while end < clusters && (end - at) * size < PIECE && !bitmap.serialised_is_zero(end * size, size)
            {
                end += 1;
            }
            let mut data = vec![0; ((end * size).min(len) - at * size) as usize];
            bitmap.serialise(at * size, &mut data)?;
            let place = Unlinked::write(self, io, data).await?;
            for (word, n) in table.iter_mut().skip(at as usize).take((end - at) as usize).zip(0u64..) {
                *word = TableEntry::Stored(place.offset() + n * size).encode();
            }
            new.push(place);
            at = end;
        }
        let raw = table.iter().flat_map(|w| w.to_be_bytes()).collect();
        let place = Unlinked::write(self, io, raw).await?;
        let entry = DirEntry {
            table_offset: place.offset(),
            table_size: u32::try_from(clusters).map_err(|_| BlockError::from(Errno::EFBIG))?,
            flags: if bitmap.recording() { FLAG_AUTO } else { 0 },
            granularity_bits: bitmap.granularity().trailing_zeros() as u8,
            name: bitmap.name().as_bytes().to_vec(),
        };
        debug_assert_eq!(entry.flags & FLAG_IN_USE, 0);
        new.push(place);
        Ok(entry)
    }

    /// Makes `directory` that of the image. `new`: what it refers to that the one before did not; `old`: the other way round.
    async fn switch_directory(
        &self,
        io: &NodeIo,
        directory: Vec<DirEntry>,
        new: Vec<Unlinked<'_>>,
        mut old: Places,
    ) -> Result<()> {
        let file = io.child(FILE);
        let raw = serialise_directory(&directory);
        let directory_size = raw.len() as u64;
        let place = Unlinked::write(self, io, raw).await?;
        self.write_counts_durably(io).await?;
        let count = u32::try_from(directory.len()).map_err(|_| BlockError::from(Errno::EFBIG))?;
        let ext =
            (count != 0).then_some(BitmapsExt { count, directory_size, directory_offset: place.offset() });
        if let Some(before) = self.header().bitmaps {
            old.push((before.directory_offset, before.directory_size));
        }
        self.header
            .rewrite(&file, |header| {
                header.bitmaps = ext;
                match ext {
                    Some(_) => header.autoclear |= AUTOCLEAR_BITMAPS,
                    None => header.autoclear &= !AUTOCLEAR_BITMAPS,
                }
            })
            .await?;
        place.keep(Kind::BitmapDirectory);
        new.into_iter().for_each(|place| place.keep(Kind::Bitmap));
        *self.bitmaps.directory() = directory;
        for (offset, bytes) in old {
            self.space.remove_metadata(offset, bytes);
            self.space.free_later(offset, bytes, FreeKind::Other);
        }
        Ok(())
    }
}
