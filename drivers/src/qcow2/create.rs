//! Creating an image: header, refcounts, an empty L1 table, and what preallocation asks for, laid out as QEMU lays them out
//! (header in cluster 0, refcount table from 1, refcount blocks, L1 table).
//!
//! Called by the create job and the command line tools (`DriverDef::create`). The layout is computed, then written from
//! front to back; the header comes last and behind a barrier, so that nothing half made is ever taken for an image.

mod layout;
mod options;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use graph::options::{BlockdevRef, parse_options};
use graph::{
    BlockError, CreateContext, Errno, JobControl, NodeIo, Perm, PermPair, Prealloc, Result, Truncate,
};
use serde_json::Value;

use super::commit::{MetaWrite, write_all};
use super::format::{CryptMethod, CryptoExt, Header};
use crate::luks;
use layout::Layout;

pub(crate) use options::Qcow2CreateOptions;

/// Tables are written in pieces of this size, bytes.
const PIECE: u64 = 1 << 20;

/// Creates an image.
pub(super) async fn create(mut cx: CreateContext, value: Value) -> Result<()> {
    let options: Qcow2CreateOptions = parse_options(value)?;
    let plan = options.plan()?;
    let secret = match &plan.luks {
        Some(params) => {
            let id = params.key_secret.clone().ok_or_else(|| {
                BlockError::invalid("Parameter 'encrypt.key-secret' is required for cipher")
            })?;
            Some(luks::passphrase(&id, cx.secret(&id)?)?)
        }
        None => None,
    };
    // Both are held before anything is computed or written.
    let file = open(&mut cx, options.file.clone()).await?;
    let data = match options.data_file.clone() {
        Some(reference) => Some(open(&mut cx, reference).await?),
        None => None,
    };
    let mut header = plan.header;
    let mut crypto = Vec::new();
    let mut crypto_len = 0;
    if let (Some(params), Some(secret)) = (plan.luks, secret) {
        let made =
            host::pool::run(move || luks::format::create(&params, &secret, luks::Place::Attached)).await?;
        (crypto, crypto_len) = (made.bytes, made.area_len);
        header.crypt = CryptMethod::Luks;
    }
    if let Some(index) = data {
        header.data_file = Some(cx.child(index)?.driver().info().filename.into_bytes());
    }
    let layout = Layout::new(&header, crypto_len, plan.prealloc != Prealloc::Off)?;
    layout.describe(&mut header, crypto_len);
    let first = header.serialise()?;

    // Whatever was there, it is no image while this one is made. A device keeps its size and its content.
    let empty = Truncate::default();
    let emptied =
        cx.truncate(file, 0, Truncate { exact: false, ..empty }).await.is_ok() && cx.child(file)?.size() == 0;
    let end = layout.end(header.geometry());
    let on_file = match plan.prealloc {
        // The space of the data is in the data file.
        _ if data.is_some() => Prealloc::Off,
        Prealloc::Metadata => Prealloc::Off,
        mode => mode,
    };
    if emptied || cx.child(file)?.size() < end {
        cx.truncate(file, end, Truncate { prealloc: on_file, ..empty }).await?;
    }
    let prealloc_any = plan.prealloc != Prealloc::Off;
    if let Some(index) = data {
        let prealloc = if plan.prealloc == Prealloc::Metadata { Prealloc::Off } else { plan.prealloc };
        let how = Truncate { exact: false, prealloc, zero: false };
        // Mapped clusters are there as a whole.
        let whole = if prealloc_any { header.geometry().round_up(header.size) } else { None };
        cx.truncate(index, whole.unwrap_or(header.size), how).await?;
    }
    // Old bytes in clusters that are allocated must not show, nor zeroes be deciphered.
    let stale = data.is_none() && !emptied;
    let hide = header.version >= 3 && (stale || header.crypt != CryptMethod::None);
    let control = cx.control();
    let tables = Tables { layout, header, crypto, hide };
    cx.child_io(file, move |io| async move { tables.write(&io, first, &control).await }).await?;
    cx.close().await;
    Ok(())
}

async fn open(cx: &mut CreateContext, reference: BlockdevRef) -> Result<usize> {
    // As QEMU: whoever minds a writer says so itself.
    cx.open(reference, PermPair { perm: Perm::WRITE | Perm::RESIZE, shared: Perm::ALL }).await
}

/// What is written.
struct Tables {
    layout: Layout,
    header: Header,
    crypto: Vec<u8>,
    /// Preallocated clusters are marked as zeroes.
    hide: bool,
}

impl Tables {
    async fn write(&self, file: &NodeIo, first: Vec<u8>, control: &Arc<JobControl>) -> Result<()> {
        let total = self.layout.metadata_bytes(self.header.geometry());
        let mut done = 0;
        let mut at = self.header.geometry().cluster_size();
        while at < total {
            if control.cancelled() {
                return Err(Errno::ECANCELED.into());
            }
            let len = PIECE.min(total - at);
            let mut data = vec![0; len as usize];
            self.layout.fill(&self.header, at, &mut data, self.hide);
            if let Some(crypto) = self.header.crypto {
                copy_overlap(&mut data, at, &self.crypto, crypto.offset);
            }
            // Also zeroes are written: there may be something else there.
            write_all(file, vec![MetaWrite { offset: at, data }]).await?;
            at += len;
            done += len;
            control.progress(done, total);
        }
        file.flush().await?;
        write_all(file, vec![MetaWrite { offset: 0, data: first }]).await?;
        file.flush().await?;
        control.progress(total, total);
        Ok(())
    }
}

/// Copies what `from`, which belongs at `from_at`, has of the range that `to` stands for.
fn copy_overlap(to: &mut [u8], to_at: u64, from: &[u8], from_at: u64) {
    let start = to_at.max(from_at);
    let end = (to_at + to.len() as u64).min(from_at + from.len() as u64);
    if start >= end {
        return;
    }
    let (source, target) = ((start - from_at) as usize, (start - to_at) as usize);
    let len = (end - start) as usize;
    if let (Some(to), Some(from)) = (to.get_mut(target..target + len), from.get(source..source + len)) {
        to.copy_from_slice(from);
    }
}

/// Where the encryption header is.
fn crypto_ext(offset: u64, length: u64) -> CryptoExt {
    CryptoExt { offset, length }
}
