//! How long to poll before sleeping: QEMU's rule, from its documentation of the `iothread` object and observed behaviour.
//!
//! Pure arithmetic; the loop measures.

use super::PollParams;

/// Where growth starts, in ns.
const START: u64 = 4_000;

/// The current polling time.
#[derive(Default)]
pub(crate) struct Adaptive {
    ns: u64,
}

impl Adaptive {
    /// How long to poll now, in ns.
    #[inline]
    pub(crate) fn current(&self, p: &PollParams) -> u64 {
        self.ns.min(p.max_ns)
    }

    /// Learns from a wait of `block` ns (polling and sleep together).
    pub(crate) fn update(&mut self, p: &PollParams, block: u64) {
        if p.max_ns == 0 {
            self.ns = 0;
        } else if block <= self.ns {
            // Polling caught it.
        } else if block > p.max_ns {
            // Out of reach.
            self.ns = self.ns.checked_div(p.shrink).unwrap_or(0);
        } else if self.ns < p.max_ns {
            let grown = if self.ns == 0 {
                START
            } else {
                self.ns.saturating_mul(if p.grow == 0 { 2 } else { p.grow })
            };
            self.ns = grown.min(p.max_ns);
        }
    }
}
