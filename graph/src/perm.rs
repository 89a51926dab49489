//! Permissions: four bits, when two users conflict, and what a parent's users mean for its children. Pure.
//!
//! Used by the permission engine in `control` and by drivers (`Driver::child_perm`). Must not touch the graph.

use crate::role::Roles;

bitflags::bitflags! {
    /// What a user of a node does to it, or (as *shared*) lets others do at the same time.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Perm: u8 {
        /// Reads, and what is read has to be one complete point in time of the image. A user without this bit may
        /// see an image that makes no sense, e.g. an intermediate node while a commit job rewrites it.
        const CONSISTENT_READ = 0x01;
        /// Writes that change what others see.
        const WRITE = 0x02;
        /// Writes that change nothing anyone sees: filling clusters from the backing file, rewriting the same
        /// data. WRITE covers these writes too, and yet both bits are told apart so that one can be shared alone.
        const WRITE_UNCHANGED = 0x04;
        /// Changes the size, deliberately or by writing past the end.
        const RESIZE = 0x08;
    }
}

impl Perm {
    /// Nothing.
    pub const NONE: Perm = Perm::empty();
    /// All four.
    pub const ALL: Perm = Perm::all();
    /// Those that change anything: what a read-only node grants to nobody.
    pub const MODIFIES: Perm = Perm::WRITE.union(Perm::WRITE_UNCHANGED).union(Perm::RESIZE);

    /// The names QEMU uses in its messages, comma separated.
    pub fn names(self) -> String {
        const NAMES: [(Perm, &str); 4] = [
            (Perm::CONSISTENT_READ, "consistent read"),
            (Perm::WRITE, "write"),
            (Perm::WRITE_UNCHANGED, "write unchanged"),
            (Perm::RESIZE, "resize"),
        ];
        let names: Vec<&str> = NAMES.iter().filter(|(p, _)| self.contains(*p)).map(|(_, n)| *n).collect();
        names.join(", ")
    }

    /// Whether a user with this permission writes in any way.
    pub fn writes(self) -> bool {
        self.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED)
    }
}

/// What one user of a node takes and what it leaves to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermPair {
    /// What this user does.
    pub perm: Perm,
    /// What it lets others do.
    pub shared: Perm,
}

impl PermPair {
    /// A user that does nothing and allows everything: the neutral element of [`PermPair::join`].
    pub const IDLE: PermPair = PermPair { perm: Perm::NONE, shared: Perm::ALL };

    /// Both at once: union of what is used, intersection of what is shared.
    #[must_use]
    pub fn join(self, other: PermPair) -> PermPair {
        PermPair { perm: self.perm | other.perm, shared: self.shared & other.shared }
    }

    /// All users of a node together, as its driver sees them.
    pub fn cumulative(users: impl IntoIterator<Item = PermPair>) -> PermPair {
        users.into_iter().fold(PermPair::IDLE, PermPair::join)
    }

    /// Whether going from `self` to `to` only gives up: nothing new is used, nothing shared is taken back.
    pub fn relaxes_to(self, to: PermPair) -> bool {
        self.perm.contains(to.perm) && to.shared.contains(self.shared)
    }
}

/// The first pair of users that cannot be together, in order: (index that needs, index that refuses, the bits).
pub fn first_conflict(users: &[PermPair]) -> Option<(usize, usize, Perm)> {
    // Cheap exit for the usual case; a user never conflicts with itself, hence the pairwise search below.
    users.iter().enumerate().find_map(|(b, refuses)| {
        users.iter().enumerate().find_map(|(a, needs)| {
            let bits = needs.perm - refuses.shared;
            (a != b && !bits.is_empty()).then_some((a, b, bits))
        })
    })
}

/// What a node's users mean for one of its children when the driver has no opinion of its own.
///
/// `perm` and `shared` are the node's cumulative pair; `writable` is false when the node is read-only. Follows QEMU's
/// `bdrv_default_perms`.
pub fn default_child_perm(roles: Roles, perm: Perm, shared: Perm, writable: bool) -> (Perm, Perm) {
    if roles.contains(Roles::FILTERED) {
        filter_child_perm(perm, shared)
    } else if roles.contains(Roles::COW) {
        cow_child_perm(perm, shared)
    } else {
        storage_child_perm(roles, perm, shared, writable)
    }
}

/// A filter passes everything through, in both directions.
pub fn filter_child_perm(perm: Perm, shared: Perm) -> (Perm, Perm) {
    (perm, shared)
}

/// A backing file is only read; it may be written meanwhile if whoever uses the overlay stands changing data.
pub fn cow_child_perm(perm: Perm, shared: Perm) -> (Perm, Perm) {
    let mut child_shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    if shared.contains(Perm::WRITE) {
        child_shared |= Perm::WRITE | Perm::RESIZE;
    }
    (perm & Perm::CONSISTENT_READ, child_shared)
}

/// Data and metadata of a format: written whenever the node may be, and touched by nobody else.
pub fn storage_child_perm(roles: Roles, perm: Perm, shared: Perm, writable: bool) -> (Perm, Perm) {
    let (mut perm, mut shared) = (perm, shared);
    if roles.contains(Roles::METADATA) {
        if writable {
            // A format updates its headers and tables on its own, users or not.
            perm |= Perm::WRITE | Perm::RESIZE;
        }
        perm |= Perm::CONSISTENT_READ;
        shared.remove(Perm::WRITE | Perm::RESIZE);
    }
    if roles.contains(Roles::DATA) {
        // Others may write around us, but nobody moves the end of a file we allocate in.
        shared.remove(Perm::RESIZE);
        if perm.contains(Perm::WRITE_UNCHANGED) {
            // Unchanged for the user of this node can well be new data in the child (allocating a cluster).
            perm |= Perm::WRITE;
        }
        if perm.contains(Perm::WRITE) {
            perm |= Perm::RESIZE;
        }
    }
    (perm, shared)
}
