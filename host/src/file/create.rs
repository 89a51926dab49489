//! Hints to the file system about a file that has just been created: how to lay it out.
//!
//! Called while an image is created, before anything is written. Hints: a file system that does not know them says so, and
//! the caller may go on without.

use std::io;
use std::os::fd::AsRawFd;

use super::File;

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const FSGETXATTR: u64 = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const FSSETXATTR: u64 = 0x401c_5820;
/// `FS_XFLAG_EXTSIZE`.
const XFLAG_EXTSIZE: u32 = 0x800;

impl File {
    /// Asks for extents of this many bytes, so that a file that grows in small steps is not scattered. Blocks.
    ///
    /// Errors: the kernel's; `ENOTTY` or `EOPNOTSUPP` where the file system has no such hint.
    pub fn hint_extent_size(&self, bytes: u32) -> io::Result<()> {
        let fd = self.as_fd().as_raw_fd();
        let mut attr = FsXattr::default();
        // SAFETY: the descriptor is open as long as `self`; the kernel writes one `fsxattr`, which `attr` is laid out as.
        if unsafe { libc::ioctl(fd, FSGETXATTR as _, &raw mut attr) } < 0 {
            return Err(io::Error::last_os_error());
        }
        attr.xflags |= XFLAG_EXTSIZE;
        attr.extsize = bytes;
        // SAFETY: as above; the kernel only reads it.
        if unsafe { libc::ioctl(fd, FSSETXATTR as _, &raw const attr) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Asks for no copy-on-write of this file by the file system (btrfs). The file must be empty. Blocks.
    ///
    /// Errors: the kernel's.
    pub fn hint_no_cow(&self) -> io::Result<()> {
        let flags = rustix::fs::ioctl_getflags(self.as_fd())?;
        if !flags.contains(rustix::fs::IFlags::NOCOW) {
            rustix::fs::ioctl_setflags(self.as_fd(), flags | rustix::fs::IFlags::NOCOW)?;
        }
        Ok(())
    }

    /// Backs `0..len` with storage and makes the file that long. Blocks, for a while where the file system has to write
    /// zeroes for it.
    ///
    /// Errors: the kernel's, above all `ENOSPC`; `EOPNOTSUPP` where the file system cannot.
    pub fn allocate(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(self.as_fd(), rustix::fs::FallocateFlags::empty(), 0, len)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers() {
        // From `linux/fs.h`: direction, size, type, number.
        let ioc = |dir: u64, size: usize, nr: u64| (dir << 30) | ((size as u64) << 16) | (0x58 << 8) | nr;
        assert_eq!(FSGETXATTR, ioc(2, size_of::<FsXattr>(), 31));
        assert_eq!(FSSETXATTR, ioc(1, size_of::<FsXattr>(), 32));
    }
}
