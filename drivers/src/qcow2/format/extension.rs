//! Header extensions ("Header extensions"): walking them, the bodies we know, and writing them back.
//!
//! Called by the header's parser and serialiser only. What is not known is kept byte for byte.

use super::feature;
use super::{
    AUTOCLEAR_BITMAPS, CryptMethod, MAX_BACKING_FORMAT, MAX_CRYPTO_HEADER, ParseError, be32, be64, bitmap,
};

pub(crate) const END: u32 = 0;
pub(crate) const BACKING_FORMAT: u32 = 0xE279_2ACA;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_F857;
pub(crate) const CRYPTO: u32 = 0x0537_BE77;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
pub(crate) const DATA_FILE: u32 = 0x4441_5441;

/// Where the encryption layer's header lies ("Full disk encryption header pointer").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoExt {
    /// Bytes, cluster-aligned.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Where the bitmap directory lies ("Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExt {
    /// How many bitmaps, 1…65535.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Bytes, cluster-aligned.
    pub directory_offset: u64,
}

/// An extension that is not understood, kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExt {
    /// Its type.
    pub magic: u32,
    /// Its body, without padding.
    pub data: Vec<u8>,
}

/// What the extension area held. Where a type occurs twice the last one counts, as in QEMU; unknown ones all stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    pub(crate) backing_format: Option<Vec<u8>>,
    pub(crate) data_file: Option<Vec<u8>>,
    pub(crate) crypto: Option<CryptoExt>,
    pub(crate) bitmaps: Option<BitmapsExt>,
    pub(crate) feature_names: Vec<feature::FeatureName>,
    pub(crate) unknown: Vec<UnknownExt>,
}

/// What the bodies are judged by.
pub(crate) struct Context {
    pub(crate) crypt: CryptMethod,
    pub(crate) autoclear: u64,
    pub(crate) cluster_size: u64,
}

/// The bytes of a C string.
pub(crate) fn cut_at_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|&b| b == 0).next().unwrap_or_default().to_vec()
}

/// One step of the walk: type, place of the body, body.
struct Raw<'a> {
    magic: u32,
    at: usize,
    body: &'a [u8],
}

/// The extension at `at`, `None` at the end mark or at the end of the area.
fn next<'a>(cluster: &'a [u8], at: usize, end: usize) -> Result<Option<Raw<'a>>, ParseError> {
    if at >= end {
        return Ok(None);
    }
    let too_large = || ParseError::invalid("header extension", at as u64, "Header extension too large");
    let magic = be32(cluster, at).ok_or_else(too_large)?;
    let body = at + 8;
    let len = be32(cluster, at + 4).ok_or_else(too_large)? as usize;
    // The end mark's length is looked at like any other.
    if body > end || len > end - body {
        return Err(too_large());
    }
    if magic == END {
        return Ok(None);
    }
    let body_bytes = cluster.get(body..body + len).ok_or_else(too_large)?;
    Ok(Some(Raw { magic, at: body, body: body_bytes }))
}

/// The table of feature names alone; damage elsewhere ends the walk without an error.
pub(crate) fn feature_names(cluster: &[u8], start: usize, end: usize) -> Vec<feature::FeatureName> {
    let mut at = start;
    let mut names = Vec::new();
    while let Ok(Some(raw)) = next(cluster, at, end) {
        if raw.magic == FEATURE_NAMES {
            names = feature::parse(raw.body);
        }
        at = raw.at + raw.body.len().next_multiple_of(8);
    }
    names
}

/// All extensions between `start` and `end` of the first cluster.
pub(crate) fn parse(
    cluster: &[u8],
    start: usize,
    end: usize,
    cx: &Context,
) -> Result<Extensions, ParseError> {
    let mut all = Extensions::default();
    let mut at = start;
    while let Some(raw) = next(cluster, at, end)? {
        known_or_kept(&mut all, &raw, cx)?;
        at = raw.at + raw.body.len().next_multiple_of(8);
    }
    Ok(all)
}

fn known_or_kept(all: &mut Extensions, raw: &Raw<'_>, cx: &Context) -> Result<(), ParseError> {
    let place = raw.at as u64;
    let len = raw.body.len();
    match raw.magic {
        BACKING_FORMAT => {
            if len > MAX_BACKING_FORMAT as usize {
                let text =
                    format!("ERROR: ext_backing_format: len={len} too large (>={})", MAX_BACKING_FORMAT + 1);
                return Err(ParseError::invalid("backing format extension", place, text));
            }
            all.backing_format = Some(cut_at_nul(raw.body));
        }
        FEATURE_NAMES => all.feature_names = feature::parse(raw.body),
        CRYPTO => all.crypto = Some(crypto(raw, cx)?),
        BITMAPS => all.bitmaps = bitmaps(raw, cx)?,
        DATA_FILE => all.data_file = Some(cut_at_nul(raw.body)),
        magic => all.unknown.push(UnknownExt { magic, data: raw.body.to_vec() }),
    }
    Ok(())
}

fn crypto(raw: &Raw<'_>, cx: &Context) -> Result<CryptoExt, ParseError> {
    const NAME: &str = "encryption header extension";
    let place = raw.at as u64;
    if cx.crypt != CryptMethod::Luks {
        let text = "CRYPTO header extension only expected with LUKS encryption method";
        return Err(ParseError::invalid(NAME, place, text));
    }
    let (Some(offset), Some(length), 16) = (be64(raw.body, 0), be64(raw.body, 8), raw.body.len()) else {
        let text = format!("CRYPTO header extension size {}, but expected size 16", raw.body.len());
        return Err(ParseError::invalid(NAME, place, text));
    };
    if !offset.is_multiple_of(cx.cluster_size) {
        let text = format!(
            "Encryption header offset '{offset}' is not a multiple of cluster size '{}'",
            cx.cluster_size
        );
        return Err(ParseError::invalid(NAME, place, text));
    }
    if length > MAX_CRYPTO_HEADER || offset > i64::MAX as u64 - length {
        return Err(ParseError::too_big(
            NAME,
            place + 8,
            format!("Encryption header of {length} bytes is too large"),
        ));
    }
    Ok(CryptoExt { offset, length })
}

fn bitmaps(raw: &Raw<'_>, cx: &Context) -> Result<Option<BitmapsExt>, ParseError> {
    const NAME: &str = "bitmaps extension";
    let place = raw.at as u64;
    let fields =
        (be32(raw.body, 0), be32(raw.body, 4), be64(raw.body, 8), be64(raw.body, 16), raw.body.len());
    let (Some(count), Some(reserved), Some(directory_size), Some(directory_offset), 24) = fields else {
        return Err(ParseError::invalid(NAME, place, "bitmaps_ext: Invalid extension length"));
    };
    // Somebody who knows no bitmaps has written since: not to be trusted, dropped at the next header update.
    if cx.autoclear & AUTOCLEAR_BITMAPS == 0 {
        return Ok(None);
    }
    if reserved != 0 {
        return Err(ParseError::invalid(NAME, place + 4, "bitmaps_ext: Reserved field is not zero"));
    }
    if count > bitmap::MAX_BITMAPS {
        let text = format!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {}",
            bitmap::MAX_BITMAPS
        );
        return Err(ParseError::invalid(NAME, place, text));
    }
    if count == 0 {
        return Err(ParseError::invalid(NAME, place, "found bitmaps extension with zero bitmaps"));
    }
    if !directory_offset.is_multiple_of(cx.cluster_size) {
        return Err(ParseError::invalid(NAME, place + 16, "bitmaps_ext: invalid bitmap directory offset"));
    }
    if directory_size > bitmap::MAX_DIRECTORY_BYTES {
        let text = format!(
            "bitmaps_ext: bitmap directory size ({directory_size}) exceeds the maximum supported size ({})",
            bitmap::MAX_DIRECTORY_BYTES
        );
        return Err(ParseError::invalid(NAME, place + 8, text));
    }
    Ok(Some(BitmapsExt { count, directory_size, directory_offset }))
}

/// Appends one extension, padded to 8.
fn put(out: &mut Vec<u8>, magic: u32, body: &[u8]) {
    out.extend_from_slice(&magic.to_be_bytes());
    out.extend_from_slice(&(body.len() as u32).to_be_bytes());
    out.extend_from_slice(body);
    out.resize(out.len() + (body.len().next_multiple_of(8) - body.len()), 0);
}

/// All extensions in QEMU's order with the end mark. `names`: write the feature name table.
pub(crate) fn serialise(all: &Extensions, names: bool, out: &mut Vec<u8>) {
    if let Some(format) = all.backing_format.as_deref().filter(|f| !f.is_empty()) {
        put(out, BACKING_FORMAT, format);
    }
    if let Some(name) = all.data_file.as_deref() {
        put(out, DATA_FILE, name);
    }
    if let Some(c) = all.crypto {
        let mut body = [0u8; 16];
        body[..8].copy_from_slice(&c.offset.to_be_bytes());
        body[8..].copy_from_slice(&c.length.to_be_bytes());
        put(out, CRYPTO, &body);
    }
    if names {
        put(out, FEATURE_NAMES, &feature::serialise());
    }
    if let Some(b) = all.bitmaps {
        let mut body = [0u8; 24];
        body[..4].copy_from_slice(&b.count.to_be_bytes());
        body[8..16].copy_from_slice(&b.directory_size.to_be_bytes());
        body[16..].copy_from_slice(&b.directory_offset.to_be_bytes());
        put(out, BITMAPS, &body);
    }
    for u in &all.unknown {
        put(out, u.magic, &u.data);
    }
    put(out, END, &[]);
}
