//! A few compressed clusters that were decoded lately, so that reading one bit by bit decodes it once.
//!
//! Used by `compressed`. Keyed by descriptor. A descriptor's place is used for another cluster only after everybody who could
//! have looked the old one up is done (`alloc::quarantine`); so it is enough to forget the key when a new cluster of the
//! same descriptor is published.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most memory, bytes; at least one cluster is kept.
const LIMIT: usize = 2 << 20;

/// See the module's words.
#[derive(Default)]
pub(crate) struct Decoded {
    /// Most recently used last.
    clusters: Mutex<Vec<(u64, Arc<[u8]>)>>,
}

impl Decoded {
    fn lock(&self) -> MutexGuard<'_, Vec<(u64, Arc<[u8]>)>> {
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plain bytes of a cluster.
    pub(super) fn get(&self, descriptor: u64) -> Option<Arc<[u8]>> {
        let mut clusters = self.lock();
        let at = clusters.iter().position(|(d, _)| *d == descriptor)?;
        let found = clusters.remove(at);
        let data = Arc::clone(&found.1);
        clusters.push(found);
        Some(data)
    }

    /// Keeps one.
    pub(super) fn put(&self, descriptor: u64, data: Arc<[u8]>) {
        let mut clusters = self.lock();
        clusters.retain(|(d, _)| *d != descriptor);
        let most = (LIMIT / data.len().max(1)).clamp(1, 64);
        while clusters.len() >= most {
            clusters.remove(0);
        }
        clusters.push((descriptor, data));
    }

    /// Drops one.
    pub(super) fn forget(&self, descriptor: u64) {
        self.lock().retain(|(d, _)| *d != descriptor);
    }

    /// Drops all: tables were changed by other means.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }
}
