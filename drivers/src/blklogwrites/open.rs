//! Opening a blklogwrites node: its children, and the end of a log that goes on.
//!
//! Called by the graph on the main thread; the log is read on an iothread.

use std::sync::Arc;

use graph::options::parse_options;
use graph::{BlockError, Errno, NodeIo, OpenContext, Opened, Result, Roles};
use host::IoVecs;
use host::sync::Ranges;
use serde_json::Value;

use super::format::{Bad, ENTRY_LEN, Entry, Super, sector_size};
use super::log::{ALIGN, Log};
use super::options::BlklogwritesOptions;
use super::{Blklogwrites, BlklogwritesNode, FILE, LOG};
use crate::child_size::ChildSize;

/// Sector size without an option, bytes.
const DEFAULT_SECTOR: i64 = 512;
/// Entries between superblocks without an option.
const DEFAULT_INTERVAL: i64 = 4096;

/// What the options say, as far as that is known without the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// Bytes; `None`: the log says it.
    pub(super) sector_size: Option<u32>,
    pub(super) interval: u64,
    pub(super) append: bool,
}

impl Settings {
    /// In QEMU's words.
    pub(super) fn new(options: &BlklogwritesOptions) -> Result<Settings> {
        let append = options.log_append.unwrap_or_default();
        if append && options.log_sector_size.is_some() {
            return Err(BlockError::invalid("log-append and log-sector-size are mutually exclusive"));
        }
        let size = sector_size(options.log_sector_size.unwrap_or(DEFAULT_SECTOR) as u64).map_err(words)?;
        let interval = options.log_super_update_interval.unwrap_or(DEFAULT_INTERVAL);
        let interval = u64::try_from(interval).ok().filter(|n| *n > 0).ok_or_else(|| {
            BlockError::invalid(format!("Invalid log superblock update interval {interval}"))
        })?;
        Ok(Settings { sector_size: (!append).then_some(size), interval, append })
    }
}

/// QEMU's words.
fn words(bad: Bad) -> BlockError {
    BlockError::invalid(match bad {
        Bad::Magic => "Invalid log superblock magic".to_owned(),
        Bad::Version(version) => format!("Unsupported log version {version}"),
        Bad::SectorSize(size) => format!("Invalid log sector size {size}"),
        Bad::Flags(flags) => format!("Invalid flags {flags:#x} in log entry"),
    })
}

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: BlklogwritesOptions = parse_options(value)?;
    let settings = Settings::new(&options)?;
    let file = cx.open_child("file", Roles::FILTER, options.file).await?;
    let log = cx.open_child("log", Roles::METADATA, options.log).await?;
    debug_assert_eq!((file, log), (FILE, LOG));
    let interval = settings.interval;
    let found = match settings.append {
        true => cx.child_io(LOG, |io| async move { find_end(&io).await }).await?,
        false => None,
    };
    let log = match found {
        Some((head, next)) => Log::new(head.sector_size, interval, head.entries, next, true),
        None => Log::new(settings.sector_size.unwrap_or(DEFAULT_SECTOR as u32), interval, 0, 1, false),
    };
    Ok(Opened::new(BlklogwritesNode(Arc::new(Blklogwrites {
        log,
        size: ChildSize::new(cx.child(FILE)?.size()),
        read_only: cx.options().read_only,
        ranges: Ranges::new(),
    }))))
}

async fn read(io: &NodeIo, offset: u64) -> Result<Vec<u8>> {
    let buffer = IoVecs::alloc(ENTRY_LEN, ALIGN)?;
    io.read(offset, &buffer).await.map_err(|e| e.context("Could not read the log"))?;
    Ok(buffer.to_vec())
}

/// The superblock of a log and the sector after its last entry; `None`: there is no log yet.
async fn find_end(io: &NodeIo) -> Result<Option<(Super, u64)>> {
    let size = io.size();
    if size == 0 {
        return Ok(None);
    }
    let head = Super::parse(&read(io, 0).await?).map_err(words)?;
    let mut sector = 1u64;
    for index in 0..head.entries {
        // Each entry takes a sector at least, so that this ends with the node, whatever number the superblock has.
        let offset = sector.checked_mul(head.sector_size.into()).filter(|o| *o < size);
        let outside =
            || BlockError::new(Errno::EINVAL, format!("Log entry {index} lies past the end of the log"));
        let offset = offset.ok_or_else(outside)?;
        let entry = Entry::parse(&read(io, offset).await?)
            .map_err(|bad| BlockError::invalid(format!("{} {index}", words(bad))))?;
        sector = entry.place().and_then(|n| n.checked_add(sector)).ok_or_else(outside)?;
    }
    Ok(Some((head, sector)))
}
