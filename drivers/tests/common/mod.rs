//! What the integration tests of the drivers share: the registry, loop devices, QEMU's tools.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::path::Path;
use std::process::{Command, Output};

use graph::Registry;

/// All drivers.
pub fn registry() -> Registry {
    Registry::new(ringblk_drivers::ALL.iter().copied())
}

/// Runs a command to its end; `None`, with a word, when it is not installed.
pub fn tool(name: &str, args: &[&str]) -> Option<Output> {
    match Command::new(name).args(args).output() {
        Ok(output) => Some(output),
        Err(e) => {
            eprintln!("skipped what needs {name}: {e}");
            None
        }
    }
}

/// A loop device over a file of its own; gone when dropped.
pub struct LoopDevice {
    path: String,
    _dir: tempfile::TempDir,
}

impl LoopDevice {
    /// `None`, with a word, where this machine does not let us.
    pub fn new(size: u64) -> Option<LoopDevice> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let output = tool("losetup", &["--find", "--show", file.to_str().unwrap()])?;
        if !output.status.success() {
            eprintln!("skipped what needs a loop device: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        let path = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Some(LoopDevice { path, _dir: dir })
    }

    pub fn path(&self) -> &str {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

/// Whether two images hold the same, by `qemu-img compare`; `None` without the tool.
pub fn same_content(a: &Path, b: &Path) -> Option<bool> {
    let args = ["compare", "-f", "raw", "-F", "raw", a.to_str().unwrap(), b.to_str().unwrap()];
    Some(tool("qemu-img", &args)?.status.success())
}
