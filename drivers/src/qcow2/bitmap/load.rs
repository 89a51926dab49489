//! Reading the bitmaps of an image that is being opened, and marking them as in use.
//!
//! Called by `open` on an iothread, with the image file as the node. What is read is as hostile as any image: the format
//! bounds every table, the graph the memory of all bitmaps together.

use graph::{Bitmap, BlockError, NodeIo, Result, WriteFlags};
use host::IoVecs;

use crate::qcow2::commit::{HeaderIo, Health};
use crate::qcow2::format::bitmap::{
    DirEntry, FLAG_AUTO, FLAG_IN_USE, TableEntry, parse_directory, serialise_directory,
};
use crate::qcow2::format::{AUTOCLEAR_BITMAPS, Header};
use crate::qcow2::open::{read_bytes, words};

/// Most bitmap data read at once, bytes; a multiple of the largest cluster size.
const PIECE: u64 = 2 << 20;

/// Reads the directory and what it names; consistent bitmaps with their content. `writable`: the node may change them.
pub(crate) async fn read(
    io: &NodeIo,
    header: &Header,
    writable: bool,
) -> Result<(Vec<DirEntry>, Vec<Bitmap>)> {
    let Some(ext) = header.bitmaps else { return Ok(Default::default()) };
    let raw = read_bytes(io, ext.directory_offset, ext.directory_size).await;
    let raw = raw.map_err(|e| e.context("Failed to read bitmap directory"))?;
    let directory = parse_directory(&raw, ext.count, header.virtual_size(), header.geometry())?;
    let mut memory = 0u64;
    let mut bitmaps = Vec::with_capacity(directory.len());
    for entry in &directory {
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        let failed = |e: BlockError| e.context(format!("Could not read bitmap '{name}' from image"));
        let granularity = 1u32 << entry.granularity_bits;
        let bitmap = Bitmap::new(&name, granularity, header.virtual_size()).map_err(failed)?;
        memory = memory.saturating_add(bitmap.memory());
        if memory > graph::bitmap::MAX_NODE_BITMAP_BYTES {
            return Err(BlockError::new(
                graph::Errno::ENOMEM,
                "The bitmaps of the image are too large together",
            ));
        }
        bitmap.set_persistent(true);
        bitmap.set_recording(entry.flags & FLAG_AUTO != 0);
        bitmap.set_readonly(!writable);
        if entry.in_use() {
            bitmap.set_inconsistent();
        } else {
            read_data(io, header, entry, &bitmap).await.map_err(failed)?;
        }
        bitmaps.push(bitmap);
    }
    Ok((directory, bitmaps))
}

/// The table of a bitmap.
pub(super) async fn read_table(io: &NodeIo, header: &Header, entry: &DirEntry) -> Result<Vec<TableEntry>> {
    let raw = read_bytes(io, entry.table_offset, u64::from(entry.table_size) * 8).await?;
    let geo = header.geometry();
    words(&raw).into_iter().map(|w| TableEntry::decode(w, geo).map_err(BlockError::from)).collect()
}

async fn read_data(io: &NodeIo, header: &Header, entry: &DirEntry, bitmap: &Bitmap) -> Result<()> {
    let geo = header.geometry();
    entry.check_table_size(header.virtual_size(), geo)?;
    let table = read_table(io, header, entry).await?;
    let size = geo.cluster_size();
    let mut index = 0usize;
    while let Some(first) = table.get(index) {
        let at = index as u64 * size;
        match *first {
            TableEntry::Zeroes => index += 1,
            TableEntry::Ones => {
                bitmap.deserialise_ones(at, size);
                index += 1;
            }
            TableEntry::Stored(offset) => {
                // Clusters that follow each other are read together.
                let most = (PIECE / size) as usize;
                let run = table.iter().skip(index).take(most).zip(0u64..);
                let run = run.take_while(|(e, n)| **e == TableEntry::Stored(offset + n * size)).count();
                let len = (run as u64 * size).min(bitmap.serialised_len().saturating_sub(at));
                bitmap.deserialise(at, &read_bytes(io, offset, len).await?)?;
                index += run;
            }
        }
    }
    Ok(())
}

/// Before the image is written for the first time: what it says of its bitmaps will not hold from now on. Changes
/// `directory` alike.
pub(crate) async fn mark_in_use(
    io: &NodeIo,
    header: &HeaderIo,
    health: &Health,
    directory: &mut [DirEntry],
) -> Result<()> {
    let Some(ext) = header.header().bitmaps else { return Ok(()) };
    if directory.iter().all(DirEntry::in_use) {
        return Ok(());
    }
    directory.iter_mut().for_each(|e| e.flags |= FLAG_IN_USE);
    // While the directory is written in place nobody may trust it.
    header.set_autoclear(io, AUTOCLEAR_BITMAPS, false).await?;
    health.barrier(io, None).await?;
    let data = IoVecs::from_vec(serialise_directory(directory));
    io.write(ext.directory_offset, &data, WriteFlags::empty()).await?;
    health.barrier(io, None).await?;
    header.set_autoclear(io, AUTOCLEAR_BITMAPS, true).await?;
    health.barrier(io, None).await
}
