//! What an image tells about itself and what is asked of it beyond reading and writing: checks and internal snapshots.
//!
//! Plain values between the control channel, jobs and drivers. Must not know any image format.

use std::any::Any;

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckFix {
    /// Space that nobody refers to is given back.
    pub leaks: bool,
    /// References and counts that contradict each other are put right.
    pub errors: bool,
}

impl CheckFix {
    /// Only look.
    pub const NONE: CheckFix = CheckFix { leaks: false, errors: false };
}

/// What a check found, counted as `qemu-img check` counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Where the used part of the file ends, bytes.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Clusters of the guest's disk that have a place in the file.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow their predecessor.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// Clusters that are counted as used and are not (those still there after repair included).
    pub leaks: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// One line each, in `qemu-img`'s words; bounded in number by whoever makes it.
    pub messages: Vec<String>,
}

/// A check that goes on while requests do ([`crate::Driver::check_online`]): how far it has come, and what its driver
/// remembers between two pieces. Dropped at any time, it leaves nothing behind.
#[derive(Default)]
pub struct OnlineCheck {
    /// What is done, in bytes of metadata.
    pub done: u64,
    /// What there is to do, in bytes of metadata; may change.
    pub total: u64,
    /// The driver's own; `None` before the first piece.
    pub state: Option<Box<dyn Any + Send>>,
}

impl std::fmt::Debug for OnlineCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OnlineCheck({}/{})", self.done, self.total)
    }
}

/// What comes after a piece of an [`OnlineCheck`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckStep {
    /// Another piece; requests may be let in between.
    More,
    /// Another piece, with the node drained.
    Drained,
    /// Nothing: this was found.
    Done(CheckReport),
}

/// An internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique inside the image; decimal digits where QEMU or ringblk made it.
    pub id: String,
    /// The name the user gave; need not be unique.
    pub name: String,
    /// Size of a saved machine, bytes.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// And the rest, ns.
    pub date_nsec: u32,
    /// The guest's clock at that time, ns.
    pub vm_clock_nsec: u64,
    /// The guest's instruction counter at that time.
    pub icount: Option<u64>,
    /// Size of the disk at that time, bytes.
    pub disk_size: u64,
}

/// A snapshot that shall be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name.
    pub name: String,
    /// Now: seconds since 1970.
    pub date_sec: u32,
    /// And the rest, ns.
    pub date_nsec: u32,
    /// The guest's clock, ns; 0 when unknown.
    pub vm_clock_nsec: u64,
}

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotRef {
    /// The one with this id.
    Id(String),
    /// The first one with this name.
    Name(String),
    /// The one with both.
    Both {
        /// Its id.
        id: String,
        /// Its name.
        name: String,
    },
    /// The one with this id or, if there is none, the first one with this name.
    IdOrName(String),
}

impl SnapshotRef {
    /// Looks it up in a list, in the order of the list.
    pub fn find<'a>(&self, list: &'a [SnapshotInfo]) -> Option<&'a SnapshotInfo> {
        self.position(list).and_then(|at| list.get(at))
    }

    /// Where it is in a list.
    pub fn position(&self, list: &[SnapshotInfo]) -> Option<usize> {
        match self {
            SnapshotRef::Id(id) => list.iter().position(|s| s.id == *id),
            SnapshotRef::Name(name) => list.iter().position(|s| s.name == *name),
            SnapshotRef::Both { id, name } => list.iter().position(|s| s.id == *id && s.name == *name),
            SnapshotRef::IdOrName(text) => {
                list.iter().position(|s| s.id == *text).or_else(|| list.iter().position(|s| s.name == *text))
            }
        }
    }
}

impl std::fmt::Display for SnapshotRef {
    /// As messages name it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SnapshotRef::Id(text) | SnapshotRef::Name(text) | SnapshotRef::IdOrName(text) => {
                f.write_str(text)
            }
            SnapshotRef::Both { id, name } => write!(f, "{name} ({id})"),
        }
    }
}
