//! Tests of the log's text, filter and rate limit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::filter::{DEFAULT_LEVEL, Pattern};
use super::limit::{BURST, WINDOW};
use super::*;
use log::LevelFilter;

fn text(style: Style, level: Level, message: &str, dropped: u64) -> String {
    let now = UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    line(style, now, level, "session", message, dropped)
}

#[test]
fn lines_carry_time_or_priority() {
    assert_eq!(
        text(Style::Timestamp, Level::Warn, "gone", 0),
        "2023-11-14T22:13:20.123456Z WARN  session: gone\n"
    );
    assert_eq!(text(Style::Journal, Level::Error, "gone", 0), "<3>session: gone\n");
    assert_eq!(text(Style::Journal, Level::Info, "x", 7), "<6>session: x (7 similar lines were dropped)\n");
}

#[test]
fn dates_of_the_calendars_corners() {
    for (days, date) in [
        (0, (1970, 1, 1)),
        (58, (1970, 2, 28)),
        (59, (1970, 3, 1)),
        (11_016, (2000, 2, 29)),
        (11_017, (2000, 3, 1)),
        (19_782, (2024, 2, 29)),
        (20_088, (2024, 12, 31)),
        (20_089, (2025, 1, 1)),
        (47_540, (2100, 2, 28)),
        (47_541, (2100, 3, 1)),
    ] {
        assert_eq!(civil_date(days), date, "{days}");
    }
}

#[test]
fn a_message_cannot_forge_a_line() {
    let mut message = Capped::default();
    write!(message, "a\n<0>kernel: x\x1b[2J\u{202e}b").unwrap();
    assert_eq!(message.text, "a\\n<0>kernel: x\\u{1b}[2J\\u{202e}b");
    let line = text(Style::Journal, Level::Info, &message.text, 0);
    assert_eq!(line.matches('\n').count(), 1);
}

#[test]
fn long_messages_are_cut() {
    let mut message = Capped::default();
    assert!(write!(message, "{}", "ä".repeat(MAX_LINE)).is_err());
    assert!(message.text.ends_with("ä [cut]"));
    assert!(message.text.len() <= MAX_LINE + 8);
}

#[test]
fn targets_lose_the_program_name() {
    assert_eq!(display_target("ringblk::session::memory"), "session::memory");
    assert_eq!(display_target("ringblk_graph::drain"), "graph::drain");
    assert_eq!(display_target("ringblk"), "ringblk");
    assert_eq!(display_target("vhost::x"), "vhost::x");
}

#[test]
fn patterns_cover_names_and_what_lies_beneath() {
    let p = Pattern::new("graph");
    assert!(p.matches("graph") && p.matches("graph::drain"));
    assert!(!p.matches("graphs") && !p.matches("x::graph"));
    for (pattern, target, yes) in [
        ("*", "anything", true),
        ("dr*::q*2", "drivers::qcow2", true),
        ("dr*::q*2", "drivers::qcow2::map", false),
        ("*cow*", "drivers::qcow2::map", true),
        ("a*b*c", "aXbYbZc", true),
        ("a*b*c", "aXbYbZ", false),
        ("ringblk_graph::*", "graph::drain", true),
    ] {
        assert_eq!(Pattern::new(pattern).matches(target), yes, "{pattern} {target}");
    }
}

#[test]
fn unknown_patterns_are_told_apart() {
    for known in ["graph", "graph::drain", "dr*", "*", "ringblk_host", "ringblk"] {
        assert!(Pattern::new(known).is_known(), "{known}");
    }
    for unknown in ["nosuch", "zz*"] {
        assert!(!Pattern::new(unknown).is_known(), "{unknown}");
    }
}

#[test]
fn the_last_matching_rule_decides() {
    let f = Filter::parse("warn, graph=debug,graph::drain=off").unwrap();
    assert_eq!(f.level("qmp"), LevelFilter::Warn);
    assert_eq!(f.level("graph::x"), LevelFilter::Debug);
    assert_eq!(f.level("graph::drain"), LevelFilter::Off);
    assert_eq!(f.most(), LevelFilter::Debug);
    assert_eq!(Filter::parse("").unwrap().level("x"), DEFAULT_LEVEL);
    assert!(Filter::parse("graph=loud").unwrap_err().0.contains("'loud' is not a level"));
}

#[test]
fn trace_options() {
    let o = TraceOption::parse("graph*,file=/tmp/l,,og").unwrap();
    assert_eq!(o.enable.as_deref(), Some("graph*"));
    assert_eq!(o.file.as_deref(), Some(Path::new("/tmp/l,og")));
    assert!(TraceOption::parse("x,bar=3").unwrap_err().0.contains("Invalid parameter 'bar'"));
    assert!(TraceOption::parse("").is_err());
}

#[test]
fn trace_patterns_come_from_the_file_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    std::fs::write(&path, "# comment\n\ngraph\n-graph::drain\n").unwrap();
    let option = TraceOption { enable: Some("qmp".into()), events: Some(path.clone()), file: None };
    let rules = option.patterns().unwrap();
    let expected = [
        (Pattern::new("graph"), LevelFilter::Trace),
        (Pattern::new("graph::drain"), DEFAULT_LEVEL),
        (Pattern::new("qmp"), LevelFilter::Trace),
    ];
    assert_eq!(rules, expected);
    std::fs::write(&path, "a\n".repeat(1 << 20)).unwrap();
    assert!(option.patterns().unwrap_err().0.contains("longer than"));
    std::fs::remove_file(&path).unwrap();
    assert!(option.patterns().unwrap_err().0.contains("'events'"));
}

#[test]
fn a_site_is_limited_and_says_what_was_dropped() {
    let mut limiter = RateLimiter::default();
    let site = || Site::Call("a.rs", 1);
    let at = Duration::from_secs;
    for _ in 0..BURST {
        assert_eq!(limiter.admit(site(), at(100)), Verdict::Write(0));
    }
    for _ in 0..3 {
        assert_eq!(limiter.admit(site(), at(104)), Verdict::Drop);
    }
    assert_eq!(limiter.admit(Site::Call("a.rs", 2), at(104)), Verdict::Write(0));
    assert_eq!(limiter.admit(site(), at(100) + WINDOW), Verdict::Write(3));
    assert_eq!(limiter.admit(site(), at(100) + WINDOW), Verdict::Write(0));
    assert_eq!(limiter.take_dropped(), 0);
}

#[test]
fn made_up_targets_share_one_limit() {
    let mut limiter = RateLimiter::default();
    let verdicts: Vec<_> = (0..3000)
        .map(|n| limiter.admit(Site::Target(format!("t{n}")), Duration::ZERO))
        .filter(|v| *v == Verdict::Drop)
        .collect();
    assert_eq!(verdicts.len(), 3000 - 1024 - BURST as usize);
    assert_eq!(limiter.take_dropped(), verdicts.len() as u64);
    assert_eq!(limiter.take_dropped(), 0);
}

#[test]
fn journald_is_told_by_the_stream_itself() {
    let stat = rustix::fs::fstat(rustix::stdio::stderr()).unwrap();
    assert_eq!(style(Some(&format!("{}:{}", stat.st_dev, stat.st_ino))), Style::Journal);
    assert_eq!(style(Some(&format!("{}:{}", stat.st_dev, stat.st_ino + 1))), Style::Timestamp);
    for bad in [None, Some(""), Some("x"), Some("1:y")] {
        assert_eq!(style(bad), Style::Timestamp);
    }
}

/// The one test that installs the logger; it alone may change what is global.
#[test]
fn end_to_end_into_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    assert!(init(Some("nonsense"), None).unwrap_err().0.starts_with("RINGBLK_LOG"));
    init(Some("off,mine=info"), None).unwrap();
    apply(&TraceOption { enable: Some("mine::deep".into()), events: None, file: Some(path.clone()) })
        .unwrap();
    log::info!(target: "mine", "one {}", 1);
    log::debug!(target: "mine", "not this");
    log::trace!(target: "mine::deep", "two\nlines");
    log::error!(target: "other", "nor this");
    for n in 0..50 {
        log::warn!(target: "mine", "flood {n}");
    }
    flush();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("INFO  mine: one 1\n"), "{text}");
    assert!(text.contains("TRACE mine::deep: two\\nlines\n"), "{text}");
    assert!(!text.contains("this"), "{text}");
    assert_eq!(text.matches("flood").count(), BURST as usize, "{text}");
    assert!(text.contains("40 lines were dropped"), "{text}");
    let missing = dir.path().join("no/log");
    assert!(
        apply(&TraceOption { file: Some(missing), ..Default::default() }).unwrap_err().0.contains("'file'")
    );
}
