//! The parsers field by field, and that what is written is what is read. Opening against QEMU is tested with the driver.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::bitmap::{DirEntry, TableEntry, parse_directory, serialise_directory};
use super::snapshot::{Snapshot, Step};
use super::*;

fn shape() -> Geometry {
    Geometry::new(16, 4, false, true, false).unwrap()
}

fn header() -> Header {
    let mut h = Header::new(3, shape(), 1 << 30);
    h.l1_size = 2;
    h.l1_offset = 3 << 16;
    h.reftable_offset = 1 << 16;
    h.reftable_clusters = 1;
    h.backing_file = Some(b"base.img".to_vec());
    h.backing_format = Some(b"raw".to_vec());
    h
}

/// The sentence an image is refused with after `data` was put at `at`.
fn refused(at: usize, data: &[u8]) -> String {
    refused_with(&[(at, data)])
}

fn refused_with(pokes: &[(usize, &[u8])]) -> String {
    let mut bytes = header().serialise().unwrap();
    for (at, data) in pokes {
        bytes[*at..at + data.len()].copy_from_slice(data);
    }
    match Header::parse(&bytes, Policy { writable: true, ..Policy::default() }) {
        Ok(_) => "accepted".into(),
        Err(e) => e.message,
    }
}

fn w(n: u32) -> [u8; 4] {
    n.to_be_bytes()
}

fn d(n: u64) -> [u8; 8] {
    n.to_be_bytes()
}

#[test]
fn a_header_parses_again() {
    let h = header();
    let bytes = h.serialise().unwrap();
    let mut again = Header::parse(&bytes, Policy::default()).unwrap();
    assert_eq!(again.feature_names.len(), 8);
    again.feature_names.clear();
    assert_eq!(again, h);
}

#[test]
fn numbers_out_of_range_are_refused_in_qemu_s_words() {
    assert_eq!(refused(0, b"RAW!"), "Image is not in qcow2 format");
    for n in [0, 1, 4] {
        assert_eq!(refused(4, &w(n)), format!("Unsupported qcow2 version {n}"));
    }
    for n in [0, 8, 22, 63, u32::MAX] {
        assert_eq!(refused(20, &w(n)), format!("Unsupported cluster size: 2^{n}"));
    }
    for n in [0, 72, 103] {
        assert_eq!(refused(100, &w(n)), "qcow2 header too short");
    }
    for n in [65537, 0x7fff_ffff, u32::MAX] {
        assert_eq!(refused(100, &w(n)), "qcow2 header exceeds cluster size");
    }
    for n in [7, 63, u32::MAX] {
        assert_eq!(refused(96, &w(n)), "Reference count entry width too large; may not exceed 64 bits");
    }
    assert_eq!(refused_with(&[(20, &w(13)), (72, &d(16))]), "Unsupported subcluster size: 256");
    assert_eq!(refused(32, &w(3)), "Unsupported encryption method 3");
    assert_eq!(refused(32, &w(2)), "Missing CRYPTO header for crypt method 2");
    assert_eq!(refused(32, &w(1)), "accepted", "AES of old: whether it is opened the driver decides");
}

#[test]
fn tables_out_of_range_are_refused_in_qemu_s_words() {
    assert_eq!(refused(36, &w(0)), "L1 table is too small");
    assert_eq!(refused(36, &w(1)), "L1 table is too small");
    assert_eq!(refused(36, &w((4 << 20) + 1)), "Active L1 table too large");
    assert_eq!(refused(40, &d(1)), "Active L1 table offset invalid");
    assert_eq!(refused(40, &d(u64::MAX << 16)), "Active L1 table offset invalid");
    assert_eq!(refused(40, &d(i64::MAX as u64 & !0xffff)), "Could not read L1 table");
    assert_eq!(refused(56, &w(0)), "Image does not contain a reference count table");
    for n in [0x0002_0001, u32::MAX] {
        assert_eq!(refused(56, &w(n)), "Reference count table too large");
    }
    assert_eq!(refused(48, &d(1)), "Reference count table offset invalid");
    assert_eq!(refused(60, &w(65537)), "Snapshot table too large");
    assert_eq!(refused(60, &w(u32::MAX)), "Snapshot table too large");
    assert_eq!(refused_with(&[(60, &w(1)), (64, &d(8))]), "Snapshot table offset invalid");
    assert_eq!(refused(24, &d(u64::MAX)), "Image is too big");
    assert_eq!(refused(24, &d(1 << 63)), "Image is too big");
    assert_eq!(refused(24, &d(1 << 40)), "L1 table is too small");
}

#[test]
fn features_are_refused_by_name() {
    assert_eq!(refused(72, &d(2)), "qcow2: Image is corrupt; cannot be opened read/write");
    for bit in 5..64u32 {
        let want = format!("Unsupported qcow2 feature(s): Unknown incompatible feature: {:x}", 1u64 << bit);
        assert_eq!(refused(72, &d(1 << bit)), want);
    }
    // The table of names says what bit 9 is.
    let mut bytes = header().serialise().unwrap();
    let at = bytes.windows(9).position(|b| b == b"dirty bit").unwrap();
    bytes[at - 1] = 9;
    bytes[72..80].copy_from_slice(&d(1 << 9 | 1 << 40));
    let e = Header::parse(&bytes, Policy::default()).unwrap_err();
    let want = "Unsupported qcow2 feature(s): dirty bit, Unknown incompatible feature: 10000000000";
    assert_eq!((e.message.as_str(), e.field, e.offset), (want, "incompatible_features", 72));
    // Compatible and autoclear bits are no reason.
    assert_eq!(refused_with(&[(80, &d(1 << 33)), (88, &d(1 << 34))]), "accepted");
    assert_eq!(refused(88, &d(2)), "data-file-raw requires a data file");
    assert_eq!(refused(104, &[1]), "qcow2: Compression type incompatible feature bit must be set");
    assert_eq!(refused(72, &d(8)), "qcow2: Compression type incompatible feature bit must not be set");
    assert_eq!(refused_with(&[(72, &d(8)), (104, &[2])]), "qcow2: unknown compression type: 2");
    assert_eq!(refused(104, &[255]), "qcow2: unknown compression type: 255");
}

#[test]
fn names_and_extensions_stay_inside_the_cluster() {
    assert_eq!(refused(8, &d(65537)), "Invalid backing file offset");
    assert_eq!(refused(8, &d(u64::MAX)), "Invalid backing file offset");
    assert_eq!(refused(16, &w(1024)), "Backing file name too long");
    assert_eq!(refused(16, &w(u32::MAX)), "Backing file name too long");
    assert_eq!(refused(116, &w(u32::MAX)), "Header extension too large");
    assert_eq!(refused(116, &w(1000)), "Header extension too large");
    assert_eq!(refused(116, &w(16)), "ERROR: ext_backing_format: len=16 too large (>=16)");
    // An end mark may not be longer than the area either.
    assert_eq!(refused_with(&[(112, &w(0)), (116, &w(u32::MAX))]), "Header extension too large");
    let crypto = "CRYPTO header extension only expected with LUKS encryption method";
    assert_eq!(refused(112, &w(extension::CRYPTO)), crypto);
    assert_eq!(refused(112, &w(extension::BITMAPS)), "bitmaps_ext: Invalid extension length");
    // Names end at a NUL.
    let mut bytes = header().serialise().unwrap();
    let at = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize;
    bytes[at + 4] = 0;
    let h = Header::parse(&bytes, Policy::default()).unwrap();
    assert_eq!(h.backing_file.as_deref(), Some(&b"base"[..]));
}

#[test]
fn what_is_not_understood_is_kept() {
    let mut h = header();
    h.unknown_extensions.push(UnknownExt { magic: 0x7777_0001, data: b"thirteen byte".to_vec() });
    h.unknown_extensions.push(UnknownExt { magic: 0x7777_0001, data: Vec::new() });
    h.unknown_fields = vec![1, 2, 3, 4, 5, 6, 7, 8, 9];
    h.compatible = 1 << 50;
    h.autoclear = 1 << 51;
    let again = Header::parse(&h.serialise().unwrap(), Policy::default()).unwrap();
    assert_eq!(again.unknown_extensions, h.unknown_extensions);
    assert_eq!(again.unknown_fields, h.unknown_fields);
    assert_eq!((again.compatible, again.unknown_autoclear()), (1 << 50, 1 << 51));
}

#[test]
fn version_2_has_extensions_from_byte_72() {
    let g = Geometry::new(16, 4, false, false, false).unwrap();
    let mut h = Header::new(2, g, 1 << 20);
    (h.l1_size, h.l1_offset, h.reftable_offset, h.reftable_clusters) = (1, 3 << 16, 1 << 16, 1);
    h.backing_file = Some(b"b".to_vec());
    h.backing_format = Some(b"qcow2".to_vec());
    let bytes = h.serialise().unwrap();
    assert_eq!(bytes[72..76], extension::BACKING_FORMAT.to_be_bytes());
    assert_eq!(Header::parse(&bytes, Policy::default()).unwrap(), h);
    // Feature bits mean nothing there.
    let mut bytes = bytes;
    bytes[72..80].fill(0xff);
    assert!(Header::parse(&bytes, Policy::default()).is_err(), "an extension of 4 GiB");
}

#[test]
fn what_does_not_fit_is_told() {
    let g = Geometry::new(9, 4, false, true, false).unwrap();
    let mut h = Header::new(3, g, 1 << 20);
    h.backing_file = Some(vec![b'x'; 500]);
    assert_eq!(h.serialise().unwrap_err().errno, Errno::ENOSPC);
    h.backing_file = Some(vec![b'x'; 1024]);
    assert_eq!(h.serialise().unwrap_err().errno, Errno::EINVAL);
}

#[test]
fn l2_entries() {
    let (std, v2) = (shape(), Geometry::new(16, 4, false, false, false).unwrap());
    let ext = Geometry::new(16, 4, true, true, false).unwrap();
    let data = Geometry::new(16, 4, false, true, true).unwrap();
    assert_eq!(L2Entry::decode(0, 0, std), Ok(L2Entry::Unallocated));
    assert_eq!(L2Entry::decode(1, 0, std), Ok(L2Entry::Zero { host: None, copied: false }));
    assert_eq!(L2Entry::decode(1, 0, v2), Err(EntryError::ZeroInV2));
    assert_eq!(L2Entry::decode(0x200, 0, std), Err(EntryError::Unaligned(0x200)));
    let normal = L2Entry::Normal { host: 5 << 16, copied: true };
    assert_eq!(L2Entry::decode(COPIED | 5 << 16, 0, std), Ok(normal));
    assert_eq!(L2Entry::decode(COMPRESSED, 0, data), Err(EntryError::CompressedWithDataFile));
    // In a data file offset 0 is a place if it is COPIED.
    assert_eq!(L2Entry::decode(COPIED, 0, data), Ok(L2Entry::Normal { host: 0, copied: true }));
    assert_eq!(L2Entry::decode(COPIED, 0, std), Ok(L2Entry::Unallocated));
    let moved = EntryError::DataFileMismatch { host: 1 << 16, guest: 0 };
    assert_eq!(L2Entry::decode_at(COPIED | 1 << 16, 0, 0, data), Err(moved));
    assert_eq!(L2Entry::decode(5 << 16, 1 << 32 | 1, ext), Err(EntryError::InvalidBitmap(1 << 32 | 1)));
    assert_eq!(L2Entry::decode(0, 1, ext), Err(EntryError::InvalidBitmap(1)));
    assert_eq!(L2Entry::decode(0, 1 << 32, ext), Ok(L2Entry::Unallocated));
    assert!(entry::l2_reserved(1, ext) && !entry::l2_reserved(1, std) && entry::l2_reserved(2, std));
    let words = EntryError::Unaligned(0x200).l2_message(0x40000, 0);
    assert_eq!(words, "Cluster allocation offset 0x200 unaligned (L2 offset: 0x40000, L2 index: 0)");
}

#[test]
fn subclusters_come_in_runs() {
    let entry = L2Entry::Normal { host: 1 << 16, copied: true };
    let bits = SubBitmap::new(0x0000_ff0f, 0x00ff_0000);
    let mut runs = Vec::new();
    let mut at = 0;
    while at < 32 {
        let (kind, n) = bits.run(entry, at);
        runs.push((kind, n));
        at += n;
    }
    use SubKind::{Normal, UnallocatedAlloc, ZeroAlloc};
    assert_eq!(
        runs,
        [(Normal, 4), (UnallocatedAlloc, 4), (Normal, 8), (ZeroAlloc, 8), (UnallocatedAlloc, 8)]
    );
    assert_eq!(SubBitmap::mask(0, 32), u32::MAX);
    assert_eq!(SubBitmap::mask(4, 8), 0xf0);
    assert_eq!(bits.with_zero(0xf).kind(entry, 0), ZeroAlloc);
}

#[test]
fn refcounts_of_all_widths_lie_where_qemu_puts_them() {
    let mut block = [0u8; 32];
    for order in 0..=6 {
        block.fill(0);
        let n = 256usize >> order;
        for i in 0..n {
            assert!(refcount::set(&mut block, order, i, i as u64 & refcount::max(order)));
        }
        for i in 0..n {
            assert_eq!(refcount::get(&block, order, i), i as u64 & refcount::max(order));
        }
        assert!(!refcount::set(&mut block, order, n, 0), "past the end");
        assert_eq!(refcount::get(&block, order, n), 0);
    }
    block.fill(0);
    refcount::set(&mut block, 0, 3, 1);
    refcount::set(&mut block, 2, 3, 0xa);
    assert_eq!(block[..2], [0b1000, 0xa0]);
    assert!(!refcount::set(&mut block, 4, 0, 65536));
}

#[test]
fn bitmap_directories() {
    let g = shape();
    let entry = DirEntry {
        table_offset: 9 << 16,
        table_size: 1,
        flags: bitmap::FLAG_AUTO,
        granularity_bits: 16,
        name: b"b0".to_vec(),
    };
    let good = serialise_directory(std::slice::from_ref(&entry));
    assert_eq!(parse_directory(&good, 1, 1 << 30, g).unwrap(), [entry]);
    let said = |at: usize, data: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + data.len()].copy_from_slice(data);
        parse_directory(&bytes, 1, 1 << 30, g).map_err(|e| e.message).unwrap_err()
    };
    let constraints = "Bitmap 'b0' doesn't satisfy the constraints";
    for (at, data) in
        [(17, &[8][..]), (17, &[32]), (16, &[2]), (12, &[0, 0, 0, 4]), (8, &[0; 4]), (0, &[0; 8]), (7, &[1])]
    {
        assert_eq!(said(at, data), constraints, "{at} {data:?}");
    }
    assert_eq!(said(18, &[4, 0]), "Broken bitmap directory");
    assert_eq!(said(20, &[0xff; 4]), "Broken bitmap directory");
    let message = |bytes: &[u8], n| parse_directory(bytes, n, 1 << 30, g).map_err(|e| e.message).unwrap_err();
    assert_eq!(message(&good, 0), "More bitmaps found than specified in header extension");
    assert_eq!(message(&good, 2), "Less bitmaps found than specified in header extension");
    assert_eq!(message(&[], 1), "Requested bitmap directory size is zero");
    assert_eq!(TableEntry::decode(1, g), Ok(TableEntry::Ones));
    assert!(TableEntry::decode(2, g).is_err() && TableEntry::decode(0x200, g).is_err());
}

#[test]
fn snapshot_entries() {
    let mut out = Vec::new();
    let s = Snapshot {
        l1_offset: 1 << 16,
        l1_size: 3,
        id: b"1".to_vec(),
        name: b"a".to_vec(),
        date_sec: 1,
        date_nsec: 2,
        vm_clock_nsec: 3,
        vm_state_size: 1 << 40,
        disk_size: None,
        icount: None,
        extra_size: 24,
        unknown_extra: b"rest".to_vec(),
    };
    s.serialise(77, &mut out).unwrap();
    assert_eq!(Snapshot::parse(&out[..39], 0, 0, 1024), Ok(Step::Need(40)));
    assert_eq!(Snapshot::parse(&out[..40], 0, 0, 1024), Ok(Step::Need(40 + 28 + 2)));
    let Ok(Step::Entry(again, used)) = Snapshot::parse(&out, 0, 0, 1024) else { panic!("no entry") };
    assert_eq!((used, again.disk_size, again.vm_state_size), (72, Some(77), 1 << 40));
    assert_eq!(again.unknown_extra, b"rest");
    out[36..40].copy_from_slice(&w(1025));
    let e = Snapshot::parse(&out, 5, 0, 1024).unwrap_err();
    assert_eq!(e.message, "Too much extra metadata in snapshot table entry 5");
    // Old entries have none.
    out[36..40].copy_from_slice(&w(0));
    let Ok(Step::Entry(old, _)) = Snapshot::parse(&out, 0, 0, 1024) else { panic!("no entry") };
    assert_eq!((old.disk_size, old.vm_state_size, old.icount), (None, 0, None));
}

fn names() -> impl Strategy<Value = Option<Vec<u8>>> {
    proptest::option::of(proptest::collection::vec(1u8..255, 1..15))
}

proptest! {
    #[test]
    fn any_header_parses_again(
        bits in 9u32..22,
        order in 0u32..7,
        ext: bool,
        size in 0u64..1 << 40,
        (backing_file, backing_format, data_file) in (names(), names(), names()),
        unknown in proptest::collection::vec((0x1000_0000u32..0x1fff_ffff, proptest::collection::vec(any::<u8>(), 0..20)), 0..3),
        fields in proptest::collection::vec(any::<u8>(), 0..20),
        (compatible, lucky) in any::<(u64, u64)>(),
    ) {
        let Some(g) = Geometry::new(bits, order, ext, true, data_file.is_some()) else { return Ok(()) };
        let mut h = Header::new(3, g, size);
        let entries = g.l1_entries_for(size);
        prop_assume!(entries <= MAX_L1_BYTES / 8);
        h.l1_size = entries as u32;
        h.l1_offset = (lucky % 1000) << bits;
        (h.reftable_offset, h.reftable_clusters) = (1 << bits, 1);
        (h.backing_file, h.backing_format, h.data_file) = (backing_file, backing_format, data_file);
        h.unknown_extensions = unknown.into_iter().map(|(magic, data)| UnknownExt { magic, data }).collect();
        h.unknown_fields = fields;
        h.compatible = compatible;
        h.compression = if lucky & 1 == 0 { Compression::Deflate } else { Compression::Zstd };
        if let Ok(bytes) = h.serialise() {
            let mut again = Header::parse(&bytes, Policy::default()).unwrap();
            again.feature_names.clear();
            h.incompatible = again.incompatible;
            prop_assert_eq!(again, h);
        }
    }

    #[test]
    fn any_compressed_range_comes_back(bits in 9u32..22, offset: u64, len in 1u64..1 << 21) {
        let g = Geometry::new(bits, 4, false, true, false).unwrap();
        let (offset, len) = (offset & g.compressed_offset_mask(), len.min(g.cluster_size()));
        let (at, longest) = entry::compressed_range(entry::compressed_word(offset, len, g), g);
        prop_assert_eq!(at, offset);
        prop_assert!(longest >= len && longest < len + 512);
    }

    #[test]
    fn any_snapshot_comes_back(
        (id, name) in (proptest::collection::vec(any::<u8>(), 0..200), proptest::collection::vec(any::<u8>(), 0..300)),
        (l1_offset, l1_size, vm_state_size, disk_size) in any::<(u64, u32, u64, u64)>(),
        unknown_extra in proptest::collection::vec(any::<u8>(), 0..1000),
    ) {
        let s = Snapshot {
            l1_offset, l1_size, id, name, date_sec: 1, date_nsec: 2, vm_clock_nsec: 3, vm_state_size,
            disk_size: Some(disk_size), icount: Some(4), extra_size: 24 + unknown_extra.len() as u32, unknown_extra,
        };
        let mut out = Vec::new();
        s.serialise(0, &mut out).unwrap();
        prop_assert_eq!(out.len(), s.serialised_len());
        prop_assert_eq!(Snapshot::parse(&out, 0, 0, MAX_SNAPSHOT_EXTRA), Ok(Step::Entry(Box::new(s), out.len())));
    }

    #[test]
    fn any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), good: bool) {
        if good && bytes.len() >= 24 {
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            bytes[20..24].copy_from_slice(&[0, 0, 0, 9]);
        }
        let _ = Header::parse(&bytes, Policy { check: true, ..Policy::default() });
        let _ = parse_directory(&bytes, 3, 1 << 30, shape());
        let _ = Snapshot::parse(&bytes, 0, 0, MAX_SNAPSHOT_EXTRA);
    }
}
