//! Options of the creation of an image, and what goes together; names, defaults and refusals are QEMU's.
//!
//! Parsed by `create`; the comments are the reference text. Must not open anything.

use graph::options::BlockdevRef;
use graph::{BlockError, Prealloc, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::luks::format::LuksParams;
use crate::luks::spec::{CipherAlg, CipherMode, HashAlg, IvGen};
use crate::qcow2::format::{
    AUTOCLEAR_DATA_FILE_RAW, COMPAT_LAZY_REFCOUNTS, Compression, Geometry, Header, MAX_BACKING_FORMAT,
    MAX_BACKING_NAME, MAX_L1_BYTES,
};

/// Default cluster size, bytes.
const CLUSTER: u64 = 65536;

/// Version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Version {
    /// Of old (compat 0.10): no zero clusters, no features.
    V2,
    /// Today's (compat 1.1).
    #[default]
    V3,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CompressionType {
    /// Deflate.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Which encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum EncryptFormat {
    /// LUKS version 1.
    Luks,
    /// The AES-CBC of old; not offered for new images.
    Qcow,
}

/// How the image is encrypted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Encrypt {
    /// The format: `luks`.
    pub(crate) format: EncryptFormat,
    /// The `secret` object with the passphrase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_secret: Option<String>,
    /// The cipher; default: aes-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cipher_alg: Option<CipherAlg>,
    /// Its mode; default: xts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cipher_mode: Option<CipherMode>,
    /// Where initialisation vectors come from; default: plain64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ivgen_alg: Option<IvGen>,
    /// The hash of `essiv`; default: sha256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ivgen_hash_alg: Option<HashAlg>,
    /// The hash of the key derivation; default: sha256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hash_alg: Option<HashAlg>,
    /// How long an unlock shall compute on a machine like this one, milliseconds; default: 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub(crate) iter_time: Option<i64>,
}

/// Options of the creation of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Qcow2CreateOptions {
    /// The node that becomes the image; what it held is lost.
    pub(crate) file: BlockdevRef,
    /// The node that takes the guest's data, if that shall not lie in `file`. Its file name goes into the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data_file: Option<BlockdevRef>,
    /// The data file is to be the disk as a raw image, at all times; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data_file_raw: Option<bool>,
    /// Clusters have 32 subclusters that are allocated one by one; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) extended_l2: Option<bool>,
    /// Size of the disk in bytes, a multiple of 512.
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub(crate) size: i64,
    /// Version of the format; default: v3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<Version>,
    /// Name of the backing file, as it is written into the image. It is not opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backing_file: Option<String>,
    /// Name of the format of the backing file, as it is written into the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backing_fmt: Option<String>,
    /// Encryption; default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) encrypt: Option<Encrypt>,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB, with `extended-l2` from 16 KiB; default: 65536.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub(crate) cluster_size: Option<i64>,
    /// What is set aside: nothing (`off`), clusters without their space (`metadata`), with their space (`falloc`), with
    /// zeroes written (`full`). Default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) preallocation: Option<Prealloc>,
    /// Refcounts may be written late, to be repaired after a crash; default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lazy_refcounts: Option<bool>,
    /// Width of a refcount in bits, a power of two from 1 to 64; default: 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) refcount_bits: Option<i64>,
    /// How compressed clusters are compressed; default: zlib.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) compression_type: Option<CompressionType>,
}

/// What was asked for, checked.
#[derive(Debug)]
pub(super) struct Plan {
    /// All of the header but places and what needs an open node.
    pub(super) header: Header,
    /// Preallocation as it will be done.
    pub(super) prealloc: Prealloc,
    /// Encryption.
    pub(super) luks: Option<LuksParams>,
}

fn refuse<T>(words: impl Into<String>) -> Result<T> {
    Err(BlockError::invalid(words.into()))
}

impl Qcow2CreateOptions {
    /// Checks everything that can be without a node, in QEMU's order and words.
    pub(super) fn plan(&self) -> Result<Plan> {
        let v3 = self.version.unwrap_or_default() == Version::V3;
        let Some(size) = u64::try_from(self.size).ok().filter(|s| s.is_multiple_of(512)) else {
            return refuse("Image size must be a multiple of 512 bytes");
        };
        let extended = self.extended_l2.unwrap_or(false);
        let needs_v3 = |what: &str, level: &str| {
            refuse::<()>(format!("{what} compatibility level 1.1 {level} above (use version=v3 or greater)"))
        };
        let cluster = self.cluster_size.map_or(CLUSTER, |c| u64::try_from(c).unwrap_or(0));
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            return refuse("Cluster size must be a power of two between 512 and 2048k");
        }
        if extended && !v3 {
            needs_v3("Extended L2 entries are only supported with", "and")?;
        }
        if extended && cluster < 16384 {
            return refuse(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        let mut prealloc = self.preallocation.unwrap_or_default();
        if self.backing_file.is_some() && prealloc != Prealloc::Off && !extended {
            return refuse(
                "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
            );
        }
        if self.backing_fmt.is_some() && self.backing_file.is_none() {
            return refuse("Backing format cannot be used without backing file");
        }
        let lazy = self.lazy_refcounts.unwrap_or(false);
        if lazy && !v3 {
            needs_v3("Lazy refcounts only supported with", "and")?;
        }
        let bits = self.refcount_bits.unwrap_or(16);
        let width = u64::try_from(bits).ok().filter(|b| *b <= 64 && b.is_power_of_two());
        let Some(width) = width else {
            return refuse("Refcount width must be a power of two and may not exceed 64 bits");
        };
        if width != 16 && !v3 {
            needs_v3("Different refcount widths than 16 bits require", "or")?;
        }
        let raw = self.data_file_raw.unwrap_or(false);
        if raw && self.data_file.is_none() {
            return refuse("data-file-raw requires data-file");
        }
        if raw && self.backing_file.is_some() {
            return refuse("Backing file and data-file-raw cannot be used at the same time");
        }
        if raw && prealloc == Prealloc::Off {
            // The data file alone can only be right if nothing is left to allocate.
            prealloc = Prealloc::Metadata;
        }
        if self.data_file.is_some() && !v3 {
            needs_v3("External data files are only supported with", "and")?;
        }
        let zstd = self.compression_type == Some(CompressionType::Zstd);
        if zstd && !v3 {
            needs_v3("Non-zlib compression type is only supported with", "and")?;
        }
        let geometry = Geometry::new(
            cluster.trailing_zeros(),
            width.trailing_zeros(),
            extended,
            v3,
            self.data_file.is_some(),
        );
        let Some(geometry) = geometry else { return refuse("Unsupported cluster size") };
        if geometry.l1_entries_for(size) > MAX_L1_BYTES / 8 {
            return Err(BlockError::new(
                graph::Errno::EFBIG,
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            ));
        }
        let mut header = Header::new(if v3 { 3 } else { 2 }, geometry, size);
        header.compression = if zstd { Compression::Zstd } else { Compression::Deflate };
        header.compatible = if lazy { COMPAT_LAZY_REFCOUNTS } else { 0 };
        header.autoclear = if raw { AUTOCLEAR_DATA_FILE_RAW } else { 0 };
        if let Some(name) = &self.backing_file {
            if name.len() > MAX_BACKING_NAME as usize {
                return refuse("Backing file name too long");
            }
            header.backing_file = Some(name.clone().into_bytes());
        }
        if let Some(format) = &self.backing_fmt {
            if format.len() > MAX_BACKING_FORMAT as usize {
                return refuse(format!("Backing format '{format}' is too long"));
            }
            header.backing_format = Some(format.clone().into_bytes());
        }
        Ok(Plan { header, prealloc, luks: self.luks()? })
    }

    fn luks(&self) -> Result<Option<LuksParams>> {
        let Some(e) = &self.encrypt else { return Ok(None) };
        if e.format != EncryptFormat::Luks {
            return Err(BlockError::unsupported(
                "The encryption format 'qcow' is weak and not offered for new images: use 'luks'",
            ));
        }
        let iter_time = match e.iter_time.map(u64::try_from) {
            None => None,
            Some(Ok(ms)) => Some(ms),
            Some(Err(_)) => return refuse("iteration time must be greater than zero"),
        };
        let params = LuksParams {
            key_secret: e.key_secret.clone(),
            cipher_alg: e.cipher_alg,
            cipher_mode: e.cipher_mode,
            ivgen_alg: e.ivgen_alg,
            ivgen_hash_alg: e.ivgen_hash_alg,
            hash_alg: e.hash_alg,
            iter_time,
        };
        params.check()?;
        Ok(Some(params))
    }
}
