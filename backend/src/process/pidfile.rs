//! `--pidfile`: a locked file that holds the process id while the daemon serves.
//!
//! `main.rs` creates it once all options are applied and sockets accept, so that its presence means "ready", and
//! drops it at the end. Knows nothing else of the process.
//!
//! The lock is a record lock over the whole file, as QEMU's tools take: a second daemon given the same path is
//! refused while the first lives, and a file left by a dead one is taken over. A record lock belongs to the
//! process and goes with its first descriptor for the file that is closed: nothing else here may open the path.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

/// Times the file is opened anew because another daemon's exit removed it in between.
const ATTEMPTS: u32 = 16;

/// Why the pid file could not be written.
#[derive(Debug)]
pub struct PidfileError {
    path: PathBuf,
    what: String,
}

impl fmt::Display for PidfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot create PID file {}: {}", self.path.display(), self.what)
    }
}

impl std::error::Error for PidfileError {}

/// The pid file of this process; removed on drop.
#[derive(Debug)]
pub struct Pidfile {
    // Absolute: a daemon changes its directory.
    path: PathBuf,
    file: File,
}

impl Pidfile {
    /// Creates or takes over the file at `path` and writes this process's id and a newline. Mode 0600.
    ///
    /// # Errors
    ///
    /// The file is locked by a living process (its id is named when readable), or cannot be created or written.
    pub fn create(path: &Path) -> Result<Self, PidfileError> {
        let failed = |what: String| PidfileError { path: path.to_owned(), what };
        let absolute = std::path::absolute(path).map_err(|e| failed(e.to_string()))?;
        for _ in 0..ATTEMPTS {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&absolute)
                .map_err(|e| failed(e.to_string()))?;
            if !file.metadata().is_ok_and(|m| m.is_file()) {
                return Err(failed("not a regular file".into()));
            }
            match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::ACCESS | Errno::AGAIN) => return Err(failed(held_by(&mut file))),
                Err(e) => return Err(failed(e.to_string())),
            }
            // The previous owner may have removed the path between our open and our lock.
            if !is_at(&file, &absolute) {
                continue;
            }
            let mut pidfile = Self { path: absolute, file };
            pidfile.write().map_err(|e| failed(e.to_string()))?;
            return Ok(pidfile);
        }
        Err(failed("it is being created and removed by others".into()))
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all(format!("{}\n", std::process::id()).as_bytes())
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Removed while locked, and only if it is still ours: an operator may have put another in its place.
        if is_at(&self.file, &self.path)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("cannot remove PID file {}: {e}", self.path.display());
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn held_by(file: &mut File) -> String {
    let mut text = String::new();
    let pid = match file.take(32).read_to_string(&mut text) {
        Ok(_) => text.trim().parse::<u32>().ok(),
        Err(_) => None,
    };
    match pid {
        Some(pid) => format!("process {pid} holds it: stop that one or choose another path"),
        None => "another process holds it: stop that one or choose another path".into(),
    }
}

#[cfg(test)]
mod tests;
