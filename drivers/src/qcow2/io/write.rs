//! Driven writes: what `map` could not answer in one piece, with allocation and copy-on-write.
//!
//! Called by the graph. No lock is held while data moves: a record in the slice keeps others from changing the same
//! clusters, everything else goes on. What a new entry makes visible is written, in one go with its surroundings,
//! before the entry is published; the commit makes it durable before the entry is.

use graph::{BlockError, DebugEvent, NodeIo, Result, WriteFlags};
use host::IoVecs;

use super::join::Pieces;
use super::plan::{Next, Old, Plan};
use super::read::MAX_BOUNCE;
use crate::qcow2::alloc::Kinds;
use crate::qcow2::node::{FILE, Qcow2};
use crate::qcow2::table::Kind;

/// Space that was allocated and is not published: given back when dropped.
struct Unpublished<'a> {
    node: &'a Qcow2,
    offset: u64,
    bytes: u64,
}

impl Unpublished<'_> {
    fn published(self) {
        std::mem::forget(self);
    }
}

impl Drop for Unpublished<'_> {
    fn drop(&mut self) {
        self.node.space.give_back(self.offset, self.bytes);
    }
}

impl Qcow2 {
    /// Writes.
    pub(super) async fn write_range(&self, io: &NodeIo, offset: u64, bufs: &IoVecs) -> Result<()> {
        let len = bufs.len() as u64;
        let mut pieces = Pieces::default();
        let mut done = 0;
        let mut failed = Ok(());
        while done < len && !pieces.failed() {
            let at = offset + done;
            match pieces.during(self.next_piece(io, at, len - done)).await {
                Ok(None) => {}
                Ok(Some((step, work))) => {
                    let part = bufs.slice(done as usize, step as usize);
                    done += step;
                    if done == len && pieces.is_idle() {
                        return self.carry_out(io, work, at, part).await;
                    }
                    pieces.add(Box::pin(self.carry_out(io, work, at, part))).await;
                }
                Err(e) => {
                    failed = Err(e);
                    break;
                }
            }
        }
        pieces.finish().await.and(failed)
    }

    /// What to do for the first part of `at..at + len`, and how long that is. `None`: look again.
    async fn next_piece(&self, io: &NodeIo, at: u64, len: u64) -> Result<Option<(u64, Work<'_>)>> {
        self.commits.check()?;
        let run = self.tables.find(self, io, at, len).await?;
        match (run.kind, run.host) {
            (Kind::Invalid, _) => return Err(self.invalid_entry(io, at, run.entry).await),
            (Kind::Normal, Some(host)) if run.copied => {
                self.guard_metadata(io, host, run.len).await?;
                return Ok(Some((run.len, Work::InPlace(host))));
            }
            _ => {}
        }
        let Some(plan) = self.make_plan(io, at, len, false).await? else { return Ok(None) };
        let (plan, place) = self.place(io, plan).await?;
        // The plan covers less than was asked where clusters differ in kind, or space is fragmented.
        let step = plan.to.min(at + len) - at;
        Ok(Some((step, Work::Planned(plan, place))))
    }

    async fn carry_out(&self, io: &NodeIo, work: Work<'_>, at: u64, data: IoVecs) -> Result<()> {
        match work {
            Work::InPlace(host) => {
                io.child(FILE).debug_event(DebugEvent::WriteAio);
                self.write_host(io, at, host, &data).await
            }
            Work::Planned(plan, place) => self.write_planned(io, plan, place, at, data).await,
        }
    }

    /// Waits until the clusters from `at` on may be changed, and plans. `None`: look again.
    pub(super) async fn make_plan(
        &self,
        io: &NodeIo,
        at: u64,
        len: u64,
        whole: bool,
    ) -> Result<Option<Plan<'_>>> {
        if self.tables.wants_commit() {
            self.commits.flush(self, io).await?;
        }
        self.tables.own(self, io, at).await?;
        match self.tables.with(at, |slice| self.plan(slice, at, len, whole)) {
            None => self.tables.load(self, io, self.tables.slice_of(at)).await?,
            Some(Next::Wait(event)) => event.wait().await,
            Some(Next::Again) => {}
            Some(Next::Invalid(entry)) => return Err(self.invalid_entry(io, at, entry).await),
            Some(Next::Go(plan)) => return Ok(Some(plan)),
        }
        Ok(None)
    }

    /// Finds host clusters for a plan, perhaps for a part of it only.
    async fn place<'a>(&'a self, io: &NodeIo, mut plan: Plan<'a>) -> Result<(Plan<'a>, Place<'a>)> {
        let size = self.geo.cluster_size();
        if let Some(host) = plan.reuse {
            self.guard_metadata(io, host, plan.count() * size).await?;
            return Ok((plan, Place { host, zero: false, space: None }));
        }
        if self.data_file.is_some() {
            let host = plan.start;
            return Ok((plan, Place { host, zero: false, space: None }));
        }
        let extent = self.space.alloc(io, plan.count()).await?;
        let space = Some(Unpublished { node: self, offset: extent.offset, bytes: extent.clusters * size });
        plan.shorten(extent.clusters);
        Ok((plan, Place { host: extent.offset, zero: extent.zero, space }))
    }

    /// Writes data with its surroundings, and publishes.
    async fn write_planned(
        &self,
        io: &NodeIo,
        plan: Plan<'_>,
        place: Place<'_>,
        at: u64,
        data: IoVecs,
    ) -> Result<()> {
        let end = at + data.len() as u64;
        let head = self.surrounding(io, &plan, plan.from, at, place.zero).await?;
        let tail = self.surrounding(io, &plan, end, plan.to, place.zero).await?;
        let from = if head.is_some() { plan.from } else { at };
        let host = place.host + (from - plan.start);
        let file = io.child(FILE);
        if head.is_some() || tail.is_some() {
            file.debug_event(DebugEvent::CowWrite);
        }
        // One write is both, where there is something to copy.
        file.debug_event(DebugEvent::WriteAio);
        if head.is_none() && tail.is_none() {
            self.write_host(io, at, host, &data).await?;
        } else {
            let parts: Vec<IoVecs> = [head, Some(data), tail].into_iter().flatten().collect();
            self.write_host(io, from, host, &IoVecs::concat(&parts)).await?;
        }
        plan.publish(place.host);
        if let Some(space) = place.space {
            space.published();
        }
        Ok(())
    }

    /// What has to be written beside the data in `from..to`; `None`: nothing, the host reads as it should.
    async fn surrounding(
        &self,
        io: &NodeIo,
        plan: &Plan<'_>,
        from: u64,
        to: u64,
        host_zero: bool,
    ) -> Result<Option<IoVecs>> {
        if from >= to {
            return Ok(None);
        }
        let index = ((from - plan.start) >> self.geo.cluster_bits()) as usize;
        let old = plan.old.get(index).copied().unwrap_or(Old { entry: 0, bitmap: 0 });
        let zero = self.reads_zero(old, from, to);
        // Ciphertext of zeroes is not zeroes.
        if zero && host_zero && self.crypt.is_none() {
            return Ok(None);
        }
        let buffer = IoVecs::alloc((to - from) as usize, 4096).map_err(BlockError::from)?;
        if !zero {
            io.child(FILE).debug_event(DebugEvent::CowRead);
            self.read_range(io, from, &buffer).await?;
            if host_zero && self.crypt.is_none() && buffer.is_zero() {
                return Ok(None);
            }
        }
        Ok(Some(buffer))
    }

    /// Writes guest data to where it is to lie, enciphered. `at` is the guest offset.
    pub(super) async fn write_host(&self, io: &NodeIo, at: u64, host: u64, data: &IoVecs) -> Result<()> {
        let child = io.child(self.data);
        let Some(crypt) = &self.crypt else { return child.write(host, data, WriteFlags::empty()).await };
        let len = data.len() as u64;
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(MAX_BOUNCE);
            let plain = data.slice(done as usize, piece as usize).to_vec();
            let sector = crypt.sector(at + done, host + done);
            let secret = crypt.volume.encrypt_on(io.local(), sector, plain).await;
            child.write(host + done, &IoVecs::from_vec(secret), WriteFlags::empty()).await?;
            done += piece;
        }
        Ok(())
    }

    /// Refuses a write of guest data over metadata: the image is damaged.
    async fn guard_metadata(&self, io: &NodeIo, host: u64, len: u64) -> Result<()> {
        if self.data_file.is_some() {
            return Ok(());
        }
        let Some(kind) = self.space.overlap(host, len, Kinds::NONE) else { return Ok(()) };
        let words = format!("Preventing invalid write on metadata (overlaps with {kind})");
        Err(self.corrupt(io, words, Some(host), Some(len)).await)
    }
}

/// A part of a write that is ready to go.
enum Work<'a> {
    /// To where the data lies, at this host offset.
    InPlace(u64),
    /// With new entries.
    Planned(Plan<'a>, Place<'a>),
}

/// Where the clusters of a plan go.
struct Place<'a> {
    /// Host offset of the first one.
    host: u64,
    /// All of it reads as zeroes.
    zero: bool,
    /// To be given back if nothing comes of it.
    space: Option<Unpublished<'a>>,
}
