//! Opening a file or device: options, the kind of file, sizes.
//!
//! Called by the graph on the main thread; what can block runs on the pool. Takes no locks: those follow the users.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use graph::options::{NodeOptions, parse_options};
use graph::{BlockError, Errno, OpenContext, Opened, Result};
use host::file::ofd_locks_supported;
use host::{Engine, File, FileKind, OpenOptions};
use serde_json::Value;

use super::lock::Locks;
use super::options::{Aio, FileOptions, Locking};
use super::size::Sizes;
use super::{Counters, FileNode, Lacks, Wanted};

/// Opens a node.
pub(super) async fn open(wanted: Wanted, cx: OpenContext, value: Value) -> Result<Opened> {
    let options: FileOptions = parse_options(value)?;
    let node = *cx.options();
    let node = host::pool::run(move || open_blocking(wanted, &options, &node)).await?;
    Ok(Opened::new(node))
}

/// Opens a node; blocks.
pub(super) fn open_blocking(wanted: Wanted, options: &FileOptions, node: &NodeOptions) -> Result<FileNode> {
    check_filename(wanted, &options.filename)?;
    let engine = engine(options.aio, node.direct)?;
    if options.aio_max_batch.is_some_and(|n| n < 0) {
        return Err(BlockError::invalid("Value of parameter 'aio-max-batch' must not be negative"));
    }
    let locking = match options.locking.unwrap_or_default() {
        Locking::Off => false,
        Locking::Auto => ofd_locks_supported(),
        Locking::On if ofd_locks_supported() => true,
        Locking::On => {
            return Err(BlockError::unsupported(
                "locking=on: this kernel has no open file description locks",
            ));
        }
    };
    let reader = OpenOptions { writable: false, direct: node.direct, create: None, engine };
    let writer = OpenOptions { writable: true, ..reader.clone() };
    // A file is not opened for writing before somebody writes when the user said so: it may lie on a read-only medium, or
    // belong to somebody else.
    let later = !node.read_only && node.auto_read_only;
    let now = if node.read_only || later { &reader } else { &writer };
    let first = open_file(wanted, &options.filename, now)?;
    let sizes = Sizes::of(&first).map_err(|e| could_not("get size of", &options.filename, e))?;
    Ok(FileNode {
        wanted,
        filename: options.filename.clone(),
        locks: Arc::new(Locks::new(locking.then(|| Arc::clone(&first)))),
        writer: OnceLock::new(),
        reopen: later.then_some(writer),
        first,
        size: sizes.visible.into(),
        length: sizes.length.into(),
        lacks: Lacks::default(),
        counters: Arc::new(Counters::default()),
    })
}

fn check_filename(wanted: Wanted, filename: &str) -> Result<()> {
    if filename.is_empty() {
        return Err(BlockError::invalid(format!(
            "The '{}' block driver requires a file name",
            wanted.name()
        )));
    }
    if filename.starts_with("/dev/fdset/") {
        return Err(BlockError::unsupported(format!(
            "Could not open '{filename}': there are no descriptor sets here; give the path of the image, or \
             /proc/self/fd/N for a descriptor this process was started with"
        )));
    }
    Ok(())
}

fn engine(aio: Option<Aio>, direct: bool) -> Result<Engine> {
    match aio {
        None => Ok(Engine::Auto),
        Some(Aio::Threads) => Ok(Engine::Threads),
        Some(Aio::IoUring) => Ok(Engine::IoUring),
        Some(Aio::Native) if direct => Ok(Engine::Auto),
        Some(Aio::Native) => Err(BlockError::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )),
    }
}

pub(super) fn could_not(verb: &str, filename: &str, e: io::Error) -> BlockError {
    BlockError::io(format!("Could not {verb} '{filename}'"), e)
}

/// Opens a file and checks that it is what the driver is for; blocks.
pub(super) fn open_file(wanted: Wanted, filename: &str, how: &OpenOptions) -> Result<Arc<File>> {
    let wrong_kind = || {
        BlockError::invalid(match wanted {
            Wanted::File => format!("'file' driver requires '{filename}' to be a regular file"),
            Wanted::HostDevice => {
                format!("'host_device' driver requires '{filename}' to be either a character or block device")
            }
        })
    };
    let file = match File::open(Path::new(filename), how) {
        Ok(file) => file,
        // What the number alone does not tell: directories and pipes, and file systems without direct I/O.
        Err(e) if e.raw_os_error() == Some(Errno::EINVAL.raw()) => {
            return Err(match std::fs::metadata(filename) {
                Ok(meta) if !meta.is_file() => wrong_kind(),
                Ok(_) if how.direct => BlockError::new(
                    Errno::EINVAL,
                    format!(
                        "Could not open '{filename}': filesystem does not support O_DIRECT (cache.direct=off)"
                    ),
                ),
                _ => could_not("open", filename, e),
            });
        }
        Err(e) => return Err(could_not("open", filename, e)),
    };
    match (wanted, file.kind()) {
        (Wanted::File, FileKind::Regular)
        | (Wanted::HostDevice, FileKind::BlockDevice | FileKind::CharDevice) => Ok(file),
        _ => Err(wrong_kind()),
    }
}
