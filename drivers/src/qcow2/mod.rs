//! `qcow2`: QEMU's image format, versions 2 and 3.
//!
//! Being built from the inside out: the on-disk format first.

#[allow(dead_code, unused_imports)]
pub(crate) mod format;
#[allow(dead_code)]
pub(crate) mod codec;
