//! Ratios, references and verdicts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Contestant, Results, Sample, Spread};
use crate::workload::{self, Against, Figure};

fn sample(iops: f64, p50: Option<f64>, cpu_ns: f64) -> Option<Sample> {
    Some(Sample { iops, p50, p99: p50, cpu_ns, undisturbed: p50.map(|ns| 1e9 / ns), waited: None })
}

#[test]
fn spread_takes_the_middle() {
    assert_eq!(Spread::of(&[]), None);
    assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
    assert_eq!(Spread::of(&[4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
}

#[test]
fn ratios_are_taken_within_rounds_and_skip_failed_runs() {
    let workload = workload::all().into_iter().find(|workload| workload.name == "tmpfs-read").unwrap();
    let results = Results {
        workload,
        contestants: vec![Contestant::Qsd, Contestant::Ringblk, Contestant::Fio(0), Contestant::Fio(1)],
        samples: vec![
            vec![sample(100.0, Some(10.0), 5.0), sample(1000.0, Some(10.0), 5.0), None],
            vec![sample(200.0, Some(4.0), 1.0), sample(2000.0, Some(8.0), 1.0), sample(1.0, Some(1.0), 1.0)],
            vec![sample(400.0, None, 2.0), sample(1000.0, None, 2.0), None],
            vec![sample(100.0, None, 9.0), sample(2500.0, None, 9.0), sample(4.0, None, 1.0)],
        ],
    };
    assert_eq!(results.ratios(Figure::Iops, Against::Qsd), [2.0, 2.0]);
    assert_eq!(results.ratios(Figure::P50, Against::Qsd), [0.4, 0.8]);
    assert_eq!(results.ratios(Figure::Iops, Against::BestFio), [0.5, 0.8, 0.25]);
    assert_eq!(results.ratios(Figure::Cpu, Against::BestFio), [0.5, 0.5, 1.0]);
    assert!(results.ratios(Figure::P50, Against::BestFio).is_empty());
    let text = results.markdown();
    assert!(text.contains("| requests/s / best host fio | 0.50 (0.25..0.80) | ≥ 0.85 | missed |"), "{text}");
    assert!(
        text.contains(
            "| qemu-storage-daemon | 550 (100..1000) | 100000000 (100000000..100000000) | 0.01 (0.01..0.01) |"
        ),
        "{text}"
    );
}

#[test]
fn without_ringblk_targets_are_not_judged() {
    let workload = workload::all().into_iter().find(|workload| workload.name == "null-d32").unwrap();
    let samples = vec![vec![sample(100.0, Some(10.0), 5.0)]];
    let text = Results { workload, contestants: vec![Contestant::Qsd], samples }.markdown();
    assert!(text.contains("| CPU per request, ns | not measured | ≤ 200 |  |"), "{text}");
    assert!(!text.contains("missed"), "{text}");
}
