//! `cache-clean-interval`: what the caches hold and nobody used for a while goes, and its memory with it.
//!
//! Set off by loading a slice of an L2 table; one timer on the iothread that did so, which ends when the caches are empty: an
//! idle image keeps neither memory nor a timer. Does no I/O, so that it needs no drain. If the iothread goes, the timer goes with
//! it, and the next load sets it off again.

use std::sync::atomic::{AtomicBool, Ordering::AcqRel, Ordering::Release};
use std::sync::{Arc, Weak};

use host::Local;

use super::alloc::Space;
use super::table::Tables;

/// The timer of one image.
pub(crate) struct Cleaning {
    /// Nanoseconds; 0: never.
    interval: u64,
    running: AtomicBool,
}

/// The timer runs as long as this lives.
struct Running(Arc<Cleaning>);

impl Drop for Running {
    fn drop(&mut self) {
        // Pairs with the AcqRel exchange of whoever sets it off next.
        self.0.running.store(false, Release);
    }
}

impl Cleaning {
    /// `seconds` 0: never.
    pub(crate) fn new(seconds: u64) -> Arc<Cleaning> {
        Arc::new(Cleaning {
            interval: seconds.saturating_mul(1_000_000_000),
            running: AtomicBool::new(false),
        })
    }

    fn start(self: &Arc<Cleaning>) -> Option<Running> {
        // Pairs with the Release store of a timer that ended.
        let free = !self.running.swap(true, AcqRel);
        free.then(|| Running(Arc::clone(self)))
    }

    /// Something was cached.
    #[inline]
    pub(crate) fn set_off(self: &Arc<Cleaning>, local: &Local, tables: &Arc<Tables>, space: &Arc<Space>) {
        if self.interval == 0 {
            return;
        }
        let Some(mut running) = self.start() else { return };
        let (cleaning, tables, space) = (Arc::clone(self), Arc::downgrade(tables), Arc::downgrade(space));
        let clock = local.clone();
        local.spawn(async move {
            loop {
                clock.sleep(cleaning.interval).await;
                if clean(&tables, &space) {
                    continue;
                }
                drop(running);
                // Whoever cached something before that did not set it off.
                match any(&tables).then(|| cleaning.start()).flatten() {
                    Some(again) => running = again,
                    None => return,
                }
            }
        });
    }
}

/// Whether anything is left.
fn clean(tables: &Weak<Tables>, space: &Weak<Space>) -> bool {
    let (Some(tables), Some(space)) = (tables.upgrade(), space.upgrade()) else { return false };
    // Both, whatever the first one says.
    let (slices, blocks) = (tables.clean(), space.clean());
    slices || blocks
}

fn any(tables: &Weak<Tables>) -> bool {
    tables.upgrade().is_some_and(|t| t.has_any())
}
