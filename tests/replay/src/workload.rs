//! What runs on a node: requests by a seed, many at a time, in one or several sessions; the log of its disk and the history
//! of its requests.
//!
//! Called by tests. Every request knows when it was sent and answered, by the disk's clock.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use conformance::request::{Client, Way, join_all};
use conformance::rng::Rng;
use graph::{NewSnapshot, NodeIo, SnapshotRef, Truncate, WriteFlags, ZeroFlags};
use host::IoVecs;

use crate::disk::{Change, Disk, Rule};
use crate::oracle::{History, Snapshot, What};
use crate::rig::Rig;
use crate::scenario::{Can, Format, SECRET, Subject};
use crate::stamp::{self, SECTOR};
use crate::states::Log;
use crate::words;

/// How much runs.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The seed of everything.
    pub seed: u64,
    /// Times the node is opened and closed.
    pub sessions: u32,
    /// Steps of each session: a step is a few requests at the same time, a flush, or one thing done alone.
    pub steps: u32,
    /// Most requests at a time.
    pub together: u64,
    /// One in so many requests is a flush.
    pub flush: u64,
    /// Flushes are sent alone.
    pub lone: bool,
}

impl Default for Load {
    fn default() -> Load {
        Load { seed: 1, sessions: 2, steps: 12, together: 4, flush: 5, lone: false }
    }
}

/// The first sector of the flush that closing is.
pub const CLOSING: u64 = u64::MAX;

/// The first sector of the flush that the creation of a snapshot is as well.
pub const SNAPSHOT: u64 = u64::MAX - 1;

/// What happened.
pub struct Run {
    /// On the disk.
    pub log: Log,
    /// To the guest.
    pub history: History,
    /// The first request that failed, in words; only with a rule for failures.
    pub failure: Option<String>,
}

impl Run {
    /// Everything that happened, in the order of time, for humans.
    pub fn story(&self) -> String {
        let mut lines: Vec<(u64, String)> = Vec::new();
        for (at, e) in self.log.entries.iter().enumerate() {
            let what = match &e.change {
                Change::Write(data) => format!("write {:#x}+{:#x}", e.offset, data.len()),
                Change::Zero(len) => format!("zero {:#x}+{len:#x}", e.offset),
                Change::Discard(len) => format!("discard {:#x}+{len:#x}", e.offset),
                other => format!("{other:?} {:#x}", e.offset),
            };
            let file = self.log.start.get(e.file).map_or("", |(n, _)| n.as_str());
            lines.push((e.done, format!("  {at}: {file}: {what}, from {} to {}", e.started, e.done)));
        }
        for (number, e) in self.history.events.iter().enumerate() {
            let what = match e.what {
                What::Content(_) => "a snapshot applied".to_owned(),
                ref other => format!("{other:?} {}+{}", e.first, e.count),
            };
            lines.push((e.start, format!("request {number}: {what}, from {} to {:?}", e.start, e.ack)));
        }
        for s in &self.history.snapshots {
            let (c, d) = (s.created, (s.delete, s.deleted));
            lines.push((s.create, format!("'{}': created {} to {c:?}, deleted {d:?}", s.name, s.create)));
        }
        lines.sort();
        lines.into_iter().map(|(_, l)| l + "\n").collect()
    }
}

/// Opens a rig for a subject: its drivers, its secret.
///
/// # Errors
/// There is no thread to be had.
pub fn rig(subject: &Subject) -> Result<Rig, String> {
    let rig = Rig::new(subject.registry.clone())?;
    if let Format::Qcow2 { secret: Some(secret), .. } = &subject.format {
        let bytes = graph::Secret::new(secret.clone().into_bytes());
        rig.graph().secrets().add(SECRET, bytes).map_err(words)?;
    }
    Ok(rig)
}

/// Runs a workload from the subject's first state.
///
/// # Errors
/// A request failed, or a read saw what it must not.
pub fn run(subject: &Subject, load: &Load) -> Result<Run, String> {
    run_with(subject, load, None)
}

/// As [`run`], with operations of the disk that fail: failures of requests are no error then, and end their session.
///
/// # Errors
/// A read saw what it must not.
pub fn run_with(subject: &Subject, load: &Load, rule: Option<Rule>) -> Result<Run, String> {
    let rig = rig(subject)?;
    let disk = Disk::with(&subject.files);
    let failing = rule.is_some();
    disk.record();
    disk.fail(rule);
    let mut history = History::new(subject.initial.clone());
    let (mut failure, mut wrong) = (None, None);
    for session in 0..load.sessions {
        let result = (|| {
            let opened = rig.open((subject.options)(&disk), false)?;
            disk.latency(Some(load.seed ^ u64::from(session) << 32));
            let mut worker = Worker::new(subject, load, session, &disk, history.clone());
            let work = opened.run(load.seed, |io| async move {
                let result = worker.work(&io).await;
                Ok((result, worker.history.take(), worker.wrong.take()))
            });
            disk.latency(None);
            let (result, after, read) = work?;
            history = after;
            wrong = read;
            result?;
            // Closing flushes; who closes is not told when that fails.
            let closing = history.begin(disk.tick(), What::Flush, CLOSING, 0);
            opened.close()?;
            if disk.struck() {
                return Err("the disk failed in this session".to_owned());
            }
            history.end(closing, disk.tick());
            Ok(())
        })();
        match result {
            Ok(()) => {}
            Err(e) if failing && wrong.is_none() => {
                failure = Some(e);
                break;
            }
            Err(e) => return Err(format!("{}, session {session}, seed {}: {e}", subject.name, load.seed)),
        }
    }
    let log = Log { start: subject.files.clone(), entries: disk.log(), end: disk.tick() };
    Ok(Run { log, history, failure })
}

/// What all requests of a session share.
struct Worker {
    disk: Disk,
    can: Can,
    cluster: u64,
    load: Load,
    rng: Rng,
    history: Rc<RefCell<History>>,
    /// A read that cannot be.
    wrong: Rc<RefCell<Option<String>>>,
    names: u64,
}

impl Worker {
    fn new(subject: &Subject, load: &Load, session: u32, disk: &Disk, history: History) -> Worker {
        Worker {
            disk: disk.clone(),
            can: subject.can,
            cluster: subject.cluster,
            load: *load,
            rng: Rng::new(load.seed.wrapping_mul(31) ^ u64::from(session)),
            names: history.snapshots.len() as u64,
            history: Rc::new(RefCell::new(history)),
            wrong: Rc::default(),
        }
    }

    async fn work(&mut self, io: &NodeIo) -> Result<(), String> {
        self.look(io).await?;
        for _ in 0..self.load.steps {
            match self.rng.below(10) {
                0 if self.can.snapshot => self.snapshot(io).await?,
                1 if self.can.resize => self.resize(io).await?,
                _ => self.together(io).await?,
            }
            if self.rng.one_in(4) {
                self.look(io).await?;
            }
        }
        self.look(io).await.map(|_| ())
    }

    /// Reads everything and compares: without a crash there is one answer only.
    async fn look(&self, io: &NodeIo) -> Result<Vec<u8>, String> {
        let data = read_all(io).await?;
        if let Err(e) = self.history.borrow().now(self.disk.tick()).check(&data) {
            // No failure of the disk excuses this.
            self.wrong.borrow_mut().get_or_insert(format!("read: {e}"));
            return Err(format!("read: {e}"));
        }
        Ok(data)
    }

    async fn together(&mut self, io: &NodeIo) -> Result<(), String> {
        let n = 1 + self.rng.below(self.load.together);
        let sectors = io.size() / SECTOR as u64;
        let mut requests: Vec<_> = (0..n).map(|_| self.request(sectors)).collect();
        if self.load.lone && requests.iter().any(|r| r.0 == Kind::Flush) {
            requests = vec![(Kind::Flush, 0, 0, Way::Driven)];
        }
        let send = |(kind, first, count, way): (Kind, u64, u64, Way)| {
            let client = Client { io: io.clone(), way };
            let (disk, history) = (self.disk.clone(), Rc::clone(&self.history));
            async move {
                let sent = request(&client, &disk, &history, kind, first, count).await;
                sent.map_err(|e| format!("{kind:?} {first}+{count}: {e}"))
            }
        };
        let sent: Vec<_> = requests.into_iter().map(send).collect();
        for result in join_all(io, sent).await {
            result.ok_or("a request panicked")??;
        }
        Ok(())
    }

    fn request(&mut self, sectors: u64) -> (Kind, u64, u64, Way) {
        let rng = &mut self.rng;
        let way = if rng.one_in(2) { Way::Driven } else { Way::Mapped };
        if rng.one_in(self.load.flush) {
            return (Kind::Flush, 0, 0, way);
        }
        let kind = match rng.below(20) {
            0 | 1 if self.can.zero => Kind::Zero,
            2 if self.can.zero => Kind::Unmap,
            3 | 4 if self.can.discard => Kind::Discard,
            5 => Kind::Fua,
            6 | 7 if self.can.compress => Kind::Compressed,
            _ => Kind::Write,
        };
        let aligned = matches!(kind, Kind::Discard | Kind::Unmap | Kind::Compressed) || rng.one_in(6);
        let unit = if aligned { self.cluster.min(sectors) } else { 1 };
        // Mostly in few places, so that requests meet.
        let spread = if rng.one_in(3) { sectors } else { sectors.min(8 * self.cluster) };
        let first = rng.below(spread.max(unit) / unit) * unit;
        let count = match rng.below(8) {
            0 => 2 * self.cluster + 1,
            1 => self.cluster,
            2 => 8,
            n => n - 2,
        };
        let count = if kind == Kind::Compressed { unit } else { count.next_multiple_of(unit) };
        (kind, first, count.min(sectors - first), way)
    }

    async fn snapshot(&mut self, io: &NodeIo) -> Result<(), String> {
        let driver = io.node().map_err(words)?.driver();
        let there: Vec<usize> = {
            let history = self.history.borrow();
            let there = |s: &&Snapshot| s.delete.is_none();
            let all = history.snapshots.iter().enumerate();
            all.filter(|(_, s)| there(s)).map(|(i, _)| i).collect()
        };
        let create = there.is_empty() || (there.len() < 3 && self.rng.one_in(2));
        let pick = |rng: &mut Rng| there[rng.below(there.len() as u64) as usize];
        if create {
            let content = Arc::new(self.look(io).await?);
            let name = format!("snapshot {}", self.names);
            self.names += 1;
            let at = self.disk.tick();
            let new = Snapshot { name, content, create: at, created: None, delete: None, deleted: None };
            let request = NewSnapshot { name: new.name.clone(), date_sec: 1, ..NewSnapshot::default() };
            self.history.borrow_mut().snapshots.push(new);
            // What was acknowledged before is part of the snapshot, and durable with it.
            let flush = self.history.borrow_mut().begin(at, What::Flush, SNAPSHOT, 0);
            driver.snapshot_create(io, request).await.map_err(|e| format!("snapshot_create: {e}"))?;
            let now = self.disk.tick();
            self.history.borrow_mut().end(flush, now);
            if let Some(s) = self.history.borrow_mut().snapshots.last_mut() {
                s.created = Some(now);
            }
        } else if self.rng.one_in(2) {
            let i = pick(&mut self.rng);
            let name = {
                let s = &mut self.history.borrow_mut().snapshots[i];
                s.delete = Some(self.disk.tick());
                s.name.clone()
            };
            let gone = driver.snapshot_delete(io, SnapshotRef::Name(name)).await;
            gone.map_err(|e| format!("snapshot_delete: {e}"))?;
            self.history.borrow_mut().snapshots[i].deleted = Some(self.disk.tick());
        } else {
            let i = pick(&mut self.rng);
            let (name, content) = {
                let s = &self.history.borrow().snapshots[i];
                (s.name.clone(), Arc::clone(&s.content))
            };
            let at = self.disk.tick();
            let n = self.history.borrow_mut().begin(at, What::Content(content), 0, 0);
            let applied = driver.snapshot_apply(io, SnapshotRef::Name(name)).await;
            applied.map_err(|e| format!("snapshot_apply: {e}"))?;
            self.history.borrow_mut().end(n, self.disk.tick());
        }
        self.look(io).await.map(|_| ())
    }

    async fn resize(&mut self, io: &NodeIo) -> Result<(), String> {
        let initial = self.history.borrow().initial.len() as u64 / SECTOR as u64;
        let size = 1 + self.rng.below(2 * initial);
        let n = self.history.borrow_mut().begin(self.disk.tick(), What::Resize(size), 0, 0);
        let how = Truncate { exact: true, ..Truncate::default() };
        let driver = io.node().map_err(words)?.driver();
        driver.truncate(io, size * SECTOR as u64, how).await.map_err(|e| format!("truncate: {e}"))?;
        self.history.borrow_mut().end(n, self.disk.tick());
        Ok(())
    }
}

/// Reads the whole disk.
///
/// # Errors
/// What the node says.
pub async fn read_all(io: &NodeIo) -> Result<Vec<u8>, String> {
    let bufs = IoVecs::from_vec(vec![0xa5; io.size() as usize]);
    io.read(0, &bufs).await.map_err(words)?;
    Ok(bufs.to_vec())
}

/// Sorts of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write.
    Write,
    /// A write that is durable by itself.
    Fua,
    /// A write of one cluster, compressed.
    Compressed,
    /// Zeroes.
    Zero,
    /// Zeroes, and the space may go.
    Unmap,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
}

/// Sends one request and notes it.
///
/// # Errors
/// The node's.
pub async fn request(
    client: &Client,
    disk: &Disk,
    history: &RefCell<History>,
    kind: Kind,
    first: u64,
    count: u64,
) -> Result<(), String> {
    let what = match kind {
        Kind::Write | Kind::Fua | Kind::Compressed => What::Stamp,
        Kind::Zero | Kind::Unmap => What::Zero,
        Kind::Discard => What::Discard,
        Kind::Flush => What::Flush,
    };
    let number = history.borrow_mut().begin(disk.tick(), what, first, count);
    if kind == Kind::Fua
        && let Some(event) = history.borrow_mut().events.get_mut(number)
    {
        event.fua = true;
    }
    let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
    let data = || stamp::sectors(first, count, number as u64);
    let none = ZeroFlags::empty();
    match kind {
        Kind::Write => client.write(offset, &data(), false).await.map_err(words),
        Kind::Fua => client.write(offset, &data(), true).await.map_err(words),
        Kind::Compressed => {
            let bufs = IoVecs::from_vec(data());
            client.io.write(offset, &bufs, WriteFlags::COMPRESSED).await.map_err(words)
        }
        Kind::Zero => client.zero(offset, len, none).await.map_err(words),
        Kind::Unmap => client.zero(offset, len, ZeroFlags::MAY_UNMAP).await.map_err(words),
        Kind::Discard => client.discard(offset, len).await.map_err(words),
        Kind::Flush => client.flush().await.map_err(words),
    }?;
    history.borrow_mut().end(number, disk.tick());
    Ok(())
}
