//! The first cluster: header, extensions, backing file name ("Header").
//!
//! Parsed once from memory in the order magic, version, cluster size, header length, incompatible features, the rest;
//! whoever opens, inspects or checks an image uses this and nothing else. Must not read or write files.

use super::extension::{self, BitmapsExt, CryptoExt, Extensions, UnknownExt, cut_at_nul};
use super::feature::{self, FeatureName};
use super::{
    AUTOCLEAR_DATA_FILE_RAW, AUTOCLEAR_KNOWN, COMPAT_LAZY_REFCOUNTS, Geometry, INCOMPAT_COMPRESSION,
    INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_DIRTY, INCOMPAT_EXTENDED_L2, INCOMPAT_KNOWN,
    MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS,
    ParseError, be32, be64, validate_table,
};

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49FB;
/// Header of version 2, bytes.
const V2_LEN: usize = 72;
/// Shortest header of version 3, bytes.
const V3_MIN: usize = 104;
/// The header fields that are understood end here.
const KNOWN: usize = 112;
/// Longest block device of QEMU, bytes: 2^63 - 1 rounded down to 1 GiB.
const MAX_LENGTH: u64 = i64::MAX as u64 & !((1 << 30) - 1);
/// How much of a file has to be given to [`Header::parse`] (less if the file or the cluster is shorter).
pub const MAX_HEADER_BYTES: usize = 1 << MAX_CLUSTER_BITS;

/// Offsets of header fields, bytes, for switches of single fields.
pub mod field {
    /// Name of the backing file: offset, then length at + 8.
    pub const BACKING: u64 = 8;
    /// Virtual size; L1 entries (36) and L1 offset (40) follow: one switch of 24 bytes.
    pub const SIZE: u64 = 24;
    /// Number of L1 entries; the L1 offset follows: one switch of 12 bytes.
    pub const L1: u64 = 36;
    /// Refcount table offset, then its clusters: one switch of 12 bytes.
    pub const REFTABLE: u64 = 48;
    /// Number of snapshots, then the table's offset: one switch of 12 bytes.
    pub const SNAPSHOTS: u64 = 60;
    /// Incompatible features.
    pub const INCOMPATIBLE: u64 = 72;
    /// Compatible features.
    pub const COMPATIBLE: u64 = 80;
    /// Autoclear features.
    pub const AUTOCLEAR: u64 = 88;
}

/// Encryption of guest data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CryptMethod {
    /// Plain.
    None,
    /// AES-CBC of old, with the passphrase itself as key.
    Aes,
    /// LUKS1.
    Luks,
}

/// Compression of compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Raw deflate.
    Deflate,
    /// Zstandard.
    Zstd,
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Policy {
    /// It will be written: a corrupt one is refused.
    pub writable: bool,
    /// It will be checked or repaired: a corrupt one, one without a refcount table and one with a bad snapshot table
    /// pointer are taken.
    pub check: bool,
    /// Only its header is looked at: no key is needed.
    pub inspect: bool,
}

/// A validated header. Fields that a writer changes are public; [`Header::serialise`] gives the first cluster again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Name of the backing file as stored (up to a NUL); `None` if there is none.
    pub backing_file: Option<Vec<u8>>,
    /// Name of the backing file's format as stored; `None` if the extension is missing or empty.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file as stored.
    pub data_file: Option<Vec<u8>>,
    /// Virtual size as stored, bytes; see [`Header::virtual_size`].
    pub size: u64,
    /// Encryption.
    pub crypt: CryptMethod,
    /// L1 entries.
    pub l1_size: u32,
    /// Where the L1 table is, bytes.
    pub l1_offset: u64,
    /// Where the refcount table is, bytes.
    pub reftable_offset: u64,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table is, bytes.
    pub snapshots_offset: u64,
    /// Incompatible features, all of them known.
    pub incompatible: u64,
    /// Compatible features, unknown ones included.
    pub compatible: u64,
    /// Autoclear features, unknown ones included; a writer clears [`Header::unknown_autoclear`] first.
    pub autoclear: u64,
    /// Compression of compressed clusters.
    pub compression: Compression,
    /// Where the encryption header is.
    pub crypto: Option<CryptoExt>,
    /// Where the bitmap directory is; `None` also if the autoclear bit does not vouch for it.
    pub bitmaps: Option<BitmapsExt>,
    /// Extensions that are not understood.
    pub unknown_extensions: Vec<UnknownExt>,
    /// Header bytes that are not understood (from byte 112 on).
    pub unknown_fields: Vec<u8>,
    /// Feature names found in the image.
    pub feature_names: Vec<FeatureName>,
    geometry: Geometry,
}

/// A field of the header, 0 past the end of a short file.
fn u32_at(c: &[u8], at: u64) -> u32 {
    be32(c, at as usize).unwrap_or(0)
}

fn u64_at(c: &[u8], at: u64) -> u64 {
    be64(c, at as usize).unwrap_or(0)
}

impl Header {
    /// Parses the first cluster. `first` is the beginning of the file: a whole cluster, up to [`MAX_HEADER_BYTES`], or
    /// less where the file ends earlier (what is missing reads as zeroes, as QEMU sees it). Looks at nothing but `first`.
    ///
    /// # Errors
    /// The first rule that is broken, in QEMU's order and words.
    pub fn parse(first: &[u8], policy: Policy) -> Result<Header, ParseError> {
        if u32_at(first, 0) != MAGIC {
            return Err(ParseError::invalid("magic", 0, "Image is not in qcow2 format"));
        }
        let version = u32_at(first, 4);
        if !(2..=3).contains(&version) {
            return Err(ParseError::unsupported(
                "version",
                4,
                format!("Unsupported qcow2 version {version}"),
            ));
        }
        let cluster_bits = u32_at(first, 20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            let text = format!("Unsupported cluster size: 2^{cluster_bits}");
            return Err(ParseError::invalid("cluster_bits", 20, text));
        }
        let cluster_size = 1usize << cluster_bits;
        let padded;
        let cluster = match first.get(..cluster_size) {
            Some(whole) => whole,
            None => {
                let mut bytes = first.to_vec();
                bytes.resize(cluster_size, 0);
                padded = bytes;
                &padded
            }
        };
        Header::parse_cluster(cluster, version, cluster_bits, policy)
    }

    fn parse_cluster(
        c: &[u8],
        version: u32,
        cluster_bits: u32,
        policy: Policy,
    ) -> Result<Header, ParseError> {
        let v3 = version >= 3;
        let header_length = if v3 { u32_at(c, 100) as usize } else { V2_LEN };
        if v3 && header_length < V3_MIN {
            return Err(ParseError::invalid("header_length", 100, "qcow2 header too short"));
        }
        if header_length > c.len() {
            return Err(ParseError::invalid("header_length", 100, "qcow2 header exceeds cluster size"));
        }
        let backing_offset = u64_at(c, field::BACKING);
        if backing_offset > c.len() as u64 {
            return Err(ParseError::invalid("backing_file_offset", 8, "Invalid backing file offset"));
        }
        let backing_offset = backing_offset as usize;
        let end = if backing_offset != 0 { backing_offset } else { c.len() };

        let features = |at| if v3 { u64_at(c, at) } else { 0 };
        let incompatible = features(field::INCOMPATIBLE);
        let (compatible, autoclear) = (features(field::COMPATIBLE), features(field::AUTOCLEAR));
        if incompatible & !INCOMPAT_KNOWN != 0 {
            let names = extension::feature_names(c, header_length, end);
            let text = feature::unsupported(incompatible & !INCOMPAT_KNOWN, &names);
            return Err(ParseError::unsupported("incompatible_features", field::INCOMPATIBLE, text));
        }
        let compression = compression(c, header_length, incompatible)?;
        if incompatible & INCOMPAT_CORRUPT != 0 && policy.writable && !policy.check {
            let text = "qcow2: Image is corrupt; cannot be opened read/write";
            let mut e = ParseError::invalid("incompatible_features", field::INCOMPATIBLE, text);
            e.errno = graph::Errno::EACCES;
            return Err(e);
        }
        let geometry = geometry(c, v3, cluster_bits, incompatible)?;
        let crypt = crypt(u32_at(c, 32))?;

        let mut header = Header {
            version,
            backing_file: None,
            backing_format: None,
            data_file: None,
            size: u64_at(c, field::SIZE),
            crypt,
            l1_size: u32_at(c, field::L1),
            l1_offset: u64_at(c, field::L1 + 4),
            reftable_offset: u64_at(c, field::REFTABLE),
            reftable_clusters: u32_at(c, field::REFTABLE + 8),
            snapshot_count: u32_at(c, field::SNAPSHOTS),
            snapshots_offset: u64_at(c, field::SNAPSHOTS + 4),
            incompatible,
            compatible,
            autoclear,
            compression,
            crypto: None,
            bitmaps: None,
            unknown_extensions: Vec::new(),
            unknown_fields: c.get(KNOWN..header_length).unwrap_or_default().to_vec(),
            feature_names: Vec::new(),
            geometry,
        };
        header.check_tables(policy)?;
        header.read_extensions(c, header_length, end)?;
        header.backing_file = backing_name(c, backing_offset)?;
        header.check_features()?;
        Ok(header)
    }

    fn check_tables(&self, policy: Policy) -> Result<(), ParseError> {
        let g = &self.geometry;
        if self.reftable_clusters == 0 && !policy.check {
            let text = "Image does not contain a reference count table";
            return Err(ParseError::invalid("refcount_table_clusters", field::REFTABLE + 8, text));
        }
        let (at, clusters) = (self.reftable_offset, u64::from(self.reftable_clusters));
        let (len, max) = (g.cluster_size(), MAX_REFTABLE_BYTES);
        validate_table(
            g,
            ("refcount_table_offset", field::REFTABLE),
            "Reference count table",
            at,
            clusters,
            len,
            max,
        )?;
        if !policy.check {
            let (at, n) = (self.snapshots_offset, u64::from(self.snapshot_count));
            let max = u64::from(MAX_SNAPSHOTS) * 40;
            validate_table(g, ("snapshots_offset", field::SNAPSHOTS + 4), "Snapshot table", at, n, 40, max)?;
        }
        let (at, n) = (self.l1_offset, u64::from(self.l1_size));
        validate_table(g, ("l1_table_offset", field::L1 + 4), "Active L1 table", at, n, 8, MAX_L1_BYTES)?;
        // No block device reaches beyond this; reading there fails in QEMU.
        if self.l1_size != 0 && self.l1_offset + self.l1_bytes() > MAX_LENGTH {
            return Err(unreadable("l1_table_offset", field::L1 + 4, "Could not read L1 table"));
        }
        if self.reftable_clusters != 0 && self.reftable_offset + self.reftable_bytes() > MAX_LENGTH {
            let text = "Could not initialize refcount handling";
            return Err(unreadable("refcount_table_offset", field::REFTABLE, text));
        }
        // QEMU's limits: entries in an int, and no device above 2^63 - 1 bytes.
        let needed = g.l1_entries_for(self.size);
        if needed > i32::MAX as u64 || self.size > i64::MAX as u64 {
            return Err(ParseError::too_big("size", field::SIZE, "Image is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(ParseError::invalid("l1_size", field::L1, "L1 table is too small"));
        }
        Ok(())
    }

    fn read_extensions(&mut self, c: &[u8], start: usize, end: usize) -> Result<(), ParseError> {
        let cx = extension::Context {
            crypt: self.crypt,
            autoclear: self.autoclear,
            cluster_size: self.geometry.cluster_size(),
        };
        let found = extension::parse(c, start, end, &cx)?;
        self.backing_format = found.backing_format.filter(|f| !f.is_empty());
        self.data_file = found.data_file;
        self.crypto = found.crypto;
        self.bitmaps = found.bitmaps;
        self.unknown_extensions = found.unknown;
        self.feature_names = found.feature_names;
        Ok(())
    }

    /// Rules between features.
    fn check_features(&self) -> Result<(), ParseError> {
        if self.crypt == CryptMethod::Luks && self.crypto.is_none() {
            let text = "Missing CRYPTO header for crypt method 2";
            return Err(ParseError::invalid("crypt_method", 32, text));
        }
        if self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0 && !self.has_data_file() {
            let text = "data-file-raw requires a data file";
            return Err(ParseError::invalid("autoclear_features", field::AUTOCLEAR, text));
        }
        Ok(())
    }

    /// The shape of the image.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Virtual size, bytes: whole sectors of 512, as QEMU reads it.
    pub fn virtual_size(&self) -> u64 {
        self.size & !511
    }

    /// Whether guest data lies in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    /// Whether refcounts may be wrong.
    pub fn dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Whether an inconsistency was found before.
    pub fn corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// Whether refcount updates may be postponed.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & COMPAT_LAZY_REFCOUNTS != 0
    }

    /// Autoclear bits nobody here understands.
    pub fn unknown_autoclear(&self) -> u64 {
        self.autoclear & !AUTOCLEAR_KNOWN
    }

    /// Bytes of the L1 table.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_size) * 8
    }

    /// Bytes of the refcount table.
    pub fn reftable_bytes(&self) -> u64 {
        u64::from(self.reftable_clusters) * self.geometry.cluster_size()
    }

    /// A header of a new image, all offsets and counts 0, no extensions.
    pub fn new(version: u32, geometry: Geometry, size: u64) -> Header {
        let mut incompatible = 0;
        if geometry.extended_l2() {
            incompatible |= INCOMPAT_EXTENDED_L2;
        }
        if geometry.data_file() {
            incompatible |= INCOMPAT_DATA_FILE;
        }
        Header {
            version,
            backing_file: None,
            backing_format: None,
            data_file: None,
            size,
            crypt: CryptMethod::None,
            l1_size: 0,
            l1_offset: 0,
            reftable_offset: 0,
            reftable_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            crypto: None,
            bitmaps: None,
            unknown_extensions: Vec::new(),
            unknown_fields: Vec::new(),
            feature_names: Vec::new(),
            geometry,
        }
    }

    /// The first cluster: header, extensions in QEMU's order, backing file name, zeroes. Unknown header fields and
    /// unknown extensions are there again. The bit of the compression type follows [`Header::compression`].
    ///
    /// # Errors
    /// `ENOSPC` if it does not fit into one cluster, `EINVAL` if the backing name is longer than 1023 bytes.
    pub fn serialise(&self) -> Result<Vec<u8>, ParseError> {
        let g = self.geometry;
        let v3 = self.version >= 3;
        let backing = self.backing_file.as_deref().filter(|n| !n.is_empty());
        if backing.is_some_and(|n| n.len() > MAX_BACKING_NAME as usize) {
            return Err(ParseError::invalid("backing_file_size", 16, "Backing file name too long"));
        }
        let mut out = Vec::with_capacity(g.cluster_size() as usize);
        out.extend_from_slice(&MAGIC.to_be_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        out.extend_from_slice(&[0; 12]); // backing name: below
        out.extend_from_slice(&g.cluster_bits().to_be_bytes());
        out.extend_from_slice(&self.size.to_be_bytes());
        let crypt: u32 = match self.crypt {
            CryptMethod::None => 0,
            CryptMethod::Aes => 1,
            CryptMethod::Luks => 2,
        };
        out.extend_from_slice(&crypt.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.reftable_offset.to_be_bytes());
        out.extend_from_slice(&self.reftable_clusters.to_be_bytes());
        out.extend_from_slice(&self.snapshot_count.to_be_bytes());
        out.extend_from_slice(&self.snapshots_offset.to_be_bytes());
        if v3 {
            let zstd = self.compression == Compression::Zstd;
            let incompatible =
                self.incompatible & !INCOMPAT_COMPRESSION | if zstd { INCOMPAT_COMPRESSION } else { 0 };
            out.extend_from_slice(&incompatible.to_be_bytes());
            out.extend_from_slice(&self.compatible.to_be_bytes());
            out.extend_from_slice(&self.autoclear.to_be_bytes());
            out.extend_from_slice(&g.refcount_order().to_be_bytes());
            out.extend_from_slice(&((KNOWN + self.unknown_fields.len()) as u32).to_be_bytes());
            out.extend_from_slice(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
            out.extend_from_slice(&self.unknown_fields);
        }
        let extensions = Extensions {
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            crypto: self.crypto,
            bitmaps: self.bitmaps,
            feature_names: Vec::new(),
            unknown: self.unknown_extensions.clone(),
        };
        extension::serialise(&extensions, v3 && g.cluster_size() > 4096, &mut out);
        if let Some(name) = backing {
            let at = out.len() as u64;
            out.extend_from_slice(name);
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        }
        if out.len() as u64 > g.cluster_size() {
            let mut e = ParseError::invalid("header", 0, "No space left in the file header");
            e.errno = graph::Errno::ENOSPC;
            return Err(e);
        }
        out.resize(g.cluster_size() as usize, 0);
        Ok(out)
    }
}

fn unreadable(name: &'static str, at: u64, text: &str) -> ParseError {
    let mut e = ParseError::invalid(name, at, text);
    e.errno = graph::Errno::EIO;
    e
}

fn compression(c: &[u8], header_length: usize, incompatible: u64) -> Result<Compression, ParseError> {
    const NAME: &str = "compression_type";
    let kind = if header_length > V3_MIN { c.get(V3_MIN).copied().unwrap_or(0) } else { 0 };
    let bit = incompatible & INCOMPAT_COMPRESSION != 0;
    match (kind, bit) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => {
            let text = "qcow2: Compression type incompatible feature bit must not be set";
            Err(ParseError::invalid(NAME, V3_MIN as u64, text))
        }
        (1, false) => {
            let text = "qcow2: Compression type incompatible feature bit must be set";
            Err(ParseError::invalid(NAME, V3_MIN as u64, text))
        }
        (other, _) => {
            let text = format!("qcow2: unknown compression type: {other}");
            Err(ParseError::unsupported(NAME, V3_MIN as u64, text))
        }
    }
}

fn geometry(c: &[u8], v3: bool, cluster_bits: u32, incompatible: u64) -> Result<Geometry, ParseError> {
    let extended = incompatible & INCOMPAT_EXTENDED_L2 != 0;
    if extended && cluster_bits < 14 {
        let text = format!("Unsupported subcluster size: {}", (1u64 << cluster_bits) / 32);
        return Err(ParseError::invalid("cluster_bits", 20, text));
    }
    let order = if v3 { u32_at(c, 96) } else { 4 };
    Geometry::new(cluster_bits, order, extended, v3, incompatible & INCOMPAT_DATA_FILE != 0).ok_or_else(
        || {
            ParseError::invalid(
                "refcount_order",
                96,
                "Reference count entry width too large; may not exceed 64 bits",
            )
        },
    )
}

fn crypt(method: u32) -> Result<CryptMethod, ParseError> {
    match method {
        0 => Ok(CryptMethod::None),
        1 => Ok(CryptMethod::Aes),
        2 => Ok(CryptMethod::Luks),
        other => {
            Err(ParseError::invalid("crypt_method", 32, format!("Unsupported encryption method {other}")))
        }
    }
}

fn backing_name(c: &[u8], offset: usize) -> Result<Option<Vec<u8>>, ParseError> {
    if offset == 0 {
        return Ok(None);
    }
    let len = u32_at(c, 16) as usize;
    let room = c.len().saturating_sub(offset).min(MAX_BACKING_NAME as usize);
    match c.get(offset..).and_then(|rest| rest.get(..len)) {
        Some(name) if len <= room => {
            let name = cut_at_nul(name);
            Ok(if name.is_empty() { None } else { Some(name) })
        }
        _ => Err(ParseError::invalid("backing_file_size", 16, "Backing file name too long")),
    }
}
