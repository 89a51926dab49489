//! The vhost-user backend conventions (`--socket-path`, `--fd`, `--blk-file`, `--read-only`).
//!
//! They are shorthand: [`expand`] turns them into the `--blockdev` and `--export` a user could have written, and
//! [`super::parse`] appends those to the plan. No other code knows that the shorthand was used. A backend started
//! this way stays in the foreground (vhost-user.rst: "must not daemonize").

use std::os::unix::fs::FileTypeExt;

use serde_json::json;

use super::super::chardev::check_socket_path;
use super::super::opts::{self, OptError, err};
use super::{CliError, QapiText};

/// Node name of the file under a disk given by `--blk-file`.
pub const FILE_NODE: &str = "blk-file";
/// Node name of such a disk.
pub const DISK_NODE: &str = "blk";
/// Export id of such a disk.
pub const EXPORT_ID: &str = "vhost";

/// What was given of the shorthand.
#[derive(Debug, Default)]
pub struct Shorthand {
    /// `--socket-path`.
    pub socket_path: Option<String>,
    /// `--fd`.
    pub fd: Option<String>,
    /// `--blk-file`.
    pub blk_file: Option<String>,
    /// `--read-only`.
    pub read_only: bool,
}

/// The equal options: two nodes and one export.
#[derive(Debug)]
pub struct Expansion {
    /// `--blockdev` twice, file first.
    pub blockdevs: [QapiText; 2],
    /// `--export`.
    pub export: QapiText,
    /// The option that named the socket, for messages.
    pub socket_option: &'static str,
}

/// Checks the shorthand and expands it; `None` if none of it was used.
///
/// # Errors
///
/// Both or neither of `--socket-path` and `--fd`, no `--blk-file`, a bad path or descriptor number.
pub fn expand(given: Shorthand) -> Result<Option<Expansion>, CliError> {
    let Shorthand { socket_path, fd, blk_file, read_only } = given;
    let addr = match (&socket_path, &fd) {
        (Some(_), Some(_)) => return Err(CliError::at("fd", "excludes --socket-path: give one of them")),
        (Some(path), None) => {
            check_socket_path(path).map_err(|e| CliError::at("socket-path", e))?;
            json!({"type": "unix", "path": path})
        }
        (None, Some(number)) => {
            check_fd(number).map_err(|e| CliError::at("fd", e))?;
            json!({"type": "fd", "str": number})
        }
        (None, None) => {
            let Some(option) = blk_file.as_ref().map(|_| "blk-file").or(read_only.then_some("read-only"))
            else {
                return Ok(None);
            };
            return Err(CliError::at(option, "needs a socket: add --socket-path=PATH or --fd=FDNUM"));
        }
    };
    let socket_option = if fd.is_some() { "fd" } else { "socket-path" };
    let Some(file) = blk_file else {
        return Err(CliError::at(
            socket_option,
            "needs a disk: add --blk-file=PATH, or use --blockdev and --export instead",
        ));
    };
    // QEMU's two drivers for the two kinds of file. What is not there gets its error from the driver.
    let is_device = std::fs::metadata(&file).is_ok_and(|m| m.file_type().is_block_device());
    let driver = if is_device { "host_device" } else { "file" };
    let storage = json!({"driver": driver, "node-name": FILE_NODE, "filename": file, "read-only": read_only});
    let disk = json!({"driver": "raw", "node-name": DISK_NODE, "file": FILE_NODE, "read-only": read_only});
    let export = json!({
        "type": "vhost-user-blk", "id": EXPORT_ID, "node-name": DISK_NODE, "addr": addr, "writable": !read_only,
    });
    Ok(Some(Expansion {
        blockdevs: [storage, disk].map(|v| QapiText { text: v.to_string(), implied_key: "driver" }),
        export: QapiText { text: export.to_string(), implied_key: "type" },
        socket_option,
    }))
}

/// A number, or a name in `LISTEN_FDNAMES`, which goes beyond the convention.
fn check_fd(designator: &str) -> Result<(), OptError> {
    if !designator.starts_with(|c: char| c.is_ascii_digit()) {
        return match opts::is_identifier(designator) {
            true => Ok(()),
            false => err(format!("'{designator}' is neither a descriptor number nor a name")),
        };
    }
    match designator.parse::<i32>() {
        Ok(3..) => Ok(()),
        Ok(_) => err(format!("{designator} is a standard stream: pass the socket as 3 or above")),
        Err(_) => err(format!("'{designator}' is not a descriptor number")),
    }
}
