//! Options of `qcow2`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use std::borrow::Cow;

use graph::options::BlockdevRef;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// A child, or the word that there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BlockdevRefOrNull {
    /// A child.
    Child(BlockdevRef),
    /// No child, whatever the image says.
    Null,
}

impl JsonSchema for BlockdevRefOrNull {
    fn schema_name() -> Cow<'static, str> {
        "BlockdevRefOrNull".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "The name of an existing node, the definition of a new one, or null for no node at all.",
            "anyOf": [{ "type": "string" }, { "$ref": "#/$defs/BlockdevOptions" }, { "type": "null" }],
        })
    }
}

/// Tells `null` from "not given".
fn present<'de, D: Deserializer<'de>>(d: D) -> Result<Option<BlockdevRefOrNull>, D::Error> {
    BlockdevRefOrNull::deserialize(d).map(Some)
}

/// Which checks are done before a write to the image file that could hit metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OverlapMode {
    /// None of those below.
    None,
    /// Header, active L1 table, refcount table, snapshot table, directory of bitmaps.
    Constant,
    /// As `constant`, and the active L2 tables, refcount blocks and L1 tables of snapshots; the default.
    Cached,
    /// As `cached`, and the L2 tables of snapshots, whose L1 tables are read for that when the image is opened.
    All,
}

/// Checks one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct OverlapFlags {
    /// What holds where nothing else is said; default: cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<OverlapMode>,
    /// The header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main_header: Option<bool>,
    /// The active L1 table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_l1: Option<bool>,
    /// The L2 tables of the active L1 table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_l2: Option<bool>,
    /// The refcount table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refcount_table: Option<bool>,
    /// The refcount blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refcount_block: Option<bool>,
    /// The snapshot table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_table: Option<bool>,
    /// The L1 tables of snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inactive_l1: Option<bool>,
    /// The L2 tables of snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inactive_l2: Option<bool>,
    /// The directory of persistent bitmaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap_directory: Option<bool>,
}

/// `overlap-check`: a template, or checks one by one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OverlapCheck {
    /// One by one.
    Flags(OverlapFlags),
    /// A template.
    Mode(OverlapMode),
}

/// How an encrypted image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EncryptFormat {
    /// AES-CBC with a bare password as its key, as in images of long ago. It protects little.
    Aes,
    /// LUKS, version 1.
    Luks,
}

/// `encrypt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EncryptOptions {
    /// The format of the encryption; must be the image's.
    pub format: EncryptFormat,
    /// The `secret` object that holds the passphrase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret: Option<String>,
}

/// Options of a qcow2 node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Qcow2Options {
    /// The node that holds the image.
    pub file: BlockdevRef,
    /// The backing file: the name of a node, the definition of one, or null for none. Default: what the image names, in
    /// the format the image names; an image that names a file and no format needs this option.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub backing: Option<BlockdevRefOrNull>,
    /// An internal snapshot, by its id or name: the node shows the disk as it was then. Needs `read-only`; `file` may be the
    /// file of a node that a guest writes to. Default: the disk as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Whether refcounts may be written late, which saves writes and costs a repair after a crash; default: as the
    /// image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Whether discard requests reach the image file; default: on if `discard` is `unmap`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_discard_request: Option<bool>,
    /// Whether what a deleted snapshot held is discarded in the image file; default: on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_discard_snapshot: Option<bool>,
    /// Whether other space that becomes free is discarded in the image file; default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_discard_other: Option<bool>,
    /// Whether a discarded cluster stays reserved for its place, so that the image does not get fragmented; the host's
    /// space is given back all the same. Default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard_no_unref: Option<bool>,
    /// Which metadata a write must not hit: the image is damaged then, is marked so, and takes no more writes. Metadata is
    /// checked for each write; guest data when the entry that leads to it is read into the cache, and whenever a write
    /// does more than go to where the data lies. New space is checked against all metadata, whatever is said here.
    /// Default: cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap_check: Option<OverlapCheck>,
    /// Memory for L2 tables and refcount blocks together, bytes; default: the sum of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub cache_size: Option<i64>,
    /// Memory for L2 tables, bytes; default: as much as the image needs, at most 32 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub l2_cache_size: Option<i64>,
    /// Size of a cached part of an L2 table, bytes: a power of two, 512 to the cluster size; default: 4096, or the
    /// cluster size if that is less. More than 64 KiB counts as 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub l2_cache_entry_size: Option<i64>,
    /// Memory for refcount blocks, bytes; default: four clusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub refcount_cache_size: Option<i64>,
    /// After how many seconds what was not used leaves the caches, and their memory goes back to the host; 0: never.
    /// Default: 600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub cache_clean_interval: Option<i64>,
    /// How to read an encrypted image; required if the image is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<EncryptOptions>,
    /// The node that holds the guest's data, for an image that keeps it outside; default: the file the image names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<BlockdevRef>,
    /// The images above this one, as far as they were opened for the names inside them. Not for users.
    #[serde(rename = "x-chain", default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(skip)]
    pub chain: Vec<String>,
}
