//! Reading fio's report.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Engine, Job, figures};
use crate::drive::Pattern;

#[test]
fn figures_add_both_directions() {
    let text = r#"fio: a warning
        {"jobs": [{"error": 0, "usr_cpu": 20.0, "sys_cpu": 30.0,
          "read": {"iops": 1000.5, "total_ios": 2001, "runtime": 2000},
          "write": {"iops": 0.0, "total_ios": 0, "runtime": 0}}]}"#;
    let found = figures(text).unwrap();
    assert_eq!(found.iops, 1000.5);
    assert!((found.cpu_ns - 1e9 / 2001.0).abs() < 1e-6, "{}", found.cpu_ns);
    for broken in ["", "{}", r#"{"jobs":[{"error": 5}]}"#, r#"{"jobs":[{"error": 0, "read": {"iops": 0}}]}"#]
    {
        assert!(figures(broken).is_err(), "{broken}");
    }
}

#[test]
fn mixed_loads_become_two_options() {
    let job = Job { engine: Engine::Psync, direct: true, depth: 1 };
    let line = job.arguments("/f".as_ref(), Pattern { random: true, reads: 30 }, 4096, 0.5, &[1, 2]);
    for wanted in ["--rw=randrw", "--rwmixread=30", "--cpus_allowed=1,2", "--runtime=500ms", "--direct=1"] {
        assert!(line.iter().any(|option| option == wanted), "{wanted} in {line:?}");
    }
}
