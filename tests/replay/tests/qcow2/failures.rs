//! The disk fails: each operation in turn, and whatever a crash makes of that must still be good. What was acknowledged and
//! flushed before is there; a flush that failed is not followed by one that succeeds.

use std::sync::{Arc, Mutex};

use ringblk_replay::disk::Attempt;
use ringblk_replay::judge::{Judge, Rigour};
use ringblk_replay::states::Plan;
use ringblk_replay::workload::{self, Load};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn each_operation_fails(name: &str) {
    let Some(subject) = super::subject(name) else { return };
    let plan = Plan { exhaustive: 3, random: 4, torn: 1, each: 4 };
    let mut states = 0;
    for seed in 1..=super::number("RINGBLK_STATES", 1) {
        let load = Load { seed, steps: 8, together: 3, flush: 4, sessions: 2, lone: false };
        let mut nth = 0;
        loop {
            let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
            let struck = Arc::new(Mutex::new(String::new()));
            let mark = Arc::clone(&struck);
            let rule = move |attempt: Attempt<'_>| {
                (attempt.nth == nth).then(|| {
                    *mark.lock().unwrap() = format!("a {} of '{}'", attempt.kind, attempt.file);
                    errno
                })
            };
            let run = workload::run_with(&subject, &load, Some(Box::new(rule)));
            let run = run.unwrap_or_else(|e| panic!("{name}, seed {seed}, operation {nth} fails: {e}"));
            if run.failure.is_none() {
                break;
            }
            let mut judge = Judge::new(&subject, Rigour { open: 4, qemu: 0 }, seed).unwrap();
            let verdict = judge.all(&run, plan, seed, &|_, _| false);
            verdict.unwrap_or_else(|e| {
                let struck = struck.lock().unwrap();
                panic!("{e}\nafter operation {nth}, {struck}, failed with {errno} ({:?})", run.failure)
            });
            states += judge.tally.states;
            nth += 1 + nth / 20;
        }
        eprintln!("{name}, seed {seed}: {nth} operations, {states} states");
        assert!(nth > 20);
    }
}

#[test]
fn plain() {
    each_operation_fails("plain, filled");
}

#[test]
fn lazy() {
    each_operation_fails("lazy");
}

#[test]
fn backing() {
    each_operation_fails("backing raw");
}

#[test]
fn snapshots() {
    each_operation_fails("snapshots");
}

#[test]
fn external_data() {
    each_operation_fails("external data");
}
