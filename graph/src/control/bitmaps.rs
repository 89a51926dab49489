//! Dirty bitmaps from the control channel: adding, removing, clearing, merging, starting and stopping.
//!
//! Called by the `block-dirty-bitmap-*` commands and by the command line tools. A node whose changes are recorded takes them
//! off the fast path, so everything that may start or end recording happens drained, with new views. The words of
//! refusals are QEMU's.

use std::sync::Arc;

use super::{Graph, no_such_node};
use crate::bitmap::{Bitmap, MIN_BITMAP_GRANULARITY};
use crate::drain::DrainGuard;
use crate::error::{BlockError, Errno, Result};
use crate::ids::NodeId;
use crate::node::Node;

/// Granularity of bitmaps over nodes without clusters, and the coarsest that is taken by itself, bytes.
const DEFAULT_GRANULARITY: u32 = 65536;
/// The finest that is taken by itself, bytes.
const FINEST_DEFAULT: u32 = 4096;

/// A bitmap that is to be made.
#[derive(Clone, Debug, Default)]
pub struct NewBitmap {
    /// Its name.
    pub name: String,
    /// Bytes per bit; the node's cluster size within 4 KiB and 64 KiB by default.
    pub granularity: Option<u32>,
    /// Kept in the image when the node is closed.
    pub persistent: bool,
    /// Does not record at first.
    pub disabled: bool,
}

/// A bitmap of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapRef {
    /// The node; `None` for the one the command names.
    pub node: Option<String>,
    /// The bitmap.
    pub name: String,
}

/// What must not be the case of a bitmap for an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Usable {
    /// In use.
    Removal,
    /// In use, inconsistent.
    Reading,
    /// In use, inconsistent, read-only.
    Writing,
}

/// Refuses a bitmap that cannot be used so.
fn usable(bitmap: &Bitmap, how: Usable) -> Result<()> {
    let name = bitmap.name();
    if bitmap.busy() {
        let text = format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
        return Err(BlockError::new(Errno::EBUSY, text));
    }
    if how != Usable::Reading && bitmap.readonly() {
        let text = format!("Bitmap '{name}' is readonly and cannot be modified");
        return Err(BlockError::new(Errno::EPERM, text));
    }
    if how != Usable::Removal && bitmap.inconsistent() {
        return Err(BlockError::invalid(format!("Bitmap '{name}' is inconsistent and cannot be used")));
    }
    Ok(())
}

impl Graph {
    /// A bitmap that nothing keeps from being removed.
    pub(super) fn bitmap_to_remove(&self, node: &str, name: &str) -> Result<Arc<Bitmap>> {
        let (_, bitmap) = self.bitmap(node, name)?;
        usable(&bitmap, Usable::Removal)?;
        Ok(bitmap)
    }

    /// Takes a bitmap away that has never been stored; drained.
    pub(super) fn bitmap_forget(&self, node: &str, name: &str) -> Result<()> {
        let (found, _) = self.bitmap(node, name)?;
        found.bitmaps().remove(name);
        self.bitmaps_changed(found.id());
        Ok(())
    }

    /// The node and one of its bitmaps.
    pub(super) fn bitmap(&self, node: &str, name: &str) -> Result<(Arc<Node>, Arc<Bitmap>)> {
        let missing = |_| BlockError::new(Errno::ENOENT, format!("Node '{node}' not found"));
        let node = self.node(node).map_err(missing)?;
        let bitmap = node.bitmaps().find(name);
        let bitmap = bitmap
            .ok_or_else(|| BlockError::new(Errno::ENOENT, format!("Dirty bitmap '{name}' not found")))?;
        Ok((node, bitmap))
    }

    /// Stops the requests above a node for as long as the guard lives; these see a change of its bitmaps afterwards if
    /// [`Graph::bitmaps_changed`] is called before the guard goes.
    async fn bitmaps_drained(&self, id: NodeId) -> DrainGuard {
        self.drain_nodes(vec![id]).await
    }

    fn bitmaps_changed(&self, id: NodeId) {
        self.state().refresh_views(&[id]);
    }

    /// Makes a bitmap.
    ///
    /// # Errors
    /// No such node, a bad name or granularity, a name that is taken, too many or too large, or the image cannot hold it.
    pub async fn bitmap_add(&self, node: &str, new: NewBitmap) -> Result<()> {
        if new.name.is_empty() {
            return Err(BlockError::invalid("Bitmap name cannot be empty"));
        }
        let id = self.state().find(node).ok_or_else(|| no_such_node_as_device(node))?;
        let found = self.node_by_id(id)?;
        let granularity = match new.granularity {
            Some(g) if g < MIN_BITMAP_GRANULARITY || !g.is_power_of_two() => {
                return Err(BlockError::invalid("Granularity must be power of 2 and at least 512"));
            }
            Some(g) => g,
            None => match found.driver().info().cluster_size {
                Some(size) if size > 0 => size.clamp(FINEST_DEFAULT, DEFAULT_GRANULARITY),
                _ => DEFAULT_GRANULARITY,
            },
        };
        if new.persistent {
            if !found.driver().supports_bitmaps() {
                let text = format!("Can't store persistent bitmaps to {node}: Operation not supported");
                return Err(BlockError::new(Errno::ENOTSUP, text));
            }
            let name = &new.name;
            let refused =
                |e: BlockError| e.context(format!("Can't make bitmap '{name}' persistent in '{node}'"));
            if found.options().read_only {
                return Err(refused(BlockError::new(Errno::EPERM, "the node is read-only")));
            }
            if found.bitmaps().find(name).is_some() {
                return Err(already(name));
            }
            found.driver().make_bitmap_persistent_ok(name, granularity).map_err(refused)?;
        }
        let guard = self.bitmaps_drained(id).await;
        let bitmap = Bitmap::new(&new.name, granularity, found.size())?;
        bitmap.set_recording(!new.disabled);
        bitmap.set_persistent(new.persistent);
        found.bitmaps().add(bitmap)?;
        self.bitmaps_changed(id);
        drop(guard);
        Ok(())
    }

    /// Removes a bitmap, from the image too.
    ///
    /// # Errors
    /// There is none of that name, something uses it, or it cannot be removed from the image; then it stays.
    pub async fn bitmap_remove(&self, node: &str, name: &str) -> Result<()> {
        let (found, bitmap) = self.bitmap(node, name)?;
        usable(&bitmap, Usable::Removal)?;
        let id = found.id();
        let guard = self.bitmaps_drained(id).await;
        if bitmap.persistent() {
            let name = name.to_owned();
            self.on_iothread(id, |io| async move {
                let node = Arc::clone(io.node()?);
                node.driver().remove_stored_bitmap(&io, name).await
            })
            .await?;
        }
        found.bitmaps().remove(name);
        self.bitmaps_changed(id);
        drop(guard);
        Ok(())
    }

    /// Unmarks everything.
    ///
    /// # Errors
    /// There is none of that name, or its state does not allow it.
    pub async fn bitmap_clear(&self, node: &str, name: &str) -> Result<()> {
        let (found, bitmap) = self.bitmap(node, name)?;
        usable(&bitmap, Usable::Writing)?;
        // Drained, so that every change is either before it or after it as a whole.
        let guard = self.bitmaps_drained(found.id()).await;
        bitmap.clear_all();
        drop(guard);
        Ok(())
    }

    /// Starts (`block-dirty-bitmap-enable`) or stops recording.
    ///
    /// # Errors
    /// There is none of that name, or its state does not allow it.
    pub async fn bitmap_set_recording(&self, node: &str, name: &str, on: bool) -> Result<()> {
        let (found, bitmap) = self.bitmap(node, name)?;
        usable(&bitmap, Usable::Reading)?;
        let guard = self.bitmaps_drained(found.id()).await;
        bitmap.set_recording(on);
        self.bitmaps_changed(found.id());
        drop(guard);
        Ok(())
    }

    /// Marks in `target` what any of `sources` marks: all of them, or none when one is refused.
    ///
    /// # Errors
    /// There is none of that name, the state of one does not allow it, or the sizes differ.
    pub async fn bitmap_merge(&self, node: &str, target: &str, sources: &[BitmapRef]) -> Result<()> {
        let (_, into) = self.bitmap(node, target)?;
        usable(&into, Usable::Writing)?;
        let mut all = Vec::with_capacity(sources.len());
        for source in sources {
            let (_, from) = self.bitmap(source.node.as_deref().unwrap_or(node), &source.name)?;
            usable(&from, Usable::Reading)?;
            into.check_merge(&from)?;
            all.push(from);
        }
        all.iter().try_for_each(|from| into.merge(from))
    }
}

fn already(name: &str) -> BlockError {
    BlockError::new(Errno::EEXIST, format!("Bitmap already exists: {name}"))
}

/// QEMU's words where the name may be a device's, too.
pub(super) fn no_such_node_as_device(name: &str) -> BlockError {
    if name.is_empty() {
        return no_such_node(name);
    }
    BlockError::new(Errno::ENOENT, format!("Cannot find device='{name}' nor node-name='{name}'"))
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
