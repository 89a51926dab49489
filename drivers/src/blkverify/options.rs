//! Options of `blkverify`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Options of a blkverify node. When the children differ, the request fails with `EIO` and the log says where they do; QEMU
/// ends its process instead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlkverifyOptions {
    /// The node that is tested: an image in some format. Reads return its data, and it gives the node its size.
    pub test: BlockdevRef,
    /// The node that holds the right data, usually a raw image. What lies past its end counts as zeroes and is not written.
    pub raw: BlockdevRef,
}
