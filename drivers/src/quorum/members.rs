//! The children of a quorum, as they come and go.
//!
//! Changed on the main thread in drained sections, read by requests on all iothreads, each of which works with the list as
//! it was when it began. Must not know requests.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use graph::Node;

/// What precedes the number in a child's name.
const PREFIX: &str = "children.";

/// The name of the edge to a child.
pub(super) fn child_name(number: u32) -> String {
    format!("{PREFIX}{number}")
}

/// One child.
pub(super) struct Member {
    /// Index of the child in the graph.
    pub(super) index: usize,
    /// The number in its name; they are asked and counted in this order.
    number: u32,
    pub(super) node: Arc<Node>,
    /// It has failed a write: what it holds is not what was acknowledged.
    stale: AtomicBool,
}

impl Member {
    pub(super) fn new(index: usize, number: u32, node: Arc<Node>) -> Member {
        Member { index, number, node, stale: AtomicBool::new(false) }
    }

    /// It has failed a write.
    pub(super) fn set_stale(&self) {
        // Relaxed: whoever was told that the write succeeded learns of it by other means than this flag.
        self.stale.store(true, Relaxed);
    }

    /// Whether it has failed a write.
    pub(super) fn is_stale(&self) -> bool {
        self.stale.load(Relaxed)
    }
}

/// A list of children in the order of their numbers.
pub(super) type List = Arc<Vec<Arc<Member>>>;

struct State {
    list: List,
    /// The number of the next child.
    next: u32,
}

/// All children.
pub(super) struct Members {
    /// A leaf: held for a copy of the pointer, or for a change in a drained section.
    state: RwLock<State>,
}

impl Members {
    pub(super) fn new(members: Vec<Member>) -> Members {
        let next = members.len() as u32;
        let list = Arc::new(members.into_iter().map(Arc::new).collect());
        Members { state: RwLock::new(State { list, next }) }
    }

    /// The children as of now.
    pub(super) fn list(&self) -> List {
        Arc::clone(&self.state.read().unwrap_or_else(PoisonError::into_inner).list)
    }

    /// The name of the next child, and how many there are.
    pub(super) fn next(&self) -> (String, usize) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        (child_name(state.next), state.list.len())
    }

    /// The graph says what is at an index.
    pub(super) fn changed(&self, index: usize, now: Option<(&str, &Arc<Node>)>) {
        let state = &mut *self.state.write().unwrap_or_else(PoisonError::into_inner);
        let before = state.list.iter().find(|m| m.index == index).cloned();
        let number = |name: &str| name.strip_prefix(PREFIX).and_then(|n| n.parse::<u32>().ok());
        let now = now.and_then(|(name, node)| Some((number(name)?, node)));
        match (&before, now) {
            (None, None) => return,
            // Still the same: what is known of it holds.
            (Some(old), Some((n, node))) if old.number == n && Arc::ptr_eq(&old.node, node) => return,
            _ => {}
        }
        let mut list: Vec<_> = state.list.iter().filter(|m| m.index != index).cloned().collect();
        match now {
            Some((number, node)) => {
                list.push(Arc::new(Member::new(index, number, Arc::clone(node))));
                list.sort_by_key(|m| m.number);
                state.next = state.next.max(number.saturating_add(1));
            }
            // As in QEMU the highest number is used again, others are not.
            None => {
                if let Some(old) = before
                    && old.number + 1 == state.next
                {
                    state.next = old.number;
                }
            }
        }
        state.list = Arc::new(list);
    }
}
