//! Tests of the parts that need no node: masks, the shares of memory, options. Requests are in the conformance suite and in
//! `drivers/tests/cache.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::options::parse_options;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::block::{MAX_BLOCK, Mask, SECTOR};
use super::layout::{Layout, OVERHEAD};
use super::options::{CacheOptions, Settings};

fn settings(more: Value) -> Result<Settings, String> {
    let mut options = json!({"file": "f"});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let o: CacheOptions = parse_options(options).map_err(|e| e.to_string())?;
    Settings::new(o.mode, o.reads, o.size, o.block_size).map_err(|e| e.to_string())
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    assert_eq!(settings(json!({"size": -1})).unwrap_err(), "Value '-1' is out of range for parameter 'size'");
    for block in [0, 2048, 5000, 131_072] {
        assert_eq!(
            settings(json!({"block-size": block})).unwrap_err(),
            "Parameter 'block-size' expects a power of 2 between 4096 and 65536"
        );
    }
    let small = settings(json!({"size": 4096, "block-size": 4096})).unwrap_err();
    let least: u64 = small.split("at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(settings(json!({"size": least, "block-size": 4096})).is_ok(), "what the message says is enough");
    assert!(settings(json!({"size": 0})).is_ok());
    assert!(settings(json!({"mode": "writearound"})).unwrap_err().contains("writearound"));
}

proptest! {
    #[test]
    fn memory_stays_below_its_size(size in 200_000u64..1 << 40, shift in 12u32..=16, swap in 0u64..1 << 50) {
        let block = 1usize << shift;
        let settings = Settings { mode: Default::default(), reads: Default::default(), size, block };
        if let Ok(layout) = Layout::new(&settings, swap) {
            let frames = (layout.frames * layout.shards) as u64;
            let slots = u64::from(layout.slots);
            prop_assert!(layout.shards.is_power_of_two() && frames >= 8);
            prop_assert!(frames * (block as u64 + OVERHEAD) + slots * OVERHEAD <= size);
            prop_assert!(slots * block as u64 <= swap);
        } else {
            prop_assert!(size < 12 * (block as u64 + OVERHEAD));
        }
    }

    #[test]
    fn masks_are_sets_of_sectors(from in 0..MAX_BLOCK, len in 0..MAX_BLOCK) {
        let to = (from + len).min(MAX_BLOCK);
        let (inside, touched) = (Mask::inside(from, to), Mask::touched(from, to));
        for sector in 0..MAX_BLOCK / SECTOR {
            let (low, high) = (sector * SECTOR, (sector + 1) * SECTOR);
            let one = Mask::touched(low, high);
            prop_assert_eq!(inside.contains(one), from <= low && high <= to);
            prop_assert_eq!(touched.contains(one), from < high && low < to && from < to);
        }
        let runs: Vec<(usize, usize)> = touched.runs().collect();
        let whole = if from < to {
            vec![(from / SECTOR * SECTOR, to.div_ceil(SECTOR) * SECTOR)]
        } else {
            Vec::new()
        };
        prop_assert_eq!(runs, whole);
    }
}

#[test]
fn runs_are_told_apart() {
    let mask =
        Mask::touched(0, 1).plus(Mask::touched(1024, 2048)).plus(Mask::touched(MAX_BLOCK - 1, MAX_BLOCK));
    let runs: Vec<_> = mask.runs().collect();
    assert_eq!(runs, [(0, 512), (1024, 2048), (MAX_BLOCK - 512, MAX_BLOCK)]);
}
