//! What format an image seems to have: for `info` alone, and for nothing but telling.
//!
//! Reads the first bytes of a local file and opens nothing else. Every other command wants the format to be said: a guest
//! writes what it likes to the beginning of a raw image.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use super::failure::Failure;

/// Magic numbers at the beginning of images: (bytes, format).
const MAGIC: [(&[u8], &str); 2] = [(b"QFI\xfb", "qcow2"), (b"LUKS\xba\xbe", "luks")];

/// The format of an image by its first bytes; `raw` when they say nothing.
///
/// # Errors
/// It cannot be opened or read.
pub fn format(path: &str) -> Result<&'static str, Failure> {
    let path = path.strip_prefix("file:").unwrap_or(path);
    let cannot = |e: std::io::Error| {
        Failure::new(format!("Could not open '{path}': {}", graph::BlockError::io("", e)))
    };
    let mut head = Vec::new();
    // A pipe by that name must not hang us.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(cannot)?;
    file.take(512).read_to_end(&mut head).map_err(cannot)?;
    Ok(of(&head))
}

fn of(head: &[u8]) -> &'static str {
    MAGIC.iter().find(|(magic, _)| head.starts_with(magic)).map_or("raw", |(_, format)| format)
}

#[cfg(test)]
mod tests;
