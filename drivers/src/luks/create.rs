//! Creating a LUKS image: a header with one key slot, and a file of the right length.
//!
//! Called by the create job and the command line tools, on the main thread; keys are computed on the worker pool.

use graph::options::{BlockdevRef, parse_options};
use graph::{
    BlockError, CreateContext, NodeIo, Perm, PermPair, Prealloc, Result, Truncate, WriteFlags, ZeroFlags,
};
use host::IoVecs;
use serde_json::Value;

use super::format::{self, Created, LuksParams};
use super::header::Place;
use super::options::LuksCreateOptions;
use super::passphrase;

/// Creates an image.
pub(super) async fn create(mut cx: CreateContext, value: Value) -> Result<()> {
    let options: LuksCreateOptions = parse_options(value)?;
    let params = params(&options)?;
    let size = u64::try_from(options.size).map_err(|_| {
        BlockError::invalid(format!("Value '{}' is out of range for parameter 'size'", options.size))
    })?;
    let prealloc = options.preallocation.unwrap_or_default();
    if options.file.is_none() && options.header.is_none() {
        return Err(BlockError::invalid("Either the parameter 'header' or 'file' must be specified"));
    }
    if options.file.is_none() && prealloc != Prealloc::Off {
        return Err(BlockError::invalid(
            "Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk",
        ));
    }
    let id = params
        .key_secret
        .clone()
        .ok_or_else(|| BlockError::invalid("Parameter 'key-secret' is required for cipher"))?;
    let secret = passphrase(&id, cx.secret(&id)?)?;
    let place = if options.header.is_some() { Place::Detached } else { Place::Attached };
    let area = params.area_len()?;
    let in_front = if place == Place::Attached { area } else { 0 };
    let length = size
        .checked_add(in_front)
        .filter(|l| *l <= i64::MAX as u64)
        .ok_or_else(|| BlockError::invalid("The requested file size is too large"))?;

    // Both are held before anything is computed or written.
    let file = open(&mut cx, options.file).await?;
    let header = open(&mut cx, options.header).await?;
    let created = host::pool::run(move || format::create(&params, &secret, place)).await?;
    if cx.cancelled() {
        return Err(graph::Errno::ECANCELED.into());
    }
    if let Some(file) = file {
        cx.truncate(file, length, Truncate { exact: false, prealloc, zero: false }).await?;
    }
    if let Some(header) = header {
        cx.truncate(header, area, Truncate::default()).await?;
    }
    if let Some(target) = header.or(file) {
        cx.child_io(target, move |io| write(io, created)).await?;
    }
    cx.close().await;
    Ok(())
}

async fn open(cx: &mut CreateContext, reference: Option<BlockdevRef>) -> Result<Option<usize>> {
    let Some(reference) = reference else { return Ok(None) };
    // As QEMU: whoever minds a writer says so itself.
    let hold = PermPair { perm: Perm::WRITE | Perm::RESIZE, shared: Perm::ALL };
    Ok(Some(cx.open(reference, hold).await?))
}

/// Writes the header; what an older one left in the place of the other key slots goes.
async fn write(io: NodeIo, created: Created) -> Result<()> {
    io.write_zeroes(0, created.area_len, ZeroFlags::MAY_UNMAP).await?;
    io.write(0, &IoVecs::from_vec(created.bytes), WriteFlags::empty()).await?;
    io.flush().await
}

fn params(options: &LuksCreateOptions) -> Result<LuksParams> {
    let iter_time = match options.iter_time.map(u64::try_from) {
        None => None,
        Some(Ok(ms)) => Some(ms),
        Some(Err(_)) => return Err(BlockError::invalid("iteration time must be greater than zero")),
    };
    let params = LuksParams {
        key_secret: options.key_secret.clone(),
        cipher_alg: options.cipher_alg,
        cipher_mode: options.cipher_mode,
        ivgen_alg: options.ivgen_alg,
        ivgen_hash_alg: options.ivgen_hash_alg,
        hash_alg: options.hash_alg,
        iter_time,
    };
    params.check()?;
    Ok(params)
}
