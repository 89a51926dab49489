//! Tests of the tables in memory: decoding, the cache of slices, what a commit collects.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::Ordering::Relaxed;

use super::watch::Counted;
use super::*;
use crate::qcow2::format::{COMPRESSED, COPIED, ZERO};

fn geo(bits: u32, extended: bool) -> Geometry {
    Geometry::new(bits, 4, extended, true, false).unwrap()
}

#[test]
fn a_run_ends_where_kind_or_place_changes() {
    let d = Decoder::new(geo(16, false));
    let c = 65536u64;
    let words = [
        (c * 5) | COPIED,
        (c * 6) | COPIED,
        (c * 8) | COPIED,
        ZERO,
        ZERO,
        0,
        0,
        COMPRESSED | 512,
        c * 9,
        (c * 10) | ZERO | COPIED,
    ];
    let run = |guest: u64, len: u64| d.run(|i| (words[i], 0), (guest / c) as usize, words.len(), guest, len);
    let a = run(100, 10 * c);
    assert_eq!((a.kind, a.len, a.host, a.copied), (Kind::Normal, 2 * c - 100, Some(5 * c + 100), true));
    assert_eq!(run(2 * c, 10 * c).len, c, "not contiguous");
    assert_eq!((run(3 * c + 1, 10 * c).kind, run(3 * c + 1, 10 * c).len), (Kind::Zero, 2 * c - 1));
    assert_eq!((run(5 * c, 10 * c).kind, run(5 * c, 10 * c).len), (Kind::Unallocated, 2 * c));
    assert_eq!((run(7 * c, 10 * c).kind, run(7 * c + 5, 10 * c).len), (Kind::Compressed, c - 5));
    assert_eq!((run(8 * c, c).kind, run(8 * c, c).copied), (Kind::Normal, false));
    assert_eq!((run(9 * c, c).kind, run(9 * c, c).host), (Kind::Zero, Some(10 * c)));
    assert_eq!(run(3, 10).len, 10, "never more than was asked");
}

#[test]
fn subclusters_are_told_one_by_one() {
    let d = Decoder::new(geo(16, true));
    let (c, s) = (65536u64, 2048u64);
    // Subclusters 0 and 1 allocated, 2 zero, the others unallocated; the next cluster allocated, contiguous.
    let words = [
        ((c * 5) | COPIED, 0b011 | (0b100 << 32)),
        ((c * 6) | COPIED, 0xffff_ffff),
        (c * 7, 1 | (1 << 32)),
        (0, 1),
    ];
    let run = |guest: u64, len: u64| d.run(|i| words[i], (guest / c) as usize, words.len(), guest, len);
    assert_eq!((run(1, c).kind, run(1, c).len, run(1, c).host), (Kind::Normal, 2 * s - 1, Some(5 * c + 1)));
    assert_eq!((run(2 * s, c).kind, run(2 * s, c).len), (Kind::Zero, s));
    assert_eq!((run(3 * s, 4 * c).kind, run(3 * s, 4 * c).len), (Kind::Unallocated, 29 * s));
    assert_eq!((run(c, 4 * c).kind, run(c, 4 * c).len), (Kind::Normal, c));
    assert_eq!(run(2 * c, s).kind, Kind::Invalid, "both bits");
    assert_eq!(run(3 * c, s).kind, Kind::Invalid, "data nowhere");
}

#[test]
fn reserved_bits_and_crooked_offsets_are_invalid() {
    let d = Decoder::new(geo(16, false));
    for entry in [1 << 61, 1 << 56, 2, 0x100, 512, 65536 + 512, COMPRESSED | COPIED | 512] {
        assert!(!d.valid(entry, 0), "{entry:#x}");
        assert_eq!(d.kind(entry, 0, 0), Kind::Invalid, "{entry:#x}");
    }
    let v2 = Decoder::new(Geometry::new(16, 4, false, false, false).unwrap());
    assert_eq!(v2.kind(ZERO, 0, 0), Kind::Invalid);
    let outside = Decoder::new(Geometry::new(16, 4, false, true, true).unwrap());
    assert_eq!(outside.kind(COPIED, 0, 0), Kind::Normal, "the first cluster of a data file");
    assert_eq!(outside.kind(0, 0, 0), Kind::Unallocated);
    assert_eq!(outside.kind(COMPRESSED | 512, 0, 0), Kind::Invalid);
}

/// Tables over one L2 table at 1 MiB, with a cache of `slices` slices of 512 bytes.
fn tables(slices: u64) -> Tables {
    Tables::new(geo(16, false), 0x30000, &[0x100000 | COPIED, 0], slices * 512, 512, 512)
}

fn fill(t: &Tables, slice: u64, words: &[u64]) -> bool {
    let mut all = vec![0; 64];
    all[..words.len()].copy_from_slice(words);
    match t.cache.reserve(slice) {
        Ok(at) => {
            t.cache.fill(&at, slice, &all, false);
            true
        }
        Err(_) => false,
    }
}

#[test]
fn what_is_cached_is_found_and_nothing_else() {
    let t = tables(16);
    assert!(t.lookup(0, 10).is_none(), "not loaded");
    assert_eq!(t.lookup(512 << 20, 10).unwrap().kind, Kind::Unallocated, "no table");
    assert!(fill(&t, 0, &[0x200000 | COPIED]));
    assert_eq!(t.lookup(7, 10).unwrap().host, Some(0x200007));
    assert!(t.lookup(64 << 16, 10).is_none());
}

#[test]
fn a_dirty_slice_stays_and_is_collected_once() {
    let t = tables(8);
    assert!(fill(&t, 3, &[]));
    t.with((3 * 64) << 16, |s| t.set_entry(s, 5, 0x300000 | COPIED, 0)).unwrap();
    t.set_l1(1, 0x400000 | COPIED);
    assert!(t.has_dirty());
    for slice in 100..200 {
        assert!(fill(&t, slice, &[]), "seven slots are left");
    }
    assert_eq!(t.lookup((3 * 64 + 5) << 16, 1).unwrap().host, Some(0x300000));
    let collected = t.collect();
    assert_eq!(collected.writes.len(), 2);
    let (l1, l2) = (&collected.writes[0], &collected.writes[1]);
    assert_eq!((l1.offset, l1.data.len()), (0x30000, 16));
    assert_eq!(l1.data[8..], (0x400000u64 | COPIED).to_be_bytes());
    assert_eq!((l2.offset, l2.data.len()), (0x100000 + 3 * 512, 512));
    assert_eq!(l2.data[40..48], (0x300000u64 | COPIED).to_be_bytes());
    assert!(!t.has_dirty());
    assert!(t.collect().writes.is_empty());
    t.finish(collected, false);
    assert!(t.has_dirty(), "what could not be written stays dirty");
    assert_eq!(t.collect().writes.len(), 2);
}

#[test]
fn a_set_full_of_dirty_slices_says_so() {
    let t = tables(8);
    for slice in 0..8 {
        assert!(fill(&t, slice, &[]));
        t.with((slice * 64) << 16, |s| t.set_entry(s, 0, COPIED | 0x500000, 0)).unwrap();
    }
    assert!(matches!(t.cache.reserve(9), Err(cache::Full::Dirty)));
    assert!(t.wants_commit());
    let collected = t.collect();
    assert!(matches!(t.cache.reserve(9), Err(cache::Full::Dirty)), "being written");
    t.finish(collected, true);
    assert!(t.cache.reserve(9).is_ok());
}

#[test]
fn records_keep_a_slice_and_others_away() {
    let t = tables(8);
    assert!(fill(&t, 0, &[]));
    let id = t.with(0, |s| s.begin(4, 3)).unwrap();
    t.with(0, |s| {
        assert!(s.in_flight(6, 1).is_some() && s.in_flight(7, 1).is_none() && s.in_flight(0, 4).is_none());
        assert_eq!((s.next_in_flight(0, 10), s.next_in_flight(5, 10), s.next_in_flight(7, 10)), (4, 5, 10));
    })
    .unwrap();
    for slice in 1..100 {
        assert!(fill(&t, slice, &[]));
    }
    let waiting = t.with(0, |s| s.in_flight(4, 1)).unwrap().unwrap();
    t.with(0, |s| s.shorten(id, 1)).unwrap();
    assert!(waiting.is_set(), "whoever waits looks again");
    assert!(t.with(0, |s| s.in_flight(5, 2).is_none()).unwrap());
    t.with(0, |s| s.end(id)).unwrap();
    for slice in 1..100 {
        assert!(fill(&t, slice, &[]));
    }
    assert!(t.with(0, |_| ()).is_none(), "evicted");
}

#[test]
fn readers_never_see_half_a_change() {
    // Two words that are always written together, as with extended entries.
    let t = Tables::new(geo(16, true), 0x30000, &[0x100000 | COPIED], 8 * 512, 512, 512);
    let at = t.cache.reserve(0).ok().unwrap();
    t.cache.fill(&at, 0, &vec![0; 64], false);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..200_000u64 {
                t.with(0, |s| {
                    s.set_word(10, n);
                    s.set_word(11, n);
                });
                if n % 1000 == 0 {
                    // Another slice takes the slot's place for a moment.
                    t.finish(t.collect(), true);
                }
            }
            stop.store(true, Relaxed);
        });
        scope.spawn(|| {
            let mut seen = 0u64;
            while !stop.load(Relaxed) {
                let pair = t.cache.read(0, |w| (w.get(10), w.get(11)));
                if let Some((a, b)) = pair {
                    assert_eq!(a, b);
                    assert!(a >= seen);
                    seen = a;
                }
            }
        });
    });
}

#[test]
fn what_is_not_used_goes_and_what_is_dirty_stays() {
    // Slices that share a page, and slices of a page each.
    for slice_bytes in [512u64, 4096] {
        let t =
            Tables::new(geo(16, false), 0x30000, &[0x100000 | COPIED], 32 * slice_bytes, slice_bytes, 512);
        let words = (slice_bytes / 8) as usize;
        let put = |slice: u64| {
            let at = t.cache.reserve(slice).ok().unwrap();
            t.cache.fill(&at, slice, &vec![(slice + 1) << 20 | COPIED; words], false);
        };
        let guest = |slice: u64| (slice * words as u64) << 16;
        (0..16).for_each(put);
        assert!(t.clean(), "all were used since the last time: never");
        t.lookup(guest(3), 1).unwrap();
        t.with(guest(5), |s| t.set_entry(s, 0, 0x900_0000 | COPIED, 0)).unwrap();
        assert!(t.clean());
        for slice in 0..16 {
            assert_eq!(t.lookup(guest(slice), 1).is_some(), [3, 5].contains(&slice), "slice {slice}");
        }
        t.finish(t.collect(), true);
        // The lookups used them.
        assert!(t.clean());
        assert!(!t.clean());
        assert!(!t.has_any());
        // Slots and memory are used again.
        (0..16).for_each(put);
        for slice in 0..16 {
            assert_eq!(t.lookup(guest(slice), 1).unwrap().host, Some((slice + 1) << 20));
        }
    }
}

#[test]
fn memory_that_goes_is_never_taken_for_entries() {
    let t = Tables::new(geo(16, false), 0x30000, &[0x100000 | COPIED], 8 * 4096, 4096, 512);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..20_000u64 {
                let at = t.cache.reserve(n % 8).ok().unwrap();
                t.cache.fill(&at, n % 8, &[n << 16 | COPIED; 512], false);
                t.clean();
                t.clean();
            }
            stop.store(true, Relaxed);
        });
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                for slice in 0..8 {
                    let seen = t.cache.read(slice, |w| (w.get(0), w.get(511), w.is_zero(7)));
                    if let Some((first, last, zero)) = seen {
                        assert!(first == last && first & !COPIED != 0 && !zero, "{first:x} {last:x} {zero}");
                    }
                    assert_ne!(t.cache.word(slice, 9), Some(0));
                }
            }
        });
    });
}

/// A disk with the tables of two L1 entries, and a walk over them.
struct Walked {
    t: Tables,
    /// Words of each slice on disk.
    disk: Vec<Vec<u64>>,
    rng: u64,
}

const SLICES: u64 = 2 * 128;

impl Walked {
    fn below(&mut self, n: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng % n
    }

    /// The slice as the disk would be after everything was written.
    fn truth(&self, slice: u64) -> Vec<u64> {
        self.t.cached_words(slice).unwrap_or_else(|| self.disk[slice as usize].clone())
    }

    /// Something happens to the tables.
    fn happens(&mut self) {
        let slice = self.below(SLICES);
        match self.below(8) {
            0 => {
                let collected = self.t.collect();
                for w in &collected.writes {
                    let first = (w.offset - 0x100000) as usize / 8;
                    for (i, b) in w.data.as_chunks::<8>().0.iter().enumerate() {
                        self.disk[(first + i) / 64][(first + i) % 64] = u64::from_be_bytes(*b);
                    }
                }
                self.t.finish(collected, true);
            }
            1 => drop(self.t.clean()),
            _ => {
                if self.t.cached_words(slice).is_none() {
                    let Ok(at) = self.t.cache.reserve(slice) else { return };
                    self.t.cache.fill(&at, slice, &self.disk[slice as usize].clone(), false);
                }
                let (index, cluster) = (self.below(64), self.below(1000) + 100);
                let entry = match self.below(4) {
                    0 => 0,
                    1 => crate::qcow2::format::COMPRESSED | ((cluster << 16) + 0xff00) | (3 << 54),
                    2 => cluster << 16,
                    _ => cluster << 16 | COPIED,
                };
                self.t.with((slice * 64) << 16, |s| self.t.set_entry(s, index as usize, entry, 0));
            }
        }
    }
}

#[test]
fn references_are_counted_along_whatever_happens_between_reading_and_counting() {
    for seed in 1..=60u64 {
        // The second table lies right behind the first one, so that the model's disk is one array.
        let l1 = [0x100000 | COPIED, 0x110000 | COPIED];
        let t = Tables::new(geo(16, false), 0x30000, &l1, 16 * 512, 512, 512);
        let mut w = Walked { t, disk: vec![vec![0; 64]; SLICES as usize], rng: seed * 0x9e37_79b9 };
        (0..200).for_each(|_| w.happens());
        let turn = w.t.watch().begin(geo(16, false), 1 << 30).unwrap();
        assert!(w.t.watch().begin(geo(16, false), 1 << 30).is_none(), "one at a time");
        let mut again = 0;
        for index in 0..2 {
            let entry = w.t.begin_table(index).unwrap();
            let mut slice = index * 128;
            while slice < (index + 1) * 128 {
                let unsteady = w.t.steady(slice);
                (0..w.below(4)).for_each(|_| w.happens());
                let mut read = w.disk[slice as usize].clone();
                (0..w.below(4)).for_each(|_| w.happens());
                match w.t.count_slice(slice, entry, &mut read, unsteady, |_, _| ()) {
                    Counted::Yes { differs } => {
                        assert!(!differs, "seed {seed}, slice {slice}");
                        slice += 1;
                    }
                    Counted::Again => again += 1,
                    Counted::Moved => panic!("nothing moves"),
                }
                (0..w.below(3)).for_each(|_| w.happens());
            }
        }
        (0..50).for_each(|_| w.happens());
        assert!(seed != 1 || again > 0, "the walk met stale reads");
        let mut expected = std::collections::BTreeMap::new();
        for entry in l1.into_iter().chain((0..SLICES).flat_map(|s| w.truth(s))) {
            let compressed = entry & crate::qcow2::format::COMPRESSED != 0;
            // Four sectors from 0xff00 on reach into the next cluster.
            let clusters = if compressed {
                vec![entry >> 16 & 0xffff, (entry >> 16 & 0xffff) + 1]
            } else {
                vec![entry >> 16 & 0xffff]
            };
            for cluster in clusters.into_iter().filter(|_| entry != 0) {
                let cell = expected.entry(cluster).or_insert((0u64, 0u32, 0u32));
                cell.0 += 1;
                cell.1 += u32::from(!compressed && entry & COPIED != 0);
                cell.2 += u32::from(!compressed && entry & COPIED == 0);
            }
        }
        let mut census = w.t.watch().census();
        let cells = &mut census.as_mut().unwrap().cells;
        for cluster in 0..1200 {
            let cell = cells.get(cluster);
            let want = expected.get(&cluster).copied().unwrap_or((0, 0, 0));
            assert_eq!((cell.refs, cell.sole, cell.shared), want, "seed {seed}, cluster {cluster}");
        }
        drop(census);
        drop(turn);
        assert!(w.t.watch().census().is_none());
    }
}

#[test]
fn a_table_that_moves_is_read_again() {
    let t = tables(16);
    let turn = t.watch().begin(geo(16, false), 1 << 30).unwrap();
    let entry = t.begin_table(0).unwrap();
    let unsteady = t.steady(0);
    t.set_l1(0, 0x200000 | COPIED);
    assert_eq!(t.count_slice(0, entry, &mut [0; 64], unsteady, |_, _| ()), Counted::Moved);
    let entry = t.begin_table(0).unwrap();
    assert_eq!(entry, 0x200000 | COPIED);
    let unsteady = t.steady(0);
    assert_eq!(t.count_slice(0, entry, &mut [0; 64], unsteady, |_, _| ()), Counted::Yes { differs: false });
    // There was none at the second entry; one that comes later is counted when it comes.
    for slice in 1..128 {
        let unsteady = t.steady(slice);
        t.count_slice(slice, entry, &mut [0; 64], unsteady, |_, _| ());
    }
    assert!(t.begin_table(1).is_none());
    t.set_l1(1, 0x300000 | COPIED);
    fill(&t, 128, &[]);
    t.with(512 << 20, |s| t.set_entry(s, 0, 0x400000 | COPIED, 0)).unwrap();
    let mut census = t.watch().census();
    let cells = &mut census.as_mut().unwrap().cells;
    let refs = |cluster: u64| cells.get(cluster).refs;
    assert_eq!([0x10, 0x20, 0x30, 0x40].map(refs), [0, 1, 1, 1]);
    drop(census);
    drop(turn);
}

#[test]
fn what_the_disk_has_otherwise_is_seen() {
    let t = tables(16);
    let _turn = t.watch().begin(geo(16, false), 1 << 30).unwrap();
    let entry = t.begin_table(0).unwrap();
    fill(&t, 0, &[0x500000 | COPIED]);
    fill(&t, 1, &[0x500000 | COPIED]);
    t.with(64 << 16, |s| t.set_entry(s, 0, 0x600000 | COPIED, 0)).unwrap();
    let mut seen = Vec::new();
    for slice in 0..2 {
        let unsteady = t.steady(slice);
        let counted = t.count_slice(slice, entry, &mut [0; 64], unsteady, |word, _| seen.push(word));
        // What waits to be written may differ.
        assert_eq!(counted, Counted::Yes { differs: slice == 0 });
    }
    assert_eq!((seen[0], seen[64]), (0x500000 | COPIED, 0x600000 | COPIED));
}
