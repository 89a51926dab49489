//! `throttle`: passes its child's requests on as fast as the limits of a throttle group allow.
//!
//! | file | subject |
//! |---|---|
//! | `limits` | what limits there are, and which can be together |
//! | `bucket` | how long a request waits |
//! | `group` | who waits, and whose turn it is |
//! | `options`, `open`, `io` | the driver |
//!
//! Called by the graph; groups are made and changed by the process. Must not reach anything but its child.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use graph::{DriverDef, DriverKind};

mod bucket;
mod group;
mod io;
mod limits;
mod open;
mod options;
#[cfg(test)]
mod tests;

pub use group::ThrottleGroup;
pub use limits::{Limits, MAX_BURST_LENGTH, MAX_RATE, Rate, ThrottleLimits};

use crate::filter::Shown;
use group::Member;
use options::ThrottleOptions;

/// `throttle`.
pub(crate) const THROTTLE: DriverDef = DriverDef {
    name: "throttle",
    kind: DriverKind::Filter,
    schema: || schemars::schema_for!(ThrottleOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: None,
};

/// A throttle node.
struct Throttle {
    child: Shown,
    /// Whether the group limits anything; kept by the group.
    limited: Arc<AtomicBool>,
    seat: Arc<Mutex<Seat>>,
}

/// The node's place in its group, and how many drains it knows of. The lock is a leaf but for the group's.
struct Seat {
    member: Arc<Member>,
    drains: usize,
}

impl Throttle {
    fn new(child: Shown, group: &Arc<ThrottleGroup>) -> Throttle {
        let limited = Arc::new(AtomicBool::new(false));
        let member = Arc::new(group.join(&limited, false));
        Throttle { child, limited, seat: Arc::new(Mutex::new(Seat { member, drains: 0 })) }
    }

    fn with_seat<T>(&self, change: impl FnOnce(&mut Seat) -> T) -> T {
        change(&mut self.seat.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
