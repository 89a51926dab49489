//! Who may use an image together with whom: in one process, across processes, ringblk and QEMU on either side; the locks on
//! the image; and permissions of whole graphs against `qemu-storage-daemon`'s.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod locks;
mod matrix;
mod oracle;
mod peer;
mod together;
