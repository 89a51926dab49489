//! Options of `blkdebug`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use graph::{DebugEvent, Perm};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a blkdebug node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlkdebugOptions {
    /// The node requests are passed to.
    pub image: BlockdevRef,
    /// A file with further rules, in QEMU's format of configuration files: groups `[inject-error]` and `[set-state]`, in
    /// them lines `name = "value"` with the members of the options of those names; at most 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// Requests are multiples of this, in bytes; a power of two, default: what `image` wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("format" = "size"))]
    pub align: Option<i64>,
    /// Longest read or write, in bytes; a multiple of the alignment, default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("format" = "size"))]
    pub max_transfer: Option<i64>,
    /// Writes of zeroes below this are refused, so that zeroes are written instead, and longer ones are cut at its
    /// multiples; in bytes, a multiple of the alignment, default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("format" = "size"))]
    pub opt_write_zero: Option<i64>,
    /// Longest write of zeroes, in bytes; a multiple of the alignment and of opt-write-zero, default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("format" = "size"))]
    pub max_write_zero: Option<i64>,
    /// Discards below this do nothing, and longer ones are cut at its multiples; in bytes, a multiple of the alignment,
    /// default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("format" = "size"))]
    pub opt_discard: Option<i64>,
    /// Longest discard, in bytes; a multiple of the alignment and of opt-discard, default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("format" = "size"))]
    pub max_discard: Option<i64>,
    /// Which requests fail; at most 1024 rules, the first that fits counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inject_error: Vec<InjectError>,
    /// When the state changes; at most 1024 rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_state: Vec<SetState>,
    /// Permissions that are taken on `image` whatever users of this node do; default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub take_child_perms: Vec<Permission>,
    /// Permissions that are not shared on `image` whatever users of this node share; default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unshare_child_perms: Vec<Permission>,
}

/// Requests that fail after an event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InjectError {
    /// The event after which requests fail, until an event of another such rule comes; `none` is passed when the node is
    /// opened.
    pub event: DebugEvent,
    /// The state the node must be in when the event comes, 0: any; default: any. A node starts in state 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<i64>,
    /// The kind of request that fails; default: all but block-status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iotype: Option<IoType>,
    /// The error, a number of Linux, 0 to 4095; 0 lets the request pass and later rules unseen; default: EIO (5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 4095))]
    pub errno: Option<i64>,
    /// A sector of 512 bytes the request must touch; default: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sector: Option<i64>,
    /// Only one request fails; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub once: Option<bool>,
    /// The request fails at once rather than a turn of the event loop later; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub immediately: Option<bool>,
}

/// A change of state after an event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetState {
    /// The event.
    pub event: DebugEvent,
    /// The state the node must be in, 0: any; default: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<i64>,
    /// The state it is in afterwards.
    pub new_state: i64,
}

/// Kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum IoType {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Writes of zeroes.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Questions what is allocated.
    BlockStatus,
}

/// A permission on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Permission {
    /// Reading a complete point in time.
    ConsistentRead,
    /// Changing data.
    Write,
    /// Writing what is there already.
    WriteUnchanged,
    /// Changing the size.
    Resize,
}

impl Permission {
    /// All of these.
    pub(super) fn all(list: &[Permission]) -> Perm {
        list.iter().fold(Perm::NONE, |all, one| {
            all | match one {
                Permission::ConsistentRead => Perm::CONSISTENT_READ,
                Permission::Write => Perm::WRITE,
                Permission::WriteUnchanged => Perm::WRITE_UNCHANGED,
                Permission::Resize => Perm::RESIZE,
            }
        })
    }
}
