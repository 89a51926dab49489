//! `qemu-img check` beside our checker on the same image.
//!
//! Exit codes must agree: clean, leaks, corrupt, not checkable. Where QEMU stops with an error and we do not, or the other
//! way round, that is told as well.

use std::process::Command;

use drivers::image::qcow2::check::{CheckFailed, Limits, Memory, check_memory};
use graph::{CheckFix, CheckReport};

fn code(report: &Result<CheckReport, CheckFailed>) -> i32 {
    match report {
        Ok(r) if r.check_errors == 0 => match (r.corruptions, r.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        },
        _ => 1,
    }
}

/// # Errors
/// The difference.
pub fn compare(image: &[u8]) -> Result<(), String> {
    let ours = check_memory(&Memory::new(image.to_vec(), 0), CheckFix::NONE, Limits::default());
    let io = |e: std::io::Error| format!("oracle: {e}");
    let dir = tempfile::tempdir().map_err(io)?;
    let path = dir.path().join("image");
    std::fs::write(&path, image).map_err(io)?;
    for beside in ["data.raw", "base.img"] {
        std::fs::write(dir.path().join(beside), []).map_err(io)?;
    }
    let theirs = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(&path)
        // A relative name of a data file is looked for here.
        .current_dir(dir.path())
        .output()
        .map_err(io)?;
    let their_code = theirs.status.code().unwrap_or(-1);
    if their_code == code(&ours) {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&theirs.stderr).into_owned();
    // QEMU opens what an image names and loads its bitmaps even to check it; our checker only looks at the image.
    if words.contains("Could not open backing file")
        || words.contains("Could not read bitmap")
        || words.contains("data-file")
        || words.contains("data file")
    {
        return Ok(());
    }
    Err(format!("QEMU says {their_code}, we {}\n{words}\n{ours:#?}", code(&ours)))
}
