//! OFD record locks on single bytes, the way QEMU marks its images (bytes 100.. and 200..).
//!
//! Called by the protocol drivers' permission hooks on the main thread. Only shared locks are taken; conflicts are found by
//! asking whether an exclusive lock would be possible. Which byte means what is the driver's business.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use super::File;

/// True if the kernel has locks that belong to the open file description (Linux 3.15). Asked once per process.
pub fn ofd_locks_supported() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        std::fs::File::open("/dev/null").is_ok_and(|f| {
            let mut l = flock(libc::F_WRLCK, 0, 1);
            // SAFETY: an open descriptor and a flock that lives through the call.
            let r = unsafe { libc::fcntl(f.as_raw_fd(), libc::F_OFD_GETLK, &mut l) };
            r == 0
        })
    })
}

fn flock(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        // The kernel demands 0 for OFD locks.
        l_pid: 0,
    }
}

impl File {
    fn fcntl_lock(&self, cmd: libc::c_int, l: &mut libc::flock) -> io::Result<()> {
        loop {
            // SAFETY: the descriptor is ours, `l` lives through the call.
            if unsafe { libc::fcntl(self.raw_fd(), cmd, std::ptr::from_mut(l)) } == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    }

    /// Takes a shared lock on one byte (`F_OFD_SETLK`, `F_RDLCK`). Never waits.
    ///
    /// Errors: `EAGAIN` when another open file has it exclusively; `EINVAL` without OFD locks or for a byte beyond 2⁶³.
    pub fn lock_byte(&self, byte: u64) -> io::Result<()> {
        let mut l = flock(libc::F_RDLCK, offset(byte)?, 1);
        self.locked.store(true, Ordering::Relaxed);
        self.fcntl_lock(libc::F_OFD_SETLK, &mut l)
    }

    /// Gives a byte back; not an error if it was not held.
    pub fn unlock_byte(&self, byte: u64) -> io::Result<()> {
        let mut l = flock(libc::F_UNLCK, offset(byte)?, 1);
        self.fcntl_lock(libc::F_OFD_SETLK, &mut l)
    }

    /// True if nobody else holds a lock on the byte, that is, an exclusive lock would be granted. Own locks do not count.
    pub fn byte_is_free_for_write_lock(&self, byte: u64) -> io::Result<bool> {
        let mut l = flock(libc::F_WRLCK, offset(byte)?, 1);
        self.fcntl_lock(libc::F_OFD_GETLK, &mut l)?;
        Ok(l.l_type == libc::F_UNLCK as libc::c_short)
    }

    /// Gives everything back.
    pub(super) fn unlock_all(&self) {
        let mut l = flock(libc::F_UNLCK, 0, 0);
        if let Err(e) = self.fcntl_lock(libc::F_OFD_SETLK, &mut l) {
            log::warn!("cannot unlock {}: {e}", self.path().display());
        }
    }
}

fn offset(byte: u64) -> io::Result<i64> {
    i64::try_from(byte).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
