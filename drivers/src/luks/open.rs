//! Opening a LUKS node: its children, the header, the key.
//!
//! Called by the graph on the main thread; reading happens on an iothread, computing on the worker pool.

use std::sync::Arc;

use graph::options::{Purpose, parse_options};
use graph::{BlockError, OpenContext, Opened, Result, Roles};
use serde_json::Value;

use super::header::Place;
use super::options::LuksOptions;
use super::volume::Loaded;
use super::{FILE, Luks, passphrase};

/// Opens a node.
pub(super) async fn open(cx: OpenContext, value: Value) -> Result<Opened> {
    let options: LuksOptions = parse_options(value)?;
    let index = cx.open_child("file", Roles::IMAGE, options.file).await?;
    debug_assert_eq!(index, FILE);
    let (header, place) = match options.header {
        Some(header) => (cx.open_child("header", Roles::METADATA, header).await?, Place::Detached),
        None => (FILE, Place::Attached),
    };
    let secret = match (cx.options().purpose, options.key_secret) {
        (Purpose::Inspect, _) => None,
        (_, Some(id)) => Some(passphrase(&id, cx.secret(&id)?)?),
        (_, None) => return Err(BlockError::invalid("Parameter 'key-secret' is required for cipher")),
    };
    let loaded = cx
        .child_io(header, move |io| async move {
            let room = io.size();
            Loaded::read(&io, 0, room, place).await
        })
        .await?;
    let payload = loaded.header().payload_offset();
    let file_size = cx.child(FILE)?.size();
    if payload > file_size {
        return Err(BlockError::invalid(format!(
            "The LUKS payload offset ({payload}) lies past the end of the file ({file_size})"
        )));
    }
    let info = loaded.info();
    let volume = match secret {
        Some(secret) => Some(Arc::new(loaded.unlock_on_pool(secret).await?)),
        None => None,
    };
    Ok(Opened::new(Luks { volume, info, payload, file_size: file_size.into() }))
}
