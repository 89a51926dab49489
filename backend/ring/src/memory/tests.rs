//! Tables, borders, epochs, and the files behind them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::GuestAddress;

use super::*;

const PAGE: usize = 4096;

fn segments(memory: &Memory, gpa: u64, len: u64) -> Result<Vec<(u64, usize)>, MemoryError> {
    let mut out = Vec::new();
    memory.translate(gpa, len, &mut out)?;
    Ok(out.iter().map(|s| (memory.guest_of_host(s.base()).unwrap(), s.len())).collect())
}

fn unmapped<T>(result: &Result<T, MemoryError>) -> bool {
    matches!(result, Err(MemoryError::Unmapped { .. }))
}

/// Regions [0x1000, 0x3000), [0x3000, 0x4000), [0x8000, 0x9000), given out of order.
fn three() -> Memory {
    Memory::anonymous(&[(0x8000, 0x70_8000, PAGE), (0x1000, 0x70_1000, 2 * PAGE), (0x3000, 0x90_0000, PAGE)])
        .unwrap()
}

#[test]
fn ranges_translate_within_and_across_regions() {
    let memory = three();
    assert_eq!((memory.regions(), memory.total_size()), (3, 4 * PAGE as u64));
    assert_eq!(segments(&memory, 0x1000, 0x2000).unwrap(), [(0x1000, 0x2000)]);
    assert_eq!(segments(&memory, 0x2fff, 2).unwrap(), [(0x2fff, 1), (0x3000, 1)]);
    assert_eq!(segments(&memory, 0x1000, 0x3000).unwrap(), [(0x1000, 0x2000), (0x3000, 0x1000)]);
    assert_eq!(segments(&memory, 0x8fff, 1).unwrap(), [(0x8fff, 1)]);
    assert_eq!(segments(&memory, 0xdead_beef, 0).unwrap(), []);
    for (gpa, len) in [
        (0xfff, 1),
        (0xfff, 2),
        (0x3fff, 2),
        (0x4000, 1),
        (0x7fff, 2),
        (0x8fff, 2),
        (0x9000, 1),
        (0x1000, 0x8000),
        (0x1000, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (0, 1),
    ] {
        assert!(unmapped(&segments(&memory, gpa, len)), "{gpa:#x} {len:#x}");
    }
}

#[test]
fn a_failed_translation_leaves_the_list_alone() {
    let memory = three();
    let mut out = Vec::new();
    memory.translate(0x1000, 8, &mut out).unwrap();
    assert!(unmapped(&memory.translate(0x3ff0, 0x100, &mut out)));
    assert_eq!(out.len(), 1);
}

#[test]
fn the_hint_changes_the_way_not_the_result() {
    let memory = three();
    let mut hint = Flat::NOTHING;
    for (gpa, len) in
        [(0x1000, 16), (0x1010, 16), (0x8000, 1), (0x2ff0, 32), (0x3000, 0x1000), (0x1000, 0x2000)]
    {
        let mut out = Vec::new();
        assert!(memory.translate_hinted(&mut hint, gpa, len, 2, &mut out).is_some());
        let got: Vec<_> = out.iter().map(|s| (memory.guest_of_host(s.base()).unwrap(), s.len())).collect();
        assert_eq!(got, segments(&memory, gpa, len).unwrap());
    }
    for (gpa, len) in [(0x8000, 0x1001), (0x3fff, 2), (u64::MAX, 1), (0x1000, u64::MAX)] {
        assert!(memory.translate_hinted(&mut hint, gpa, len, 8, &mut Vec::new()).is_none());
    }
    let mut full = vec![GuestIov::EMPTY];
    assert!(memory.translate_hinted(&mut hint, 0x1000, 1, 1, &mut full).is_none());
    assert!(memory.translate_hinted(&mut hint, 0x2fff, 2, 2, &mut full).is_none());
}

#[test]
fn user_addresses_resolve_within_one_region_only() {
    let memory = three();
    let host = memory.resolve_user(0x70_1008, 16).unwrap();
    assert_eq!(memory.guest_of_host(host), Some(0x1008));
    assert_eq!(memory.user_to_guest(0x90_0fff), Some(0x3fff));
    assert_eq!(memory.user_to_guest(0x90_1000), None);
    assert!(memory.resolve_user(0x70_1000, 0x2000).is_ok());
    assert!(matches!(memory.resolve_user(0x70_1000, 0x2001), Err(MemoryError::CrossesRegion { .. })));
    assert!(matches!(memory.resolve_user(0x70_2fff, 2), Err(MemoryError::CrossesRegion { .. })));
    assert!(matches!(memory.resolve_user(0x70_1000, u64::MAX), Err(MemoryError::CrossesRegion { .. })));
    assert!(matches!(memory.resolve_user(0x70_3000, 1), Err(MemoryError::Unmapped { .. })));
    assert!(matches!(memory.resolve_user(0x1000, 1), Err(MemoryError::Unmapped { .. })));
}

#[test]
fn impossible_tables_are_refused() {
    let with = |layout: &[(u64, u64, usize)]| Memory::anonymous(layout).map(|_| ());
    assert!(matches!(with(&[(0, 0, 0)]), Err(MemoryError::RegionSize { .. })));
    assert!(matches!(with(&[(u64::MAX - 4095, 0, PAGE)]), Err(MemoryError::RegionSize { .. })));
    assert!(matches!(with(&[(0, u64::MAX - 4095, PAGE)]), Err(MemoryError::RegionSize { .. })));
    assert!(with(&[(u64::MAX - 4096, 0, PAGE)]).is_ok());
    assert!(matches!(
        with(&[(0, 0, PAGE), (0, PAGE as u64, PAGE)]),
        Err(MemoryError::Overlap { guest_addr: 0 })
    ));
    assert!(matches!(
        with(&[(0x1fff, 0, PAGE), (0x1000, PAGE as u64, PAGE)]),
        Err(MemoryError::Overlap { guest_addr: 0x1fff })
    ));
    let many = |n: u64| (0..n).map(|i| (i * 8192, i * 8192, 8)).collect::<Vec<_>>();
    assert!(with(&many(MAX_REGIONS as u64)).is_ok());
    assert!(matches!(with(&many(MAX_REGIONS as u64 + 1)), Err(MemoryError::TooManyRegions)));
    assert!(with(&[]).is_ok());
}

#[test]
fn copies_span_regions_and_never_leave_them() {
    let memory = three();
    let text: Vec<u8> = (0..=255).cycle().take(5000).collect();
    memory.write(0x2800, &text).unwrap();
    let mut back = vec![0; text.len()];
    memory.read(0x2800, &mut back).unwrap();
    assert_eq!(back, text);
    for len in [0_usize, 1, 7, 8, 9, 255, 256, 300] {
        let mut part = vec![0; len];
        memory.read(0x2fff - 100, &mut part).unwrap();
        let from = 0x2fff - 100 - 0x2800;
        assert_eq!(part, text[from..from + len]);
    }
    assert!(unmapped(&memory.write(0x3ff0, &[1; 32])));
    let mut last = [1; 16];
    memory.read(0x3ff0, &mut last).unwrap();
    assert_eq!(last, [0; 16], "a refused write wrote");
}

#[test]
fn parts_of_lists() {
    let memory = three();
    let mut list = Vec::new();
    memory.translate(0x1000, 10, &mut list).unwrap();
    memory.translate(0x8000, 10, &mut list).unwrap();
    let part = |offset, len| {
        let mut out = Vec::new();
        crate::slice_iovs(&list, offset, len, &mut out);
        out.iter().map(|s| (memory.guest_of_host(s.base()).unwrap(), s.len())).collect::<Vec<_>>()
    };
    assert_eq!(part(0, 20), [(0x1000, 10), (0x8000, 10)]);
    assert_eq!(part(9, 2), [(0x1009, 1), (0x8000, 1)]);
    assert_eq!(part(10, 3), [(0x8000, 3)]);
    assert_eq!(part(19, 100), [(0x8009, 1)]);
    assert_eq!(part(20, 1), []);
    assert_eq!(part(u64::MAX, u64::MAX), []);
    assert_eq!(part(3, 0), []);
    let raw = GuestIov::as_iovecs(&list);
    assert_eq!((raw.len(), raw[1].iov_len, raw[1].iov_base.cast()), (2, 10, list[1].base()));
    assert_eq!(list[0].slice(4, 100).len(), 6);
    assert!(list[0].slice(11, 1).is_empty());
}

#[test]
fn epochs_differ_and_share() {
    let first = three();
    first.write(0x1000, b"kept").unwrap();
    let second = first.with_removed(0x8000, 0x70_8000, PAGE as u64).unwrap();
    assert_ne!(first.epoch(), second.epoch());
    assert_eq!((first.regions(), second.regions()), (3, 2));
    drop(first);
    let mut text = [0; 4];
    second.read(0x1000, &mut text).unwrap();
    assert_eq!(&text, b"kept");
    assert!(unmapped(&second.read(0x8000, &mut text)));
    for (guest, user, size) in
        [(0x8000, 0x70_8000, 4096), (0x3000, 0x90_0000, 4095), (0x3000, 0x90_0001, 4096)]
    {
        assert!(matches!(second.with_removed(guest, user, size), Err(MemoryError::NoSuchRegion { .. })));
    }
}

#[test]
fn a_vm_memory_table_is_taken_over() {
    let table =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), PAGE), (GuestAddress(0x5000), PAGE)])
            .unwrap();
    let memory = Memory::from_vm_memory(&table).unwrap();
    memory.write(0x5ffc, b"text").unwrap();
    let text: [u8; 4] = vm_memory::Bytes::read_obj(&table, GuestAddress(0x5ffc)).unwrap();
    assert_eq!(&text, b"text");
    drop(table);
    let mut text = [0; 4];
    memory.read(0x5ffc, &mut text).unwrap();
    assert_eq!((&text, memory.user_to_guest(0x5000)), (b"text", Some(0x5000)));
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn region(fd: OwnedFd, guest_addr: u64, size: u64, mmap_offset: u64) -> Region {
    Region { guest_addr, size, user_addr: guest_addr + 0x7f00_0000_0000, fd, mmap_offset }
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn files_are_shared_with_whoever_holds_them() {
    let fd = memfd(0x4000, SealFlags::empty());
    let other = fd.try_clone().unwrap();
    // The second one starts in the middle of a page.
    let regions =
        vec![region(fd.try_clone().unwrap(), 0x10000, 0x1000, 0x3000), region(fd, 0x0, 0x1800, 0x1800)];
    let memory = Memory::map(regions).unwrap();
    memory.write(0x17fc, b"last").unwrap();
    memory.write(0x0, b"first").unwrap();
    memory.write(0x10000, b"other").unwrap();
    let mut file = vec![0; 0x4000];
    rustix::io::pread(&other, &mut file, 0).unwrap();
    assert_eq!(
        (&file[0x2ffc..0x3000], &file[0x1800..0x1805], &file[0x3000..0x3005]),
        (&b"last"[..], &b"first"[..], &b"other"[..])
    );
    assert!(unmapped(&memory.write(0x17fd, b"last")));
    rustix::io::pwrite(&other, b"x", 0x1800).unwrap();
    let mut byte = [0];
    memory.read(0, &mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn files_that_cannot_back_their_region_are_refused() {
    let map = |r: Region| Memory::map(vec![r]).map(|_| ());
    let file = || memfd(0x2000, SealFlags::empty());
    assert!(map(region(file(), 0, 0x1000, 0x1000)).is_ok());
    assert!(matches!(
        map(region(file(), 0, 0x1001, 0x1000)),
        Err(MemoryError::FileTooShort { file: 0x2000, needed: 0x2001 })
    ));
    assert!(matches!(map(region(file(), 0, 0x1000, 0x2000)), Err(MemoryError::FileTooShort { .. })));
    assert!(matches!(map(region(file(), 0, 1 << 46, 0)), Err(MemoryError::FileTooShort { .. })));
    assert!(matches!(map(region(file(), 0, 0x1000, u64::MAX)), Err(MemoryError::FileOffset { .. })));
    assert!(matches!(map(region(file(), 0, 0x1000, i64::MAX as u64)), Err(MemoryError::FileOffset { .. })));
    assert!(matches!(map(region(file(), 0, 0, 0)), Err(MemoryError::RegionSize { .. })));
    let (read, write) = rustix::pipe::pipe().unwrap();
    let (left, _right) = std::os::unix::net::UnixStream::pair().unwrap();
    for fd in [
        read,
        write,
        left.into(),
        std::fs::File::open("/dev/zero").unwrap().into(),
        std::fs::File::open("/").unwrap().into(),
    ] {
        assert!(matches!(map(region(fd, 0, 0x1000, 0)), Err(MemoryError::NotAFile)));
    }
    // Read-only descriptors cannot be mapped shared and writable.
    let path = std::env::temp_dir().join(format!("ringblk-ring-{}", std::process::id()));
    std::fs::write(&path, [0; 0x1000]).unwrap();
    let read_only = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(map(region(read_only.into(), 0, 0x1000, 0)), Err(MemoryError::Io(_))));
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn seals_are_seen() {
    let map = |fd: OwnedFd| Memory::map(vec![region(fd, 0, 0x1000, 0)]).unwrap();
    assert!(!map(memfd(0x1000, SealFlags::empty())).is_sealed_against_shrink());
    assert!(!map(memfd(0x1000, SealFlags::GROW)).is_sealed_against_shrink());
    let sealed = map(memfd(0x1000, SealFlags::SHRINK));
    assert!(sealed.is_sealed_against_shrink());
    let added = sealed.with_added(region(memfd(0x1000, SealFlags::empty()), 0x1000, 0x1000, 0)).unwrap();
    assert!(sealed.is_sealed_against_shrink() && !added.is_sealed_against_shrink());
    let back = added.with_removed(0x1000, 0x7f00_0000_1000, 0x1000).unwrap();
    assert!(back.is_sealed_against_shrink());
    assert!(matches!(
        back.with_added(region(memfd(0x1000, SealFlags::empty()), 0xfff, 0x1000, 0)),
        Err(MemoryError::Overlap { .. })
    ));
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn guest_memory_stays_out_of_dumps_and_children() {
    let fd = memfd(0x3000, SealFlags::empty());
    let borrowed = rustix::fs::fstat(fd.as_fd()).unwrap().st_ino;
    let memory = Memory::map(vec![region(fd, 0, 0x3000, 0)]).unwrap();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", memory.flat[0].host.addr());
    let mut lines = maps.lines().skip_while(|l| !l.starts_with(&start));
    assert!(lines.next().unwrap().contains(&borrowed.to_string()));
    let flags = lines.find(|l| l.starts_with("VmFlags:")).unwrap();
    assert!(flags.contains(" dd") && flags.contains(" dc") && flags.contains(" sh"), "{flags}");
}
