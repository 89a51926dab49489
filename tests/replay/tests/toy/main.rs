//! The harness on formats simple enough to be known right or wrong: it must pass the right one and convict every wrong one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod format;

use std::sync::Arc;

use format::{TOY, Wrong};
use ringblk_replay::disk::{Disk, Entry, registry};
use ringblk_replay::image::Image;
use ringblk_replay::judge::{Judge, Rigour};
use ringblk_replay::scenario::{Can, Format, Subject};
use ringblk_replay::states::{Plan, Void};
use ringblk_replay::workload::{self, Load};
use serde_json::{Value, json};

type Options = dyn Fn(&Disk) -> Value + Send + Sync;

fn subject(name: &str, image: Image, options: Arc<Options>, sectors: u64) -> Subject {
    Subject {
        name: name.to_owned(),
        registry: registry(&[TOY]),
        files: vec![("image".to_owned(), image)],
        top: "image".to_owned(),
        options,
        format: Format::Other,
        checker: None,
        initial: vec![0; (sectors * 512) as usize],
        backing: None,
        cluster: 1,
        discards_in_place: true,
        can: Can::default(),
    }
}

fn toy(wrong: Wrong) -> Subject {
    let options = move |disk: &Disk| {
        json!({
            "driver": "toy", "wrong": wrong,
            "file": {"driver": "file", "filename": disk.path("image")},
        })
    };
    let subject = subject(&format!("toy, {wrong:?}"), format::create(), Arc::new(options), format::SECTORS);
    Subject { checker: Some(format::check), ..subject }
}

fn raw() -> Subject {
    let options =
        |disk: &Disk| json!({"driver": "raw", "file": {"driver": "file", "filename": disk.path("image")}});
    let subject = subject("raw", Image::from_bytes(&[0; 64 << 10]), Arc::new(options), 128);
    Subject { can: Can { zero: true, discard: true, ..Can::default() }, ..subject }
}

/// States judged until the verdict, and the verdict.
fn verdict(subject: &Subject, seed: u64, void: Void<'_>) -> (u64, Result<(), String>) {
    let load = Load { seed, steps: 16, ..Load::default() };
    let run = match workload::run(subject, &load) {
        Ok(run) => run,
        Err(e) => return (0, Err(e)),
    };
    let mut judge = Judge::new(subject, Rigour { open: 4, qemu: 0 }, seed).unwrap();
    let result = judge.all(&run, Plan::default(), seed, void);
    (judge.tally.states, result)
}

#[test]
fn the_right_format_and_raw_pass() {
    let mut states = 0;
    for seed in 1..6 {
        for subject in [toy(Wrong::Nothing), raw()] {
            let (n, result) = verdict(&subject, seed, &|_, _| false);
            assert_eq!(result, Ok(()), "{n} states");
            states += n;
        }
    }
    assert!(states > 3000, "{states} states");
}

#[test]
fn every_wrong_format_is_convicted() {
    for wrong in
        [Wrong::FirstBarrier, Wrong::LastBarrier, Wrong::SameTable, Wrong::TornSector, Wrong::EarlyReuse]
    {
        let errors: Vec<_> =
            (1..6).filter_map(|seed| verdict(&toy(wrong), seed, &|_, _| false).1.err()).collect();
        eprintln!("{wrong:?}: {} of 5, {}", errors.len(), errors.first().map_or("", String::as_str));
        assert!(!errors.is_empty(), "{wrong:?} goes unnoticed");
    }
}

#[test]
fn every_barrier_of_the_right_format_is_needed_and_so_are_those_of_raw() {
    let convicted =
        |subject: &Subject, void: Void<'_>| (1..6).any(|seed| verdict(subject, seed, void).1.is_err());
    assert!(convicted(&raw(), &|_, _| true), "raw without barriers goes unnoticed");
    let toy = toy(Wrong::Nothing);
    assert!(convicted(&toy, &|_, _| true), "the format without barriers goes unnoticed");
    // A barrier right after the switch, and one before it.
    for last in [false, true] {
        let noticed = (1..6).any(|seed| {
            let load = Load { seed, steps: 16, ..Load::default() };
            let run = workload::run(&toy, &load).unwrap();
            let switch = |i: usize| i > 0 && run.log.entries[i - 1].offset == 0;
            let void = |i: usize, _: &Entry| switch(i) == last;
            let mut judge = Judge::new(&toy, Rigour { open: 4, qemu: 0 }, seed).unwrap();
            judge.all(&run, Plan::default(), seed, &void).is_err()
        });
        assert!(
            noticed,
            "the format without its {} barriers goes unnoticed",
            if last { "last" } else { "first" }
        );
    }
}
