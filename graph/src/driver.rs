//! What a driver is to the graph: the [`Driver`] trait, its limits and answers, and the registry of drivers by name.
//!
//! Implemented in the drivers' crate, called by the views (any iothread) and by the control side (main thread). The graph
//! never names a driver: the process hands it a [`Registry`].

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use host::{File, IoVecs};
use serde_json::Value;

use crate::create::CreateDef;
use crate::debug::DebugEvent;
use crate::error::{BlockError, Errno, Result};
use crate::image::{CheckFix, CheckReport, CheckStep, NewSnapshot, OnlineCheck, SnapshotInfo, SnapshotRef};
use crate::io::NodeIo;
use crate::node::Node;
use crate::perm::Perm;
use crate::reopen::{Reopen, ReopenContext};
use crate::role::Roles;

pub use crate::control::open::{OpenContext, Opened};

/// A future of the data path or of the main thread: stays on the thread that made it.
pub type BoxFut<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// Kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Reads data.
    Read = 0,
    /// Writes data.
    Write = 1,
    /// Makes a range read as zeroes.
    WriteZeroes = 2,
    /// Gives a range up; what it reads afterwards is up to the driver.
    Discard = 3,
    /// Makes everything written before durable. Has no range: offset and length are 0.
    Flush = 4,
}

impl Op {
    /// How many kinds there are.
    pub const COUNT: usize = 5;
    /// All kinds, in order of their numbers.
    pub const ALL: [Op; Op::COUNT] = [Op::Read, Op::Write, Op::WriteZeroes, Op::Discard, Op::Flush];

    /// The bit of this kind in a set of kinds.
    pub(crate) const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Whether it changes data.
    pub const fn modifies(self) -> bool {
        matches!(self, Op::Write | Op::WriteZeroes | Op::Discard)
    }
}

/// Where the first part of an asked range lives. `len` never exceeds what was asked and is not 0, except for
/// [`Op::Flush`], whose ranges are empty.
#[derive(Clone, Copy)]
pub enum Map<'a> {
    /// In a child.
    Child {
        /// The index [`OpenContext::open_child`] returned.
        child: usize,
        /// Where in the child, bytes.
        offset: u64,
        /// For how long, bytes.
        len: u64,
    },
    /// In a child, if that has the range itself: not in its backing file, where the request would have to be driven. Filters
    /// in between count as the image they show. An answer to reads only.
    Own {
        /// As for `Child`.
        child: usize,
        /// As for `Child`.
        offset: u64,
        /// As for `Child`.
        len: u64,
    },
    /// In a host file.
    File {
        /// The file.
        file: &'a Arc<File>,
        /// Where in the file, bytes.
        offset: u64,
        /// For how long, bytes.
        len: u64,
    },
    /// Reads as zeroes; an answer to reads only.
    Zero {
        /// For how long, bytes.
        len: u64,
    },
    /// Nothing needs doing: a read leaves the buffer as it is, a write vanishes.
    Done {
        /// For how long, bytes.
        len: u64,
    },
    /// Cannot be said without waiting or without seeing data: call the asynchronous method.
    Drive,
    /// Fails.
    Error(Errno),
}

bitflags::bitflags! {
    /// How a write is meant.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct WriteFlags: u8 {
        /// Durable before it completes.
        const FUA = 0x01;
        /// Writes what is there already for whoever looks (copy-on-read); needs WRITE_UNCHANGED only.
        const UNCHANGED = 0x02;
        /// Nothing that overlaps may run at the same time: waits for it and holds back what comes later.
        const SERIALISING = 0x04;
        /// One compressed cluster: offset aligned to it, length a cluster's or up to the end of the node. `ENOTSUP` where
        /// the node cannot ([`Driver::supports_compressed`]).
        const COMPRESSED = 0x08;
    }
}

bitflags::bitflags! {
    /// How a write of zeroes is meant.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ZeroFlags: u8 {
        /// Blocks may be given up if they read as zeroes then.
        const MAY_UNMAP = 0x01;
        /// Fail with `ENOTSUP` rather than write buffers of zeroes.
        const NO_FALLBACK = 0x02;
        /// Durable before it completes.
        const FUA = 0x04;
    }
}

bitflags::bitflags! {
    /// What is known about a range, as QEMU's `BDRV_BLOCK_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct StatusFlags: u8 {
        /// Has data of its own.
        const DATA = 0x01;
        /// Reads as zeroes.
        const ZERO = 0x02;
        /// This node decides the content, not its backing file.
        const ALLOCATED = 0x04;
        /// [`BlockStatus::location`] tells where the data is, byte for byte.
        const OFFSET_VALID = 0x08;
        /// The range reaches the end of the node.
        const EOF = 0x10;
        /// The range is stored compressed; comes with DATA and without a location.
        const COMPRESSED = 0x20;
    }
}

/// Where the bytes of a range are, when they lie somewhere byte for byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a child at this offset.
    Child {
        /// Index of the child.
        child: usize,
        /// Bytes.
        offset: u64,
    },
    /// In the node's own host file at this offset.
    File {
        /// Bytes.
        offset: u64,
    },
}

/// What is known about the first `len` bytes of an asked range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// What holds for all of it.
    pub flags: StatusFlags,
    /// Bytes; not 0, not more than asked.
    pub len: u64,
    /// Set together with [`StatusFlags::OFFSET_VALID`].
    pub location: Option<Location>,
}

/// What requests a node takes. 0 stands for "no limit" in the maxima and for "unknown" elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of reads and writes are multiples of this (the graph sees to it). A power of two, at least 1.
    pub request_alignment: u32,
    /// Memory of buffers starts at multiples of this; at least 1. `host` bounces what does not.
    pub mem_alignment: u32,
    /// Longest read or write, bytes.
    pub max_transfer: u64,
    /// Most pieces of memory in one request.
    pub max_iov: u32,
    /// Best length of a request, bytes.
    pub opt_transfer: u64,
    /// Smallest length that makes sense, bytes.
    pub min_transfer: u64,
    /// Longest discard, bytes.
    pub max_discard: u64,
    /// Discards below this granularity do nothing, bytes.
    pub discard_alignment: u32,
    /// Longest write of zeroes, bytes.
    pub max_write_zeroes: u64,
    /// Best granularity of writes of zeroes, bytes.
    pub write_zeroes_alignment: u32,
    /// Logical block size of the medium, bytes; for what a guest is told.
    pub logical_block_size: u32,
    /// Physical block size of the medium, bytes; for what a guest is told.
    pub physical_block_size: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            request_alignment: 1,
            mem_alignment: 1,
            max_transfer: 0,
            max_iov: 0,
            opt_transfer: 0,
            min_transfer: 0,
            max_discard: 0,
            discard_alignment: 0,
            max_write_zeroes: 0,
            write_zeroes_alignment: 0,
            logical_block_size: 0,
            physical_block_size: 0,
        }
    }
}

/// The smaller of two limits where 0 means none.
fn min_nonzero(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, x) | (x, 0) => x,
        (a, b) => a.min(b),
    }
}

impl Limits {
    /// This node's limits together with those of a child requests are handed to: what a user of the node had better
    /// respect. `request_alignment` stays the node's own, since the child aligns for itself.
    #[must_use]
    pub fn above(self, child: Limits) -> Limits {
        Limits {
            request_alignment: self.request_alignment,
            mem_alignment: self.mem_alignment.max(child.mem_alignment),
            max_transfer: min_nonzero(self.max_transfer, child.max_transfer),
            max_iov: min_nonzero(self.max_iov.into(), child.max_iov.into()) as u32,
            opt_transfer: self.opt_transfer.max(child.opt_transfer),
            min_transfer: self.min_transfer.max(child.min_transfer),
            max_discard: self.max_discard,
            discard_alignment: self.discard_alignment.max(child.discard_alignment),
            max_write_zeroes: self.max_write_zeroes,
            write_zeroes_alignment: self.write_zeroes_alignment.max(child.write_zeroes_alignment),
            logical_block_size: self.logical_block_size.max(child.logical_block_size),
            physical_block_size: self.physical_block_size.max(child.physical_block_size),
        }
    }

    /// Repairs what a driver got wrong in ways that would loop or divide by zero.
    #[must_use]
    pub(crate) fn sane(mut self) -> Limits {
        let pow2 = |n: u32| n.clamp(1, 1 << 30).next_power_of_two();
        self.request_alignment = pow2(self.request_alignment);
        self.mem_alignment = pow2(self.mem_alignment);
        if self.max_transfer != 0 {
            let align = u64::from(self.request_alignment);
            self.max_transfer = (self.max_transfer / align * align).max(align);
        }
        self
    }
}

/// How space is set aside when a node grows.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Prealloc {
    /// Not at all.
    #[default]
    Off,
    /// Metadata only.
    Metadata,
    /// By `fallocate`.
    Falloc,
    /// By writing zeroes.
    Full,
}

/// How [`Driver::truncate`] is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Truncate {
    /// The size must be exactly this; otherwise a device that cannot change may stay larger.
    pub exact: bool,
    /// What happens to new space.
    pub prealloc: Prealloc,
    /// New space must read as zeroes.
    pub zero: bool,
}

/// What a driver tells about a node for the queries.
#[derive(Clone, Debug, Default)]
pub struct DriverInfo {
    /// The file name the user gave, where there is one; empty otherwise (the graph asks the primary child then).
    pub filename: String,
    /// Bytes allocated on the host; `None` when unknown (the graph asks the primary child then).
    pub allocated: Option<u64>,
    /// Cluster size, bytes.
    pub cluster_size: Option<u32>,
    /// Whether the image is encrypted.
    pub encrypted: bool,
    /// Whether the image was left open by a crash.
    pub dirty: bool,
    /// The name of the backing file as it is written in the image.
    pub backing_file: Option<String>,
    /// The format of the backing file as it is written in the image.
    pub backing_format: Option<String>,
    /// `format-specific` of the image information: `{"type": .., "data": ..}`.
    pub format_specific: Option<Value>,
    /// `driver-specific` of the statistics.
    pub driver_stats: Option<Value>,
    /// A write with FUA set is honoured; otherwise the graph flushes after it.
    pub supports_fua: bool,
}

/// One open image, device, filter or format. `map`, `size`, `limits` and the asynchronous methods are called on any
/// iothread, many at a time; the others on the main thread.
///
/// The asynchronous methods are called through [`NodeIo`], which has checked bounds, aligned the request to
/// `request_alignment` and split it to the maxima. They reach children by `io.child(index)`, and never call `io` itself for
/// their own node: such a request could wait for a misaligned neighbour that waits for the outer one. They must finish: dropping a
/// future in the middle is not something the graph does outside of tearing down a process.
/// A driver's object may be asked for as what it is (`&dyn Any`), by the driver itself on another thread.
pub trait Driver: Any + Send + Sync {
    /// Where a range lives; the hot path. Must not block, allocate, or take a lock that is held across waiting.
    ///
    /// A node with a backing file may give a range space of its own while it answers a write, but only one that its backing
    /// file does not reach: what shows through may be on its way up (`copy-on-read`), and who carries it up relies on
    /// being told of every write to it ([`NodeIo::exclusive`]).
    fn map(&self, op: Op, offset: u64, len: u64) -> Map<'_>;

    /// Size in bytes, as of now (an atomic in the driver).
    fn size(&self) -> u64;

    /// Limits of this driver alone; read when a view is built, i.e. may change with permissions or size, in drained
    /// sections.
    fn limits(&self) -> Limits;

    /// Fills `bufs` from `offset`. The range is inside the node, but for its end: where the size is no multiple of
    /// `request_alignment` the last block may be asked for as a whole; what is not there reads as zeroes.
    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()>;

    /// Writes `bufs` at `offset`. Past the end only where the writer holds RESIZE. [`WriteFlags::FUA`] arrives only if
    /// [`Driver::supports_fua`].
    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()>;

    /// Makes a range read as zeroes, cheaply. `ENOTSUP` (also for a range too misaligned): the graph writes zeroes.
    fn write_zeroes<'a>(
        &'a self,
        _io: &'a NodeIo,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFut<'a, ()> {
        not_supported()
    }

    /// Gives a range up. `ENOTSUP` is not an error to the user.
    fn discard<'a>(&'a self, _io: &'a NodeIo, _offset: u64, _len: u64) -> BoxFut<'a, ()> {
        not_supported()
    }

    /// Makes everything completed before durable, children included.
    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()>;

    /// What is known about the first part of a range.
    fn block_status<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus>;

    /// Changes the size, bytes. Runs inside a drained section on an iothread.
    fn truncate<'a>(&'a self, _io: &'a NodeIo, _size: u64, _how: Truncate) -> BoxFut<'a, ()> {
        // A control client reads these words; they are QEMU's.
        let refusal = BlockError::unsupported("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(refusal)))
    }

    /// Whether [`WriteFlags::FUA`] may be passed; otherwise the graph flushes after such a write.
    fn supports_fua(&self) -> bool {
        false
    }

    /// What the users of this node mean for a child: (used, shared). Must be monotone and a pure function of its
    /// arguments and of what the driver knew when it opened. [`crate::perm::default_child_perm`] is the usual body.
    fn child_perm(&self, child: usize, role: Roles, perm: Perm, shared: Perm) -> (Perm, Perm);

    /// Main thread, prepare: get everything that is needed to serve users with `perm` and `shared`: locks, a writable
    /// file. Nothing is given back yet. On failure everything is as before the call; no [`Driver::abort_perm`] follows
    /// for it. The default is for nodes that hold nothing outside the graph.
    fn check_perm(&self, _perm: Perm, _shared: Perm) -> Result<()> {
        Ok(())
    }

    /// Main thread, commit: `perm` and `shared` hold from now on, a subset of what was checked; gives back the rest.
    /// Cannot fail: an error in giving back is logged.
    fn set_perm(&self, _perm: Perm, _shared: Perm) {}

    /// Main thread, abort: back to what held before the last [`Driver::check_perm`] that succeeded.
    fn abort_perm(&self) {}

    /// Main thread, drained: a child got another size, was replaced, attached (an index that is new, or was empty) or
    /// detached (`None`). Called for all children of a node when something below it changed. Filters and raw take the
    /// new size from here; the default is for nodes whose size is their own and whose children never change.
    fn child_changed(&self, _child: usize, _now: Option<(&str, &Arc<Node>)>) {}

    /// Whether [`WriteFlags::COMPRESSED`] may be passed.
    fn supports_compressed(&self) -> bool {
        false
    }

    /// Looks for contradictions in the image's metadata and repairs what `fix` says. With anything to fix the caller has
    /// drained the node.
    fn check<'a>(&'a self, _io: &'a NodeIo, _fix: CheckFix) -> BoxFut<'a, CheckReport> {
        not_supported()
    }

    /// One piece, a few ms at most, of a check that repairs nothing and goes on while requests do. Between two pieces the
    /// node may be drained and changed; `drained` says that it is drained now, which is so after [`CheckStep::Drained`].
    /// The default is [`Driver::check`], drained.
    fn check_online<'a>(
        &'a self,
        io: &'a NodeIo,
        _check: &'a mut OnlineCheck,
        drained: bool,
    ) -> BoxFut<'a, CheckStep> {
        if !drained {
            return Box::pin(std::future::ready(Ok(CheckStep::Drained)));
        }
        let whole = self.check(io, CheckFix::NONE);
        Box::pin(async move { whole.await.map(CheckStep::Done) })
    }

    /// Whether the image can hold snapshots.
    fn supports_snapshots(&self) -> bool {
        false
    }

    /// The snapshots inside the image, in the order the image has them.
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }

    /// Makes an internal snapshot. Drained by the caller.
    fn snapshot_create<'a>(&'a self, _io: &'a NodeIo, _new: NewSnapshot) -> BoxFut<'a, SnapshotInfo> {
        not_supported()
    }

    /// Goes back to an internal snapshot; the size may change. Drained by the caller.
    fn snapshot_apply<'a>(&'a self, _io: &'a NodeIo, _which: SnapshotRef) -> BoxFut<'a, ()> {
        not_supported()
    }

    /// Removes an internal snapshot and tells what it was. Drained by the caller.
    fn snapshot_delete<'a>(&'a self, _io: &'a NodeIo, _which: SnapshotRef) -> BoxFut<'a, SnapshotInfo> {
        not_supported()
    }

    /// Writes another name and format of the backing file into the image; `None`: the image says it has none. Drained by
    /// the caller.
    fn change_backing_file<'a>(
        &'a self,
        _io: &'a NodeIo,
        _name: Option<String>,
        _format: Option<String>,
    ) -> BoxFut<'a, ()> {
        not_supported()
    }

    /// The index of the child that shows through where this node has nothing of its own; it may be an empty slot.
    fn backing_child(&self) -> Option<usize> {
        None
    }

    /// Whether some kind of image of this driver can hold bitmaps.
    fn supports_bitmaps(&self) -> bool {
        false
    }

    /// Whether one more bitmap of this name and granularity (bytes) could be stored in this image, besides those in the
    /// node's `BitmapSet` that are persistent already.
    ///
    /// # Errors
    /// Why not, without naming bitmap and node.
    fn make_bitmap_persistent_ok(&self, _name: &str, _granularity: u32) -> Result<()> {
        Err(BlockError::errno_only(Errno::ENOTSUP))
    }

    /// Stores the persistent bitmaps of the node's `BitmapSet` in the image. Drained by the caller; also called before
    /// [`Driver::close`] of a node that has some.
    fn store_bitmaps<'a>(&'a self, _io: &'a NodeIo) -> BoxFut<'a, ()> {
        not_supported()
    }

    /// Removes a bitmap from the image, if it is there. Drained by the caller.
    fn remove_stored_bitmap<'a>(&'a self, _io: &'a NodeIo, _name: String) -> BoxFut<'a, ()> {
        not_supported()
    }

    /// Where the overlay goes when a snapshot of this node is made. Filters are looked through anyway.
    fn overlay_place(&self) -> OverlayPlace {
        OverlayPlace::Here
    }

    /// Whether one more child may be attached, and what it will be: its name on the edge (a new one, or one whose slot is
    /// empty) and its roles. [`Driver::child_changed`] follows when it is there. Main thread.
    ///
    /// # Errors
    /// The default: this driver takes no further children.
    fn add_child(&self) -> Result<(String, Roles)> {
        Err(BlockError::unsupported("The node does not support adding a child"))
    }

    /// Whether this child may be taken away; [`Driver::child_changed`] with `None` follows when it is gone. Main thread.
    ///
    /// # Errors
    /// The default: this driver needs all of its children.
    fn remove_child(&self, _child: usize) -> Result<()> {
        Err(BlockError::unsupported("The node does not support removing a child"))
    }

    /// Names of the members of this driver's options that are references to children that `blockdev-reopen` may let lead
    /// elsewhere; the graph carries that out, and they are not in what [`Driver::reopen`] gets.
    fn replaceable_children(&self) -> &'static [&'static str] {
        &[]
    }

    /// Main thread, drained, prepare: gets ready to run with these options of its own (all of them: what is absent returns
    /// to its default) and with `cx.after()`; may do I/O. Nothing has changed for users yet. An option that cannot change is
    /// refused: `Cannot change the option 'x'`.
    fn reopen<'a>(&'a self, cx: &'a ReopenContext, _own: Value) -> BoxFut<'a, Box<dyn Reopen>> {
        Box::pin(std::future::ready(Err(BlockError::unsupported(format!(
            "Block format '{}' used by node '{}' does not support reopening files",
            cx.driver_name(),
            cx.node_name(),
        )))))
    }

    /// A drain above this node begins: requests that the driver holds back of its own accord (a throttle) must go now, or
    /// the drain waits for them. Main thread; nests, each call has its [`Driver::drain_end`].
    fn drain_begin(&self) {}

    /// A drain above this node has ended.
    fn drain_end(&self) {}

    /// Whether it has set something aside in a child, and holds permissions of the child for it, that it can give back
    /// ([`Driver::give_back`]).
    fn has_set_aside(&self) -> bool {
        false
    }

    /// Gives back what it has set aside in its children: before edges near it change, and when it has lost a user. Runs on an
    /// iothread, perhaps beside requests; permissions are found anew afterwards.
    fn give_back<'a>(&'a self, _io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The parent passes this point; only `blkdebug` listens. Any thread.
    fn debug_event(&self, _event: DebugEvent) {}

    /// For the queries. Main thread; must not wait for the disk longer than a `stat` does.
    fn info(&self) -> DriverInfo {
        DriverInfo::default()
    }

    /// The node is going: no request is in flight, none will come, its permissions are gone. Asynchronous work (marking
    /// an image clean) belongs here: it runs on an iothread with the children still open.
    fn close<'a>(&'a self, _io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The answer of an operation a driver does not have.
pub fn not_supported<'a, T: 'a>() -> BoxFut<'a, T> {
    Box::pin(std::future::ready(Err(BlockError::errno_only(Errno::ENOTSUP))))
}

/// Where an overlay for a snapshot goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlayPlace {
    /// Above the node.
    Here,
    /// Above what its primary child shows, if that is an image of a format, which knows how to have overlays: what the node
    /// does to its data (encryption) happens to those of the overlay, too.
    BelowFormat,
    /// Above each of its children, which are copies of one disk.
    EachChild,
}

/// What sort of driver it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// Ends the graph: a file, a device, a network peer.
    Protocol,
    /// Interprets its child's content.
    Format,
    /// Shows its child's content.
    Filter,
}

/// One line of the driver list.
#[derive(Clone, Copy)]
pub struct DriverDef {
    /// The value of `driver` on the wire.
    pub name: &'static str,
    /// Its sort.
    pub kind: DriverKind,
    /// Schema of the driver's own options (without the common ones): `|| schemars::schema_for!(Options)`.
    pub schema: fn() -> schemars::Schema,
    /// Opens a node on the main thread; must not block it. The value holds the driver's own options, an object without
    /// the common members; parse it with [`crate::options::parse_options`].
    pub open: fn(OpenContext, Value) -> BoxFut<'static, Opened>,
    /// How images are created, where it can.
    pub create: Option<CreateDef>,
}

impl std::fmt::Debug for DriverDef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriverDef")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// The drivers of this process by name.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    drivers: Vec<DriverDef>,
}

impl Registry {
    /// A registry of these drivers; a later entry of the same name wins.
    pub fn new(drivers: impl IntoIterator<Item = DriverDef>) -> Registry {
        let mut registry = Registry::default();
        for def in drivers {
            registry.drivers.retain(|d| d.name != def.name);
            registry.drivers.push(def);
        }
        registry
    }

    /// The driver of that name.
    pub fn get(&self, name: &str) -> Option<&DriverDef> {
        self.drivers.iter().find(|d| d.name == name)
    }

    /// All drivers, in the order they were registered.
    pub fn iter(&self) -> impl Iterator<Item = &DriverDef> {
        self.drivers.iter()
    }
}

impl std::fmt::Debug for Map<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Map::Child { child, offset, len } => write!(f, "Child {child} at {offset}+{len}"),
            Map::Own { child, offset, len } => write!(f, "Own in {child} at {offset}+{len}"),
            Map::File { offset, len, .. } => write!(f, "File at {offset}+{len}"),
            Map::Zero { len } => write!(f, "Zero {len}"),
            Map::Done { len } => write!(f, "Done {len}"),
            Map::Drive => f.write_str("Drive"),
            Map::Error(errno) => write!(f, "Error({errno})"),
        }
    }
}
