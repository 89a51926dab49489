//! The rate limit of the log: a guest that can cause a line must not be able to cause a million.
//!
//! Used by the logger alone, under its lock. Pure: time is handed in.

use std::collections::HashMap;
use std::time::Duration;

/// Lines a call site may write in one window; further ones are counted and dropped.
pub const BURST: u32 = 10;
/// Length of a window. It begins with the first line after the previous window ended.
pub const WINDOW: Duration = Duration::from_secs(5);
/// Most call sites followed. A program has a fixed number of them; the limit is against targets made at run time.
const MAX_SITES: usize = 1024;

/// Where a line comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Site {
    /// File and line of the call.
    Call(&'static str, u32),
    /// The target, when the call site is not known.
    Target(String),
    /// All sites past [`MAX_SITES`] together.
    Others,
}

/// What to do with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Write it, and say that this many before it were dropped.
    Write(u64),
    /// Drop it.
    Drop,
}

#[derive(Debug)]
struct State {
    begun: Duration,
    written: u32,
    dropped: u64,
}

/// Counters of all call sites.
#[derive(Debug, Default)]
pub struct RateLimiter {
    sites: HashMap<Site, State>,
}

impl RateLimiter {
    /// Decides about a line of `site` at time `now` (any monotonic origin).
    pub fn admit(&mut self, site: Site, now: Duration) -> Verdict {
        let full = self.sites.len() >= MAX_SITES;
        let site = if full && !self.sites.contains_key(&site) { Site::Others } else { site };
        let state = self.sites.entry(site).or_insert(State { begun: now, written: 0, dropped: 0 });
        if now.saturating_sub(state.begun) >= WINDOW {
            state.begun = now;
            state.written = 0;
        }
        if state.written >= BURST {
            state.dropped = state.dropped.saturating_add(1);
            return Verdict::Drop;
        }
        state.written += 1;
        Verdict::Write(std::mem::take(&mut state.dropped))
    }

    /// Takes the number of lines dropped and not reported yet, over all sites.
    pub fn take_dropped(&mut self) -> u64 {
        self.sites.values_mut().fold(0_u64, |sum, s| sum.saturating_add(std::mem::take(&mut s.dropped)))
    }
}
