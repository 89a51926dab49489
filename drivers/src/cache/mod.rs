//! `cache`: keeps blocks of its child in memory, and what does not fit there in a second node.
//!
//! A filter. Written through or back; see [`options`] for what users see. Called by the graph; must not reach anything but
//! its children.
//!
//! | file | subject |
//! |---|---|
//! | `block` | one block: its sectors and who works on it |
//! | `layout` | how the memory is shared out |
//! | `table` | the blocks of one shard, and the claims on them |
//! | `room` | memory for one more block: the clock, the swap node |
//! | `back` | dirty sectors on their way to the file |
//! | `read`, `write` | requests |
//! | `io`, `open`, `reopen`, `options` | the driver |
//!
//! **Who may touch a block.** The blocks are spread over shards, each with a lock that is held for a look or a copy and
//! never across waiting. Whoever has to wait with a block in hand *claims* it first: alone (to fill, to replace, to move
//! it), or shared (its dirty sectors are being written: it may be read and dirtied again meanwhile). A request claims blocks
//! in ascending order; whoever makes room claims without waiting: so nobody waits in a circle.
//!
//! **What is never lost.** Dirty sectors leave the cache only when the file has taken them, or when newer content for all
//! of them has reached the file. A write to the file that fails leaves them dirty.
//!
//! Lock order: `Shard::table` and in it `Slots::state`; all others are leaves. Wakers are called after they are released.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Acquire, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use graph::{DriverDef, DriverKind, NodeId};

mod back;
mod block;
mod io;
mod layout;
mod open;
mod options;
mod read;
mod reopen;
mod room;
mod table;
#[cfg(test)]
mod tests;
mod write;

use options::{CacheMode, CacheReads, Settings};
use room::Slots;
use table::{Filter, Shard};

/// Index of the child that is cached.
const FILE: usize = 0;
/// Index of the child that takes what has no room in memory.
const SWAP: usize = 1;

/// `cache`.
pub(crate) const CACHE: DriverDef = DriverDef {
    name: "cache",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(options::CacheOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A cache node.
struct CacheNode {
    cache: Arc<Cache>,
}

/// Counters of what has happened, for the statistics.
#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    bypassed: AtomicU64,
    evictions: AtomicU64,
    written_back: AtomicU64,
    swapped_out: AtomicU64,
    swapped_in: AtomicU64,
    errors: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}

/// What all requests on a node share.
struct Cache {
    /// Size of a block, bytes.
    block: usize,
    /// Name of the swap node, and its size, bytes.
    swap: Option<String>,
    swap_size: u64,
    /// Changes in drained sections alone; read by the control side.
    settings: Mutex<Settings>,
    /// Whether the settings say `writeback`, and `reads=bypass`, and a size of 0.
    back: AtomicBool,
    bypass: AtomicBool,
    off: AtomicBool,
    /// The node may be written.
    writable: AtomicBool,
    /// What a reopening that has been prepared makes of settings and `writable`: what is said about permissions is for
    /// afterwards.
    planned: Mutex<Option<(Settings, bool)>>,
    shards: Box<[Shard]>,
    /// Shards in use - 1.
    shard_mask: AtomicUsize,
    slots: Slots,
    filter: Filter,
    /// Blocks with sectors only the cache holds.
    unsaved: AtomicUsize,
    /// Blocks in memory.
    resident: AtomicUsize,
    /// Size of the child as of the last we heard (`child_changed`, own writes), bytes.
    file_size: AtomicU64,
    /// The child whose content the blocks show.
    file_id: Mutex<Option<NodeId>>,
    counters: Counters,
}

impl Cache {
    fn is_off(&self) -> bool {
        self.off.load(Relaxed)
    }

    fn writes_back(&self) -> bool {
        self.back.load(Relaxed)
    }

    fn size(&self) -> u64 {
        self.file_size.load(Acquire)
    }

    /// The block of a byte, and where in it.
    fn locate(&self, offset: u64) -> (u64, usize) {
        let block = self.block as u64;
        (offset / block, (offset % block) as usize)
    }

    /// Where a block begins, bytes.
    fn start(&self, index: u64) -> u64 {
        index * self.block as u64
    }

    /// Takes new settings over that leave the memory as it is; nothing is dirty.
    fn reconfigure(&self, settings: Settings) {
        self.back.store(settings.mode == CacheMode::Writeback, Relaxed);
        self.bypass.store(settings.reads == CacheReads::Bypass, Relaxed);
        self.off.store(settings.size == 0, Relaxed);
        *table::lock(&self.settings) = settings;
    }

    /// Takes new settings over; the cache is empty.
    fn configure(&self, settings: Settings, layout: layout::Layout) {
        self.reconfigure(settings);
        self.shard_mask.store(layout.shards - 1, Relaxed);
        for (at, shard) in self.shards.iter().enumerate() {
            shard.table().set_limit(if at < layout.shards { layout.frames } else { 0 });
        }
        self.slots.set_limit(layout.slots);
    }
}
