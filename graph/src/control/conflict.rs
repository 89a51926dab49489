//! Why users of a node cannot be together, in words: QEMU's sentence, and then the way out.
//!
//! Called by the permission engine when it refuses. Follows the bit at fault from the edge where it hurts up to whoever can do
//! something about it: a format node two levels up may unshare writing only because an export above it does. Must not change
//! anything.

use super::State;
use crate::edge::{Edge, Parent};
use crate::error::{BlockError, Errno};
use crate::ids::NodeId;
use crate::node::Node;
use crate::perm::{Perm, PermPair};

/// Which half of a pair is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Used,
    Unshared,
}

/// Whether a pair has any of `bits` on that side.
fn has(pair: PermPair, side: Side, bits: Perm) -> bool {
    match side {
        Side::Used => pair.perm.intersects(bits),
        Side::Unshared => !pair.shared.contains(bits),
    }
}

/// Two users of node `name` that cannot be together: one needs `bits`, the other does not share them.
pub(super) fn between(state: &State, name: &str, needs: &Edge, refuses: &Edge, bits: Perm) -> BlockError {
    let user = |e: &Edge| format!("{} (uses node '{name}' as '{}' child)", state.describe(&e.parent), e.name);
    let qemu = format!(
        "Permission conflict on node '{name}': permissions '{}' are both required by {} and unshared by {}.",
        bits.names(),
        user(needs),
        user(refuses),
    );
    let ways = [way(state, refuses, Side::Unshared, bits), way(state, needs, Side::Used, bits)];
    BlockError::new(Errno::EPERM, with_ways(qemu, &ways))
}

/// Somebody wants to write to a node that is read-only or inactive.
pub(super) fn no_writes(state: &State, node: &Node, users: &[&Edge]) -> BlockError {
    let bits = Perm::WRITE | Perm::WRITE_UNCHANGED;
    let writer = users.iter().find(|e| e.pair.perm.intersects(bits));
    let less = writer.and_then(|e| way(state, e, Side::Used, bits));
    let name = node.name();
    let (why, allow) = if node.options().read_only {
        ("read-only", format!("add node '{name}' with read-only=off"))
    } else {
        ("inactive", format!("activate node '{name}' (blockdev-set-active)"))
    };
    BlockError::new(Errno::EPERM, with_ways(format!("Block node is {why}."), &[Some(allow), less]))
}

/// The last block of the node could not be written without making the node longer.
pub(super) fn odd_size(node: &Node, align: u64) -> BlockError {
    let qemu =
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment.";
    let resize = format!("resize node '{}' from {} bytes to a multiple of {align}", node.name(), node.size());
    let ways = [Some(resize), Some("add it with cache.direct=off".to_owned())];
    BlockError::new(Errno::EPERM, with_ways(qemu.to_owned(), &ways))
}

fn with_ways(mut text: String, ways: &[Option<String>]) -> String {
    let ways: Vec<&str> = ways.iter().flatten().map(String::as_str).collect();
    if !ways.is_empty() {
        text.push_str(" Way out: ");
        text.push_str(&ways.join(", or "));
        text.push('.');
    }
    text
}

/// What can be done about `bits` on one side of an edge, by whoever is the reason for them.
fn way(state: &State, edge: &Edge, side: Side, bits: Perm) -> Option<String> {
    let mut edge = edge;
    loop {
        let parent = match &edge.parent {
            Parent::Root(info) => {
                let ways = &info.ways_out;
                return match side {
                    Side::Used => ways.need_less.clone(),
                    // A node that is being opened is the newcomer: whoever was there first gives way, or nobody.
                    Side::Unshared if info.opening => None,
                    Side::Unshared => {
                        ways.share.clone().or_else(|| Some(format!("wait for {} to end", info.description)))
                    }
                };
            }
            Parent::Node(id) => *id,
        };
        match culprit(state, parent, edge, side, bits) {
            Some(above) => edge = above,
            None => {
                let (parent, child) = (state.name_of(parent), state.name_of(edge.child));
                return Some(match side {
                    Side::Used => format!("add node '{parent}' with read-only=on"),
                    Side::Unshared => format!("use node '{parent}' in place of node '{child}'"),
                });
            }
        }
    }
}

/// The user of `parent` that is the reason why its edge to a child has `bits`; `None` if that is its driver itself.
fn culprit<'a>(state: &'a State, parent: NodeId, edge: &Edge, side: Side, bits: Perm) -> Option<&'a Edge> {
    let (index, _) = state.children(parent).find(|(_, e)| e.id == edge.id)?;
    let driver = state.slot(parent).ok()?.node.driver();
    let through = |users: PermPair| {
        let (perm, shared) = driver.child_perm(index, edge.roles, users.perm, users.shared);
        has(PermPair { perm, shared }, side, bits)
    };
    if through(PermPair::IDLE) {
        return None;
    }
    // Alone, with the other half left idle: the reason is the one half.
    state.users(parent).find(|user| {
        through(match side {
            Side::Used => PermPair { perm: user.pair.perm, ..PermPair::IDLE },
            Side::Unshared => PermPair { shared: user.pair.shared, ..PermPair::IDLE },
        })
    })
}
