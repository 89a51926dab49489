//! Bitmaps against a plain vector of flags.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::*;

fn bitmap(granularity: u32, size: u64) -> Bitmap {
    Bitmap::new("b", granularity, size).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Set(u64, u64),
    Clear(u64, u64),
    ClearAll,
    Resize(u64),
    Reload(usize),
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    let range = || (0..size + 1000, 0..size / 2);
    prop_oneof![
        6 => range().prop_map(|(o, l)| Step::Set(o, l)),
        3 => range().prop_map(|(o, l)| Step::Clear(o, l)),
        1 => Just(Step::ClearAll),
        1 => (1..2 * size).prop_map(Step::Resize),
        1 => (8usize..64).prop_map(Step::Reload),
    ]
}

/// One flag for each granule.
struct Model {
    granularity: u64,
    size: u64,
    flags: Vec<bool>,
}

impl Model {
    fn change(&mut self, offset: u64, len: u64, to: bool) {
        let end = offset.saturating_add(len).min(self.size);
        for at in 0..self.flags.len() as u64 {
            let (from, until) = (at * self.granularity, (at + 1) * self.granularity);
            if offset < end && from < end && offset < until {
                self.flags[at as usize] = to;
            }
        }
    }

    fn resize(&mut self, size: u64) {
        self.size = size;
        self.flags.resize(size.div_ceil(self.granularity) as usize, false);
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (at, _) in self.flags.iter().enumerate().filter(|(_, f)| **f) {
            let (from, until) =
                (at as u64 * self.granularity, ((at as u64 + 1) * self.granularity).min(self.size));
            match ranges.last_mut() {
                Some((o, l)) if *o + *l == from => *l = until - *o,
                _ => ranges.push((from, until - from)),
            }
        }
        ranges
    }
}

fn ranges(bitmap: &Bitmap) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Some((offset, len)) = bitmap.next_dirty(at, u64::MAX, u64::MAX) {
        all.push((offset, len));
        at = offset + len;
    }
    all
}

proptest! {
    #[test]
    fn agrees_with_flags(
        shift in 9u32..13,
        size in 1u64..200_000,
        steps in prop::collection::vec(step(200_000), 0..30),
        cut in (0u64..200_000, 0u64..200_000, 1u64..9000),
    ) {
        let b = bitmap(1 << shift, size);
        let mut m = Model { granularity: 1 << shift, size: 0, flags: Vec::new() };
        m.resize(size);
        for step in steps {
            match step {
                Step::Set(o, l) => {
                    b.set(o, l);
                    m.change(o, l, true);
                }
                Step::Clear(o, l) => {
                    b.clear(o, l);
                    m.change(o, l, false);
                }
                Step::ClearAll => {
                    b.clear_all();
                    m.change(0, u64::MAX, false);
                }
                Step::Resize(size) => {
                    b.resize(size).unwrap();
                    m.resize(size);
                }
                Step::Reload(chunk) => {
                    // Through the serialised form in pieces, over a bitmap with other marks.
                    let chunk = chunk / 8 * 8;
                    let mut bytes = vec![0; b.serialised_len() as usize];
                    for (i, part) in bytes.chunks_mut(chunk).enumerate() {
                        let at = (i * chunk) as u64;
                        b.serialise(at, part).unwrap();
                        prop_assert_eq!(b.serialised_is_zero(at, part.len() as u64), part.iter().all(|x| *x == 0));
                    }
                    for (i, flag) in m.flags.iter().enumerate() {
                        prop_assert_eq!(bytes[i / 8] >> (i % 8) & 1 == 1, *flag);
                    }
                    b.set(0, u64::MAX);
                    for (i, part) in bytes.chunks(chunk).enumerate() {
                        b.deserialise((i * chunk) as u64, part).unwrap();
                    }
                }
            }
            prop_assert_eq!(b.count(), m.flags.iter().filter(|f| **f).count() as u64 * m.granularity);
        }
        prop_assert_eq!(ranges(&b), m.ranges());
        // Inside bounds, and cut.
        let (from, to, max) = (cut.0.min(cut.1), cut.0.max(cut.1), cut.2);
        let found = b.next_dirty(from, to, max);
        let wanted = m
            .ranges()
            .into_iter()
            .map(|(o, l)| (o.max(from), (o + l).min(to)))
            .find(|(o, e)| o < e)
            .map(|(o, e)| (o, (e - o).min(max)));
        prop_assert_eq!(found, wanted);
        for at in [0, size / 2, size.saturating_sub(1), size, u64::MAX] {
            let flag = m.flags.get((at / m.granularity) as usize).copied().unwrap_or(false);
            prop_assert_eq!(b.is_dirty(at), flag && at < m.size);
        }
    }

    #[test]
    fn merges_across_granularities(
        shifts in (9u32..16, 9u32..16),
        size in 1u64..1_000_000,
        marks in prop::collection::vec((0u64..1_000_000, 1u64..50_000), 0..20),
    ) {
        let (a, b) = (bitmap(1 << shifts.0, size), bitmap(1 << shifts.1, size));
        for (o, l) in &marks {
            b.set(*o, *l);
        }
        a.merge(&b).unwrap();
        for (o, l) in ranges(&b) {
            prop_assert!(a.is_dirty(o) && a.is_dirty(o + l - 1));
        }
        // Nothing beyond what a granule of the target has to take in.
        for (o, l) in ranges(&a) {
            let (o, l) = (o, l.min(size - o));
            prop_assert!(b.next_dirty(o, (o + (1 << shifts.0)).min(size), 1).is_some());
            let last = (o + l - 1) >> shifts.0 << shifts.0;
            prop_assert!(b.next_dirty(last, size.min(last + (1 << shifts.0)), 1).is_some());
        }
    }
}

#[test]
fn ones_of_a_stored_cluster_mark_a_range() {
    let b = bitmap(512, 512 * 1000);
    b.deserialise_ones(8, 16);
    assert_eq!(ranges(&b), [(64 * 512, 128 * 512)]);
    b.deserialise_ones(120, 1 << 40);
    assert_eq!(ranges(&b), [(64 * 512, 128 * 512), (960 * 512, 40 * 512)]);
}

#[test]
fn bad_bitmaps_are_refused() {
    let words = |r: Result<Bitmap>| r.unwrap_err().to_string();
    assert_eq!(words(Bitmap::new("", 512, 1)), "Bitmap name cannot be empty");
    assert_eq!(words(Bitmap::new("x", 256, 1)), "Granularity must be at least 512");
    assert_eq!(words(Bitmap::new("x", 768, 1)), "Granularity must be a power of 2");
    let long = "x".repeat(1024);
    assert_eq!(words(Bitmap::new(&long, 512, 1)), format!("Bitmap name too long: {long}"));
    // 2^63 bytes would need 2 EiB of bits at this granularity; nothing of it may be allocated.
    assert!(Bitmap::new("x", 512, i64::MAX as u64).is_err());
    assert!(Bitmap::new("x", 1 << 31, 1 << 50).is_ok());
    assert!(bitmap(512, 1).serialise(4, &mut [0; 8]).is_err());
    assert!(bitmap(512, 1).deserialise(4, &[0; 8]).is_err());
}

#[test]
fn a_set_has_limits_and_names() {
    let set = BitmapSet::default();
    assert!(set.is_empty() && !set.recording());
    set.add(bitmap(512, 1 << 20)).unwrap();
    assert_eq!(set.add(bitmap(512, 1 << 20)).unwrap_err().to_string(), "Bitmap already exists: b");
    assert!(set.recording());
    set.find("b").unwrap().set_recording(false);
    set.note_change(0, 512, 1 << 20);
    assert!(!set.recording() && set.find("b").unwrap().count() == 0);
    set.find("b").unwrap().set_recording(true);
    // The node grew by the write itself.
    set.note_change(1 << 20, 1, (1 << 20) + 1);
    assert_eq!(set.find("b").unwrap().count(), 512);
    assert_eq!(set.find("b").unwrap().size(), (1 << 20) + 1);
    // 2 TiB in 512 bytes are 512 MiB of bits: two of them reach the limit with what is there.
    set.add(Bitmap::new("c", 512, 2 << 40).unwrap()).unwrap();
    assert!(set.add(Bitmap::new("d", 512, 2 << 40).unwrap()).is_err());
    assert!(set.remove("c").is_some() && set.remove("c").is_none());
    assert_eq!(set.persistent().len(), 0);
}
