//! What a file demands of direct I/O, and its block sizes.
//!
//! Called once, when a file is opened. Asks the kernel (`STATX_DIOALIGN`, Linux 6.1), then the device, then tries.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::FileKind;

/// `BLKGETSIZE64` from linux/fs.h: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `ramfs`' number from linux/magic.h.
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// Demanded where nothing can be found out: no device has larger sectors that Linux supports.
const SAFE: u32 = 4096;

/// What direct I/O demands; both are powers of two. 1 and 1 for buffered files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of memory addresses, in bytes.
    pub mem: u32,
    /// Of offsets and lengths, in bytes.
    pub offset: u32,
}

impl Alignment {
    /// True if a request may go to the kernel as it is: offset and every length a multiple of `offset`, every address of
    /// `mem`. Always true for 1 and 1.
    #[inline]
    pub fn fits(&self, iov: &[libc::iovec], off: u64) -> bool {
        if self.mem <= 1 && self.offset <= 1 {
            return true;
        }
        let (m, o) = ((self.mem.max(1) - 1) as usize, u64::from(self.offset.max(1) - 1));
        off & o == 0 && iov.iter().all(|v| (v.iov_base as usize) & m == 0 && v.iov_len as u64 & o == 0)
    }
}

/// True for file systems that live in memory and have nothing but memory below them.
pub(super) fn is_memory_fs(f: &fs::File) -> bool {
    rustix::fs::fstatfs(f).is_ok_and(|s| {
        // The type of f_type differs between architectures; the magic numbers are 32 bits.
        let t = u64::from(s.f_type as u32);
        t == libc::TMPFS_MAGIC as u64 || t == RAMFS_MAGIC
    })
}

/// What the kernel says about direct I/O on a file.
fn statx_dio(f: &fs::File) -> Option<Alignment> {
    let mut st = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an open descriptor, an empty path with AT_EMPTY_PATH, and room for the answer.
    let r = unsafe {
        libc::statx(f.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, st.as_mut_ptr())
    };
    if r != 0 {
        return None;
    }
    // SAFETY: zeroed above, which is valid for its integers, and filled by the kernel.
    let st = unsafe { st.assume_init() };
    let ok = |v: u32| v.is_power_of_two() && v <= 1 << 20;
    (st.stx_mask & libc::STATX_DIOALIGN != 0 && ok(st.stx_dio_mem_align) && ok(st.stx_dio_offset_align))
        .then_some(Alignment { mem: st.stx_dio_mem_align, offset: st.stx_dio_offset_align })
}

/// The alignment of an open file.
pub(super) fn of(f: &fs::File, kind: FileKind, direct: bool) -> Alignment {
    if !direct || kind == FileKind::CharDevice {
        return Alignment { mem: 1, offset: 1 };
    }
    statx_dio(f).unwrap_or_else(|| match kind {
        FileKind::BlockDevice => {
            let ss = rustix::fs::ioctl_blksszget(f).ok().filter(|s| s.is_power_of_two()).unwrap_or(SAFE);
            Alignment { mem: ss.max(512), offset: ss }
        }
        _ => probe(|addr_shift, len| read_direct(f, addr_shift, len)),
    })
}

/// Finds by trying what `read(address offset from a page, length)` accepts. `Some(n)`: it read n bytes; `None`: refused.
/// A file too short to tell counts as demanding the most.
pub(super) fn probe(mut read: impl FnMut(usize, usize) -> Option<usize>) -> Alignment {
    if read(0, SAFE as usize).unwrap_or(0) == 0 {
        return Alignment { mem: SAFE, offset: SAFE };
    }
    let sizes = || std::iter::once(1u32).chain((9..=12).map(|s| 1u32 << s));
    let offset = sizes().find(|s| read(0, *s as usize).is_some()).unwrap_or(SAFE);
    let mem = sizes().find(|s| read(*s as usize, SAFE as usize).is_some()).unwrap_or(SAFE);
    Alignment { mem, offset }
}

fn read_direct(f: &fs::File, shift: usize, len: usize) -> Option<usize> {
    let room = SAFE as usize * 4;
    let mut raw = vec![0u8; room];
    // Relative to a page, so that a shift of one is really odd. A shift of a page is aligned as well.
    let base = raw.as_ptr().align_offset(SAFE as usize);
    let buf = raw.get_mut(base.checked_add(shift)?..base.checked_add(shift)?.checked_add(len)?)?;
    std::os::unix::fs::FileExt::read_at(f, buf, 0).ok()
}

/// Logical and physical block size.
pub(super) fn block_sizes(f: &fs::File, kind: FileKind, a: Alignment) -> (u32, u32) {
    let sane = |v: u32| (v.is_power_of_two() && (512..=1 << 21).contains(&v)).then_some(v);
    match kind {
        FileKind::BlockDevice => {
            let l = rustix::fs::ioctl_blksszget(f).ok().and_then(sane).unwrap_or(512);
            let p = rustix::fs::ioctl_blkpbszget(f).ok().and_then(sane).unwrap_or(l);
            (l, p.max(l))
        }
        FileKind::Regular => {
            let l = sane(a.offset).unwrap_or(512);
            let p = std::os::unix::fs::MetadataExt::blksize(&match f.metadata() {
                Ok(m) => m,
                Err(_) => return (l, l),
            });
            let p = u32::try_from(p).ok().and_then(sane).unwrap_or(l);
            (l, p.max(l))
        }
        FileKind::CharDevice => (512, 512),
    }
}

/// Size of a block device in bytes.
pub(super) fn device_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 there.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &mut size) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(size) }
}
