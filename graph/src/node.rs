//! A node: a driver under a name, with what the graph keeps for it on every thread.
//!
//! Shared by the control side and all iothreads; immutable but for its atomics, and for its options and its driver object,
//! which change in drained sections. Its place in the graph (parents, children,
//! permissions) is the control side's and is not here.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::bitmap::BitmapSet;
use crate::driver::{Driver, DriverKind};
use crate::epoch::Epochs;
use crate::error::Errno;
use crate::ids::NodeId;
use crate::io::tracked::Tracker;
use crate::options::NodeOptions;
use crate::pins::Pins;
use crate::stats::NodeStats;

/// A node of the graph.
pub struct Node {
    id: NodeId,
    name: String,
    driver_name: &'static str,
    kind: DriverKind,
    /// Changes inside drained sections alone (a reopened file has another descriptor); views keep a copy, so that no
    /// request looks here.
    driver: Mutex<Arc<dyn Driver>>,
    /// Changes inside drained sections alone (`blockdev-reopen`); views keep a copy.
    options: Mutex<NodeOptions>,
    tracker: Tracker,
    stats: NodeStats,
    bitmaps: Arc<BitmapSet>,
    pins: Arc<Pins>,
    /// Of a driver that asked for them.
    epochs: Option<Arc<Epochs>>,
    /// Number of the first flush that failed, 0 for none.
    flush_error: AtomicI32,
}

impl Node {
    pub(crate) fn new(
        id: NodeId,
        name: String,
        driver_name: &'static str,
        kind: DriverKind,
        driver: Arc<dyn Driver>,
        options: NodeOptions,
        (bitmaps, epochs): (Arc<BitmapSet>, Option<Arc<Epochs>>),
    ) -> Node {
        Node {
            id,
            name,
            driver_name,
            kind,
            driver: Mutex::new(driver),
            options: Mutex::new(options),
            tracker: Tracker::default(),
            stats: NodeStats::default(),
            bitmaps,
            pins: Arc::default(),
            epochs,
            flush_error: AtomicI32::new(0),
        }
    }

    /// Its number.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its name; starts with `#` when it was generated.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its driver.
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// The sort of its driver.
    pub fn kind(&self) -> DriverKind {
        self.kind
    }

    /// Its driver. Views have it at hand ([`crate::ViewNode`]): not for the data path.
    pub fn driver(&self) -> Arc<dyn Driver> {
        Arc::clone(&self.driver.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another driver object of the same driver, in a drained section: views made from now on see it.
    pub(crate) fn set_driver(&self, driver: Arc<dyn Driver>) -> Arc<dyn Driver> {
        std::mem::replace(&mut *self.driver.lock().unwrap_or_else(PoisonError::into_inner), driver)
    }

    /// The options it runs with.
    pub fn options(&self) -> NodeOptions {
        *self.options.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other options, in a drained section: views made from now on see them.
    pub(crate) fn set_options(&self, options: NodeOptions) -> NodeOptions {
        std::mem::replace(&mut *self.options.lock().unwrap_or_else(PoisonError::into_inner), options)
    }

    /// Its size as of now, bytes.
    pub fn size(&self) -> u64 {
        self.driver().size()
    }

    /// Its statistics.
    pub fn stats(&self) -> &NodeStats {
        &self.stats
    }

    /// Its dirty bitmaps.
    pub fn bitmaps(&self) -> &Arc<BitmapSet> {
        &self.bitmaps
    }

    /// Claims of the nodes above on parts of this one's content.
    pub fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    /// The grace periods of requests that may use this node's mappings, where its driver asked for them.
    pub fn epochs(&self) -> Option<&Arc<Epochs>> {
        self.epochs.as_ref()
    }

    /// The failure all further flushes of this node answer with.
    pub fn flush_error(&self) -> Option<Errno> {
        match self.flush_error.load(Relaxed) {
            0 => None,
            n => Some(Errno::from_raw(n)),
        }
    }

    /// Remembers a failed flush: the kernel may have dropped the data, so that the next flush would lie. The source of a
    /// request that took the fast path calls it for the last node of the path.
    pub fn note_flush_error(&self, errno: Errno) {
        // Only the first one is kept; losing a race keeps another one's.
        let _ = self.flush_error.compare_exchange(0, errno.raw(), Relaxed, Relaxed);
    }

    /// Lets flushes through again; for somebody who has seen to the data.
    pub fn clear_flush_error(&self) {
        self.flush_error.store(0, Relaxed);
    }

    pub(crate) fn tracker(&self) -> &Tracker {
        &self.tracker
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({} {:?} {})", self.id.0, self.name, self.driver_name)
    }
}
