//! One queue at work, on its iothread: fetch a batch, start every request, publish what ended.
//!
//! The host's loop calls it as a `Source`; the device reaches it through calls on the iothread (`find`, by key). A
//! request whose every node answers `map` becomes one raw operation; the others are driven as futures. Must not
//! block, and allocates only for driven requests. Everything here runs on one thread.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Poll, Waker};

use graph::{NodeIo, Op, Path, Stays, Target, View};
use host::{FastOp, Local, Source, SourceId};
use ring::{Chain, Kick, Memory, Notifier, Part, Pinned, Slots, SplitConfig, SplitQueue};

mod drive;

use super::config::feature;
use super::device::{BlkDevice, Call, IoErrorReport, RingSetup};
use super::request::{self, HEADER_LEN, Kind, Status};

/// Chains unpacked before the first of their headers is read.
const GROUP: usize = 16;

thread_local! {
    /// The queues of this iothread.
    static WORKERS: RefCell<HashMap<u64, Rc<QueueWorker>>> = RefCell::new(HashMap::new());
}

/// The worker with this key, if it runs on this iothread.
pub fn find(key: u64) -> Option<Rc<QueueWorker>> {
    WORKERS.with_borrow(|w| w.get(&key).cloned())
}

/// What a slot remembers of its request.
#[derive(Debug, Default)]
struct InFlight {
    kind: Option<Kind>,
    /// Stamp of the batch it came with, ns.
    start: u64,
    path: Path,
    /// Where in the last node of the path it went, bytes.
    leaf: u64,
    /// The batch it was resolved in, as the grace periods of the nodes below count it ([`Inner::batch`]).
    batch: Option<u8>,
}

/// A request that ended in this batch, to be accounted once the batch has its time stamp.
struct Ended {
    op: Op,
    /// Where it began, bytes: in the first node of the path, and in the last one.
    offsets: [u64; 2],
    bytes: u64,
    start: u64,
    path: Path,
    ok: bool,
}

struct Inner {
    queue: SplitQueue,
    /// Heads that a run of the device before a crash left in flight, newest first. They go before all that is in the ring.
    again: Vec<u16>,
    slots: Slots<InFlight>,
    /// The current memory epoch, if the export wants it pinned.
    pinned: Option<Pinned>,
    /// The graph as it is until the next pause, with this queue's statistics.
    io: NodeIo,
    call: Option<Call>,
    err: Option<Notifier>,
    features: u64,
    enabled: bool,
    quiesced: bool,
    stopping: bool,
    broken: bool,
    /// While a batch is being resolved: what its requests are counted under, where a node below counts them.
    batch: Option<u8>,
    /// Entries were pushed and not published.
    unpublished: bool,
    /// Signal at the next publication whatever the driver says: after a start and after a new call descriptor.
    force_signal: bool,
    ended: Vec<Ended>,
    /// Waiting for nothing to be in flight.
    idle: Vec<Waker>,
}

/// See the module's words.
pub struct QueueWorker {
    local: Local,
    source: Cell<Option<SourceId>>,
    device: Arc<BlkDevice>,
    me: Weak<QueueWorker>,
    inner: RefCell<Inner>,
}

/// Starts a queue on this thread.
///
/// # Errors
/// Why the ring cannot be served.
pub fn start(local: &Local, key: u64, device: Arc<BlkDevice>, setup: RingSetup) -> Result<(), String> {
    if find(key).is_some() {
        return Err("it runs already".into());
    }
    let RingSetup { memory, size, addresses, base, inflight, features, kick, call, err } = setup;
    if features & feature::VERSION_1 == 0 {
        return Err("the driver did not accept VIRTIO_F_VERSION_1; legacy drivers are not served".into());
    }
    let config = SplitConfig {
        size: size.into(),
        max_size: device.config().options().queue_size,
        addresses,
        event_idx: features & feature::EVENT_IDX != 0,
        indirect: features & feature::INDIRECT_DESC != 0,
        last_avail: base,
        used_idx: None,
    };
    let mut queue = SplitQueue::new(memory.clone(), &config).map_err(|e| e.to_string())?;
    let mut again = match inflight {
        Some(tracker) => queue.track(tracker).map_err(|e| e.to_string())?,
        None => Vec::new(),
    };
    if !again.is_empty() {
        log::info!("export '{}': a queue does {} requests again", device.name(), again.len());
    }
    // Taken from the end.
    again.reverse();
    let Some((quiesced, view)) = device.join() else { return Err("the export is going away".into()) };
    let pinned = pin(local, &device, &memory);
    let worker = Rc::new_cyclic(|me| QueueWorker {
        local: local.clone(),
        source: Cell::new(None),
        me: me.clone(),
        inner: RefCell::new(Inner {
            queue,
            again,
            slots: Slots::new(size, memory),
            pinned,
            io: view.io(local),
            call,
            err,
            features,
            enabled: true,
            quiesced,
            stopping: false,
            broken: false,
            batch: None,
            unpublished: false,
            force_signal: true,
            ended: Vec::with_capacity(32),
            idle: Vec::new(),
        }),
        device,
    });
    let source = local.add_source(worker.clone());
    worker.source.set(Some(source));
    if let Some(kick) = kick {
        worker.set_kick(kick);
    }
    WORKERS.with_borrow_mut(|w| w.insert(key, worker.clone()));
    // Kicks sent before the start, and interrupts lost before it, are made up for once.
    worker.kicked();
    Ok(())
}

/// Pins a memory epoch for a queue whose export asks for it. Where it cannot be had, requests go the usual way.
fn pin(local: &Local, device: &BlkDevice, memory: &Arc<Memory>) -> Option<Pinned> {
    if !device.config().options().pin_memory {
        return None;
    }
    Pinned::new(local, memory)
        .inspect_err(|e| log::warn!("export '{}': cannot pin guest memory: {e}", device.name()))
        .ok()
}

/// Stops a queue: takes no more requests, waits for those in flight, publishes; the available index to go on from.
/// `told`: the front end is told that index, so that nothing needs to be remembered of requests that had no answer.
pub async fn stop(key: u64, told: bool) -> Option<u16> {
    let worker = find(key)?;
    if !worker.inner.borrow().again.is_empty() {
        // Stopped before the first turn: whoever asks where to go on is told an index that counts these as done.
        worker.poll();
    }
    worker.inner.borrow_mut().stopping = true;
    worker.drained().await;
    worker.end_batch();
    if let Some(source) = worker.source.take() {
        worker.local.set_kick(source, None);
        worker.local.remove_source(source);
    }
    WORKERS.with_borrow_mut(|w| w.remove(&key));
    let mut inner = worker.inner.borrow_mut();
    let unpinned = inner.pinned.take().map(Pinned::release);
    worker.unmap(unpinned);
    // Those still to be done again (the queue was paused all the time) stay marked for the next start.
    if told && inner.again.is_empty() {
        inner.queue.forget_taken();
    }
    Some(inner.queue.state().last_avail)
}

/// Pauses a queue: from this call on it takes no more requests, until `resume`. Resolves when nothing of it is in flight.
/// Not an `async fn`: its effect must come before that of a `resume` that was sent after it.
pub fn pause(key: u64) -> impl Future<Output = ()> + 'static {
    let worker = find(key);
    if let Some(w) = &worker {
        w.inner.borrow_mut().quiesced = true;
    }
    async move {
        if let Some(w) = worker {
            w.drained().await;
            w.end_batch();
        }
    }
}

impl Inner {
    /// Unpacks the next chain into a slot; `None` when there is none.
    #[inline]
    fn take(&mut self) -> Result<Option<u32>, String> {
        let Inner { queue, slots, again, .. } = self;
        let mut popped = Ok(false);
        let taken = slots.take(|chain| {
            popped = match again.pop() {
                Some(head) => queue.resubmit(head, chain).map(|()| true),
                None => queue.pop(chain),
            };
            let got = matches!(popped, Ok(true));
            if got {
                chain.prefetch();
            }
            got
        });
        match popped {
            Ok(_) => Ok(taken),
            Err(e) => Err(e.to_string()),
        }
    }

    #[inline]
    fn active(&self) -> bool {
        self.enabled && !self.quiesced && !self.stopping && !self.broken
    }
}

impl QueueWorker {
    async fn drained(&self) {
        std::future::poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            if inner.slots.in_flight() == 0 {
                return Poll::Ready(());
            }
            inner.idle.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Looks at the ring now, and signals the driver once, as if both sides had been notified.
    pub fn kicked(&self) {
        self.inner.borrow_mut().force_signal = true;
        // Through the loop, which knows whether notifications are on: consuming entries behind its back would leave the
        // event index stale, and the driver's next kick would never come.
        if let Some(source) = self.source.get() {
            self.local.kick(source);
        }
    }

    /// Enables or disables the ring.
    pub fn set_enabled(&self, enabled: bool) {
        self.inner.borrow_mut().enabled = enabled;
        if enabled {
            self.kicked();
        }
    }

    /// Replaces the kick descriptor.
    pub fn set_kick(&self, kick: Kick) {
        if let Some(source) = self.source.get() {
            self.local.set_kick(source, Some(OwnedFd::from(kick)));
        }
    }

    /// Replaces the call descriptor and signals it.
    pub fn set_call(&self, call: Option<Call>) {
        let mut inner = self.inner.borrow_mut();
        inner.call = call;
        inner.force_signal = true;
        drop(inner);
        self.end_batch();
    }

    /// Replaces the error descriptor. A ring that is broken already says so at once.
    pub fn set_err(&self, err: Option<Notifier>) {
        let mut inner = self.inner.borrow_mut();
        if let Some(err) = &err
            && inner.broken
        {
            let _ = err.signal();
        }
        inner.err = err;
    }

    /// Moves to a new memory table.
    pub fn set_memory(&self, memory: Arc<Memory>) {
        let mut inner = self.inner.borrow_mut();
        let result = inner.queue.rebase(memory.clone());
        let pinned = pin(&self.local, &self.device, &memory);
        let unpinned = std::mem::replace(&mut inner.pinned, pinned).map(Pinned::release);
        let retired = inner.slots.set_memory(memory);
        drop(inner);
        self.unmap(retired);
        self.unmap(unpinned);
        if let Err(e) = result {
            self.fail(&format!("the new memory table does not hold the ring: {e}"));
        }
    }

    /// Goes on after a pause, with the graph as it is now.
    pub fn resume(&self, view: Arc<View>) {
        let mut inner = self.inner.borrow_mut();
        inner.io = view.io(&self.local);
        inner.quiesced = false;
        drop(inner);
        self.kicked();
    }

    /// Unmaps a memory epoch where it does not hold up other queues.
    fn unmap<E: Send + 'static>(&self, epoch: Option<E>) {
        if let Some(epoch) = epoch {
            let local = self.local.clone();
            self.local.spawn(async move { local.blocking(move || drop(epoch)).await });
        }
    }

    /// The ring broke a rule: it stops for good (until the driver resets the device), the others go on.
    #[cold]
    fn fail(&self, why: &str) {
        let mut inner = self.inner.borrow_mut();
        if inner.broken {
            return;
        }
        inner.broken = true;
        if let Some(err) = &inner.err {
            let _ = err.signal();
        }
        log::error!("export '{}': a queue stopped: {why}", self.device.name());
    }

    /// Starts the request in `slot`.
    #[inline]
    fn begin(&self, inner: &mut Inner, slot: u32, now: u64) -> Result<(), String> {
        let Inner { slots, io, features, batch, .. } = inner;
        let Some((memory, chain, data)) = slots.parts(slot) else {
            return Err("a request without a slot".into());
        };
        let mut header = [0; HEADER_LEN];
        chain
            .take_header(memory, &mut header)
            .and_then(|()| chain.reserve_last())
            .map_err(|e| format!("a request without room for header and status: {e}"))?;
        let config = self.device.config();
        let kind = request::parse(header, chain.readable_len(), chain.writable_len(), config);
        data.start = now;
        data.path = Path::default();
        data.kind = kind.as_ref().ok().copied();
        let (op, offset, len) = match kind {
            Ok(Kind::Read { offset, len }) => (Op::Read, offset, len),
            Ok(Kind::Write { offset, len }) => (Op::Write, offset, len),
            Ok(Kind::GetId) => {
                let room = chain.writable_len().min(request::ID_LEN as u64);
                let status = get_id(chain, memory, &config.options().serial);
                self.complete_in(inner, slot, status, room);
                return Ok(());
            }
            Ok(Kind::Flush | Kind::Discard | Kind::WriteZeroes) => {
                self.drive(slot);
                return Ok(());
            }
            Err(status) => {
                self.complete_in(inner, slot, status, 0);
                return Ok(());
            }
        };
        if op == Op::Write && !config.write_cache(*features) {
            // No cache for this driver: durable before it completes.
            self.drive(slot);
            return Ok(());
        }
        let resolved = io.view().resolve(op, offset, len);
        data.path = resolved.path;
        match resolved.target {
            Target::File { file, offset } => {
                data.leaf = offset;
                let (part, fast) = match op {
                    Op::Read => (Part::Writable, FastOp::Readv),
                    _ => (Part::Readable, FastOp::Writev { dsync: false }),
                };
                let Some(source) = self.source.get() else { return Err("a stopped queue".into()) };
                data.batch = *batch;
                match slots.submit(slot, part, fast, &self.local, source, file, offset) {
                    Some(result) => self.result(inner, slot, result),
                    // Under way for longer than its batch.
                    None => {
                        if let (Some(stays), Some(batch)) = (io.stays(), *batch) {
                            stays.join(batch);
                        }
                    }
                }
            }
            Target::Zero => {
                let status = chain.zero_at(memory, 0, len).map_or(Status::IoErr, |()| Status::Ok);
                self.complete_in(inner, slot, status, len);
            }
            Target::Done => self.complete_in(inner, slot, Status::Ok, if op == Op::Read { len } else { 0 }),
            Target::Drive => self.drive(slot),
            Target::Error(errno) => self.failed(inner, slot, errno.raw(), op == Op::Read),
        }
        Ok(())
    }

    /// A raw operation ended with `result` bytes or a negative errno.
    #[inline]
    fn result(&self, inner: &mut Inner, slot: u32, result: i32) {
        let Some(kind) = inner.slots.get(slot).and_then(|s| s.data.kind) else { return };
        let (len, read) = match kind {
            Kind::Read { len, .. } => (len, true),
            Kind::Write { len, .. } => (len, false),
            _ => return,
        };
        if i64::from(result) == len as i64 {
            self.complete_in(inner, slot, Status::Ok, if read { len } else { 0 });
        } else if result >= 0 || [libc::EAGAIN, libc::EINTR, libc::EINVAL].contains(&-result) {
            // Short, interrupted, or buffers that direct I/O does not take: the driven path knows all of these, and
            // doing the whole request again changes nothing that anybody was told.
            self.drive(slot);
        } else {
            self.failed(inner, slot, -result, read);
        }
    }

    #[cold]
    fn failed(&self, inner: &mut Inner, slot: u32, errno: i32, read: bool) {
        self.device.report(self.local.now(), || IoErrorReport {
            read,
            nospace: errno == libc::ENOSPC,
            reason: std::io::Error::from_raw_os_error(errno).to_string(),
        });
        self.complete_in(inner, slot, Status::IoErr, 0);
    }

    /// Writes the status, pushes the used element and frees the slot. `filled`: data bytes written for the driver.
    #[inline]
    fn complete_in(&self, inner: &mut Inner, slot: u32, status: Status, filled: u64) {
        let Inner { slots, queue, ended, .. } = inner;
        let Some(s) = slots.get(slot) else { return };
        let head = s.chain().head();
        let filled = if status == Status::Ok { filled } else { 0 };
        if let Some(memory) = slots.epoch_of(slot) {
            // Fails for a chain without a status byte, which was refused when it came.
            let _ = s.chain().write_last(memory, status as u8);
        }
        let (op, offset, bytes) = match s.data.kind {
            Some(Kind::Read { offset, len }) => (Some(Op::Read), offset, len),
            Some(Kind::Write { offset, len }) => (Some(Op::Write), offset, len),
            // Driven ones are accounted where they are driven.
            _ => (None, 0, 0),
        };
        if let Some(op) = op
            && !s.data.path.nodes().is_empty()
        {
            let offsets = [offset, s.data.leaf];
            ended.push(Ended {
                op,
                offsets,
                bytes,
                start: s.data.start,
                path: s.data.path,
                ok: status == Status::Ok,
            });
        }
        // Fails for a head that is not in flight, which a taken slot's always is.
        let _ = queue.push_used(head, (filled + 1).min(u64::from(u32::MAX)) as u32);
        inner.unpublished = true;
        self.free(inner, slot);
    }

    /// Gives a slot back, and tells who waits for the last one.
    #[inline]
    fn free(&self, inner: &mut Inner, slot: u32) {
        let retired = inner.slots.release(slot);
        if retired.is_some() {
            self.unmap(retired);
        }
        if inner.slots.in_flight() == 0 && !inner.idle.is_empty() {
            inner.idle.drain(..).for_each(Waker::wake);
        }
    }
}

fn get_id(chain: &Chain, memory: &Memory, serial: &[u8; request::ID_LEN]) -> Status {
    let room = (chain.writable_len() as usize).min(serial.len());
    let part = serial.get(..room).unwrap_or_default();
    chain.write_at(memory, 0, part).map_or(Status::IoErr, |()| Status::Ok)
}

impl Source for QueueWorker {
    fn poll(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        if !inner.active() {
            return false;
        }
        let mut error = None;
        let fetched = inner.queue.fetch();
        if inner.slots.memory().is_lost() {
            error = Some("the front end has truncated the guest's memory".to_owned());
        } else if inner.queue.tracking_is_lost() {
            error = Some("the front end has truncated the in-flight area".to_owned());
        } else {
            match fetched {
                Ok(0) if inner.again.is_empty() => return false,
                Ok(_) => {}
                Err(e) => error = Some(e.to_string()),
            }
        }
        // Read when this turn began, or after the sleep before it.
        let now = self.local.coarse_now();
        let mut count = 0;
        // A handful of chains is unpacked before the first header is read: their lines, which another processor wrote,
        // are then on their way all at once.
        let mut group = [0; GROUP];
        // One fence for all of them: what they look up stays where it is until they have ended.
        inner.batch = inner.io.stays().map(Stays::enter);
        while error.is_none() {
            let mut taken = 0;
            for place in &mut group {
                match inner.take() {
                    Ok(Some(slot)) => *place = slot,
                    Ok(None) => break,
                    Err(e) => {
                        error = Some(e);
                        break;
                    }
                }
                taken += 1;
            }
            // What came before a broken chain is served.
            for &slot in group.iter().take(taken) {
                if let Err(e) = self.begin(&mut inner, slot, now) {
                    error.get_or_insert(e);
                    self.free(&mut inner, slot);
                }
            }
            count += taken as u64;
            if taken < GROUP {
                break;
            }
        }
        if let Some(batch) = inner.batch.take()
            && let Some(stays) = inner.io.stays()
        {
            stays.leave(batch);
        }
        drop(inner);
        self.local.note_requests(count);
        if let Some(why) = error {
            self.fail(&why);
        }
        count > 0
    }

    fn complete(&self, slot: u32, result: i32) {
        let mut inner = self.inner.borrow_mut();
        if inner.slots.returned(slot) {
            // The view is the one it was resolved in: it changes only with nothing in flight.
            if let Some(batch) = inner.slots.get(slot).and_then(|s| s.data.batch)
                && let Some(stays) = inner.io.stays()
            {
                stays.leave(batch);
            }
            self.result(&mut inner, slot, result);
        }
    }

    fn end_batch(&self) {
        let mut inner = self.inner.borrow_mut();
        let Inner { queue, slots, io, ended, call, unpublished, force_signal, .. } = &mut *inner;
        if !*unpublished && !*force_signal {
            return;
        }
        let wanted = *unpublished && queue.publish();
        if (wanted || *force_signal)
            && let Some(call) = call
        {
            call.signal();
        }
        *unpublished = false;
        *force_signal = false;
        if !ended.is_empty() {
            let now = self.local.now();
            let shards = io.shards();
            shards.tick(now);
            for e in ended.drain(..) {
                shards.account(&e.path, e.op, e.bytes, now.saturating_sub(e.start), e.ok);
                if e.op == Op::Write && e.ok {
                    let ends = [e.path.nodes().first(), e.path.nodes().last()];
                    for (node, offset) in ends.into_iter().zip(e.offsets) {
                        shards.note_write_end(node.map_or(0, |n| usize::from(*n)), offset + e.bytes);
                    }
                }
            }
            shards.set_in_flight(slots.in_flight().into());
        }
    }

    fn has_work(&self) -> bool {
        let inner = self.inner.borrow();
        inner.active() && inner.queue.has_work()
    }

    fn arm(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        inner.active() && inner.queue.enable_notification()
    }

    fn disarm(&self) {
        self.inner.borrow_mut().queue.disable_notification();
    }
}
