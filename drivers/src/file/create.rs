//! Creating an image file: a regular file of a size, sparse or with its space set aside.
//!
//! Called by the create job and the command line tools. A file that is there already is emptied, unless somebody has it open
//! as an image: the lock bytes are taken before anything is changed. All of it blocks and runs on the worker pool.

use std::io;
use std::path::Path;
use std::sync::Arc;

use graph::options::parse_options;
use graph::{BlockError, CreateContext, Errno, JobControl, Perm, Prealloc, Result};
use host::File;
use host::file::ofd_locks_supported;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lock::Locks;
use super::open::could_not;

/// Piece in which zeroes are written, bytes.
const FILL: usize = 1 << 20;

/// What QEMU asks of file systems that take the hint (XFS), bytes.
const EXTENT_SIZE_HINT: u32 = 1 << 20;

/// Options for the creation of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileCreateOptions {
    /// Path of the file; one that exists is overwritten.
    pub filename: String,
    /// Size in bytes.
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub size: i64,
    /// How space is set aside: not at all (`off`), by `fallocate` (`falloc`), or by writing zeroes (`full`). Default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preallocation: Option<Prealloc>,
    /// Ask btrfs for no copy-on-write of the file, as far as it can be had. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nocow: Option<bool>,
    /// Extent size to ask the file system for, bytes, as far as it can be had; 0: none. Default: 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    #[schemars(extend("format" = "size"))]
    pub extent_size_hint: Option<i64>,
}

/// Creates a file.
pub(super) async fn create(cx: CreateContext, value: Value) -> Result<()> {
    let options: FileCreateOptions = parse_options(value)?;
    let control = cx.control();
    host::pool::run(move || create_blocking(&options, &control)).await
}

fn create_blocking(options: &FileCreateOptions, control: &Arc<JobControl>) -> Result<()> {
    let name = &options.filename;
    let hint = match options.extent_size_hint.map(u32::try_from) {
        None => EXTENT_SIZE_HINT,
        Some(Ok(hint)) => hint,
        Some(Err(_)) => return Err(BlockError::invalid("Extent size hint is too large")),
    };
    let size = u64::try_from(options.size).map_err(|_| BlockError::io("Could not resize file", einval()))?;
    let path = Path::new(name);
    let mut how = std::fs::OpenOptions::new();
    // Not truncated here: it may be somebody's image.
    how.read(true).write(true).create(true).truncate(false);
    std::os::unix::fs::OpenOptionsExt::mode(&mut how, 0o644);
    let opened = how.open(path).map_err(|e| could_not("create", name, e))?;
    let file = File::from_fd(opened.into(), path, &host::OpenOptions::default())
        .map_err(|e| could_not("create", name, e))?;
    let locks = Locks::new(ofd_locks_supported().then(|| Arc::clone(&file)));
    locks.prepare(Perm::WRITE | Perm::RESIZE, Perm::ALL - Perm::RESIZE, name)?;
    let result = fill(&file, size, options, hint, control);
    // Given back with the descriptor as well; explicitly, for whoever opens the image next.
    locks.abort();
    result
}

fn einval() -> io::Error {
    io::Error::from_raw_os_error(Errno::EINVAL.raw())
}

fn fill(
    file: &Arc<File>,
    size: u64,
    options: &FileCreateOptions,
    hint: u32,
    control: &Arc<JobControl>,
) -> Result<()> {
    let resized = |e| BlockError::io("Could not resize file", e);
    // Whatever it held: the new image must read as zeroes.
    file.set_len(0).map_err(resized)?;
    if options.nocow.unwrap_or(false)
        && let Err(e) = file.hint_no_cow()
    {
        log::debug!("{}: no nocow: {e}", options.filename);
    }
    if hint > 0
        && let Err(e) = file.hint_extent_size(hint)
        && options.extent_size_hint.is_some()
    {
        log::warn!("Failed to set extent size hint of '{}': {e}", options.filename);
    }
    match options.preallocation.unwrap_or_default() {
        Prealloc::Off => file.set_len(size).map_err(resized),
        Prealloc::Metadata => Err(BlockError::unsupported("Unsupported preallocation mode: metadata")),
        Prealloc::Falloc if size == 0 => Ok(()),
        Prealloc::Falloc => {
            file.allocate(size).map_err(|e| BlockError::io("Could not preallocate data for the new file", e))
        }
        Prealloc::Full => {
            file.set_len(size).map_err(resized)?;
            write_zeroes(file, size, control)
        }
    }
}

/// Writes zeroes over all of it, so that nothing can fail for space later.
fn write_zeroes(file: &File, size: u64, control: &Arc<JobControl>) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let failed = |e| BlockError::io("Could not write zeros for preallocation", e);
    let file = std::fs::File::from(file.as_fd().try_clone_to_owned().map_err(failed)?);
    let zeroes = vec![0u8; FILL];
    let mut at = 0;
    control.progress(0, size);
    while at < size {
        control.check()?;
        let len = (size - at).min(FILL as u64);
        let piece = zeroes.get(..len as usize).unwrap_or(&zeroes);
        file.write_all_at(piece, at).map_err(failed)?;
        at += len;
        control.progress(at, size);
    }
    file.sync_all().map_err(|e| BlockError::io("Could not flush file to disk", e))
}
