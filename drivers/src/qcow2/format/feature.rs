//! Feature bits and the table of their names ("Feature name table").
//!
//! Used by the header's parser to refuse what is not understood by its name, and by the serialiser.

/// Incompatible bit 0: refcounts may be wrong.
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Incompatible bit 1: an inconsistency was found.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Incompatible bit 2: guest data lies in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible bit 3: the compression type is not deflate.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible bit 4: 16-byte L2 entries.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// All incompatible bits that are understood.
pub const INCOMPAT_KNOWN: u64 =
    INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;
/// Compatible bit 0: refcount updates may be postponed.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear bit 0: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear bit 1: the data file alone is a valid raw image.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;
/// All autoclear bits that are understood; the others are cleared before the first write.
pub const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW;

/// Bytes of one entry of the table.
pub(crate) const ENTRY: usize = 48;

/// One name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Which bit.
    pub bit: u8,
    /// At most 46 bytes, no NUL.
    pub name: Vec<u8>,
}

/// The table QEMU 10 writes, in its order.
pub(crate) const NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Entries of a table; an odd rest is ignored.
pub(crate) fn parse(body: &[u8]) -> Vec<FeatureName> {
    body.chunks_exact(ENTRY)
        .map(|e| {
            let name = &e[2..];
            let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
            FeatureName { kind: e[0], bit: e[1], name: name[..end].to_vec() }
        })
        .collect()
}

/// The body of the extension as we write it.
pub(crate) fn serialise() -> Vec<u8> {
    let mut body = Vec::with_capacity(NAMES.len() * ENTRY);
    for (kind, bit, name) in NAMES {
        let mut entry = [0u8; ENTRY];
        entry[0] = kind;
        entry[1] = bit;
        for (to, from) in entry[2..].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        body.extend_from_slice(&entry);
    }
    body
}

/// QEMU's sentence about incompatible bits nobody here understands.
pub(crate) fn unsupported(unknown: u64, names: &[FeatureName]) -> String {
    let mut rest = unknown;
    let mut said = Vec::new();
    for n in names {
        let bit = 1u64.checked_shl(u32::from(n.bit)).unwrap_or(0);
        if n.kind == 0 && rest & bit != 0 {
            said.push(String::from_utf8_lossy(&n.name).into_owned());
            rest &= !bit;
        }
    }
    if rest != 0 {
        said.push(format!("Unknown incompatible feature: {rest:x}"));
    }
    format!("Unsupported qcow2 feature(s): {}", said.join(", "))
}
