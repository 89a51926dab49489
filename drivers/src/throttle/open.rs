//! Opening a throttle node: its child and its place in the group; and the move to another group.
//!
//! Called by the graph on the main thread.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use graph::options::parse_options;
use graph::{BlockError, Errno, OpenContext, Opened, Reopen, ReopenContext, Result, Roles};
use serde_json::Value;

use super::options::{ReopenOptions, ThrottleOptions};
use super::{Seat, Throttle, ThrottleGroup};
use crate::filter::{FILE, Shown};

fn no_such_group(id: &str) -> BlockError {
    BlockError::new(Errno::ENOENT, format!("Throttle group '{id}' does not exist"))
}

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: ThrottleOptions = parse_options(value)?;
    let id = options.throttle_group;
    let group: Arc<ThrottleGroup> = cx.object(&id).map_err(|_| no_such_group(&id))?;
    cx.open_child("file", Roles::FILTER, options.file).await?;
    let child = Shown::new(&*cx.child(FILE)?);
    Ok(Opened::new(Throttle::new(child, &group)))
}

/// A move to another group.
struct Move {
    seat: Arc<Mutex<Seat>>,
    limited: Arc<AtomicBool>,
    group: Arc<ThrottleGroup>,
}

impl Reopen for Move {
    fn commit(self: Box<Self>) {
        let mut seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(seat.member.group(), &self.group) {
            return;
        }
        // Nobody waits at the old place: the node is drained.
        let member = self.group.join(&self.limited, seat.drains > 0);
        seat.member = Arc::new(member);
    }
}

impl Throttle {
    /// Prepares a move.
    pub(super) fn prepare(&self, cx: &ReopenContext, own: Value) -> Result<Box<dyn Reopen>> {
        let options: ReopenOptions = parse_options(own)?;
        let id = options.throttle_group;
        let group = cx.object(&id).map_err(|_| no_such_group(&id))?;
        Ok(Box::new(Move { seat: Arc::clone(&self.seat), limited: Arc::clone(&self.limited), group }))
    }
}
