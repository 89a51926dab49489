//! qcow2 after every sort of crash: no corruption, no flushed sector lost, snapshots and backing files as they were.
//!
//! `RINGBLK_STATES=n` judges n times as many states, `RINGBLK_SEED=n` begins with another seed, `RINGBLK_KEEP=folder` keeps
//! the files of a state that is convicted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod barriers;
mod failures;

use ringblk_replay::judge::{Judge, Rigour, Tally};
use ringblk_replay::scenario::{self, Subject};
use ringblk_replay::states::Plan;
use ringblk_replay::workload::{self, Load};

/// The subject of a scenario; `None`, with a word, without QEMU's tools, which make the images.
fn subject(name: &str) -> Option<Subject> {
    if std::process::Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return None;
    }
    Some(scenario::named(name).unwrap().make().unwrap())
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

/// Judges at least `states` states of a scenario, workload by workload.
fn crash(name: &str, states: u64) {
    let Some(subject) = subject(name) else { return };
    let states = states * number("RINGBLK_STATES", 1);
    let mut total = Tally::default();
    let mut seed = number("RINGBLK_SEED", 1);
    // Keys cost time.
    let open = if name == "LUKS" { 10 } else { 3 };
    let rigour = Rigour { open: number("RINGBLK_OPEN", open), qemu: number("RINGBLK_QEMU", 250) };
    while total.states < states {
        // Alone, a few at a time, and many: each finds other things.
        let (together, flush) = [(1, 4), (4, 5), (10, 12)][(seed % 3) as usize];
        let load = Load { seed, together, flush, ..Load::default() };
        let run = workload::run(&subject, &load).unwrap_or_else(|e| panic!("{e}"));
        let mut judge = Judge::new(&subject, rigour, seed).unwrap();
        let verdict = judge.all(&run, Plan::default(), seed, &|_, _| false);
        verdict.unwrap_or_else(|e| panic!("{e}\nRINGBLK_SEED={seed}"));
        total.add(&judge.tally);
        seed += 1;
    }
    eprintln!("{name}: {total:?}");
    // Closing stores them; a crash may leave them without a voice, but not each time.
    assert!(total.bitmaps > 0 || !subject.can.bitmap, "bitmaps are never stored");
}

macro_rules! crash_states {
    ($($test:ident: $name:literal, $states:literal;)*) => {
        $(#[test]
        fn $test() {
            crash($name, $states);
        })*

        #[test]
        fn every_scenario_is_here() {
            let here = [$($name),*];
            for scenario in scenario::qcow2() {
                assert!(here.contains(&scenario.name), "{}", scenario.name);
            }
            assert!([$($states),*].iter().sum::<u64>() >= 50_000);
        }
    };
}

crash_states! {
    plain: "plain", 4000;
    plain_filled: "plain, filled", 4000;
    plain_512: "plain, 512-byte clusters", 2500;
    plain_64k: "plain, 64 KiB clusters", 1500;
    version_2: "version 2", 2000;
    refcount_1: "1-bit refcounts", 2000;
    refcount_64: "64-bit refcounts", 2000;
    small_caches: "small caches", 2500;
    lazy: "lazy", 4000;
    subclusters: "subclusters", 2500;
    subclusters_over_raw: "subclusters over raw", 2500;
    external: "external data", 3000;
    external_raw: "external raw data", 2000;
    backing_raw: "backing raw", 2500;
    backing_qcow2: "backing qcow2, short", 2000;
    discard_no_unref: "discard-no-unref", 2000;
    resize: "resize", 2500;
    snapshots: "snapshots", 3500;
    snapshots_backing: "snapshots, backing, 1 KiB clusters", 2500;
    snapshots_subclusters: "snapshots, subclusters", 2000;
    luks: "LUKS", 2000;
    bitmaps: "bitmaps", 2000;
    compressed: "compressed", 2000;
}
