//! Tests of opening files, of what `map` answers, and of descriptors and locks. Requests are in the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use graph::options::{NodeOptions, parse_options};
use graph::{Driver, Map, Op, Perm};
use serde_json::json;

use super::open::open_blocking;
use super::{FileNode, Wanted};

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new(len: u64) -> Image {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        std::fs::File::create(image.path()).unwrap().set_len(len).unwrap();
        image
    }

    fn path(&self) -> String {
        self.dir.path().join("image").to_str().unwrap().to_owned()
    }

    fn open(&self, node: &NodeOptions) -> FileNode {
        open(Wanted::File, &self.path(), json!({}), node).unwrap()
    }
}

fn open(
    wanted: Wanted,
    filename: &str,
    more: serde_json::Value,
    node: &NodeOptions,
) -> std::result::Result<FileNode, String> {
    let mut options = json!({"filename": filename});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    parse_options(options).and_then(|o| open_blocking(wanted, &o, node)).map_err(|e| e.to_string())
}

fn refusal(wanted: Wanted, filename: &str, more: serde_json::Value) -> String {
    open(wanted, filename, more, &NodeOptions::default()).err().expect("refused")
}

fn ro() -> NodeOptions {
    NodeOptions { read_only: true, ..NodeOptions::default() }
}

fn auto() -> NodeOptions {
    NodeOptions { auto_read_only: true, ..NodeOptions::default() }
}

#[test]
fn what_cannot_be_opened_is_refused_in_qemus_words() {
    let image = Image::new(1 << 20);
    let path = image.path();
    let dir = image.dir.path().to_str().unwrap();
    let gone = format!("{dir}/gone");
    let file = Wanted::File;
    assert_eq!(refusal(file, "", json!({})), "The 'file' block driver requires a file name");
    assert_eq!(
        refusal(file, &gone, json!({})),
        format!("Could not open '{gone}': No such file or directory")
    );
    assert_eq!(refusal(file, dir, json!({})), format!("Could not open '{dir}': Is a directory"));
    assert_eq!(
        refusal(file, "/dev/null", json!({})),
        "'file' driver requires '/dev/null' to be a regular file"
    );
    assert_eq!(
        refusal(Wanted::HostDevice, &path, json!({})),
        format!("'host_device' driver requires '{path}' to be either a character or block device")
    );
    assert_eq!(
        refusal(file, &path, json!({"aio": "native"})),
        "aio=native was specified, but it requires cache.direct=on, which was not specified."
    );
    assert!(refusal(file, "/dev/fdset/1", json!({})).starts_with("Could not open '/dev/fdset/1': "));
    for unknown in ["pr-manager", "x-check-cache-dropped", "foo"] {
        assert_eq!(refusal(file, &path, json!({unknown: 1})), format!("Parameter '{unknown}' is unexpected"));
    }
}

#[test]
fn a_directory_opened_for_reading_and_a_pipe_are_no_images() {
    let image = Image::new(0);
    let dir = image.dir.path();
    let words = |p: &Path| format!("'file' driver requires '{}' to be a regular file", p.display());
    let error = open(Wanted::File, dir.to_str().unwrap(), json!({}), &ro()).err();
    assert_eq!(error, Some(words(dir)));
    let pipe = dir.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let error = open(Wanted::File, pipe.to_str().unwrap(), json!({}), &ro()).err();
    assert_eq!(error, Some(words(&pipe)));
}

#[test]
fn character_devices_are_host_devices() {
    let node = open(Wanted::HostDevice, "/dev/null", json!({}), &NodeOptions::default()).unwrap();
    assert_eq!(node.size(), 0);
    assert_eq!(node.info().allocated, Some(0));
}

#[test]
fn sizes_are_rounded_up_and_only_what_is_there_is_mapped() {
    let image = Image::new(1000);
    let node = image.open(&NodeOptions::default());
    assert_eq!(node.size(), 1024);
    assert!(matches!(node.map(Op::Read, 0, 1000), Map::File { offset: 0, len: 1000, .. }));
    assert!(matches!(node.map(Op::Read, 512, 512), Map::File { offset: 512, len: 488, .. }));
    assert!(matches!(node.map(Op::Read, 1000, 24), Map::Drive));
    assert!(matches!(node.map(Op::Write, 512, 512), Map::File { offset: 512, len: 512, .. }));
    assert!(matches!(node.map(Op::Write, 512, 1024), Map::Drive), "growing needs the driver");
    assert!(matches!(node.map(Op::Write, u64::MAX - 5, 512), Map::Drive));
    assert!(matches!(node.map(Op::Flush, 0, 0), Map::File { .. }));
    assert!(matches!(node.map(Op::Discard, 0, 512), Map::Drive));
    assert!(matches!(node.map(Op::WriteZeroes, 0, 512), Map::Drive));
    node.note_end(1500);
    assert_eq!(node.size(), 1536);
    assert!(matches!(node.map(Op::Read, 0, 1500), Map::File { len: 1500, .. }));
    node.note_end(100);
    assert_eq!(node.size(), 1536);
}

#[test]
fn a_read_only_node_has_no_way_to_write() {
    let image = Image::new(4096);
    let node = image.open(&ro());
    assert!(!node.first.writable());
    assert!(matches!(node.map(Op::Write, 0, 512), Map::Error(e) if e == graph::Errno::EPERM));
    assert!(matches!(node.map(Op::Flush, 0, 0), Map::Done { .. }));
    assert!(node.prepare_perm(Perm::WRITE, Perm::ALL).is_err());
    assert!(node.writable().is_err());
}

#[test]
fn auto_read_only_opens_for_writing_when_the_first_writer_comes() {
    let image = Image::new(4096);
    let node = image.open(&auto());
    assert!(!node.current().writable());
    node.prepare_perm(Perm::CONSISTENT_READ, Perm::ALL).unwrap();
    node.set_perm(Perm::CONSISTENT_READ, Perm::ALL);
    assert!(!node.current().writable());
    node.prepare_perm(Perm::CONSISTENT_READ | Perm::WRITE, Perm::ALL).unwrap();
    node.set_perm(Perm::CONSISTENT_READ | Perm::WRITE, Perm::ALL);
    assert!(node.current().writable());
    assert!(!node.first.writable(), "the locks stay where they are");
    assert!(matches!(node.map(Op::Write, 0, 512), Map::File { file, .. } if file.writable()));
    assert!(matches!(node.map(Op::Read, 0, 512), Map::File { file, .. } if file.writable()));
}

#[test]
fn auto_read_only_does_not_follow_a_name_to_another_file() {
    let image = Image::new(4096);
    let node = image.open(&auto());
    std::fs::remove_file(image.path()).unwrap();
    std::fs::write(image.path(), [0; 4096]).unwrap();
    let e = node.prepare_perm(Perm::WRITE, Perm::ALL).unwrap_err();
    assert!(e.to_string().contains("is another file by now"), "{e}");
    // Nothing is held after the failure: the old file is free.
    assert!(!node.current().writable());
}

#[test]
fn two_nodes_of_one_file_are_told_apart_by_their_locks() {
    let image = Image::new(4096);
    let (a, b) = (image.open(&NodeOptions::default()), image.open(&auto()));
    a.prepare_perm(Perm::WRITE, Perm::ALL - Perm::WRITE).unwrap();
    a.set_perm(Perm::WRITE, Perm::ALL - Perm::WRITE);
    let e = b.prepare_perm(Perm::WRITE, Perm::ALL).unwrap_err();
    assert!(e.to_string().starts_with("Failed to get \"write\" lock\n"), "{e}");
    assert!(b.writer.get().is_none(), "nothing is opened for a writer that is refused");
    b.prepare_perm(Perm::CONSISTENT_READ, Perm::ALL).unwrap();
    b.set_perm(Perm::CONSISTENT_READ, Perm::ALL);
    drop(a);
    b.prepare_perm(Perm::WRITE, Perm::ALL).unwrap();
    b.abort_perm();
}

#[test]
fn locking_can_be_turned_off() {
    let image = Image::new(4096);
    let off =
        || open(Wanted::File, &image.path(), json!({"locking": "off"}), &NodeOptions::default()).unwrap();
    let (a, b) = (off(), off());
    for node in [&a, &b] {
        node.prepare_perm(Perm::ALL, Perm::NONE).unwrap();
        node.set_perm(Perm::ALL, Perm::NONE);
    }
}

#[test]
fn queries_show_name_and_allocation() {
    let image = Image::new(1 << 20);
    let node = image.open(&ro());
    let info = node.info();
    assert_eq!(info.filename, image.path());
    assert_eq!(info.allocated, Some(0));
    assert_eq!(info.driver_stats.unwrap()["driver"], "file");
}

#[test]
fn a_file_beyond_what_offsets_can_say_is_refused() {
    assert!(super::size::Sizes::new(i64::MAX as u64).is_err());
    assert_eq!(super::size::Sizes::new(i64::MAX as u64 - 511).unwrap().visible, i64::MAX as u64 - 511);
}
