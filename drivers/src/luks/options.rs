//! Options of `luks`, for opening and for creating.
//!
//! Parsed by `open` and `create`; the comments are the reference text. Must not hold anything but plain values.

use graph::Prealloc;
use graph::options::BlockdevRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::spec::{CipherAlg, CipherMode, HashAlg, IvGen};

/// Options of a LUKS node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LuksOptions {
    /// The node that holds the encrypted data, behind the LUKS header unless `header` is given.
    pub file: BlockdevRef,
    /// The `secret` object with the passphrase. A passphrase is UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret: Option<String>,
    /// The node that holds the LUKS header, if `file` holds nothing but data (detached header).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<BlockdevRef>,
}

/// Options of the creation of a LUKS image. The members up to `iter-time` are those of
/// [`LuksParams`](super::format::LuksParams), which cannot be flattened where unknown members are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct LuksCreateOptions {
    /// The `secret` object with the passphrase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key_secret: Option<String>,
    /// The cipher; default: aes-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cipher_alg: Option<CipherAlg>,
    /// Its mode; default: xts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cipher_mode: Option<CipherMode>,
    /// Where initialisation vectors come from; default: plain64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ivgen_alg: Option<IvGen>,
    /// The hash of `essiv`; default: sha256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ivgen_hash_alg: Option<HashAlg>,
    /// The hash of the key derivation; default: sha256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hash_alg: Option<HashAlg>,
    /// How long an unlock shall compute on a machine like this one, milliseconds, 1 to 150000. Default: 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub(super) iter_time: Option<i64>,
    /// The node that takes the data, behind the header unless `header` is given. Only with `header` it may be left out:
    /// then nothing but a header is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) file: Option<BlockdevRef>,
    /// The node that takes the header, if it shall not lie in `file` (detached header).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) header: Option<BlockdevRef>,
    /// Size of the disk, bytes.
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub(super) size: i64,
    /// How space for the data is set aside; default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) preallocation: Option<Prealloc>,
}
