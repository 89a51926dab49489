//! The limits of a throttle group: as they are told, and as they are kept; what may be together. Pure.
//!
//! Used by the group, and by the process for `object-add`, `qom-get` and `qom-set`. The words of refusals are QEMU's.

use graph::{BlockError, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Highest rate.
pub const MAX_RATE: u64 = 1_000_000_000_000_000;
/// Longest burst, seconds.
pub const MAX_BURST_LENGTH: u64 = u32::MAX as u64;

/// Limits of a throttle group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ThrottleLimits {
    /// Limit of reads and writes together, requests per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_total: Option<i64>,
    /// How fast a burst of reads and writes together may be, requests per second; not below `iops-total`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_total_max: Option<i64>,
    /// How long a burst of reads and writes together may last, seconds; 1 to 4294967295, above 1 only with `iops-total-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_total_max_length: Option<i64>,
    /// Limit of reads, requests per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_read: Option<i64>,
    /// How fast a burst of reads may be, requests per second; not below `iops-read`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_read_max: Option<i64>,
    /// How long a burst of reads may last, seconds; 1 to 4294967295, above 1 only with `iops-read-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_read_max_length: Option<i64>,
    /// Limit of writes, requests per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_write: Option<i64>,
    /// How fast a burst of writes may be, requests per second; not below `iops-write`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_write_max: Option<i64>,
    /// How long a burst of writes may last, seconds; 1 to 4294967295, above 1 only with `iops-write-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_write_max_length: Option<i64>,
    /// Limit of reads and writes together, bytes per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_total: Option<i64>,
    /// How fast a burst of reads and writes together may be, bytes per second; not below `bps-total`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_total_max: Option<i64>,
    /// How long a burst of reads and writes together may last, seconds; 1 to 4294967295, above 1 only with `bps-total-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_total_max_length: Option<i64>,
    /// Limit of reads, bytes per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_read: Option<i64>,
    /// How fast a burst of reads may be, bytes per second; not below `bps-read`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_read_max: Option<i64>,
    /// How long a burst of reads may last, seconds; 1 to 4294967295, above 1 only with `bps-read-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_read_max_length: Option<i64>,
    /// Limit of writes, bytes per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_write: Option<i64>,
    /// How fast a burst of writes may be, bytes per second; not below `bps-write`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_write_max: Option<i64>,
    /// How long a burst of writes may last, seconds; 1 to 4294967295, above 1 only with `bps-write-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps_write_max_length: Option<i64>,
    /// A request longer than this counts as several, in proportion, bytes; 0: each counts once. Needs a limit of requests. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_size: Option<i64>,
}

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units per second that are let through for ever; 0: all.
    pub avg: u64,
    /// Units per second while a burst lasts; 0: there are none.
    pub max: u64,
    /// How long a burst may last, seconds; at least 1.
    pub burst_length: u64,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { avg: 0, max: 0, burst_length: 1 }
    }
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Requests,
    Bytes,
}

/// Which requests it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Total,
    Reads,
    Writes,
}

/// How many limits there are.
pub(super) const RATES: usize = 6;

/// The limits in their order, with the beginnings of their names.
pub(super) const NAMES: [(&str, Unit, Which); RATES] = [
    ("iops-total", Unit::Requests, Which::Total),
    ("iops-read", Unit::Requests, Which::Reads),
    ("iops-write", Unit::Requests, Which::Writes),
    ("bps-total", Unit::Bytes, Which::Total),
    ("bps-read", Unit::Bytes, Which::Reads),
    ("bps-write", Unit::Bytes, Which::Writes),
];

/// The limits of a group as it keeps them: complete, and possible together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub(super) rates: [Rate; RATES],
    /// A longer request counts as several, bytes; 0: it does not.
    pub(super) iops_size: u64,
}

/// Which member of a limit a name means.
enum Member {
    Avg,
    Max,
    BurstLength,
}

/// The limit and the member a name means; `None` for `iops-size` and for names there are not.
fn place(name: &str) -> Option<(usize, Member)> {
    let (start, member) = match (name.strip_suffix("-max-length"), name.strip_suffix("-max")) {
        (Some(start), _) => (start, Member::BurstLength),
        (None, Some(start)) => (start, Member::Max),
        (None, None) => (name, Member::Avg),
    };
    NAMES.iter().position(|(n, ..)| *n == start).map(|at| (at, member))
}

fn out_of_range() -> BlockError {
    BlockError::invalid(format!("bps/iops/max values must be within [0, {MAX_RATE}]"))
}

impl Limits {
    /// These limits with those that are told in place of the old ones.
    ///
    /// # Errors
    /// A value is out of range, or the limits cannot be together.
    pub fn with(mut self, told: &ThrottleLimits) -> Result<Limits> {
        let Ok(Value::Object(told)) = serde_json::to_value(told) else {
            return Err(BlockError::invalid("Invalid parameter type for 'limits', expected: object"));
        };
        for (name, value) in &told {
            if let Some(value) = value.as_i64() {
                self.set(name, value)?;
            }
        }
        self.check()?;
        Ok(self)
    }

    fn set(&mut self, name: &str, value: i64) -> Result<()> {
        match place(name).and_then(|(at, member)| Some((self.rates.get_mut(at)?, member))) {
            Some((rate, Member::BurstLength)) => {
                let range = |v: &u64| *v <= MAX_BURST_LENGTH;
                rate.burst_length = u64::try_from(value).ok().filter(range).ok_or_else(|| {
                    BlockError::invalid(format!("{name} value must be in the range [0, {MAX_BURST_LENGTH}]"))
                })?;
            }
            Some((rate, member)) => {
                let value = u64::try_from(value).ok().filter(|v| *v <= MAX_RATE).ok_or_else(out_of_range)?;
                match member {
                    Member::Max => rate.max = value,
                    _ => rate.avg = value,
                }
            }
            None => {
                // QEMU takes any number here; less than nothing means nothing.
                self.iops_size = u64::try_from(value)
                    .map_err(|_| BlockError::invalid("Property values cannot be negative"))?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let refuse = |words: &'static str| Err(BlockError::invalid(words));
        for unit in self.rates.chunks(3) {
            let both = |f: fn(&Rate) -> u64| match unit {
                [total, read, write] => f(total) != 0 && (f(read) != 0 || f(write) != 0),
                _ => false,
            };
            if both(|r| r.avg) || both(|r| r.max) {
                return refuse(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                );
            }
        }
        if self.iops_size != 0 && self.rates.iter().take(3).all(|r| r.avg == 0) {
            return refuse("iops size requires an iops value to be set");
        }
        for r in &self.rates {
            if r.burst_length == 0 {
                return refuse("the burst length cannot be 0");
            }
            if r.burst_length > 1 && r.max == 0 {
                return refuse("burst length set without burst rate");
            }
            if r.max != 0 && r.burst_length > MAX_RATE / r.max {
                return refuse("burst length too high for this burst rate");
            }
            if r.max != 0 && r.avg == 0 {
                return refuse("bps_max/iops_max require corresponding bps/iops values");
            }
            if r.max != 0 && r.max < r.avg {
                return refuse("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }

    /// Whether anything is limited.
    pub fn any(&self) -> bool {
        self.rates.iter().any(|r| r.avg != 0)
    }

    /// One of them, by the name it is told under; `None` where there is none of that name.
    pub fn get(&self, name: &str) -> Option<u64> {
        if name == "iops-size" {
            return Some(self.iops_size);
        }
        let (at, member) = place(name)?;
        self.rates.get(at).map(|r| match member {
            Member::Avg => r.avg,
            Member::Max => r.max,
            Member::BurstLength => r.burst_length,
        })
    }

    /// All of them, as `qom-get` tells them.
    pub fn tell(&self) -> Value {
        let names = Self::names();
        Value::Object(
            names.filter_map(|n| Some((n.clone(), Value::from(self.get(&n)?)))).collect::<Map<_, _>>(),
        )
    }

    /// The names of all of them.
    pub fn names() -> impl Iterator<Item = String> {
        let of_one =
            |(name, ..): &(&str, Unit, Which)| ["", "-max", "-max-length"].map(|end| format!("{name}{end}"));
        NAMES.iter().flat_map(of_one).chain(["iops-size".to_owned()])
    }
}
