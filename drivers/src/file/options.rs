//! Options of `file` and `host_device`.
//!
//! Parsed by `open`; the comments are the reference text. Must not hold anything but plain values.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How requests reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Aio {
    /// Blocking system calls on worker threads.
    #[serde(rename = "threads")]
    Threads,
    /// QEMU's name for Linux AIO, which is not used here: the same as leaving `aio` out. Needs `cache.direct=on`, as
    /// in QEMU.
    #[serde(rename = "native")]
    Native,
    /// io_uring; worker threads on an iothread that has none.
    #[serde(rename = "io_uring")]
    IoUring,
}

/// Whether the image is locked against other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Locking {
    /// Where the kernel has locks that belong to an open file (every Linux since 3.15).
    #[default]
    Auto,
    /// Always; opening fails where the kernel has no such locks.
    On,
    /// Never.
    Off,
}

/// Options of a file or host device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileOptions {
    /// Path of the image file (`file`: a regular file) or device (`host_device`: a block or character device). A plain
    /// path: no `file:` in front, and no `/dev/fdset`.
    pub filename: String,
    /// How requests reach the kernel; default: io_uring where the kernel allows it, else threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aio: Option<Aio>,
    /// Accepted for QEMU's sake, where only `aio=native` looks at it: here everything that has come together by the
    /// end of a turn of the iothread's loop is submitted in one system call. 0 to 2^63 - 1, default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub aio_max_batch: Option<i64>,
    /// Whether the image is locked against other processes, with the locks QEMU and its tools use; default: auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locking: Option<Locking>,
    /// Accepted for QEMU's sake, where it drops the page cache when an inactive node is activated at the end of a
    /// migration. Nodes are always active here, so that there is nothing to drop. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_cache: Option<bool>,
}
