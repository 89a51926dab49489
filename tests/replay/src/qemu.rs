//! QEMU's tools over files in memory: written to a directory, looked at by `qemu-img`, read back.
//!
//! Called for a sample of the states and for every state that something else complains about.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::image::Image;
use crate::words;

/// What `qemu-img check` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to complain about (exit code 0).
    Clean,
    /// Space is lost, nothing else (3).
    Leaks,
    /// Damaged (2), or it could not be checked; its words.
    Bad(String),
}

/// Files laid out in a directory of their own, in memory where there is such a place.
pub struct Exported {
    dir: tempfile::TempDir,
}

/// A directory for short-lived files.
///
/// # Errors
/// What the file system says.
pub fn scratch() -> Result<tempfile::TempDir, String> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir()
        && let Ok(dir) = tempfile::tempdir_in(memory)
    {
        return Ok(dir);
    }
    tempfile::tempdir().map_err(words)
}

/// Runs a tool in a directory.
///
/// # Errors
/// It cannot be started.
pub fn run(dir: &Path, tool: &str, args: &[&str]) -> Result<Output, String> {
    Command::new(tool).args(args).current_dir(dir).output().map_err(|e| format!("{tool}: {e}"))
}

/// As [`run`], for a tool that has to succeed; its standard output.
///
/// # Errors
/// It did not; its words.
pub fn must(dir: &Path, tool: &str, args: &[&str]) -> Result<String, String> {
    let output = run(dir, tool, args)?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(out);
    }
    let err = String::from_utf8_lossy(&output.stderr);
    Err(format!("{tool} {}: {}: {out}{err}", args.join(" "), output.status))
}

/// Loads a file.
///
/// # Errors
/// What the file system says.
pub fn load(path: &Path) -> Result<Image, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Image::from_bytes(&bytes))
}

impl Exported {
    /// Writes the files out.
    ///
    /// # Errors
    /// What the file system says.
    pub fn new(files: &[(String, Image)]) -> Result<Exported, String> {
        let dir = scratch()?;
        for (name, image) in files {
            std::fs::write(dir.path().join(name), image.to_bytes()).map_err(words)?;
        }
        Ok(Exported { dir })
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where one of them is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file as it is now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn load(&self, name: &str) -> Result<Image, String> {
        load(&self.path(name))
    }

    /// `qemu-img check`, with these arguments more.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn check(&self, args: &[&str]) -> Result<Verdict, String> {
        let output = run(self.dir(), "qemu-img", &[&["check"], args].concat())?;
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Ok(match output.status.code() {
            Some(0) => Verdict::Clean,
            Some(3) => Verdict::Leaks,
            code => Verdict::Bad(format!("qemu-img check {}: {code:?}: {text}", args.join(" "))),
        })
    }

    /// The content of a disk, by `qemu-img convert` with these arguments for the source.
    ///
    /// # Errors
    /// Its words.
    pub fn content(&self, source: &[&str]) -> Result<Vec<u8>, String> {
        let out = self.path("content.raw");
        must(self.dir(), "qemu-img", &[&["convert", "-O", "raw"], source, &["content.raw"]].concat())?;
        let bytes = std::fs::read(&out).map_err(words)?;
        std::fs::remove_file(&out).map_err(words)?;
        Ok(bytes)
    }
}
