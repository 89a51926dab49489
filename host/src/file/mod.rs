//! Open files: what kind they are, how big, how they want to be accessed.
//!
//! Opened by drivers (on the pool or before the threads start); read and written by iothreads only through `Local`.
//! Everything here may block on the disk, except the accessors. Formats, node names and permissions are unknown here.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::Engine;

mod align;
mod create;
mod lock;

pub use align::Alignment;
pub use lock::ofd_locks_supported;

#[cfg(test)]
mod tests;

/// How to open a file.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For reading and writing; otherwise for reading only.
    pub writable: bool,
    /// `O_DIRECT`: past the page cache.
    pub direct: bool,
    /// Create the file (it must not exist) with this many bytes.
    pub create: Option<u64>,
    /// How its operations reach the kernel, whatever its iothread uses.
    pub engine: Engine,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharDevice,
}

/// How reads and writes that need no waiting may be tried on the calling thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inline {
    /// tmpfs and ramfs: memory, and no non-blocking reads in the kernel, so that io_uring would use a worker thread each time.
    Always,
    /// Page cache: try `RWF_NOWAIT`, else the ring.
    Try,
    /// Direct I/O and devices with their own ideas: the ring.
    Never,
}

/// Told when a file goes, so that it lets go of its descriptor.
pub(crate) trait FileUser: Send + Sync {
    /// Forgets everything about `fd` and drops it.
    fn forget(&self, fd: Arc<Descriptor>);
}

/// A descriptor and its number in the tables of the rings. Closed when the last holder has let go.
pub(crate) struct Descriptor {
    fd: OwnedFd,
    id: u32,
}

impl Descriptor {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        ids().free.push(self.id);
    }
}

struct Ids {
    next: u32,
    free: Vec<u32>,
}

static IDS: Mutex<Ids> = Mutex::new(Ids { next: 0, free: Vec::new() });

fn ids() -> std::sync::MutexGuard<'static, Ids> {
    IDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open file; always in an `Arc`. When the last one is dropped, its locks are given back at once and the descriptor is
/// closed as soon as every iothread that used it has let go of it.
pub struct File {
    desc: Arc<Descriptor>,
    path: PathBuf,
    kind: FileKind,
    writable: bool,
    direct: bool,
    engine: Engine,
    inline: Inline,
    alignment: Alignment,
    blocks: (u32, u32),
    locked: AtomicBool,
    users: Mutex<Vec<Weak<dyn FileUser>>>,
}

impl Drop for File {
    fn drop(&mut self) {
        // The lock bytes first: who asks for the image next must not depend on how fast the iothreads are.
        if *self.locked.get_mut() {
            self.unlock_all();
        }
        let users = std::mem::take(self.users.get_mut().unwrap_or_else(PoisonError::into_inner));
        for u in users {
            if let Some(u) = u.upgrade() {
                u.forget(Arc::clone(&self.desc));
            }
        }
    }
}

impl File {
    /// Opens (or creates) a file. Blocks.
    ///
    /// Errors: those of `open(2)`; `EINVAL` also when the file is a directory, a socket or a pipe, or `direct` is refused.
    pub fn open(path: &Path, o: &OpenOptions) -> io::Result<Arc<File>> {
        let c = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // O_NONBLOCK: opening a pipe by mistake must not hang. Regular files and block devices ignore it.
        let mut flags = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
        flags |= if o.writable { libc::O_RDWR } else { libc::O_RDONLY };
        if o.direct {
            flags |= libc::O_DIRECT;
        }
        if o.create.is_some() {
            flags |= libc::O_CREAT | libc::O_EXCL;
        }
        // SAFETY: `c` is a string with its NUL; open has no other preconditions.
        let fd = unsafe { libc::open(c.as_ptr(), flags, 0o644) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fresh, and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if let Some(size) = o.create {
            rustix::fs::ftruncate(&fd, size)?;
        }
        // Not wanted beyond the open: reads of a character device would return EAGAIN.
        let fl = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, fl & !rustix::fs::OFlags::NONBLOCK)?;
        File::from_fd(fd, path, o)
    }

    /// Takes an open descriptor. Whether it is writable and direct is read from the descriptor; `path` is for messages
    /// alone; of `o` only the engine counts. Blocks.
    ///
    /// Errors: `EINVAL` for anything that is not a regular file or a device.
    pub fn from_fd(fd: OwnedFd, path: &Path, o: &OpenOptions) -> io::Result<Arc<File>> {
        let einval = || io::Error::from_raw_os_error(libc::EINVAL);
        let f = fs::File::from(fd);
        let meta = f.metadata()?;
        let t = meta.file_type();
        let kind = if t.is_file() {
            FileKind::Regular
        } else if t.is_block_device() {
            FileKind::BlockDevice
        } else if t.is_char_device() {
            FileKind::CharDevice
        } else {
            return Err(einval());
        };
        let fl = rustix::fs::fcntl_getfl(&f)?;
        let writable = match fl & rustix::fs::OFlags::ACCMODE {
            rustix::fs::OFlags::RDWR => true,
            rustix::fs::OFlags::RDONLY => false,
            _ => return Err(einval()),
        };
        let direct = fl.contains(rustix::fs::OFlags::DIRECT);
        // A guest's reads say nothing about who looked at the image, and the time stamp costs some 3 % of a cached read.
        // Granted to the file's owner only; others go without.
        let _ = rustix::fs::fcntl_setfl(&f, fl | rustix::fs::OFlags::NOATIME);
        let inline = if kind == FileKind::Regular && align::is_memory_fs(&f) {
            Inline::Always
        } else if direct || kind == FileKind::CharDevice {
            Inline::Never
        } else {
            Inline::Try
        };
        let alignment = align::of(&f, kind, direct);
        let blocks = align::block_sizes(&f, kind, alignment);
        let id = {
            let mut ids = ids();
            match ids.free.pop() {
                Some(i) => i,
                None => {
                    let i = ids.next;
                    ids.next = i.wrapping_add(1);
                    i
                }
            }
        };
        Ok(Arc::new(File {
            desc: Arc::new(Descriptor { fd: f.into(), id }),
            path: path.to_path_buf(),
            kind,
            writable,
            direct,
            engine: o.engine,
            inline,
            alignment,
            blocks,
            locked: AtomicBool::new(false),
            users: Mutex::new(Vec::new()),
        }))
    }

    /// What the file is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// True if it was opened for writing.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// True if it bypasses the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// The name under which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The engine asked for.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.desc.fd.as_fd()
    }

    /// What direct I/O demands of addresses, offsets and lengths; 1 and 1 when buffered.
    #[inline]
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Logical and physical block size in bytes: of the device, or for a regular file what its file system says.
    pub fn block_sizes(&self) -> (u32, u32) {
        self.blocks
    }

    /// Size in bytes now. 0 for character devices.
    pub fn len(&self) -> io::Result<u64> {
        match self.kind {
            FileKind::Regular => {
                let st = rustix::fs::fstat(self.as_fd())?;
                u64::try_from(st.st_size).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
            }
            FileKind::BlockDevice => align::device_size(self.as_fd()),
            FileKind::CharDevice => Ok(0),
        }
    }

    /// True if there is no byte in it.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Grows (with a hole) or cuts a regular file. A device only accepts a size up to its own, which changes nothing.
    ///
    /// Errors: those of `ftruncate(2)`; `ENOTSUP` for character devices; `EINVAL` beyond the end of a block device.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        match self.kind {
            FileKind::Regular => Ok(rustix::fs::ftruncate(self.as_fd(), len)?),
            FileKind::BlockDevice if len <= self.len()? => Ok(()),
            FileKind::BlockDevice => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            FileKind::CharDevice => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
        }
    }

    /// Bytes that the file system has allocated; for a device its size.
    pub fn allocated(&self) -> io::Result<u64> {
        match self.kind {
            FileKind::Regular => {
                let st = rustix::fs::fstat(self.as_fd())?;
                Ok(u64::try_from(st.st_blocks).unwrap_or(0).saturating_mul(512))
            }
            _ => self.len(),
        }
    }

    /// Device and inode number: equal for the same file under two names.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let st = rustix::fs::fstat(self.as_fd())?;
        Ok((st.st_dev, st.st_ino))
    }

    /// The first data at or after `off`; `None` if only a hole follows (or `off` is past the end). A file system without
    /// support calls everything data.
    pub fn seek_data(&self, off: u64) -> io::Result<Option<u64>> {
        self.seek(rustix::fs::SeekFrom::Data(off))
    }

    /// The first hole at or after `off`; the end of the file counts as one. `None` past the end.
    pub fn seek_hole(&self, off: u64) -> io::Result<Option<u64>> {
        self.seek(rustix::fs::SeekFrom::Hole(off))
    }

    fn seek(&self, to: rustix::fs::SeekFrom) -> io::Result<Option<u64>> {
        // The file position is shared, but nothing here reads or writes through it.
        match rustix::fs::seek(self.as_fd(), to) {
            Ok(o) => Ok(Some(o)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads exactly `buf.len()` bytes, zeroes past the end of the file. Blocks: for opening and tools. With direct I/O the
    /// buffer is bounced where needed.
    pub fn read_at(&self, buf: &mut [u8], off: u64) -> io::Result<()> {
        let f = self.std_file();
        if !self.direct {
            return read_full(&f, buf, off);
        }
        let a = u64::from(self.alignment.offset.max(1));
        let begin = off / a * a;
        let end = off
            .checked_add(buf.len() as u64)
            .and_then(|e| e.checked_next_multiple_of(a))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let len = usize::try_from(end - begin).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let align = self.alignment.mem.max(1) as usize;
        let mut raw = vec![0u8; len + align];
        let skip = raw.as_ptr().align_offset(align).min(align);
        let bounce = &mut raw[skip..skip + len];
        read_full(&f, bounce, begin)?;
        let at = (off - begin) as usize;
        buf.copy_from_slice(&bounce[at..at + buf.len()]);
        Ok(())
    }

    fn std_file(&self) -> std::mem::ManuallyDrop<fs::File> {
        // SAFETY: the descriptor is open while `self` is borrowed... the result must not outlive this call's caller, which
        // is why this is private, and ManuallyDrop keeps it from being closed.
        std::mem::ManuallyDrop::new(unsafe { fs::File::from_raw_fd(self.raw_fd()) })
    }

    #[inline]
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.desc.fd.as_raw_fd()
    }

    /// Number in the tables of the rings: small, and not reused before every user has forgotten it.
    #[inline]
    pub(crate) fn id(&self) -> u32 {
        self.desc.id
    }

    #[inline]
    pub(crate) fn inline(&self) -> Inline {
        self.inline
    }

    /// Remembers a user, which will be told when the file goes.
    pub(crate) fn add_user(&self, user: Weak<dyn FileUser>) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        // Iothreads come and go; a file that stays open must not remember them all.
        users.retain(|u| u.strong_count() > 0);
        users.push(user);
    }
}

fn read_full(f: &fs::File, mut buf: &mut [u8], mut off: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match f.read_at(buf, off) {
            Ok(0) => {
                buf.fill(0);
                break;
            }
            Ok(n) => {
                buf = &mut buf[n..];
                off += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
