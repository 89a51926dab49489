//! Grace periods: by hand, on real threads, and model-checked.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

#[cfg(not(loom))]
fn pair() -> (Epochs, Stays) {
    let (epochs, stays) = (Epochs::default(), Stays::new());
    epochs.register(&stays);
    (epochs, stays)
}

#[cfg(not(loom))]
#[test]
fn nothing_under_way_passes_at_once() {
    let (epochs, stays) = pair();
    assert!(epochs.passed(&epochs.ticket()));
    let ticket = epochs.ticket();
    let _later = stays.stay();
    assert!(epochs.passed(&ticket));
}

#[cfg(not(loom))]
#[test]
fn a_request_from_before_holds_a_ticket_and_one_from_after_does_not() {
    let (epochs, stays) = pair();
    let before = stays.stay();
    let ticket = epochs.ticket();
    assert!(!epochs.passed(&ticket));
    // Steady load: one is always under way.
    let mut others = vec![stays.stay()];
    for _ in 0..10 {
        assert!(!epochs.passed(&ticket));
        others.push(stays.stay());
        others.remove(0);
    }
    drop(before);
    let mut rounds = 0;
    while !epochs.passed(&ticket) {
        others.push(stays.stay());
        others.remove(0);
        rounds += 1;
        assert!(rounds < 10, "new requests hold an old ticket");
    }
}

#[cfg(not(loom))]
#[test]
fn a_ticket_of_a_later_time_waits_for_what_came_in_between() {
    let (epochs, stays) = pair();
    let first = stays.stay();
    let early = epochs.ticket();
    assert!(!epochs.passed(&early));
    let second = stays.stay();
    let late = epochs.ticket();
    drop(first);
    while !epochs.passed(&early) {
        // The second one may have taken the counter that is waited for.
        if !epochs.passed(&late) && !epochs.passed(&early) {
            break;
        }
    }
    for _ in 0..5 {
        assert!(!epochs.passed(&late), "the second request is still under way");
    }
    drop(second);
    assert!(epochs.passed(&late) && epochs.passed(&early));
}

#[cfg(not(loom))]
#[test]
fn participants_that_have_gone_hold_nothing() {
    let (epochs, stays) = pair();
    let stay = stays.stay();
    let ticket = epochs.ticket();
    drop(stay);
    drop(stays);
    let other = Stays::new();
    epochs.register(&other);
    assert_eq!(lock(&epochs.participants).len(), 2, "the ticket still looks at it");
    assert!(epochs.passed(&ticket));
    drop(ticket);
    epochs.register(&Stays::new());
    assert_eq!(lock(&epochs.participants).len(), 2);
}

/// Threads look a value up and use it; another one replaces it and, once its ticket has passed, marks the old one as
/// gone. Nobody may use what is marked.
#[cfg(not(loom))]
#[test]
fn nobody_uses_what_has_passed() {
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    const VALUES: usize = 300;
    let epochs = Arc::new(Epochs::default());
    let current = Arc::new(AtomicUsize::new(0));
    let gone: Arc<Vec<AtomicBool>> = Arc::new((0..=VALUES).map(|_| AtomicBool::new(false)).collect());
    let end = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (epochs, current, gone, end) = (epochs.clone(), current.clone(), gone.clone(), end.clone());
            std::thread::spawn(move || {
                let stays = Stays::new();
                epochs.register(&stays);
                let mut under_way = std::collections::VecDeque::new();
                while !end.load(Relaxed) {
                    let stay = stays.stay();
                    under_way.push_back((current.load(Relaxed), stay));
                    if under_way.len() > 4 {
                        under_way.pop_front();
                    }
                    for (value, _) in &under_way {
                        assert!(!gone[*value].load(Relaxed), "{value} has gone");
                    }
                    std::thread::yield_now();
                }
            })
        })
        .collect();
    for value in 1..=VALUES {
        current.store(value, Relaxed);
        let ticket = epochs.ticket();
        while !epochs.passed(&ticket) {
            std::thread::yield_now();
        }
        gone[value - 1].store(true, Relaxed);
    }
    end.store(true, Relaxed);
    readers.into_iter().for_each(|r| r.join().unwrap());
}

/// Two requests, the second of which may overlap the first, against one replacement.
#[cfg(loom)]
#[test]
fn loom_nobody_uses_what_has_passed() {
    use loom::sync::atomic::{AtomicBool, AtomicUsize};
    loom::model(|| {
        let epochs = Arc::new(Epochs::default());
        let current = Arc::new(AtomicUsize::new(0));
        let gone = Arc::new(AtomicBool::new(false));
        let reader = {
            let (epochs, current, gone) = (epochs.clone(), current.clone(), gone.clone());
            loom::thread::spawn(move || {
                let stays = Stays::new();
                epochs.register(&stays);
                let first = stays.stay();
                let seen = current.load(Relaxed);
                // Joins without a fence of its own.
                let second = stays.stay();
                let again = current.load(Relaxed);
                drop(first);
                if seen == 0 && again == 1 {
                    drop(second);
                    return;
                }
                if again == 0 {
                    assert!(!gone.load(Relaxed), "used after it has passed");
                }
                drop(second);
            })
        };
        current.store(1, Relaxed);
        let ticket = epochs.ticket();
        for _ in 0..2 {
            if epochs.passed(&ticket) {
                gone.store(true, Relaxed);
                break;
            }
            loom::thread::yield_now();
        }
        reader.join().unwrap();
    });
}

/// A replacement by one thread whose ticket another thread asks about, against a request on the counter that the first grace
/// period has turned away from.
#[cfg(loom)]
#[test]
fn loom_two_grace_periods_in_a_row() {
    use loom::sync::atomic::{AtomicBool, AtomicUsize};
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let epochs = Arc::new(Epochs::default());
        let current = Arc::new(AtomicUsize::new(0));
        let gone = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let reader = {
            let (epochs, current, gone) = (epochs.clone(), current.clone(), gone.clone());
            loom::thread::spawn(move || {
                let stays = Stays::new();
                epochs.register(&stays);
                for _ in 0..2 {
                    let stay = stays.stay();
                    let seen = current.load(Relaxed);
                    if seen < 2 {
                        assert!(!gone[seen].load(Relaxed), "{seen} used after it has passed");
                    }
                    drop(stay);
                }
            })
        };
        for value in 1..=2 {
            current.store(value, Relaxed);
            let ticket = epochs.ticket();
            if epochs.passed(&ticket) {
                gone[value - 1].store(true, Relaxed);
            }
        }
        reader.join().unwrap();
    });
}
