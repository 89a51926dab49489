//! The checker against `qemu-img check`: images as QEMU makes them, and the same images damaged at one place, before and
//! after repair. Figures and messages must agree; where ours differs on purpose the case says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use graph::{CheckFix, CheckReport};

use super::{CheckFailed, Limits, Memory, check_memory};
use crate::qcow2::format::{Header, Policy};

const LEAKS: CheckFix = CheckFix { leaks: true, errors: false };
const ALL: CheckFix = CheckFix { leaks: true, errors: true };

fn tool(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

fn made(program: &str, args: &[&str]) {
    let done = tool(program, args);
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// What `qemu-img check` said.
#[derive(Debug)]
struct Verdict {
    code: i32,
    json: Option<serde_json::Value>,
    lines: Vec<String>,
}

fn qemu_check(path: &Path, fix: CheckFix) -> Verdict {
    let mut args = vec!["check", "-f", "qcow2", "--output=json"];
    match fix {
        CheckFix { errors: true, .. } => args.extend(["-r", "all"]),
        CheckFix { leaks: true, .. } => args.extend(["-r", "leaks"]),
        _ => {}
    }
    args.push(path.to_str().unwrap());
    let done = tool("qemu-img", &args);
    Verdict {
        code: done.status.code().unwrap_or(-1),
        json: serde_json::from_slice(&done.stdout).ok(),
        lines: String::from_utf8_lossy(&done.stderr).lines().map(str::to_owned).collect(),
    }
}

fn ours(bytes: Vec<u8>, fix: CheckFix) -> (Result<CheckReport, CheckFailed>, Vec<u8>) {
    let memory = Memory::new(bytes, 1 << 32);
    let report = check_memory(&memory, fix, Limits::default());
    (report, memory.into_inner())
}

/// The exit code `qemu-img check` would give for our report.
fn code(report: &Result<CheckReport, CheckFailed>) -> i32 {
    match report {
        Err(_) => 1,
        Ok(r) if r.check_errors != 0 => 1,
        Ok(r) if r.corruptions != 0 => 2,
        Ok(r) if r.leaks != 0 => 3,
        Ok(_) => 0,
    }
}

/// QEMU's JSON figures by name, 0 where left out.
fn figures(v: &serde_json::Value) -> Vec<(&'static str, u64)> {
    ["check-errors", "corruptions", "leaks", "corruptions-fixed", "leaks-fixed", "total-clusters"]
        .into_iter()
        .chain(["allocated-clusters", "fragmented-clusters", "compressed-clusters", "image-end-offset"])
        .map(|name| (name, v[name].as_u64().unwrap_or(0)))
        .collect()
}

fn our_figures(r: &CheckReport) -> Vec<(&'static str, u64)> {
    vec![
        ("check-errors", r.check_errors),
        ("corruptions", r.corruptions),
        ("leaks", r.leaks),
        ("corruptions-fixed", r.corruptions_fixed),
        ("leaks-fixed", r.leaks_fixed),
        ("total-clusters", r.total_clusters),
        ("allocated-clusters", r.allocated_clusters),
        ("fragmented-clusters", r.fragmented_clusters),
        ("compressed-clusters", r.compressed_clusters),
        ("image-end-offset", r.image_end_offset),
    ]
}

/// How much of QEMU's answer has to be ours after a repair.
#[derive(Clone, Copy, PartialEq)]
enum Repair {
    /// All figures.
    Same,
    /// QEMU's repair fails or leaves something; ours must leave a clean image.
    Better,
    /// Both leave a clean image; the figures differ.
    Clean,
    /// Neither can repair it, and QEMU says so by failing: so does ours.
    Neither,
}

struct Case {
    dir: tempfile::TempDir,
    image: PathBuf,
    /// Differences, told all at once at the end.
    wrong: RefCell<Vec<String>>,
}

impl Drop for Case {
    fn drop(&mut self) {
        let wrong = self.wrong.take();
        if !std::thread::panicking() {
            assert!(wrong.is_empty(), "{} differences\n{}", wrong.len(), wrong.join("\n\n"));
        }
    }
}

impl Case {
    fn new(options: &str, size: &str) -> Case {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let case = Case { dir, image, wrong: RefCell::default() };
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([case.name(), size]);
        made("qemu-img", &args);
        case
    }

    fn name(&self) -> &str {
        self.image.to_str().unwrap()
    }

    fn io(&self, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2"];
        for c in commands {
            args.extend(["-c", c]);
        }
        args.push(self.name());
        made("qemu-io", &args);
    }

    fn img(&self, args: &[&str]) {
        let mut all = args.to_vec();
        all.push(self.name());
        made("qemu-img", &all);
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }

    fn header(&self) -> Header {
        Header::parse(&self.bytes(), Policy { check: true, ..Policy::default() }).unwrap()
    }

    /// Damages a copy of the image and compares both checkers on it, without and with repair.
    fn damaged(&self, what: &str, pokes: &[(u64, &[u8])], repair: Repair) {
        let mut bytes = self.bytes();
        for &(at, data) in pokes {
            let end = at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at as usize..end].copy_from_slice(data);
        }
        self.compare(what, &bytes, repair);
    }

    fn compare(&self, what: &str, bytes: &[u8], repair: Repair) {
        let copy = self.dir.path().join("copy");
        std::fs::write(&copy, bytes).unwrap();
        for fix in [CheckFix::NONE, LEAKS, ALL] {
            std::fs::write(&copy, bytes).unwrap();
            let theirs = qemu_check(&copy, fix);
            let (mut report, after) = ours(bytes.to_vec(), fix);
            let title = format!("{what} {fix:?}\nQEMU: {theirs:#?}\nours: {report:#?}");
            if fix == CheckFix::NONE {
                assert!(after == bytes, "a check without repair has written: {title}");
            }
            if fix == ALL && repair != Repair::Same {
                let same = (theirs.code == 0) == (repair == Repair::Clean);
                self.expect(same, &format!("QEMU's repair: {title}"));
                if repair != Repair::Neither {
                    self.must_be_clean(&after, &title);
                } else {
                    self.expect(code(&report) != 0, &title);
                }
                continue;
            }
            if let Ok(r) = &mut report
                && (r.leaks_fixed != 0 || r.corruptions_fixed != 0)
            {
                // As qemu-img: what is left is counted by another run.
                let fixed = (r.corruptions_fixed, r.leaks_fixed);
                report = ours(after.clone(), CheckFix::NONE).0;
                if let Ok(r) = &mut report {
                    (r.corruptions_fixed, r.leaks_fixed) = fixed;
                }
            }
            self.expect(code(&report) == theirs.code, &format!("exit code of {title}"));
            if let (Ok(r), Some(json)) = (&report, &theirs.json) {
                self.expect(our_figures(r) == figures(json), &format!("figures of {title}"));
                if fix == CheckFix::NONE {
                    let theirs: Vec<&String> =
                        theirs.lines.iter().filter(|l| !l.starts_with("qemu-img: ")).collect();
                    self.expect(
                        r.messages.iter().collect::<Vec<_>>() == theirs,
                        &format!("words of {title}"),
                    );
                }
            }
            if fix == ALL && code(&report) == 0 {
                self.must_be_clean(&after, &title);
            }
        }
    }

    /// QEMU must find nothing in the repaired image.
    fn must_be_clean(&self, bytes: &[u8], title: &str) {
        let path = self.dir.path().join("repaired");
        std::fs::write(&path, bytes).unwrap();
        let verdict = qemu_check(&path, CheckFix::NONE);
        self.expect(verdict.code == 0, &format!("after our repair: {verdict:#?} of {title}"));
        let (again, _) = ours(bytes.to_vec(), CheckFix::NONE);
        self.expect(code(&again) == 0, &format!("our second check: {again:#?} of {title}"));
    }

    fn expect(&self, true_: bool, title: &str) {
        if !true_ {
            self.wrong.borrow_mut().push(title.to_owned());
        }
    }
}

/// An image with a little of everything.
fn usual(options: &str) -> Case {
    let case = Case::new(options, "8M");
    case.io(&[
        "write -P 1 0 300k",
        "write -P 2 4M 128k",
        "write -z 1M 256k",
        "discard 64k 64k",
        "write -P 3 2M 1k",
    ]);
    case
}

fn l2_of(case: &Case, index: u64) -> u64 {
    let at = (case.header().l1_offset + index * 8) as usize;
    u64::from_be_bytes(case.bytes()[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
}

const SHAPES: [&str; 9] = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=64",
    "refcount_bits=1",
    "refcount_bits=8,cluster_size=2M",
    "extended_l2=on,cluster_size=128k",
    "lazy_refcounts=on,refcount_bits=4",
    "preallocation=metadata",
];

#[test]
fn good_images_are_clean() {
    for options in SHAPES {
        let case = usual(options);
        case.damaged(&format!("[{options}] untouched"), &[], Repair::Same);
    }
}

#[test]
fn snapshots_and_compressed_clusters() {
    let case = usual("");
    case.img(&["snapshot", "-c", "one"]);
    case.io(&["write -P 9 0 64k", "write -c -P 5 3M 64k", "write -c -P 6 3136k 64k"]);
    case.img(&["snapshot", "-c", "two"]);
    case.io(&["write -P 9 128k 64k", "write -P 7 3M 64k"]);
    case.damaged("snapshots", &[], Repair::Same);
    let h = case.header();
    let t = h.snapshots_offset;
    case.damaged("snapshot L1 unaligned", &[(t, &[0, 0, 0, 0, 0, 9, 2, 0])], Repair::Same);
    case.damaged("snapshot L1 too large", &[(t + 8, &[0xff; 4])], Repair::Same);
    case.damaged("snapshot L1 past the end", &[(t, &[0, 0, 1, 0, 0, 0, 0, 0])], Repair::Same);
    // The last entry: what follows an earlier one would be read as entries, by the time of day.
    case.damaged("extra data of v2", &[(t + 72 + 36, &[0, 0, 0, 8])], Repair::Same);
    case.damaged("too much extra data", &[(t + 36, &[0, 0, 8, 0])], Repair::Same);
    case.damaged("snapshot table past the end", &[(67, &[1])], Repair::Same);
    case.damaged("snapshot table unaligned", &[(71, &[1])], Repair::Same);
    case.damaged("no snapshots any more", &[(60, &[0, 0, 0, 0])], Repair::Same);
}

#[test]
fn too_many_snapshots() {
    let case = usual("");
    case.img(&["snapshot", "-c", "one"]);
    let t = case.header().snapshots_offset;
    // Entries of zeroes are as good as any.
    case.damaged("many incomplete snapshots", &[(60, &[0, 0, 0, 200]), (t + (1 << 20), &[0])], Repair::Same);
    // With repair QEMU takes a minute for this one; ours alone must manage.
    let mut bytes = case.bytes();
    bytes.resize(t as usize + (4 << 20), 0);
    bytes[60..64].copy_from_slice(&65537u32.to_be_bytes());
    let (report, _) = ours(bytes.clone(), CheckFix::NONE);
    let said = report.expect_err("too many").report.messages;
    assert_eq!(said[1], "You can force-remove all 1 overhanging snapshots with qemu-img check -r all");
    let (report, after) = ours(bytes, ALL);
    assert_eq!(report.unwrap().corruptions, 0);
    case.must_be_clean(&after, "65537 snapshots");
}

#[test]
fn damaged_refcounts() {
    for options in ["", "cluster_size=4k,refcount_bits=64", "compat=0.10"] {
        let case = usual(options);
        let h = case.header();
        let bytes = case.bytes();
        let rt = h.reftable_offset;
        let rb = u64::from_be_bytes(bytes[rt as usize..rt as usize + 8].try_into().unwrap());
        let width = 1u64 << (h.geometry().refcount_order() - 3);
        let title = |what: &str| format!("[{options}] {what}");
        let low = |i: u64| rb + (i + 1) * width - 1;
        case.damaged(&title("too high"), &[(low(5), &[7])], Repair::Same);
        case.damaged(&title("leak"), &[(low(30), &[1])], Repair::Same);
        case.damaged(&title("zero"), &[(low(5), &[0])], Repair::Same);
        case.damaged(&title("zero of the header"), &[(low(0), &[0])], Repair::Same);
        case.damaged(&title("zero of a block"), &[(low(2), &[0])], Repair::Same);
        case.damaged(&title("leak and zero"), &[(low(30), &[1]), (low(6), &[0])], Repair::Same);
        let zeroes = vec![0; h.geometry().cluster_size() as usize];
        case.damaged(&title("block of zeroes"), &[(rb, &zeroes)], Repair::Same);
        case.damaged(&title("table of zeroes"), &[(rt, &zeroes)], Repair::Same);
        // QEMU marks the image corrupt while it looks and cannot write any more.
        case.damaged(&title("entry reserved"), &[(rt + 7, &[1])], Repair::Better);
        case.damaged(&title("entry unaligned"), &[(rt + 6, &[2])], Repair::Better);
        let to = |offset: u64| offset.to_be_bytes();
        case.damaged(&title("block is the header"), &[(rt, &to(0))], Repair::Same);
        case.damaged(&title("block is the L1"), &[(rt, &to(h.l1_offset))], Repair::Same);
        case.damaged(&title("block is the table"), &[(rt, &to(rt))], Repair::Same);
        // QEMU makes the file reach there first, and builds anew then.
        case.damaged(&title("block past the end"), &[(rt, &to(1 << 26))], Repair::Clean);
        case.damaged(&title("second block past the end"), &[(rt + 8, &to(1 << 26))], Repair::Clean);
        case.damaged(&title("no table"), &[(56, &[0; 4])], Repair::Same);
    }
}

#[test]
fn raised_counts() {
    let case = usual("");
    case.img(&["snapshot", "-c", "one"]);
    let rb = 2 << 16;
    case.damaged("shared cluster with count 1", &[(rb + 11, &[1])], Repair::Same);
    case.damaged(
        "shared clusters with count 1",
        &[(rb + 9, &[1]), (rb + 11, &[1]), (rb + 13, &[1])],
        Repair::Same,
    );
}

#[test]
fn damaged_l1_and_l2() {
    for options in ["", "cluster_size=4k", "extended_l2=on,cluster_size=64k", "compat=0.10"] {
        let case = usual(options);
        let h = case.header();
        let g = h.geometry();
        let l1 = h.l1_offset;
        let l2 = l2_of(&case, 0);
        let size = g.l2_entry_size();
        let title = |what: &str| format!("[{options}] {what}");
        let flagged = |offset: u64| (offset | 1 << 63).to_be_bytes();
        case.damaged(&title("L1 without COPIED"), &[(l1, &[0])], Repair::Same);
        case.damaged(&title("L1 reserved bit"), &[(l1, &[0x81])], Repair::Same);
        case.damaged(&title("L1 unaligned"), &[(l1, &flagged(0x200))], Repair::Neither);
        case.damaged(&title("L1 past the end"), &[(l1, &flagged(1 << 40))], Repair::Same);
        case.damaged(&title("L1 zero"), &[(l1, &[0; 8])], Repair::Same);
        case.damaged(&title("L2 without COPIED"), &[(l2, &[0])], Repair::Same);
        case.damaged(&title("L2 reserved bits"), &[(l2, &[0x81])], Repair::Same);
        case.damaged(&title("L2 low reserved bit"), &[(l2 + 7, &[2])], Repair::Same);
        case.damaged(&title("L2 unaligned"), &[(l2 + 6, &[2])], Repair::Same);
        case.damaged(&title("L2 zero"), &[(l2, &[0; 8])], Repair::Same);
        case.damaged(&title("L2 to the header"), &[(l2, &flagged(0))], Repair::Same);
        case.damaged(&title("L2 to the L1"), &[(l2, &flagged(l1))], Repair::Same);
        case.damaged(&title("L2 to the refcount table"), &[(l2, &flagged(h.reftable_offset))], Repair::Same);
        case.damaged(&title("L2 to itself"), &[(l2, &flagged(l2))], Repair::Same);
        case.damaged(&title("L2 twice"), &[(l2 + size, &case.bytes()[l2 as usize..][..8])], Repair::Same);
        case.damaged(&title("L2 past the end"), &[(l2, &flagged(1 << 40))], Repair::Same);
        case.damaged(
            &title("L2 just past the end"),
            &[(l2, &flagged(case.bytes().len() as u64))],
            Repair::Same,
        );
        case.damaged(
            &title("L2 far past the end"),
            &[(l2, &[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0])],
            Repair::Same,
        );
        case.damaged(&title("compressed"), &[(l2, &[0x40])], Repair::Same);
        case.damaged(&title("compressed and copied"), &[(l2, &[0xc0])], Repair::Same);
        if h.version >= 3 {
            case.damaged(&title("L2 unaligned zero"), &[(l2 + 6, &[2, 1])], Repair::Same);
        }
        if g.extended_l2() {
            case.damaged(&title("both bits"), &[(l2 + 11, &[1]), (l2 + 15, &[1])], Repair::Same);
            case.damaged(&title("bits without a cluster"), &[(l2, &[0; 8])], Repair::Same);
            case.damaged(&title("unaligned, no data"), &[(l2 + 6, &[2]), (l2 + 8, &[0; 8])], Repair::Same);
            case.damaged(&title("compressed with bitmap"), &[(l2, &[0x40])], Repair::Same);
        }
        let dirty = [0, 0, 0, 0, 0, 0, 0, (h.incompatible | 3) as u8];
        if h.version >= 3 {
            case.damaged(&title("dirty and corrupt"), &[(72, &dirty)], Repair::Same);
            case.damaged(&title("dirty with a leak"), &[(72, &dirty), (l2, &[0; 8])], Repair::Same);
        }
    }
}
