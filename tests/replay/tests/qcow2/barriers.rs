//! Does the harness bite? With any one kind of barrier declared void it must find a violation.
//!
//! A kind: the how-manieth of how many barriers of one flush of the guest's, on which file; or one outside of any flush.
//! Those of closing are left out: nobody is told anything there, and nothing follows. Those of snapshots count as outside.

use std::collections::BTreeMap;

use ringblk_replay::disk::{Change, Entry};
use ringblk_replay::judge::{Judge, Rigour};
use ringblk_replay::oracle::What;
use ringblk_replay::states::Plan;
use ringblk_replay::workload::{self, CLOSING, Load, Run, SNAPSHOT};

/// Place of a barrier: the file, its number among the barriers of one flush, and how many those are. (0, 0): outside of any.
type Kind = (usize, usize, usize);

/// The kind of each barrier of a run, by its place in the log.
fn kinds(run: &Run) -> BTreeMap<usize, Kind> {
    let mut kinds = BTreeMap::new();
    let flush =
        |(i, e): (usize, &Entry)| (e.change == Change::Flush).then_some((i, e.started, e.done, e.file));
    let barriers: Vec<_> = run.log.entries.iter().enumerate().filter_map(flush).collect();
    let mut closing = Vec::new();
    for event in run.history.events.iter().filter(|e| matches!(e.what, What::Flush)) {
        let Some(ack) = event.ack.filter(|_| event.first != SNAPSHOT) else { continue };
        if event.first == CLOSING {
            closing.push(event.start..ack);
            continue;
        }
        let inside: Vec<_> = barriers.iter().filter(|b| b.1 > event.start && b.2 < ack).collect();
        // Several files at the same time are one barrier.
        let mut starts: Vec<u64> = Vec::new();
        let mut last = 0;
        for barrier in &inside {
            if barrier.1 > last {
                starts.push(barrier.1);
                last = barrier.2;
            }
        }
        for barrier in inside {
            let nth = starts.iter().filter(|s| **s <= barrier.1).count().max(1);
            kinds.entry(barrier.0).or_insert((barrier.3, nth, starts.len()));
        }
    }
    for barrier in barriers.iter().filter(|b| !closing.iter().any(|c| c.contains(&b.1))) {
        kinds.entry(barrier.0).or_insert((barrier.3, 0, 0));
    }
    kinds
}

fn words(found: &Option<String>) -> &str {
    found.as_deref().and_then(|f| f.lines().next()).unwrap_or("NOTHING FOUND")
}

/// Voids each kind in turn. `spared` are kinds that are not needed, each with its reason in the test.
fn every_kind_is_needed(name: &str, spared: &[Kind]) {
    let Some(subject) = super::subject(name) else { return };
    let mut seen: BTreeMap<Kind, Option<String>> = BTreeMap::new();
    for seed in 1..25 {
        let load = Load { seed, together: 1 + seed % 4, flush: 4, lone: true, ..Load::default() };
        let run = workload::run(&subject, &load).unwrap_or_else(|e| panic!("{e}"));
        let kinds = kinds(&run);
        let mut all: Vec<Kind> = kinds.values().copied().collect();
        all.sort_unstable();
        all.dedup();
        for kind in all {
            let found = seen.entry(kind).or_default();
            if found.is_none() {
                let void = |i: usize, _: &Entry| kinds.get(&i) == Some(&kind);
                let mut judge = Judge::new(&subject, Rigour { open: 10, qemu: 0 }, seed).unwrap();
                *found = judge.all(&run, Plan::default(), seed, &void).err();
            }
        }
        if seed > 3 && seen.values().all(Option::is_some) {
            break;
        }
    }
    for (kind, found) in &seen {
        eprintln!("{name}: without {kind:?}: {}", words(found));
    }
    assert!(!seen.is_empty());
    let missed: Vec<_> = seen.iter().filter(|(k, f)| f.is_none() && !spared.contains(k)).collect();
    assert!(missed.is_empty(), "{name}: nothing found without {missed:?}");
}

#[test]
fn plain_needs_every_barrier() {
    every_kind_is_needed("plain", &[]);
}

#[test]
fn filled_needs_every_barrier() {
    every_kind_is_needed("plain, filled", &[]);
}

#[test]
fn external_data_needs_every_barrier() {
    // With nothing to commit the image file has nothing the guest could miss.
    every_kind_is_needed("external data", &[(0, 1, 1)]);
}

#[test]
fn snapshots_need_every_barrier() {
    every_kind_is_needed("snapshots", &[]);
}

#[test]
fn backing_needs_every_barrier() {
    every_kind_is_needed("backing raw", &[]);
}
