//! The layout of the repository: what ARCHITECTURE.md says about crates, unsafe code and files, checked.
//!
//! Reads sources as text. Must not need the daemon.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Lines a source file may have.
const CEILING: usize = 800;

/// Our crates by folder: what each may depend on among ours, and whether it may hold unsafe code.
const CRATES: [(&str, &[&str], bool); 7] = [
    ("host", &[], true),
    ("graph", &["host"], false),
    ("drivers", &["graph", "host"], false),
    ("jobs", &["graph", "host"], false),
    ("qmp", &[], false),
    ("backend/ring", &["host"], true),
    ("backend", &["drivers", "graph", "host", "jobs", "qmp", "ring"], false),
];

/// The names under which crates of ours appear in manifests.
const OURS: [&str; 8] = ["host", "graph", "drivers", "qmp", "ring", "client", "conformance", "jobs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                sources(&path, out);
            }
        } else if name.ends_with(".rs") {
            out.push(path);
        }
    }
}

fn all_sources() -> Vec<(String, String)> {
    let root = root();
    let mut paths = Vec::new();
    for top in ["host", "graph", "drivers", "jobs", "qmp", "backend", "tests"] {
        sources(&root.join(top), &mut paths);
    }
    assert!(paths.len() > 100, "only {} sources found: is this the right folder?", paths.len());
    paths
        .into_iter()
        .map(|p| {
            let text = std::fs::read_to_string(&p).unwrap();
            (p.strip_prefix(&root).unwrap().to_string_lossy().into_owned(), text)
        })
        .collect()
}

#[test]
fn every_file_says_what_it_is_and_keeps_to_its_size() {
    let mut wrong = Vec::new();
    for (path, text) in all_sources() {
        if !text.starts_with("//!") {
            wrong.push(format!("{path}: does not open with `//!`"));
        }
        let lines = text.lines().count();
        if lines > CEILING {
            wrong.push(format!("{path}: {lines} lines, the ceiling is {CEILING}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The section `[name]` of a manifest: the keys before the first dot, space or `=`.
fn section(manifest: &str, name: &str) -> Vec<String> {
    manifest
        .lines()
        .skip_while(|l| l.trim() != format!("[{name}]"))
        .skip(1)
        .take_while(|l| !l.starts_with('['))
        .filter(|l| !l.trim().is_empty() && !l.starts_with('#'))
        .filter_map(|l| l.split(['.', ' ', '=']).next().map(str::to_owned))
        .collect()
}

#[test]
fn crates_depend_in_one_direction() {
    for (folder, allowed, _) in CRATES {
        let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let dependencies = section(&manifest, "dependencies");
        assert!(!dependencies.is_empty(), "{folder}: no dependencies found, is the manifest read right?");
        for d in dependencies.iter().filter(|d| OURS.contains(&d.as_str())) {
            assert!(allowed.contains(&d.as_str()), "{folder} must not depend on {d}");
        }
    }
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    let by_crate: BTreeMap<&str, bool> = CRATES.iter().map(|(f, _, u)| (*f, *u)).collect();
    for (folder, may) in &by_crate {
        let src = root().join(folder).join("src");
        let top = if src.join("lib.rs").exists() { src.join("lib.rs") } else { src.join("main.rs") };
        let forbids = std::fs::read_to_string(top).unwrap().contains("#![forbid(unsafe_code)]");
        assert_eq!(forbids, !may, "{folder}: forbid(unsafe_code)");
    }
}

#[test]
fn drivers_do_not_know_each_other() {
    let drivers = root().join("drivers/src");
    let names: Vec<String> = std::fs::read_dir(&drivers)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    assert!(names.len() >= 3, "{names:?}");
    for name in &names {
        let mut files = Vec::new();
        sources(&drivers.join(name), &mut files);
        for standard in ["mod.rs", "options.rs", "open.rs", "io.rs", "tests.rs"] {
            // A large driver has folders in place of files.
            let folder = standard.replace(".rs", "/mod.rs");
            let has = files.iter().any(|f| f.ends_with(standard) || f.ends_with(&folder));
            assert!(has, "drivers/src/{name} has no {standard}");
        }
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            // The cryptography of LUKS serves images that carry a LUKS header inside.
            for other in
                names.iter().filter(|n| *n != name && (name.as_str(), n.as_str()) != ("qcow2", "luks"))
            {
                assert!(!text.contains(&format!("crate::{other}")), "{} names {other}", file.display());
            }
        }
    }
}

#[test]
fn orderings_name_their_partner() {
    // A release that pairs with nothing is a bug or a decoration.
    let mut wrong = Vec::new();
    for (path, text) in all_sources() {
        if path.contains("tests") || path.starts_with("tests/") {
            continue;
        }
        let uses = text.contains("Ordering::Release") || text.contains("Ordering::AcqRel");
        if uses && !text.to_lowercase().contains("pair") {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "no word on what a Release pairs with in: {}", wrong.join(", "));
}
