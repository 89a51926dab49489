//! `secret` objects: passphrases and keys, given in the clear, base64-coded, in a file, or encrypted with another secret.
//!
//! Called by `object-add` and `object-del` on the main thread. What is inside goes to the graph, whose drivers ask for it by id;
//! here stays only what may be told. Nothing here prints a secret, not even in an error.

use std::io::Read;

use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, KeyInit};
use graph::{Secret, Secrets};
use qmp::QmpError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zeroize::Zeroizing;

#[cfg(test)]
mod tests;

/// Most secrets of a process.
pub const MAX_SECRETS: usize = 1024;
/// Longest secret, in the form it is given in, bytes.
const MAX_LEN: usize = 64 << 10;
/// Length of an AES block, bytes.
const BLOCK: usize = 16;

/// How the data of a secret is written.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum SecretFormat {
    /// As it is. On the control channel that can be nothing but UTF-8.
    #[default]
    Raw,
    /// In base64.
    Base64,
}

/// Text that is not shown, and wiped when dropped.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Hidden(Zeroizing<String>);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("...")
    }
}

/// `secret`: a passphrase or key that other things name by its id.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SecretProperties {
    /// Name of the object.
    pub id: String,
    /// The secret itself; visible to whoever may list processes when it is given on the command line. At most 64 KiB.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub data: Option<Hidden>,
    /// A file that holds it, read once; at most 64 KiB.
    #[serde(default)]
    pub file: Option<String>,
    /// How `data` or `file` is written; default: raw.
    #[serde(default)]
    pub format: SecretFormat,
    /// Another secret, of 32 bytes, which this one is encrypted with (AES-256-CBC, PKCS#7 padding). Then `iv` is needed.
    #[serde(default)]
    pub keyid: Option<String>,
    /// The initialisation vector, 16 bytes in base64.
    #[serde(default)]
    pub iv: Option<String>,
}

/// What stays of an object once it is loaded.
#[derive(Clone, Debug)]
pub struct SecretObject {
    /// How it was written.
    pub format: SecretFormat,
    /// The file it came from.
    pub file: Option<String>,
    /// The secret it was encrypted with.
    pub keyid: Option<String>,
    /// The initialisation vector as it was given.
    pub iv: Option<String>,
}

impl SecretObject {
    /// A property for `qom-get`. Unlike in QEMU the secret itself cannot be had.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn get(&self, property: &str) -> Result<Value, QmpError> {
        let text = |t: &Option<String>| json!(t.as_deref().unwrap_or_default());
        match property {
            "type" => Ok(json!("secret")),
            "format" => Ok(json!(self.format)),
            "file" => Ok(text(&self.file)),
            "keyid" => Ok(text(&self.keyid)),
            "iv" => Ok(text(&self.iv)),
            "data" => Err(QmpError::generic("Property 'secret.data' is not readable")),
            _ => Err(QmpError::generic(format!("Property 'secret.{property}' not found"))),
        }
    }
}

/// Its properties with their types, as `qom-list` of QEMU spells them.
pub const PROPERTIES: [(&str, &str); 6] = [
    ("type", "string"),
    ("iv", "string"),
    ("keyid", "string"),
    ("format", "QCryptoSecretFormat"),
    ("file", "string"),
    ("data", "string"),
];

/// Gets at the secret; the words of errors are QEMU's.
///
/// # Errors
/// Data is missing, too long, not what the format says, or cannot be decrypted.
pub async fn load(p: &SecretProperties, secrets: &Secrets) -> Result<Secret, QmpError> {
    let given = match (&p.data, &p.file) {
        (Some(_), Some(_)) => {
            return Err(QmpError::generic("'file' and 'data' are mutually exclusive"));
        }
        (None, None) => return Err(QmpError::generic("Either 'file' or 'data' must be provided")),
        (Some(data), None) => Zeroizing::new(data.0.as_bytes().to_vec()),
        (None, Some(path)) => {
            let path = path.clone();
            host::pool::run(move || read(&path)).await?
        }
    };
    if given.len() > MAX_LEN {
        return Err(QmpError::generic(format!("a secret must not exceed {MAX_LEN} bytes")));
    }
    let Some(keyid) = &p.keyid else {
        return Ok(secret(&decode(p.format, given)?));
    };
    let key = secrets.get(keyid).map_err(|e| QmpError::generic(e.to_string()))?;
    let key: &[u8; 32] =
        key.bytes().try_into().map_err(|_| QmpError::generic("Key should be 32 bytes in length"))?;
    let iv = p.iv.as_ref().ok_or_else(|| QmpError::generic("IV is required to decrypt secret"))?;
    let iv = base64(iv.as_bytes())?;
    let iv: [u8; BLOCK] = iv
        .as_slice()
        .try_into()
        .map_err(|_| QmpError::generic(format!("IV should be {BLOCK} bytes in length not {}", iv.len())))?;
    Ok(secret(&decrypt(key, iv, decode(p.format, given)?)?))
}

fn secret(bytes: &[u8]) -> Secret {
    Secret::new(bytes.to_vec())
}

fn read(path: &str) -> Result<Zeroizing<Vec<u8>>, QmpError> {
    let failed = |e: std::io::Error| QmpError::generic(format!("Unable to read {path}: {e}"));
    // Never grown: what a growing vector leaves behind is not wiped.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_LEN + 1));
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_LEN as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn decode(format: SecretFormat, given: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>, QmpError> {
    match format {
        SecretFormat::Raw => Ok(given),
        SecretFormat::Base64 => base64(&given),
    }
}

/// Base64 (RFC 4648, 4) with line ends anywhere. Unlike QEMU, which drops it silently, an incomplete last group is refused.
fn base64(text: &[u8]) -> Result<Zeroizing<Vec<u8>>, QmpError> {
    let invalid = || QmpError::generic("Base64 data contains invalid characters");
    let mut out = Zeroizing::new(Vec::with_capacity(text.len() / 4 * 3 + 3));
    let (mut group, mut count, mut padding) = (0u32, 0, 0);
    for byte in text {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'\r' | b'\n' => continue,
            b'=' if count >= 2 => {
                padding += 1;
                0
            }
            _ => return Err(invalid()),
        };
        // Digits after padding, or padding after a whole group.
        if padding > 0 && *byte != b'=' || padding > 2 {
            return Err(invalid());
        }
        group = group << 6 | u32::from(digit);
        count += 1;
        if count == 4 {
            let bytes = group.to_be_bytes();
            out.extend_from_slice(&bytes[1..4 - padding]);
            (group, count) = (0, 0);
        }
    }
    if count != 0 {
        return Err(QmpError::generic("Base64 data is incomplete"));
    }
    Ok(out)
}

/// AES-256-CBC with PKCS#7 padding.
fn decrypt(
    key: &[u8; 32],
    iv: [u8; BLOCK],
    mut data: Zeroizing<Vec<u8>>,
) -> Result<Zeroizing<Vec<u8>>, QmpError> {
    if data.is_empty() || !data.len().is_multiple_of(BLOCK) {
        return Err(QmpError::generic(format!(
            "Length {} must be a multiple of block size {BLOCK}",
            data.len()
        )));
    }
    let cipher = Aes256::new(&Array::from(*key));
    let mut before = iv;
    for block in data.as_chunks_mut::<BLOCK>().0 {
        let coded = *block;
        cipher.decrypt_block(Array::cast_from_core_mut(block));
        block.iter_mut().zip(before).for_each(|(a, b)| *a ^= b);
        before = coded;
    }
    let padding = usize::from(data.last().copied().unwrap_or_default());
    if padding == 0 || padding > BLOCK || padding > data.len() {
        return Err(QmpError::generic(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        )));
    }
    let len = data.len() - padding;
    data.truncate(len);
    Ok(data)
}
