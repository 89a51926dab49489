//! Options every node has, whichever its driver, and the reference type drivers use for their children.
//!
//! Parsed by `control::open`; drivers read the *effective* values through `OpenContext::options`. Must not know any
//! driver's own options.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{BlockError, Result};

/// What a node does with discard requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiscardOption {
    /// Drop them; the request succeeds and changes nothing.
    #[default]
    Ignore,
    /// Pass them on.
    Unmap,
}

/// Whether a node looks for zeroes in the data written to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroes {
    /// No.
    #[default]
    Off,
    /// Writes of zeroes become write-zeroes requests.
    On,
    /// As on, and the blocks may be unmapped; needs `discard=unmap`.
    Unmap,
}

/// Cache members of a node's options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CacheOptions {
    /// Bypass the host's page cache (O_DIRECT); default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// Ignore flush requests; default: off. Data can be lost when the host fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_flush: Option<bool>,
}

/// The members of `blockdev-add` that are the same for all drivers, as the user gave them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CommonOptions {
    /// The block driver.
    pub driver: String,
    /// The node's name: at most 31 characters out of A-Z a-z 0-9 - . _, a letter first. Generated when missing
    /// (required at the top level).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// What discard requests do; default: ignore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard: Option<DiscardOption>,
    /// Cache options.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheOptions>,
    /// Whether the node refuses writes; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// Fall back to read-only when the image cannot be opened for writing; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_read_only: Option<bool>,
    /// Share everything with other users of the image, also other processes; needs `read-only=on`; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force_share: Option<bool>,
    /// Look for zeroes in written data; default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detect_zeroes: Option<DetectZeroes>,
    /// Whether the node may be used: an inactive one takes no writes and lets others write to its image, for a guest that
    /// moves between two processes; see `blockdev-set-active`. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<bool>,
}

/// Names of the members of [`CommonOptions`] on the wire; a driver's own option may have none of these.
pub const COMMON_MEMBERS: [&str; 9] = [
    "driver",
    "node-name",
    "discard",
    "cache",
    "read-only",
    "auto-read-only",
    "force-share",
    "detect-zeroes",
    "active",
];

/// What a node is opened for; not an option a user gives, but what a tool says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Requests.
    #[default]
    Use,
    /// Telling what it is: nothing is opened but the image's own file, no key is needed, no data will be asked for.
    Inspect,
    /// Checking and repairing it: damaged images are let in, and nothing is repaired before it is asked for.
    Check,
}

/// The options a node runs with, after defaults and inheritance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// Refuses writes.
    pub read_only: bool,
    /// May fall back to read-only while it is being opened.
    pub auto_read_only: bool,
    /// Discards are passed on.
    pub discard: DiscardOption,
    /// Looks for zeroes in written data.
    pub detect_zeroes: DetectZeroes,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes stop here.
    pub no_flush: bool,
    /// Every user shares everything.
    pub force_share: bool,
    /// Takes no writes and lets others write to its image.
    pub inactive: bool,
    /// What it is opened for; children are always opened for use.
    pub purpose: Purpose,
}

impl NodeOptions {
    /// Whether writes are refused.
    pub fn refuses_writes(&self) -> bool {
        self.read_only || self.inactive
    }
}

impl CommonOptions {
    /// Splits a `blockdev-add` object into the common members and the driver's own.
    ///
    /// # Errors
    /// Not an object, `driver` missing, or a common member of the wrong type; the words are QEMU's.
    pub fn split(value: Value) -> Result<(CommonOptions, Map<String, Value>)> {
        let Value::Object(mut own) = value else {
            return Err(BlockError::invalid("Invalid parameter type for 'options', expected: object"));
        };
        let mut common = Map::new();
        for name in COMMON_MEMBERS {
            if let Some(value) = own.remove(name) {
                common.insert(name.to_owned(), value);
            }
        }
        check_types(&common)?;
        Ok((parse_options(Value::Object(common))?, own))
    }

    /// Fills in defaults and checks what only makes sense together. `inherited` holds what an inline child takes from
    /// its parent where the user said nothing.
    ///
    /// # Errors
    /// A combination that is refused; the words are QEMU's.
    pub fn effective(&self, inherited: &NodeOptions) -> Result<NodeOptions> {
        let cache = self.cache.unwrap_or_default();
        let options = NodeOptions {
            read_only: self.read_only.unwrap_or(inherited.read_only),
            auto_read_only: self.auto_read_only.unwrap_or(inherited.auto_read_only),
            discard: self.discard.unwrap_or(inherited.discard),
            detect_zeroes: self.detect_zeroes.unwrap_or_default(),
            direct: cache.direct.unwrap_or(inherited.direct),
            no_flush: cache.no_flush.unwrap_or(inherited.no_flush),
            force_share: self.force_share.unwrap_or(inherited.force_share),
            inactive: self.active.map_or(inherited.inactive, |active| !active),
            purpose: inherited.purpose,
        };
        if options.force_share && !options.read_only {
            return Err(BlockError::invalid("force-share=on can only be used with read-only images"));
        }
        if options.detect_zeroes == DetectZeroes::Unmap && options.discard != DiscardOption::Unmap {
            return Err(BlockError::invalid(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        Ok(options)
    }
}

/// QEMU's words for common members of the wrong type, which the parser cannot name.
fn check_types(common: &Map<String, Value>) -> Result<()> {
    let wrong = |name: &str, expected: &str| {
        Err(BlockError::invalid(format!("Invalid parameter type for '{name}', expected: {expected}")))
    };
    let one_of = |name: &str, allowed: &[&str]| match common.get(name) {
        Some(Value::String(s)) if !allowed.contains(&s.as_str()) => {
            Err(BlockError::invalid(format!("Parameter '{name}' does not accept value '{s}'")))
        }
        _ => Ok(()),
    };
    for name in ["driver", "node-name", "discard", "detect-zeroes"] {
        if common.get(name).is_some_and(|v| !v.is_string()) {
            return wrong(name, "string");
        }
    }
    for name in ["read-only", "auto-read-only", "force-share", "active"] {
        if common.get(name).is_some_and(|v| !v.is_boolean()) {
            return wrong(name, "boolean");
        }
    }
    one_of("discard", &["ignore", "unmap"])?;
    one_of("detect-zeroes", &["off", "on", "unmap"])?;
    let Some(cache) = common.get("cache") else { return Ok(()) };
    let Some(cache) = cache.as_object() else { return wrong("cache", "object") };
    for (name, value) in cache {
        match name.as_str() {
            "direct" | "no-flush" if value.is_boolean() => {}
            "direct" | "no-flush" => return wrong(&format!("cache.{name}"), "boolean"),
            _ => return Err(BlockError::invalid(format!("Parameter 'cache.{name}' is unexpected"))),
        }
    }
    Ok(())
}

/// A child in a driver's options: the name of an existing node, or the definition of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BlockdevRef {
    /// The name of a node that exists.
    Reference(String),
    /// Options of a node that is created for this parent and goes with it.
    Inline(Map<String, Value>),
}

impl JsonSchema for BlockdevRef {
    fn schema_name() -> Cow<'static, str> {
        "BlockdevRef".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // The definition side is the union over the registry, which only the control channel can assemble.
        json_schema!({
            "description": "The name of an existing node, or the definition of a new one.",
            "anyOf": [{ "type": "string" }, { "$ref": "#/$defs/BlockdevOptions" }],
        })
    }
}

/// Parses an options object into a driver's struct with QEMU's words for what is wrong.
///
/// # Errors
/// `Parameter 'x' is missing`, `Parameter 'x' is unexpected` or the parser's own words.
pub fn parse_options<T: for<'de> Deserialize<'de>>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| {
        let text = e.to_string();
        let quoted = text.split('`').nth(1).unwrap_or("").to_owned();
        if text.starts_with("missing field") {
            BlockError::invalid(format!("Parameter '{quoted}' is missing"))
        } else if text.starts_with("unknown field") {
            BlockError::invalid(format!("Parameter '{quoted}' is unexpected"))
        } else if text.starts_with("unknown variant") {
            BlockError::invalid(format!("Invalid parameter '{quoted}'"))
        } else {
            BlockError::invalid(format!("Invalid parameter type: {text}"))
        }
    })
}
