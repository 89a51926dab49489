//! The qcow2 images of a comparison: made by `qemu-img`, so that neither contestant has the advantage of its own layout.
//!
//! Called by `compare`. An image that a run changes is made anew for every run.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, fio};

/// How an image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// No format: the raw file itself.
    Raw,
    /// No format: the raw file itself below this many filters that have nothing to do.
    Filters(u8),
    /// One image with every cluster allocated.
    Allocated,
    /// This many images above each other: empty overlays, all data in the lowest.
    Chain(u8),
    /// Nothing allocated, 64 GiB; made anew for each run.
    Fresh,
    /// 200 GiB with all metadata and no data.
    Large,
}

fn qemu_img(arguments: &[&str]) -> Result<()> {
    let output = Command::new("qemu-img").args(arguments).output();
    let output = output.map_err(|error| format!("qemu-img: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("qemu-img {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())
        .into())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| "a folder whose name is not UTF-8".into())
}

/// The files of a layout in `folder`, the top one first; `raw` holds the data.
///
/// # Errors
/// What `qemu-img` says.
pub fn prepare(layout: Layout, raw: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let allocated = folder.join("allocated.qcow2");
    match layout {
        Layout::Raw | Layout::Filters(_) => Ok(vec![raw.to_owned()]),
        Layout::Allocated => {
            if !allocated.exists() {
                let made = folder.join("converted.qcow2");
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-S", "0", text(raw)?, text(&made)?])?;
                settle(&made, &allocated)?;
                std::fs::remove_file(&made)?;
            }
            Ok(vec![allocated])
        }
        Layout::Chain(depth) => {
            let mut chain = prepare(Layout::Allocated, raw, folder)?;
            for level in 1..depth {
                let path = folder.join(format!("level-{level}.qcow2"));
                if !path.exists()
                    && let Some(below) = chain.first()
                {
                    qemu_img(&[
                        "create",
                        "-q",
                        "-f",
                        "qcow2",
                        "-F",
                        "qcow2",
                        "-b",
                        text(below)?,
                        text(&path)?,
                    ])?;
                }
                chain.insert(0, path);
            }
            Ok(chain)
        }
        Layout::Fresh => {
            let path = folder.join("fresh.qcow2");
            let _ = std::fs::remove_file(&path);
            qemu_img(&["create", "-q", "-f", "qcow2", text(&path)?, "64G"])?;
            Ok(vec![path])
        }
        Layout::Large => {
            let path = folder.join("large.qcow2");
            if !path.exists() {
                let preallocate = "preallocation=metadata";
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", preallocate, text(&path)?, "200G"])?;
            }
            Ok(vec![path])
        }
    }
}

/// Copies a file the way the raw one was written, and makes it durable: how large the pieces are in which a file came into
/// the page cache decides by a fifth how fast it is read from there, and what is still being written back slows reads down.
fn settle(from: &Path, to: &Path) -> Result<()> {
    let mut source = std::fs::File::open(from)?;
    let mut target = std::fs::File::create(to)?;
    let mut chunk = vec![0u8; fio::PREPARE_CHUNK];
    loop {
        let mut filled = 0;
        while let Some(room) = chunk.get_mut(filled..).filter(|room| !room.is_empty()) {
            match source.read(room)? {
                0 => break,
                n => filled += n,
            }
        }
        if filled == 0 {
            target.sync_all()?;
            return Ok(());
        }
        target.write_all(chunk.get(..filled).unwrap_or_default())?;
    }
}

/// Takes away what a run has written.
pub fn tidy(layout: Layout, files: &[PathBuf]) {
    if layout == Layout::Fresh {
        for file in files {
            let _ = std::fs::remove_file(file);
        }
    }
}
