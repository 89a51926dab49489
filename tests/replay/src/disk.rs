//! The disk everything runs on: files in memory whose every change is logged, behind a driver named `file`.
//!
//! A [`Disk`] takes the place of the host's files ([`registry`] puts its driver over the real one), so that a node of any
//! format can be opened on it by file name, whole chains included. Its log says for each change when it was started and
//! when it took effect; from that `states` makes what a crash may leave behind. On the simulated host operations take
//! virtual time of the seed's choosing, so that they overtake each other. Must not know any format.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use conformance::rng::Rng;
use graph::options::parse_options;
use graph::{
    BlockError, BlockStatus, BoxFut, Driver, DriverDef, DriverInfo, DriverKind, Errno, Limits, Location, Map,
    NodeIo, Op, Opened, Perm, Registry, Result, Roles, StatusFlags, Truncate, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::image::Image;

/// Granularity of visible sizes, bytes; also what a crash never tears.
pub const SECTOR: u64 = 512;

/// What one operation does to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A write.
    Write(Vec<u8>),
    /// Zeroes without data, bytes.
    Zero(u64),
    /// A range given up, bytes; it reads as zeroes, or as something else if the disk is mean.
    Discard(u64),
    /// The file has another length now: the offset.
    Truncate,
    /// Everything that completed before this started is durable when this has completed.
    Flush,
    /// A flush that failed: what it should have made durable may never become so, whatever a later flush says.
    FailedFlush,
}

/// One logged operation, in the order of taking effect.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Number of the file.
    pub file: usize,
    /// Begin of the range; the length for [`Change::Truncate`].
    pub offset: u64,
    /// What it does.
    pub change: Change,
    /// When it was started, by the disk's clock.
    pub started: u64,
    /// When it took effect and completed.
    pub done: u64,
    /// Durable by itself, when completed.
    pub fua: bool,
}

/// What a rule for failures is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt<'a> {
    /// Serial number of the operation.
    pub nth: u64,
    /// Name of the file.
    pub file: &'a str,
    /// Kind of operation: "read", "write", "zero", "discard", "truncate", "flush".
    pub kind: &'static str,
}

/// Decides over each operation when it takes effect: an errno to fail it with, without effect.
pub type Rule = Box<dyn FnMut(Attempt<'_>) -> Option<i32> + Send>;

#[derive(Default)]
struct State {
    names: Vec<String>,
    files: Vec<Image>,
    log: Vec<Entry>,
    recording: bool,
    rng: Option<Rng>,
    rule: Option<Rule>,
    attempts: u64,
    struck: bool,
}

impl State {
    /// Whether the rule fails this operation, and how.
    fn refuses(&mut self, file: usize, kind: &'static str) -> Option<i32> {
        let nth = self.attempts;
        self.attempts += 1;
        let file = self.names.get(file).map_or("", String::as_str);
        let errno = self.rule.as_mut()?(Attempt { nth, file, kind })?;
        self.struck = true;
        Some(errno)
    }
}

struct Shared {
    id: u64,
    clock: AtomicU64,
    slow: AtomicBool,
    state: Mutex<State>,
}

/// A set of files under one directory of their own; a handle, cheap to clone. Its files can be opened by name as long as a
/// handle lives.
#[derive(Clone)]
pub struct Disk(Arc<Lease>);

struct Lease(Arc<Shared>);

impl Drop for Lease {
    fn drop(&mut self) {
        table().remove(&self.0.id);
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

fn table() -> MutexGuard<'static, HashMap<u64, Arc<Shared>>> {
    static TABLE: OnceLock<Mutex<HashMap<u64, Arc<Shared>>>> = OnceLock::new();
    TABLE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }
}

impl Default for Disk {
    fn default() -> Disk {
        Disk::new()
    }
}

impl Disk {
    /// A disk without files.
    pub fn new() -> Disk {
        let shared = Arc::new(Shared {
            id: NEXT.fetch_add(1, Ordering::SeqCst),
            clock: AtomicU64::new(0),
            slow: AtomicBool::new(false),
            state: Mutex::default(),
        });
        table().insert(shared.id, Arc::clone(&shared));
        Disk(Arc::new(Lease(shared)))
    }

    /// A disk with these files.
    pub fn with(files: &[(String, Image)]) -> Disk {
        let disk = Disk::new();
        for (name, image) in files {
            disk.add(name, image.clone());
        }
        disk
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.state()
    }

    /// Adds a file (or replaces its content); returns its number.
    pub fn add(&self, name: &str, image: Image) -> usize {
        let mut state = self.state();
        if let Some(at) = state.names.iter().position(|n| n == name) {
            state.files[at] = image;
            return at;
        }
        state.names.push(name.to_owned());
        state.files.push(image);
        state.files.len() - 1
    }

    /// The name to open a file by.
    pub fn path(&self, name: &str) -> String {
        format!("/replay/{}/{name}", self.0.0.id)
    }

    /// Names and content of all files as of now.
    pub fn files(&self) -> Vec<(String, Image)> {
        let state = self.state();
        state.names.iter().cloned().zip(state.files.iter().cloned()).collect()
    }

    /// The content of a file as of now.
    pub fn image(&self, name: &str) -> Option<Image> {
        let state = self.state();
        let at = state.names.iter().position(|n| n == name)?;
        state.files.get(at).cloned()
    }

    /// The present, by the clock the log uses: later than everything before, earlier than everything after.
    pub fn tick(&self) -> u64 {
        self.0.0.tick()
    }

    /// From here on operations are logged.
    pub fn record(&self) {
        self.state().recording = true;
    }

    /// The log so far.
    pub fn log(&self) -> Vec<Entry> {
        self.state().log.clone()
    }

    /// Entries in the log so far.
    pub fn log_len(&self) -> usize {
        self.state().log.len()
    }

    /// From here on operations take up to a millisecond of the simulated host's time, by this seed. `None`: they take none. Off
    /// the simulated host time is real: there it stays off.
    pub fn latency(&self, seed: Option<u64>) {
        self.state().rng = seed.map(Rng::new);
        self.0.0.slow.store(seed.is_some(), Ordering::SeqCst);
    }

    /// A rule for failures.
    pub fn fail(&self, rule: Option<Rule>) {
        self.state().rule = rule;
    }

    /// Whether a rule has failed something.
    pub fn struck(&self) -> bool {
        self.state().struck
    }

    /// Operations so far that a rule was, or would have been, asked about.
    pub fn attempts(&self) -> u64 {
        self.state().attempts
    }
}

/// The drivers of ringblk with `file` on these disks, and `more`.
pub fn registry(more: &[DriverDef]) -> Registry {
    let all = drivers::ALL.iter().chain(more).copied();
    Registry::new(all.chain([DEF]))
}

/// Options of a file; those of the real driver that change nothing here are taken and ignored.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    /// The name [`Disk::path`] gives.
    filename: String,
    /// Ignored.
    #[serde(default)]
    locking: Option<String>,
    /// Ignored.
    #[serde(default)]
    aio: Option<String>,
}

const DEF: DriverDef = DriverDef {
    name: "file",
    kind: DriverKind::Protocol,
    schema: || schemars::schema_for!(Options),
    create: None,
    open: |_, value| {
        Box::pin(async move {
            let options: Options = parse_options(value)?;
            Ok(Opened::new(find(&options.filename)?))
        })
    },
};

fn find(filename: &str) -> Result<MemoryFile> {
    let missing =
        || BlockError::new(Errno::ENOENT, format!("Could not open '{filename}': No such file or directory"));
    let (id, name) = filename.strip_prefix("/replay/").and_then(|r| r.split_once('/')).ok_or_else(missing)?;
    let shared = id.parse().ok().and_then(|id: u64| table().get(&id).cloned()).ok_or_else(missing)?;
    let file = shared.state().names.iter().position(|n| n == name).ok_or_else(missing)?;
    Ok(MemoryFile { shared, file, filename: filename.to_owned() })
}

/// The node of one file.
struct MemoryFile {
    shared: Arc<Shared>,
    file: usize,
    filename: String,
}

impl MemoryFile {
    /// Waits as long as the operation takes.
    async fn wait(&self, io: &NodeIo) {
        if !self.shared.slow.load(Ordering::SeqCst) {
            return;
        }
        let ns = self.shared.state().rng.as_mut().map_or(0, |r| 1_000 + r.below(1_000_000));
        io.local().sleep(ns).await;
    }

    /// Changes the file: started now, with effect after a while. `change` is made when it takes effect.
    async fn change(
        &self,
        io: &NodeIo,
        kind: &'static str,
        offset: u64,
        fua: bool,
        change: impl FnOnce() -> Change,
    ) -> Result<()> {
        let started = self.shared.tick();
        self.wait(io).await;
        let mut state = self.shared.state();
        let state = &mut *state;
        if let Some(errno) = state.refuses(self.file, kind) {
            if kind == "flush" && state.recording {
                let (file, done) = (self.file, self.shared.tick());
                let change = Change::FailedFlush;
                state.log.push(Entry { file, offset, change, started, done, fua: false });
            }
            return Err(Errno::from_raw(errno).into());
        }
        let change = change();
        let file = state.files.get_mut(self.file).ok_or(Errno::ENODEV)?;
        if !apply(file, offset, &change) {
            return Err(Errno::EFBIG.into());
        }
        if state.recording {
            let done = self.shared.tick();
            state.log.push(Entry { file: self.file, offset, change, started, done, fua });
        }
        Ok(())
    }
}

/// Does to a file what an entry of the log says; false beyond the largest file.
pub fn apply(image: &mut Image, offset: u64, change: &Change) -> bool {
    match change {
        Change::Write(data) => image.write(offset, data),
        Change::Zero(len) => image.zero(offset, *len),
        Change::Discard(len) => {
            let len = (*len).min(image.len().saturating_sub(offset));
            image.zero(offset, len)
        }
        Change::Truncate => image.truncate(offset),
        Change::Flush | Change::FailedFlush => true,
    }
}

impl Driver for MemoryFile {
    fn map(&self, _op: Op, _offset: u64, _len: u64) -> Map<'_> {
        Map::Drive
    }

    fn size(&self) -> u64 {
        self.shared.state().files.get(self.file).map_or(0, |f| f.len().next_multiple_of(SECTOR))
    }

    fn limits(&self) -> Limits {
        Limits { max_transfer: 1 << 30, ..Limits::default() }
    }

    fn read<'a>(&'a self, io: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
        Box::pin(async move {
            self.wait(io).await;
            let mut state = self.shared.state();
            if let Some(errno) = state.refuses(self.file, "read") {
                return Err(Errno::from_raw(errno).into());
            }
            let file = state.files.get(self.file).ok_or(Errno::ENODEV)?;
            bufs.copy_from(0, &file.bytes(offset, bufs.len()));
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        io: &'a NodeIo,
        offset: u64,
        bufs: &'a IoVecs,
        flags: WriteFlags,
    ) -> BoxFut<'a, ()> {
        let fua = flags.contains(WriteFlags::FUA);
        Box::pin(self.change(io, "write", offset, fua, || Change::Write(bufs.to_vec())))
    }

    fn write_zeroes<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64, flags: ZeroFlags) -> BoxFut<'a, ()> {
        let fua = flags.contains(ZeroFlags::FUA);
        Box::pin(self.change(io, "zero", offset, fua, move || Change::Zero(len)))
    }

    fn discard<'a>(&'a self, io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, ()> {
        Box::pin(self.change(io, "discard", offset, false, move || Change::Discard(len)))
    }

    fn flush<'a>(&'a self, io: &'a NodeIo) -> BoxFut<'a, ()> {
        Box::pin(self.change(io, "flush", 0, false, || Change::Flush))
    }

    fn block_status<'a>(&'a self, _io: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
        Box::pin(async move {
            let state = self.shared.state();
            let file = state.files.get(self.file).ok_or(Errno::ENODEV)?;
            let (hole, len) = file.extent(offset, len);
            let location = Some(Location::File { offset });
            let mut flags = StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
            flags |= if hole { StatusFlags::ZERO } else { StatusFlags::DATA };
            if offset + len >= file.len() {
                flags |= StatusFlags::EOF;
            }
            Ok(BlockStatus { flags, len, location })
        })
    }

    fn truncate<'a>(&'a self, io: &'a NodeIo, size: u64, _how: Truncate) -> BoxFut<'a, ()> {
        Box::pin(self.change(io, "truncate", size, false, || Change::Truncate))
    }

    fn supports_fua(&self) -> bool {
        true
    }

    fn child_perm(&self, _child: usize, _role: Roles, _perm: Perm, _shared: Perm) -> (Perm, Perm) {
        (Perm::NONE, Perm::ALL)
    }

    fn info(&self) -> DriverInfo {
        DriverInfo { filename: self.filename.clone(), supports_fua: true, ..DriverInfo::default() }
    }
}
