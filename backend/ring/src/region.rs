//! One region of guest memory: what a front end sends, the checks it must pass, and the mapping that comes of it.
//! Called by `memory` alone, on the session's thread; it never runs on an iothread.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::error::MemoryError;
use crate::vanish::Watched;

/// A region as the vhost-user messages SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Debug)]
pub struct Region {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Size in bytes, not zero.
    pub size: u64,
    /// Address of the same memory in the front end's own address space; ring addresses are given in it.
    pub user_addr: u64,
    /// The memory itself: a memfd, or a file on tmpfs or hugetlbfs.
    pub fd: OwnedFd,
    /// Where in `fd` the region starts, bytes.
    pub mmap_offset: u64,
}

/// `f_type` of hugetlbfs (linux/magic.h); its block size is the huge page size, and offsets must respect it.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A region with its mapping. Epochs share these by `Arc`; the last one unmaps.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub guest_addr: u64,
    pub size: u64,
    pub user_addr: u64,
    /// Before the mapping: dropped before it.
    watched: Watched,
    /// Owns the mapping (and the descriptor it came from).
    mapping: Arc<MmapRegion<()>>,
    /// Where in the mapping the region starts: the part of `mmap_offset` that is below a page.
    delta: usize,
    /// Whether the kernel promises that the file never gets shorter.
    pub sealed: bool,
}

impl Mapped {
    /// Checks and maps one region.
    pub fn new(region: Region) -> Result<Self, MemoryError> {
        let Region { guest_addr, size, user_addr, fd, mmap_offset } = region;
        check_extent(guest_addr, user_addr, size)?;
        let bad_offset = MemoryError::FileOffset { mmap_offset, size };
        let Some(file_end) = mmap_offset.checked_add(size).filter(|&end| end <= i64::MAX as u64) else {
            return Err(bad_offset);
        };

        let stat = rustix::fs::fstat(fd.as_fd())?;
        // Pipes, sockets, devices and directories have no size to check; a mapping of one could end, block, or be
        // anything. A front end that wants to be served uses memfds or files.
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryError::NotAFile);
        }
        let file_size = u64::try_from(stat.st_size).unwrap_or(0);
        if file_size < file_end {
            return Err(MemoryError::FileTooShort { file: file_size, needed: file_end });
        }

        // mmap wants page-aligned offsets (huge-page-aligned on hugetlbfs); a region may start in between.
        let align = page_size(&fd)?;
        let delta = mmap_offset % align;
        let map_len = delta
            .checked_add(size)
            .and_then(|len| len.checked_next_multiple_of(align))
            .and_then(|len| usize::try_from(len).ok())
            .filter(|&len| len <= isize::MAX as usize)
            .ok_or(bad_offset)?;

        let sealed = rustix::fs::fcntl_get_seals(fd.as_fd()).is_ok_and(|s| s.contains(SealFlags::SHRINK));
        let file = FileOffset::new(fd.into(), mmap_offset - delta);
        let mapping = MmapRegionBuilder::new(map_len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(file)
            .build()
            .map_err(map_error)?;
        keep_out_of_dumps_and_children(&mapping);
        // A file that cannot get shorter loses no pages. The page size fits: map_len, its multiple, does.
        let watched =
            if sealed { Watched::NOT } else { Watched::new(mapping.as_ptr(), map_len, align as usize) };
        let mapping = Arc::new(mapping);
        // delta < align <= map_len, so it fits.
        Ok(Self { guest_addr, size, user_addr, watched, mapping, delta: delta as usize, sealed })
    }

    /// Private anonymous memory, for tests and for measuring.
    pub fn anonymous(guest_addr: u64, user_addr: u64, size: usize) -> Result<Self, MemoryError> {
        check_extent(guest_addr, user_addr, size as u64)?;
        let mapping = MmapRegion::<()>::new(size).map_err(map_error)?;
        Self::adopt(guest_addr, user_addr, Arc::new(mapping))
    }

    /// A mapping that somebody else made; its size is the region's.
    pub fn adopt(guest_addr: u64, user_addr: u64, mapping: Arc<MmapRegion<()>>) -> Result<Self, MemoryError> {
        let size = mapping.size() as u64;
        check_extent(guest_addr, user_addr, size)?;
        let sealed = match mapping.file_offset() {
            // Anonymous memory has no file that anybody could cut.
            None => true,
            Some(file) => {
                rustix::fs::fcntl_get_seals(file.file().as_fd()).is_ok_and(|s| s.contains(SealFlags::SHRINK))
            }
        };
        let watched = match mapping.file_offset() {
            Some(file) if !sealed => {
                let page = page_size(file.file())?;
                // It came from this very file's block size, which fits.
                Watched::new(mapping.as_ptr(), mapping.size(), page as usize)
            }
            _ => Watched::NOT,
        };
        Ok(Self { guest_addr, size, user_addr, watched, mapping, delta: 0, sealed })
    }

    /// Whether the file was made shorter and somebody met the hole.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.watched.is_lost()
    }

    /// Host address of the region's first byte; `size` bytes from there are mapped while `self` lives.
    pub fn host(&self) -> *mut u8 {
        // Inside the mapping: delta + size <= mapping.size() (see `new`), and 0 for the others.
        self.mapping.as_ptr().wrapping_add(self.delta)
    }
}

/// Neither the guest physical nor the user range may be empty or wrap.
fn check_extent(guest_addr: u64, user_addr: u64, size: u64) -> Result<(), MemoryError> {
    let fits = |start: u64| start.checked_add(size).is_some();
    if size == 0 || size > isize::MAX as u64 || !fits(guest_addr) || !fits(user_addr) {
        return Err(MemoryError::RegionSize { guest_addr, size });
    }
    Ok(())
}

/// Page size that offsets into this file must respect.
fn page_size(fd: &impl AsFd) -> Result<u64, MemoryError> {
    let normal = rustix::param::page_size() as u64;
    let fs = rustix::fs::fstatfs(fd.as_fd())?;
    if fs.f_type as i64 != HUGETLBFS_MAGIC {
        return Ok(normal);
    }
    let huge = u64::try_from(fs.f_bsize).unwrap_or(0);
    Ok(if huge.is_power_of_two() { huge.max(normal) } else { normal })
}

fn map_error(e: vm_memory::mmap::MmapRegionError) -> MemoryError {
    MemoryError::Io(match e {
        vm_memory::mmap::MmapRegionError::Mmap(e) => e,
        other => std::io::Error::other(other),
    })
}

/// A core dump must not hold a guest's memory, nor a child inherit it. Best effort: the kernel refuses the advice on a
/// few kinds of mapping, and then a larger dump is all that is lost.
fn keep_out_of_dumps_and_children(mapping: &MmapRegion<()>) {
    for advice in [rustix::mm::Advice::LinuxDontDump, rustix::mm::Advice::LinuxDontFork] {
        // SAFETY: the range is exactly the mapping that `mapping` owns and keeps alive; neither advice changes its
        // contents or removes pages from this process.
        let _ = unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    }
}
