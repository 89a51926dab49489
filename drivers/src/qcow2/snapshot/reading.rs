//! A node that reads an internal snapshot, next to the node a guest writes to: see `docs/decisions`, "reading snapshots".
//!
//! Called while a node is opened. What a snapshot refers to does not change while it exists, so all that is needed is its L1
//! table, and the claim that keeps it from being deleted.

use graph::{BlockError, Errno, OpenContext, Pin, Result};

use super::delete::claim;
use crate::qcow2::format::Header;
use crate::qcow2::format::snapshot::Snapshot;
use crate::qcow2::node::FILE;

/// The snapshot with this id or, if there is none, the first one with this name.
fn find<'a>(list: &'a [Snapshot], which: &str) -> Result<&'a Snapshot> {
    let found = list.iter().find(|s| s.id == which.as_bytes());
    let found = found.or_else(|| list.iter().find(|s| s.name == which.as_bytes()));
    found.ok_or_else(|| BlockError::new(Errno::ENOENT, format!("Can't find snapshot {which}")))
}

/// Claims a snapshot. The table has to be read again afterwards, for [`show`]: it may have been deleted in between.
///
/// # Errors
/// No such snapshot, one that is being deleted, or a writable node.
pub(in crate::qcow2) fn begin(
    cx: &OpenContext,
    header: &Header,
    list: &[Snapshot],
    which: &str,
) -> Result<(Snapshot, Pin)> {
    if !cx.options().read_only {
        return Err(BlockError::invalid("'snapshot' needs read-only=on"));
    }
    if header.has_data_file() {
        let text = "Internal snapshots are not supported with an external data file";
        return Err(BlockError::unsupported(text));
    }
    let snapshot = find(list, which)?.clone();
    let pin = cx.child(FILE)?.pins().share(&claim(&snapshot.id));
    let pin = pin.ok_or_else(|| {
        BlockError::new(Errno::EBUSY, format!("Snapshot '{which}' is in use: it is being deleted"))
    })?;
    Ok((snapshot, pin))
}

/// Makes the header that of a disk as it was when the snapshot was made. `list` was read under the claim.
///
/// # Errors
/// The snapshot has gone or changed since it was claimed, or its L1 table cannot be.
pub(in crate::qcow2) fn show(header: &mut Header, list: &[Snapshot], claimed: &Snapshot) -> Result<()> {
    let now = list.iter().find(|s| s.id == claimed.id);
    if now.is_none_or(|s| (s.l1_offset, s.l1_size) != (claimed.l1_offset, claimed.l1_size)) {
        let id = String::from_utf8_lossy(&claimed.id);
        return Err(BlockError::new(Errno::EBUSY, format!("Snapshot '{id}' is in use: it has just changed")));
    }
    let geo = header.geometry();
    claimed.validate_l1(&geo)?;
    let size = claimed.disk_size.unwrap_or(header.size);
    if size > i64::MAX as u64 || geo.l1_entries_for(size) > u64::from(claimed.l1_size) {
        return Err(BlockError::invalid("Snapshot L1 table is too small"));
    }
    header.l1_offset = claimed.l1_offset;
    header.l1_size = claimed.l1_size;
    header.size = size;
    // They are about the disk as it is now.
    header.bitmaps = None;
    Ok(())
}
