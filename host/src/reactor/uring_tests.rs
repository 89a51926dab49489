//! Tests of the io_uring reactor: kernels that refuse, queues that overflow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;

use super::*;
use crate::file::OpenOptions;

fn refuse(known: &AtomicUsize, n: usize, errno: i32) -> (Vec<Flavour>, io::Result<(Flavour, IoUring)>) {
    let tried = RefCell::new(vec![]);
    let r = set_up(known, |f| {
        tried.borrow_mut().push(f);
        if tried.borrow().len() <= n { Err(io::Error::from_raw_os_error(errno)) } else { f.build() }
    });
    (tried.into_inner(), r)
}

#[test]
fn unknown_flags_lead_to_the_next_flavour_and_that_is_remembered() {
    let known = AtomicUsize::new(0);
    let (tried, r) = refuse(&known, 1, libc::EINVAL);
    assert_eq!(tried, [Flavour::Deferred, Flavour::Cooperative]);
    assert_eq!(r.unwrap().0, Flavour::Cooperative);
    let (tried, r) = refuse(&known, 0, 0);
    assert_eq!(tried, [Flavour::Cooperative], "asked once per process");
    assert_eq!(r.unwrap().0, Flavour::Cooperative);
    let (tried, r) = refuse(&AtomicUsize::new(0), 3, libc::EINVAL);
    assert_eq!(tried.len(), 3);
    assert_eq!(r.err().unwrap().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn a_kernel_that_says_no_is_asked_once() {
    for errno in [libc::EPERM, libc::ENOSYS, libc::ENOMEM] {
        let (tried, r) = refuse(&AtomicUsize::new(0), 1, errno);
        assert_eq!(tried.len(), 1);
        assert_eq!(r.err().unwrap().raw_os_error(), Some(errno));
    }
}

fn file() -> (tempfile::TempDir, Arc<File>) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let o = OpenOptions { writable: true, create: Some(0), ..OpenOptions::default() };
    let f = File::open(&dir.path().join("f"), &o).unwrap();
    std::fs::write(f.path(), (0..=255).cycle().take(1 << 16).collect::<Vec<u8>>()).unwrap();
    (dir, f)
}

fn read_many(r: &mut Uring, f: &Arc<File>, count: usize) {
    let mut bufs = vec![[0u8; 8]; count];
    let iov: Vec<_> =
        bufs.iter_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 8 }).collect();
    for (i, v) in iov.iter().enumerate() {
        let op = Op::Readv { iov: v, n: 1, off: (i % 8192) as u64 * 8 };
        // SAFETY: `iov` and `bufs` live until every completion was counted below.
        assert!(unsafe { r.submit(f, op, Token::new(Kind::Fast, 3, i as u32)) });
    }
    let mut seen = vec![false; count];
    let mut out = vec![];
    let mut left = count;
    while left > 0 {
        r.enter(Wait::Forever).unwrap();
        r.reap(&mut out, 32);
        assert!(out.len() <= 32);
        for (t, res) in out.drain(..) {
            assert_eq!((t.kind(), t.number(), res), (Kind::Fast, 3, 8));
            assert!(!std::mem::replace(&mut seen[t.slot() as usize], true), "completed twice");
            left -= 1;
        }
    }
    drop(iov);
    for (i, b) in bufs.iter().enumerate() {
        assert_eq!(b[0], ((i % 8192) * 8) as u8);
    }
}

#[test]
fn more_than_both_queues_hold_is_neither_lost_nor_refused() {
    let (_d, f) = file();
    for flavour in FLAVOURS {
        let mut r = Uring::new().unwrap();
        r.ring = flavour.build().unwrap();
        read_many(&mut r, &f, CQ as usize * 2 + 1000);
        assert_eq!(r.registered.get(f.id() as usize), Some(&true));
    }
}

#[test]
fn without_registered_files_the_descriptor_serves() {
    let (_d, f) = file();
    let mut r = Uring::new().unwrap();
    r.table = Table::Refused;
    read_many(&mut r, &f, 100);
    assert!(r.registered.is_empty());
}

#[test]
fn an_eventfd_is_watched_without_being_read() {
    let mut r = Uring::new().unwrap();
    let fd = crate::mailbox::eventfd().unwrap();
    let token = Token::new(Kind::Kick, 1, 1);
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
    r.poll(raw, token);
    let mut out = vec![];
    for _ in 0..3 {
        r.enter(Wait::No).unwrap();
        rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
        while out.is_empty() {
            r.enter(Wait::Forever).unwrap();
            r.reap(&mut out, 32);
        }
        assert!(out.iter().all(|(t, _)| *t == token));
        out.clear();
    }
    r.unpoll(token);
    // Whatever was on its way, then silence: a write is not seen any more.
    r.enter(Wait::No).unwrap();
    r.reap(&mut out, 32);
    out.clear();
    rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
    r.enter(Wait::For(1_000_000)).unwrap();
    r.reap(&mut out, 32);
    assert!(out.is_empty(), "{out:?}");
}

#[test]
fn a_timeout_ends_the_wait_and_devices_are_left_to_threads() {
    let (_d, f) = file();
    let mut r = Uring::new().unwrap();
    r.enter(Wait::For(1000)).unwrap();
    let op = Op::DeviceDiscard { off: 0, len: 512 };
    // SAFETY: no memory.
    assert!(!unsafe { r.submit(&f, op, Token::new(Kind::Fast, 0, 0)) });
}

/// Runs one operation to its end.
fn one(r: &mut Uring, f: &Arc<File>, op: Op) -> i32 {
    // SAFETY: the callers keep what `op` points to until this returns.
    assert!(unsafe { r.submit(f, op, Token::new(Kind::Fast, 1, 0)) });
    let mut out = vec![];
    while out.is_empty() {
        r.enter(Wait::Forever).unwrap();
        r.reap(&mut out, 8);
    }
    out[0].1
}

#[test]
fn pinned_memory_is_used_while_it_is_pinned_and_no_longer() {
    const PAGE: usize = 4096;
    let dir = tempfile::tempdir_in(".").unwrap();
    let o = OpenOptions { writable: true, direct: true, create: Some(1 << 16), ..OpenOptions::default() };
    let Ok(f) = File::open(&dir.path().join("f"), &o) else { return };
    if !f.direct() || f.alignment().offset as usize > PAGE {
        return;
    }
    let memory = crate::IoVecs::alloc(4 * PAGE, PAGE).unwrap();
    let iovs = memory.raw().unwrap();
    let base = iovs[0].iov_base.addr();
    let at = |page: usize, len: usize| libc::iovec {
        iov_base: iovs[0].iov_base.cast::<u8>().wrapping_add(page * PAGE).cast(),
        iov_len: len,
    };
    let mut r = Uring::new().unwrap();
    // SAFETY: `memory` outlives the last `unpin` below.
    unsafe { r.pin(5, &[(base, 2 * PAGE)]) }.unwrap();
    // SAFETY: as above.
    unsafe { r.pin(5, &[(base, 2 * PAGE)]) }.unwrap();
    memory.copy_from(0, &[7; PAGE]);
    let (first, second, half) = (at(0, PAGE), at(1, PAGE), at(1, 2 * PAGE));
    let fixed = |r: &Uring, v: &libc::iovec| {
        r.fixed_entry(&Op::Readv { iov: v, n: 1, off: 0 }, types::Fd(0)).is_some()
    };
    assert!(fixed(&r, &first) && fixed(&r, &second) && !fixed(&r, &half), "only what lies inside as a whole");
    assert_eq!(one(&mut r, &f, Op::Writev { iov: &first, n: 1, off: 0, dsync: true }), PAGE as i32);
    assert_eq!(one(&mut r, &f, Op::Readv { iov: &second, n: 1, off: 0 }), PAGE as i32);
    assert_eq!(memory.slice(PAGE, PAGE).to_vec(), [7; PAGE]);
    assert_eq!(one(&mut r, &f, Op::Readv { iov: &half, n: 1, off: 0 }), 2 * PAGE as i32, "the usual way");
    r.unpin(5);
    assert!(fixed(&r, &first), "one user is left");
    r.unpin(5);
    assert!(!fixed(&r, &first));
    memory.copy_from(0, &[9; PAGE]);
    assert_eq!(one(&mut r, &f, Op::Readv { iov: &first, n: 1, off: 0 }), PAGE as i32);
    assert_eq!(memory.slice(0, PAGE).to_vec(), [7; PAGE]);
    // SAFETY: nothing is mapped there, which the kernel finds out.
    unsafe { r.pin(6, &[(PAGE, PAGE)]) }.unwrap_err();
    assert!(!fixed(&r, &libc::iovec { iov_base: std::ptr::without_provenance_mut(PAGE), iov_len: 8 }));
}
