//! LUKS1: the ciphers and keys of encrypted images ([`Volume`], also used by encrypted qcow2 images), and the format driver
//! `luks`, which shows the plaintext of its child.
//!
//! | file | subject |
//! |---|---|
//! | `spec` | names of ciphers, modes, hashes; hashing and PBKDF2 |
//! | `cipher` | sectors in, sectors out |
//! | `twofish` | one cipher whose crate is too slow for disks |
//! | `header` | the header on disk |
//! | `af` | the anti-forensic splitter |
//! | `volume` | unlocking, and what an unlocked volume does |
//! | `format` | new headers |
//! | `options`, `open`, `io`, `create` | the driver |
//!
//! The driver must not reach anything but its children, and asks for a passphrase by the id of a `secret` object alone.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use graph::{CreateDef, DriverDef, DriverKind};
use serde_json::{Map, Value};

mod af;
mod cipher;
mod create;
pub(crate) mod format;
pub mod header;
mod io;
mod open;
mod options;
mod reopen;
pub(crate) mod spec;
#[cfg(test)]
mod tests;
mod twofish;
pub(crate) mod volume;

pub(crate) use header::Place;
pub(crate) use volume::{Loaded, Volume};

/// Bytes that are encrypted as one, with one IV.
pub(crate) const SECTOR: usize = 512;

/// Index of the child with the data.
const FILE: usize = 0;

/// `luks`.
pub(crate) const LUKS: DriverDef = DriverDef {
    name: "luks",
    kind: DriverKind::Format,
    schema: || schemars::schema_for!(options::LuksOptions),
    open: |cx, value| Box::pin(open::open(cx, value)),
    create: Some(CreateDef {
        schema: || schemars::schema_for!(options::LuksCreateOptions),
        create: |cx, value| Box::pin(create::create(cx, value)),
    }),
};

/// A LUKS node.
struct Luks {
    /// `None`: opened to be looked at, without a key.
    volume: Option<Arc<Volume>>,
    /// `format-specific` of the image information.
    info: Map<String, Value>,
    /// Where the data begins in the child, bytes; a multiple of 512.
    payload: u64,
    /// Size of the child as of the last we heard (`child_changed`, own writes), bytes.
    file_size: AtomicU64,
}

/// The passphrase a `secret` object holds.
///
/// # Errors
/// It is not UTF-8, which QEMU demands of passphrases.
pub(crate) fn passphrase(id: &str, secret: graph::Secret) -> graph::Result<graph::Secret> {
    match std::str::from_utf8(secret.bytes()) {
        Ok(_) => Ok(secret),
        Err(_) => Err(graph::BlockError::invalid(format!("Data from secret {id} is not valid UTF-8"))),
    }
}
