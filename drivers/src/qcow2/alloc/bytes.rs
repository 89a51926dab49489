//! Space for compressed clusters, which share host clusters (invariant I13).
//!
//! Called by compressed writes. Every host cluster a piece touches is referenced once for it.

use graph::{BlockError, DebugEvent, Errno, NodeIo, Result};

use super::{Space, lock};
use crate::qcow2::node::FILE;

impl Space {
    /// As [`Space::alloc_bytes_in`] with the node's own `io`.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn alloc_bytes(&self, io: &NodeIo, bytes: u64) -> Result<u64> {
        self.alloc_bytes_in(&io.child(FILE), bytes).await
    }

    /// Host offset of `bytes` bytes, at most a cluster: behind the last piece where there is room, else in a fresh cluster.
    /// Each cluster that is touched has one reference more in memory.
    ///
    /// # Errors
    /// As [`Space::alloc_in`]; `EINVAL` for more than a cluster.
    pub(crate) async fn alloc_bytes_in(&self, file: &NodeIo, bytes: u64) -> Result<u64> {
        let result = self.alloc_bytes_unmarked(file, bytes).await;
        self.marked(file, result).await
    }

    async fn alloc_bytes_unmarked(&self, file: &NodeIo, bytes: u64) -> Result<u64> {
        self.health.check()?;
        file.debug_event(DebugEvent::ClusterAllocBytes);
        let size = self.geo.cluster_size();
        if bytes == 0 || bytes > size {
            return Err(Errno::EINVAL.into());
        }
        let _slow = self.slow.lock().await;
        let partial = lock(&self.state).partial;
        let mut offset = None;
        if partial != 0 {
            let cluster = partial >> self.geo.cluster_bits();
            let room = size - self.geo.in_cluster(partial);
            let shareable = {
                self.load_range(file, cluster, 1).await?;
                let count = lock(&self.state).count(self.geo, cluster).unwrap_or(0);
                count > 0 && count < self.geo.max_refcount()
            };
            if shareable && bytes <= room {
                self.share(cluster);
                offset = Some(partial);
            } else if shareable && room > 0 && lock(&self.state).end == Some(cluster + 1) {
                // Goes on into the next cluster, as long as that comes right behind.
                let next = self.extend(file, 1, true).await?;
                if next.offset >> self.geo.cluster_bits() == cluster + 1 {
                    self.share(cluster);
                    offset = Some(partial);
                } else {
                    offset = Some(next.offset);
                }
            }
        }
        let offset = match offset {
            Some(offset) => offset,
            None => self.take(file, 1, true, false).await?.offset,
        };
        if offset + bytes > 1 << self.geo.csize_shift() {
            self.give_back(offset, bytes);
            return Err(BlockError::new(Errno::EFBIG, "The image is too large for compressed clusters"));
        }
        let end = offset + bytes;
        lock(&self.state).partial = if self.geo.in_cluster(end) == 0 { 0 } else { end };
        Ok(offset)
    }

    /// One reference more to a loaded cluster that is referenced.
    fn share(&self, cluster: u64) {
        let mut state = lock(&self.state);
        if let Some(count) = state.blocks.get(cluster) {
            state.blocks.set(cluster, count + 1);
        }
    }
}
