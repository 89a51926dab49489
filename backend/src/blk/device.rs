//! The block device of one export: shared by its session, its queues' iothreads and the main thread.
//!
//! A queue belongs to one iothread for life. Whatever changes a running queue is a call on that iothread, and the
//! caller waits for its acknowledgement: connection threads by blocking, the main thread by awaiting. Implements
//! `vhost-user-backend`'s device trait, so that it also runs under the stock daemon (`stock`).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use graph::{BoxFut, RequestSource, Standing, View};
use host::IoThread;
use ring::{Kick, Memory, Notifier, RingAddresses, Tracker};
use vhost_user_backend::{VringMutex, VringT};

use super::config::DeviceConfig;
use super::stock::StockRing;
use super::worker;
use crate::vhost_user::channel::Channel;

/// How the driver is interrupted.
pub enum Call {
    /// The descriptor of SET_VRING_CALL.
    Notifier(Notifier),
    /// The stock daemon's ring, which knows it.
    Stock(VringMutex),
}

impl Call {
    /// Signals, never blocks.
    #[inline]
    pub fn signal(&self) {
        // An eventfd that cannot be written to is full, which is a signal, or gone with its owner.
        let _ = match self {
            Call::Notifier(n) => n.signal(),
            Call::Stock(ring) => ring.signal_used_queue(),
        };
    }
}

/// Everything a queue needs to start.
pub struct RingSetup {
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// Entries, a power of two.
    pub size: u16,
    /// Where the three tables lie.
    pub addresses: RingAddresses,
    /// Available index to go on from; the used index is the one in the ring. Not looked at when the ring is tracked.
    pub base: u16,
    /// The ring's part of the in-flight area, if the front end keeps one.
    pub inflight: Option<Tracker>,
    /// Features the driver accepted.
    pub features: u64,
    /// Wakes us. `None`: somebody calls [`BlkDevice::poke`] instead.
    pub kick: Option<Kick>,
    /// Interrupts the driver; `None`: it polls.
    pub call: Option<Call>,
    /// Tells the front end that the ring is broken.
    pub err: Option<Notifier>,
}

/// An I/O error that a guest was told about, for BLOCK_IO_ERROR.
#[derive(Clone, Debug)]
pub struct IoErrorReport {
    /// Whether a read failed; else something that writes.
    pub read: bool,
    /// Whether there was no space left.
    pub nospace: bool,
    /// The error in words.
    pub reason: String,
}

/// Called on an iothread with each reported error; must not block.
pub type ErrorSink = Box<dyn Fn(IoErrorReport) + Send + Sync>;

/// Nanoseconds between two reported errors of one device: a guest cannot flood the main thread.
const REPORT_INTERVAL_NS: u64 = 10_000_000;

struct Queue {
    iothread: IoThread,
    /// Names the worker on its iothread; unique in the process.
    key: u64,
}

/// See the module's words. Locks: `stock` is a leaf.
pub struct BlkDevice {
    name: String,
    config: DeviceConfig,
    channel: Channel,
    queues: Vec<Queue>,
    /// Features acknowledged by the present driver.
    acked: AtomicU64,
    /// How queues start that start now. The graph gives the view before the export listens, and takes it back at the end.
    standing: Standing<Arc<View>>,
    last_report: AtomicU64,
    errors: ErrorSink,
    /// Rings as the stock daemon handed them over.
    pub(super) stock: Mutex<HashMap<usize, StockRing>>,
    /// Memory as the stock daemon handed it over.
    pub(super) stock_memory: Mutex<Option<Arc<Memory>>>,
}

impl std::fmt::Debug for BlkDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlkDevice").field("name", &self.name).field("queues", &self.queues.len()).finish()
    }
}

impl BlkDevice {
    /// A device whose queue `i` is served by `iothreads[i % len]`, reading the graph through `view`.
    pub fn new(
        name: String,
        config: DeviceConfig,
        iothreads: &[IoThread],
        errors: ErrorSink,
    ) -> Arc<BlkDevice> {
        static KEYS: AtomicU64 = AtomicU64::new(1);
        let queues = iothreads
            .iter()
            .cycle()
            .take(config.options().num_queues.into())
            .map(|t| Queue { iothread: t.clone(), key: KEYS.fetch_add(1, Ordering::Relaxed) })
            .collect();
        Arc::new(BlkDevice {
            name,
            config,
            channel: Channel::default(),
            queues,
            acked: AtomicU64::new(0),
            standing: Standing::new(),
            last_report: AtomicU64::new(0),
            errors,
            stock: Mutex::default(),
            stock_memory: Mutex::default(),
        })
    }

    /// The export's id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Configuration space and features.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// The way to tell the front end of a new configuration.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Features the driver accepted.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    pub(super) fn set_acked(&self, features: u64) {
        self.acked.store(features, Ordering::Relaxed);
    }

    /// How a queue starts: whether paused, and with which view. Asked on its iothread.
    pub(super) fn join(&self) -> Option<(bool, Arc<View>)> {
        self.standing.join()
    }

    /// The export ends: no ring runs any more, the nodes may go.
    pub fn release_view(&self) {
        self.standing.end();
    }

    /// Reports an error, unless one was reported a moment ago.
    pub(super) fn report(&self, now_ns: u64, report: impl FnOnce() -> IoErrorReport) {
        let last = self.last_report.load(Ordering::Relaxed);
        if last != 0 && now_ns.saturating_sub(last) < REPORT_INTERVAL_NS {
            return;
        }
        self.last_report.store(now_ns.max(1), Ordering::Relaxed);
        (self.errors)(report());
    }

    /// Starts queue `index`; blocks until its iothread serves it.
    ///
    /// # Errors
    /// Why the ring cannot be served: its tables are not in guest memory, its iothread is gone.
    pub fn start_queue(self: &Arc<Self>, index: usize, setup: RingSetup) -> Result<(), String> {
        let Some(q) = self.queues.get(index) else { return Err("no such queue".into()) };
        let (device, key) = (self.clone(), q.key);
        q.iothread
            .call_blocking(move |local| async move { worker::start(&local, key, device, setup) })
            .map_err(|_| "its iothread is gone".to_owned())?
            .map_err(|e| e.to_string())
    }

    /// Stops queue `index` once nothing of it is in flight; the available index to go on from, if it ran. `told`: the front
    /// end will be told it; without that, as after a lost connection, the in-flight area keeps what had no answer.
    pub fn stop_queue(&self, index: usize, told: bool) -> Option<u16> {
        let q = self.queues.get(index)?;
        let key = q.key;
        q.iothread.call_blocking(move |_| worker::stop(key, told)).ok().flatten()
    }

    fn on_queue(&self, index: usize, f: impl FnOnce(&worker::QueueWorker) + Send + 'static) {
        let Some(q) = self.queues.get(index) else { return };
        let key = q.key;
        // A thread that is gone serves nothing: there is nothing to change.
        let _ = q.iothread.call_blocking(move |_| async move {
            if let Some(w) = worker::find(key) {
                f(&w);
            }
        });
    }

    /// SET_VRING_ENABLE on a running ring: a disabled one takes no requests.
    pub fn enable_queue(&self, index: usize, enabled: bool) {
        self.on_queue(index, move |w| w.set_enabled(enabled));
    }

    /// A new kick descriptor for a running ring.
    pub fn set_kick(&self, index: usize, kick: Kick) {
        self.on_queue(index, move |w| w.set_kick(kick));
    }

    /// A new call descriptor for a running ring. It is signalled once: what completed before may not have been.
    pub fn set_call(&self, index: usize, call: Option<Call>) {
        self.on_queue(index, move |w| w.set_call(call));
    }

    /// A new error descriptor for a running ring.
    pub fn set_err(&self, index: usize, err: Option<Notifier>) {
        self.on_queue(index, move |w| w.set_err(err));
    }

    /// Kicks a queue that was started without a kick descriptor. False if it does not run.
    pub(super) fn poke(&self, index: usize) {
        if let Some(q) = self.queues.get(index) {
            let key = q.key;
            q.iothread.post(move |_| {
                if let Some(w) = worker::find(key) {
                    w.kicked();
                }
            });
        }
    }

    /// Moves the running queues in `indexes` to a new memory table. Requests in flight keep the old one mapped.
    pub fn set_memory(&self, indexes: &[usize], memory: Arc<Memory>) {
        for &index in indexes {
            let memory = memory.clone();
            self.on_queue(index, move |w| w.set_memory(memory));
        }
    }

    /// The capacity changed; the front end is told if it can be.
    pub fn resized(&self, bytes: u64) {
        if self.config.capacity() != bytes {
            self.config.set_capacity(bytes);
            self.channel.config_changed();
        }
    }

    /// Per queue: the id of its iothread.
    pub fn placement(&self) -> Vec<String> {
        self.queues.iter().map(|q| q.iothread.name().to_owned()).collect()
    }
}

/// The device as the graph sees it: a source of requests that can be paused.
pub struct DeviceSource(pub Arc<BlkDevice>);

impl RequestSource for DeviceSource {
    fn quiesce(&self) -> BoxFut<'_, ()> {
        self.0.standing.stop();
        let pauses: Vec<_> = self
            .0
            .queues
            .iter()
            .map(|q| (q.iothread.clone(), q.key))
            .map(|(t, key)| t.call(move |_| worker::pause(key)))
            .collect();
        Box::pin(async move {
            for pause in pauses {
                // A thread that is gone has nothing in flight.
                let _ = pause.await;
            }
            Ok(())
        })
    }

    fn resume(&self, view: Arc<View>) {
        self.0.standing.go(view.clone());
        for q in &self.0.queues {
            let (view, key) = (view.clone(), q.key);
            q.iothread.post(move |_| {
                if let Some(w) = worker::find(key) {
                    w.resume(view);
                }
            });
        }
    }

    fn resized(&self, size: u64) {
        self.0.resized(size);
    }
}
