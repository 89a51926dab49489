//! `throttle-group` objects: their properties for `object-add`, `qom-get`, `qom-set` and `qom-list`.
//!
//! Called by the objects' commands on the main thread. The groups themselves live in the graph, whose throttle nodes ask for
//! them by id; here is only how they are told of.

use drivers::throttle::{Limits, ThrottleGroup, ThrottleLimits};
use qmp::QmpError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[cfg(test)]
mod tests;

/// Most throttle groups of a process.
pub const MAX_GROUPS: usize = 1024;

/// `throttle-group`: limits that the throttle nodes that name it keep together. `qom-set` changes `limits` at run time.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ThrottleGroupProperties {
    /// Name of the object.
    pub id: String,
    /// The limits; default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<ThrottleLimits>,
    /// Limit of reads and writes together, requests per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_total: Option<i64>,
    /// How fast a burst of reads and writes together may be, requests per second; not below `iops-total`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_total_max: Option<i64>,
    /// How long a burst of reads and writes together may last, seconds; 1 to 4294967295, above 1 only with `iops-total-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_total_max_length: Option<i64>,
    /// Limit of reads, requests per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_read: Option<i64>,
    /// How fast a burst of reads may be, requests per second; not below `iops-read`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_read_max: Option<i64>,
    /// How long a burst of reads may last, seconds; 1 to 4294967295, above 1 only with `iops-read-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_read_max_length: Option<i64>,
    /// Limit of writes, requests per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_write: Option<i64>,
    /// How fast a burst of writes may be, requests per second; not below `iops-write`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_write_max: Option<i64>,
    /// How long a burst of writes may last, seconds; 1 to 4294967295, above 1 only with `iops-write-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_write_max_length: Option<i64>,
    /// Limit of reads and writes together, bytes per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_total: Option<i64>,
    /// How fast a burst of reads and writes together may be, bytes per second; not below `bps-total`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_total_max: Option<i64>,
    /// How long a burst of reads and writes together may last, seconds; 1 to 4294967295, above 1 only with `bps-total-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_total_max_length: Option<i64>,
    /// Limit of reads, bytes per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_read: Option<i64>,
    /// How fast a burst of reads may be, bytes per second; not below `bps-read`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_read_max: Option<i64>,
    /// How long a burst of reads may last, seconds; 1 to 4294967295, above 1 only with `bps-read-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_read_max_length: Option<i64>,
    /// Limit of writes, bytes per second; 0: none. 0 to 10^15, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_write: Option<i64>,
    /// How fast a burst of writes may be, bytes per second; not below `bps-write`. 0: no faster than that. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_write_max: Option<i64>,
    /// How long a burst of writes may last, seconds; 1 to 4294967295, above 1 only with `bps-write-max`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_bps_write_max_length: Option<i64>,
    /// A request longer than this counts as several, in proportion, bytes; 0: each counts once. Needs a limit of requests. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_iops_size: Option<i64>,
}

fn refused(e: graph::BlockError) -> QmpError {
    QmpError::generic(e.to_string())
}

/// Values that passed the schema and are not what it says.
fn broken(e: serde_json::Error) -> QmpError {
    QmpError::generic(format!("Invalid parameter 'limits': {e}"))
}

/// A new group.
///
/// # Errors
/// The limits are refused, in QEMU's words.
pub fn make(p: &ThrottleGroupProperties) -> Result<ThrottleGroup, QmpError> {
    let mut single = serde_json::Map::new();
    for (name, value) in serde_json::to_value(p).map_err(broken)?.as_object().into_iter().flatten() {
        let Some(name) = name.strip_prefix("x-") else { continue };
        if value.as_i64().is_some_and(|v| v < 0) {
            return Err(QmpError::generic("Property values cannot be negative"));
        }
        single.insert(name.to_owned(), value.clone());
    }
    // `limits` has the last word.
    for (name, value) in serde_json::to_value(&p.limits).map_err(broken)?.as_object().into_iter().flatten() {
        single.insert(name.clone(), value.clone());
    }
    let limits: ThrottleLimits = serde_json::from_value(Value::Object(single)).map_err(broken)?;
    ThrottleGroup::new(&limits).map_err(refused)
}

/// Its properties with their types, as `qom-list` of QEMU spells them.
pub fn properties() -> impl Iterator<Item = (String, &'static str)> {
    let first = [("type".to_owned(), "string"), ("limits".to_owned(), "ThrottleLimits")];
    first.into_iter().chain(Limits::names().map(|n| (format!("x-{n}"), "int")))
}

/// A property for `qom-get`.
///
/// # Errors
/// There is none of that name.
pub fn get(group: &ThrottleGroup, property: &str) -> Result<Value, QmpError> {
    let limits = group.limits();
    match property {
        "type" => Ok(json!("throttle-group")),
        "limits" => Ok(limits.tell()),
        _ => {
            let value = property.strip_prefix("x-").and_then(|name| limits.get(name));
            value.map(|v| json!(v)).ok_or_else(|| no_such_property(property))
        }
    }
}

fn no_such_property(property: &str) -> QmpError {
    QmpError::generic(format!("Property 'throttle-group.{property}' not found"))
}

/// `qom-set`: the limits that are named change, the others stay.
///
/// # Errors
/// There is no such property, it cannot be set, or the limits are refused.
pub fn set(group: &ThrottleGroup, property: &str, value: &Value) -> Result<(), QmpError> {
    match property {
        "limits" => group.set_limits(&parse(value)?).map_err(refused),
        _ => {
            get(group, property)?;
            Err(QmpError::generic(match property {
                "type" => "Property 'throttle-group.type' is not writable",
                _ => "Property cannot be set after initialization",
            }))
        }
    }
}

/// Limits with QEMU's words for what is wrong.
fn parse(value: &Value) -> Result<ThrottleLimits, QmpError> {
    let members = value.as_object().ok_or_else(|| QmpError::invalid_type("limits", "object"))?;
    for (name, value) in members {
        if !Limits::names().any(|n| n == *name) {
            return Err(QmpError::generic(format!("Parameter 'limits.{name}' is unexpected")));
        }
        if value.as_i64().is_none() {
            return Err(QmpError::invalid_type(&format!("limits.{name}"), "integer"));
        }
    }
    serde_json::from_value(value.clone()).map_err(broken)
}
