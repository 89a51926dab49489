//! Leaky buckets: how much has been let through, and how long the next request has to wait. Pure; time is a number.
//!
//! Used by the group. The rules are QEMU's: a request is let through while the bucket is not over full, whatever it pours
//! in; then the bucket has to leak. Levels are whole numbers of billionths of a unit, so that a nanosecond at one unit per
//! second is the smallest step and nothing is ever rounded in somebody's favour.

use super::limits::{Limits, NAMES, RATES, Rate, Unit, Which};

/// Billionths per unit, and nanoseconds per second.
const NANO: u128 = 1_000_000_000;

/// Reads or writes; what changes data counts as a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read = 0,
    /// Writes, writes of zeroes, discards.
    Write = 1,
}

impl Direction {
    /// Both.
    pub const BOTH: [Direction; 2] = [Direction::Read, Direction::Write];

    /// The other one.
    pub fn other(self) -> Direction {
        match self {
            Direction::Read => Direction::Write,
            Direction::Write => Direction::Read,
        }
    }
}

/// One limit's bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bucket {
    rate: Rate,
    /// Leaks at the average rate.
    level: u128,
    /// Leaks at the rate of bursts; kept only where bursts may last for more than a second.
    burst_level: u128,
}

/// How long `excess` takes to leak, ns, rounded up.
fn time_for(excess: u128, rate: u64) -> u64 {
    u64::try_from(excess.div_ceil(u128::from(rate).max(1))).unwrap_or(u64::MAX)
}

impl Bucket {
    pub(super) fn new(rate: Rate) -> Bucket {
        Bucket { rate, level: 0, burst_level: 0 }
    }

    /// Lets `ns` nanoseconds pass.
    pub(super) fn leak(&mut self, ns: u64) {
        let leaked = |rate: u64| u128::from(rate) * u128::from(ns);
        self.level = self.level.saturating_sub(leaked(self.rate.avg));
        self.burst_level = self.burst_level.saturating_sub(leaked(self.rate.max));
    }

    /// How long the next request waits, ns.
    pub(super) fn wait(&self) -> u64 {
        let Rate { avg, max, burst_length } = self.rate;
        if avg == 0 {
            return 0;
        }
        // Without bursts a tenth of a second's worth may still come at once, or every second request would wait.
        let size = match max {
            0 => u128::from(avg) * NANO / 10,
            _ => u128::from(max) * u128::from(burst_length) * NANO,
        };
        if self.level > size {
            return time_for(self.level - size, avg);
        }
        let burst_size = u128::from(max) * NANO / 10;
        if burst_length > 1 && self.burst_level > burst_size {
            return time_for(self.burst_level - burst_size, max);
        }
        0
    }

    /// Pours in billionths of units.
    pub(super) fn pour(&mut self, amount: u128) {
        if self.rate.avg == 0 {
            return;
        }
        self.level = self.level.saturating_add(amount);
        if self.rate.burst_length > 1 {
            self.burst_level = self.burst_level.saturating_add(amount);
        }
    }
}

/// All buckets of a group.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Buckets {
    limits: Limits,
    buckets: [Bucket; RATES],
    /// When they leaked last, ns.
    leaked_at: Option<u64>,
}

fn concerns(which: Which, direction: Direction) -> bool {
    match which {
        Which::Total => true,
        Which::Reads => direction == Direction::Read,
        Which::Writes => direction == Direction::Write,
    }
}

impl Buckets {
    /// Empty ones.
    pub(super) fn new(limits: Limits) -> Buckets {
        Buckets { limits, buckets: limits.rates.map(Bucket::new), leaked_at: None }
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// It is `now`, ns. A clock that goes back stands still.
    pub(super) fn advance(&mut self, now: u64) {
        let before = self.leaked_at.unwrap_or(now);
        let now = now.max(before);
        self.buckets.iter_mut().for_each(|b| b.leak(now - before));
        self.leaked_at = Some(now);
    }

    /// How long the next request in this direction waits, ns.
    pub(super) fn wait(&self, direction: Direction) -> u64 {
        let concerned =
            NAMES.iter().zip(&self.buckets).filter(|((.., which), _)| concerns(*which, direction));
        concerned.map(|(_, bucket)| bucket.wait()).max().unwrap_or(0)
    }

    /// A request of so many bytes is let through.
    pub(super) fn account(&mut self, direction: Direction, bytes: u64) {
        let bytes_poured = u128::from(bytes) * NANO;
        let requests_poured = match u128::from(self.limits.iops_size) {
            size if size != 0 && u128::from(bytes) > size => bytes_poured / size,
            _ => NANO,
        };
        for ((_, unit, which), bucket) in NAMES.iter().zip(&mut self.buckets) {
            if concerns(*which, direction) {
                bucket.pour(match unit {
                    Unit::Requests => requests_poured,
                    Unit::Bytes => bytes_poured,
                });
            }
        }
    }
}
