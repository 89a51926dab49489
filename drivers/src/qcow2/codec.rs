//! One compressed cluster to plain bytes and back: raw deflate and Zstandard ("Compressed clusters").
//!
//! Called by reads and writes of compressed clusters, wherever they run; must not know entries or files. The input is
//! hostile: the output is exactly one cluster however long the stream claims to be, and a Zstandard frame may ask for a
//! window of at most 8 MiB. Each thread keeps one decoder and one encoder of each kind (at most 9 MiB, 0.3 MiB as a
//! rule), so that a cluster costs no allocation.

use std::cell::RefCell;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::format::Compression;

/// Window QEMU writes deflate with, log2 bytes. Other readers rely on it.
const WRITE_WINDOW: u8 = 12;
/// Window deflate is read with: the largest there is, as QEMU's reader in effect has it (its whole output is at hand).
const READ_WINDOW: u8 = 15;
/// Largest Zstandard window, log2 bytes.
const ZSTD_WINDOW_LOG: u32 = 23;
/// Level of both; the libraries' default, as in QEMU.
const DEFLATE_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// The stream does not give one whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadStream;

impl std::fmt::Display for BadStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressed cluster does not decode to one whole cluster")
    }
}

impl std::error::Error for BadStream {}

impl From<BadStream> for graph::BlockError {
    fn from(e: BadStream) -> graph::BlockError {
        graph::BlockError::new(graph::Errno::EIO, e.to_string())
    }
}

thread_local! {
    static INFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static ZSTD_IN: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
    static ZSTD_OUT: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
}

/// Fills `out` (one cluster) from `input`, which may have trailing garbage: its length is known to 512 bytes only.
///
/// # Errors
/// [`BadStream`] if the stream is damaged or ends before `out` is full. A deflate stream that goes on after `out` is full
/// is taken, a Zstandard frame is not; both as in QEMU.
pub fn decompress(kind: Compression, input: &[u8], out: &mut [u8]) -> Result<(), BadStream> {
    match kind {
        Compression::Deflate => INFLATE.with_borrow_mut(|state| inflate(state, input, out)),
        Compression::Zstd => ZSTD_IN.with_borrow_mut(|state| unzstd(state, input, out)),
    }
}

/// Compresses one cluster; `None` if the result would not be shorter than the cluster: then it is stored plain.
pub fn compress(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; cluster.len().saturating_sub(1)];
    let len = match kind {
        Compression::Deflate => DEFLATE.with_borrow_mut(|state| deflate(state, cluster, &mut out)),
        Compression::Zstd => ZSTD_OUT.with_borrow_mut(|state| enzstd(state, cluster, &mut out)),
    }?;
    out.truncate(len);
    Some(out)
}

fn inflate(state: &mut Option<Decompress>, input: &[u8], out: &mut [u8]) -> Result<(), BadStream> {
    let decoder = state.get_or_insert_with(|| Decompress::new_with_window_bits(false, READ_WINDOW));
    decoder.reset(false);
    loop {
        let (read, written) = (decoder.total_in() as usize, decoder.total_out() as usize);
        let (Some(rest), Some(space)) = (input.get(read..), out.get_mut(written..)) else {
            return Err(BadStream);
        };
        if space.is_empty() {
            return Ok(());
        }
        let status = decoder.decompress(rest, space, FlushDecompress::Finish).map_err(|_| BadStream)?;
        let moved = decoder.total_in() as usize > read || decoder.total_out() as usize > written;
        let full = decoder.total_out() as usize == out.len();
        match status {
            _ if full => return Ok(()),
            Status::StreamEnd => return Err(BadStream),
            _ if !moved => return Err(BadStream),
            _ => {}
        }
    }
}

fn unzstd(state: &mut Option<DCtx<'static>>, input: &[u8], out: &mut [u8]) -> Result<(), BadStream> {
    let decoder = match state {
        Some(decoder) => decoder,
        None => {
            let mut fresh = DCtx::try_create().ok_or(BadStream)?;
            fresh.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG)).map_err(|_| BadStream)?;
            state.insert(fresh)
        }
    };
    decoder.reset(ResetDirective::SessionOnly).map_err(|_| BadStream)?;
    let len = out.len();
    let mut from = InBuffer::around(input);
    let mut to = OutBuffer::around(out);
    let mut hint = 0;
    while to.pos() < len {
        let before = (from.pos(), to.pos());
        hint = decoder.decompress_stream(&mut to, &mut from).map_err(|_| BadStream)?;
        if before == (from.pos(), to.pos()) {
            return Err(BadStream);
        }
    }
    // Not 0: the frame goes on, so it holds more than a cluster.
    if hint == 0 { Ok(()) } else { Err(BadStream) }
}

fn deflate(state: &mut Option<Compress>, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let level = flate2::Compression::new(DEFLATE_LEVEL);
    let encoder = state.get_or_insert_with(|| Compress::new_with_window_bits(level, false, WRITE_WINDOW));
    encoder.reset();
    match encoder.compress(cluster, out, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => Some(encoder.total_out() as usize),
        _ => None,
    }
}

fn enzstd(state: &mut Option<CCtx<'static>>, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let encoder = match state {
        Some(encoder) => encoder,
        None => {
            let mut fresh = CCtx::try_create()?;
            fresh.set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL)).ok()?;
            state.insert(fresh)
        }
    };
    encoder.reset(ResetDirective::SessionOnly).ok()?;
    encoder.compress2(out, cluster).ok()
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
