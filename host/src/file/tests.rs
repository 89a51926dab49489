//! Tests of files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(".").unwrap()
}

fn rw(create: u64) -> OpenOptions {
    OpenOptions { writable: true, create: Some(create), ..OpenOptions::default() }
}

#[test]
fn sizes_holes_and_kinds() {
    let d = dir();
    let p = d.path().join("f");
    let f = File::open(&p, &rw(1 << 20)).unwrap();
    assert_eq!((f.kind(), f.len().unwrap(), f.allocated().unwrap()), (FileKind::Regular, 1 << 20, 0));
    assert!(File::open(&p, &rw(1)).is_err(), "must not exist");
    std::os::unix::fs::FileExt::write_all_at(&*f.std_file(), &[1; 4096], 65536).unwrap();
    assert_eq!(f.seek_data(0).unwrap(), Some(65536));
    assert_eq!(f.seek_hole(65536).unwrap(), Some(65536 + 4096));
    assert_eq!(f.seek_data(1 << 19).unwrap(), None);
    assert_eq!(f.seek_hole(2 << 20).unwrap(), None);
    f.set_len(100).unwrap();
    assert_eq!(f.len().unwrap(), 100);
    let ro = File::open(&p, &OpenOptions::default()).unwrap();
    assert!(!ro.writable() && f.writable());
    assert!(ro.set_len(1).is_err());
    assert_eq!(ro.identity().unwrap(), f.identity().unwrap());
    let null = File::open(Path::new("/dev/null"), &OpenOptions::default()).unwrap();
    assert_eq!((null.kind(), null.len().unwrap()), (FileKind::CharDevice, 0));
}

#[test]
fn what_is_no_disk_is_refused_without_hanging() {
    let d = dir();
    assert!(File::open(d.path(), &OpenOptions::default()).is_err());
    let fifo = d.path().join("fifo");
    let c = CString::new(fifo.as_os_str().as_bytes()).unwrap();
    // SAFETY: a string with its NUL.
    assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);
    assert_eq!(File::open(&fifo, &OpenOptions::default()).err().unwrap().raw_os_error(), Some(libc::EINVAL));
    let sock = d.path().join("s");
    let _l = std::os::unix::net::UnixListener::bind(&sock).unwrap();
    assert!(File::open(&sock, &OpenOptions::default()).is_err());
    assert!(File::open(Path::new("a\0b"), &OpenOptions::default()).is_err());
}

#[test]
fn lock_bytes_are_seen_by_others_and_given_back() {
    assert!(ofd_locks_supported());
    let d = dir();
    let p = d.path().join("f");
    let a = File::open(&p, &rw(0)).unwrap();
    let b = File::open(&p, &OpenOptions { writable: true, ..OpenOptions::default() }).unwrap();
    a.lock_byte(101).unwrap();
    assert!(a.byte_is_free_for_write_lock(101).unwrap(), "own locks do not count");
    assert!(!b.byte_is_free_for_write_lock(101).unwrap());
    assert!(b.byte_is_free_for_write_lock(100).unwrap());
    b.lock_byte(101).unwrap();
    a.unlock_byte(101).unwrap();
    assert!(b.byte_is_free_for_write_lock(101).unwrap());
    a.lock_byte(203).unwrap();
    drop(a);
    assert!(b.byte_is_free_for_write_lock(203).unwrap());
    assert_eq!(b.lock_byte(u64::MAX).unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn read_at_bounces_and_fills_with_zeroes() {
    let d = dir();
    for direct in [false, true] {
        let p = d.path().join(format!("f{direct}"));
        let data: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&p, &data).unwrap();
        let f = File::open(&p, &OpenOptions { direct, ..OpenOptions::default() }).unwrap();
        for (off, len) in [(0usize, 100usize), (4000, 200), (9990, 100), (20_000, 10), (3, 0)] {
            let mut out = vec![0xee; len];
            f.read_at(&mut out, off as u64).unwrap();
            let want: Vec<u8> = (off..off + len).map(|i| data.get(i).copied().unwrap_or(0)).collect();
            assert_eq!(out, want, "{off}+{len} direct={direct}");
        }
        assert!(f.read_at(&mut [0; 16], u64::MAX - 4).is_err() || !direct);
    }
}

#[test]
fn alignment_is_found_by_trying() {
    // A disk with 4 KiB sectors that wants memory at 512.
    let a = align::probe(|shift, len| (shift % 512 == 0 && len % 4096 == 0).then_some(len));
    assert_eq!(a, Alignment { mem: 512, offset: 4096 });
    let any = align::probe(|_, len| Some(len));
    assert_eq!(any, Alignment { mem: 1, offset: 1 });
    let never = align::probe(|_, _| None);
    assert_eq!(never, Alignment { mem: 4096, offset: 4096 });
    assert_eq!(align::probe(|_, _| Some(0)), never, "an empty file tells nothing");
    let v = |base: usize, len| libc::iovec { iov_base: base as *mut _, iov_len: len };
    assert!(a.fits(&[v(512, 4096), v(1024, 8192)], 4096));
    assert!(!a.fits(&[v(100, 4096)], 4096));
    assert!(!a.fits(&[v(512, 100)], 4096));
    assert!(!a.fits(&[v(512, 4096)], 100));
    assert!(Alignment { mem: 1, offset: 1 }.fits(&[v(3, 5)], 7));
}

#[test]
fn direct_files_say_what_they_want() {
    let d = dir();
    let p = d.path().join("f");
    File::open(&p, &rw(65536)).unwrap();
    let f = File::open(&p, &OpenOptions { direct: true, ..OpenOptions::default() }).unwrap();
    assert!(f.direct());
    let a = f.alignment();
    assert!(a.mem.is_power_of_two() && a.offset.is_power_of_two() && a.offset <= 4096);
    let b = File::open(&p, &OpenOptions::default()).unwrap();
    assert_eq!(b.alignment(), Alignment { mem: 1, offset: 1 });
    let (l, phys) = b.block_sizes();
    assert!(l >= 512 && phys >= l);
}

#[test]
fn ids_are_small_and_unique_among_the_open() {
    let d = dir();
    let open = |n: u32| File::open(&d.path().join(format!("{n}")), &rw(0)).unwrap();
    let all: Vec<_> = (0..50).map(open).collect();
    let mut ids: Vec<_> = all.iter().map(|f| f.id()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 50);
}
