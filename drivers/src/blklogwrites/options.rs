//! Options of `blklogwrites`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a blklogwrites node. Writes of more than 1 MiB have several entries in the log. A change that cannot be
/// logged fails, and so does every later one: what is in the log is complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlklogwritesOptions {
    /// The node requests are passed to.
    pub file: BlockdevRef,
    /// The node with the log. It grows, if it can: a file, or a device that is large enough.
    pub log: BlockdevRef,
    /// Unit of everything in the log, in bytes: a power of two from 512 to 8 MiB, default: 512. Requests are multiples of it.
    /// Cannot be given with log-append=on, which takes it from the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 512, max = 8_388_608), extend("format" = "size"))]
    pub log_sector_size: Option<i64>,
    /// Go on with the log that is there (an empty node is an empty log) rather than begin a new one; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_append: Option<bool>,
    /// After how many entries the superblock of the log is brought up to date, besides at each flush; at least 1, default:
    /// 4096. What lies behind is lost to readers when the process dies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub log_super_update_interval: Option<i64>,
}
