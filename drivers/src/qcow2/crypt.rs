//! The encryption of an image: which it is, and its key.
//!
//! Used by `open`. The ciphers are those of the `luks` driver; here is only where qcow2 keeps their header.

use std::sync::Arc;

use graph::options::Purpose;
use graph::{BlockError, OpenContext, Result};
use serde_json::{Map, Value};

use super::format::{CryptMethod, Header};
use super::node::{Crypt, FILE};
use super::options::{EncryptFormat, Qcow2Options};
use crate::luks::{self, Loaded, Place, Volume};

/// Unlocks; what the queries are told of it.
///
/// # Errors
/// Options that do not fit the image, a passphrase that does not fit, a header that is refused.
pub(super) async fn open(
    cx: &OpenContext,
    options: &Qcow2Options,
    header: &Header,
) -> Result<(Option<Crypt>, Map<String, Value>)> {
    let given = options.encrypt.as_ref();
    match header.crypt {
        CryptMethod::None if given.is_some() => {
            Err(BlockError::invalid("No encryption in image header, but options specified format"))
        }
        CryptMethod::None => Ok((None, Map::new())),
        method => {
            let (own, name) = match method {
                CryptMethod::Luks => (EncryptFormat::Luks, "luks"),
                _ => (EncryptFormat::Aes, "aes"),
            };
            if let Some(given) = given.filter(|g| g.format != own) {
                let asked = if given.format == EncryptFormat::Luks { "luks" } else { "aes" };
                return Err(BlockError::invalid(format!(
                    "Header reported '{name}' encryption format but options specify '{asked}'"
                )));
            }
            unlock(cx, options, header, method).await
        }
    }
}

async fn unlock(
    cx: &OpenContext,
    options: &Qcow2Options,
    header: &Header,
    method: CryptMethod,
) -> Result<(Option<Crypt>, Map<String, Value>)> {
    let inspect = cx.options().purpose != Purpose::Use;
    let secret = match options.encrypt.as_ref().and_then(|e| e.key_secret.clone()) {
        Some(id) => Some(luks::passphrase(&id, cx.secret(&id)?)?),
        None if inspect => None,
        None => {
            return Err(BlockError::invalid("Parameter 'encrypt.key-secret' is required for cipher"));
        }
    };
    if method == CryptMethod::Aes {
        let volume = secret.map(|s| Volume::legacy_aes(&s)).transpose()?;
        let crypt = volume.map(|v| Crypt { volume: Arc::new(v), by_guest: true });
        return Ok((crypt, Map::new()));
    }
    let place = header.crypto.ok_or_else(|| BlockError::invalid("Encryption header missing"))?;
    let loaded = cx
        .child_io(FILE, move |io| async move {
            Loaded::read(&io, place.offset, place.length, Place::Attached).await
        })
        .await?;
    let info = loaded.info();
    let Some(secret) = secret else { return Ok((None, info)) };
    let volume = loaded.unlock_on_pool(secret).await?;
    Ok((Some(Crypt { volume: Arc::new(volume), by_guest: false }), info))
}
