//! Which bytes of an image are locked, row by row of what QEMU does, by QEMU's daemon and by ours.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::peer::{Peer, Program, lock_bytes, run};

/// One graph: its commands (`IMAGE`, `BACKING`, `SOCKET` filled in), and the bytes of image and backing file.
struct Row {
    name: &'static str,
    commands: Vec<(&'static str, Value)>,
    image: &'static [u64],
    backing: &'static [u64],
}

fn node(driver: &str, more: Value) -> (&'static str, Value) {
    let file = json!({"driver": "file", "filename": "IMAGE"});
    let mut node = json!({"driver": driver, "node-name": "n", "file": file});
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ("blockdev-add", node)
}

fn file(more: Value) -> (&'static str, Value) {
    let mut node = json!({"driver": "file", "node-name": "n", "filename": "IMAGE"});
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ("blockdev-add", node)
}

fn export(writable: bool) -> (&'static str, Value) {
    let addr = json!({"type": "unix", "path": "SOCKET"});
    let export =
        json!({"type": "vhost-user-blk", "id": "e", "node-name": "n", "writable": writable, "addr": addr});
    ("block-export-add", export)
}

fn overlay() -> (&'static str, Value) {
    let file = json!({"driver": "file", "filename": "BACKING"});
    node("qcow2", json!({"backing": {"driver": "qcow2", "read-only": true, "file": file}}))
}

fn rows() -> Vec<Row> {
    let row = |name, commands, image, backing| Row { name, commands, image, backing };
    let shared = json!({"read-only": true, "force-share": true});
    vec![
        row("a file nobody uses", vec![file(json!({}))], &[], &[]),
        row("a file, exported for writing", vec![file(json!({})), export(true)], &[100, 101], &[]),
        row("raw, exported for writing", vec![node("raw", json!({})), export(true)], &[100, 101], &[]),
        row("raw, exported for reading", vec![node("raw", json!({})), export(false)], &[100], &[]),
        row(
            "raw with an offset, for writing",
            vec![node("raw", json!({"offset": 512})), export(true)],
            &[100, 101, 203],
            &[],
        ),
        row("qcow2, not exported", vec![node("qcow2", json!({}))], &[100, 101, 103, 201, 203], &[]),
        row(
            "qcow2, for writing",
            vec![node("qcow2", json!({})), export(true)],
            &[100, 101, 103, 201, 203],
            &[],
        ),
        row(
            "qcow2, for reading",
            vec![node("qcow2", json!({"read-only": true})), export(false)],
            &[100, 201, 203],
            &[],
        ),
        row("qcow2, force-share", vec![node("qcow2", shared.clone()), export(false)], &[100], &[]),
        row(
            "an overlay, for writing",
            vec![overlay(), export(true)],
            &[100, 101, 103, 201, 203],
            &[100, 201, 203],
        ),
        row("locking=off", vec![file(json!({"locking": "off"})), export(true)], &[], &[]),
        row("locking=on", vec![file(json!({"locking": "on"})), export(true)], &[100, 101], &[]),
        row("locking=auto", vec![file(json!({"locking": "auto"})), export(true)], &[100, 101], &[]),
        row("inactive qcow2", vec![node("qcow2", json!({"active": false}))], &[100], &[]),
    ]
}

/// Fills in paths.
fn filled(value: &Value, paths: &[(&str, &Path)]) -> Value {
    let mut text = value.to_string();
    for (word, path) in paths {
        text = text.replace(&format!("\"{word}\""), &json!(path.to_str().unwrap()).to_string());
    }
    serde_json::from_str(&text).unwrap()
}

/// The images of one row, fresh.
fn images(folder: &Path, row: &Row) -> (PathBuf, PathBuf) {
    let (image, backing) = (folder.join("image"), folder.join("backing"));
    let qcow2 = row.commands[0].1["driver"] == "qcow2";
    let (format, path) = (if qcow2 { "qcow2" } else { "raw" }, image.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", format, path, "1M"]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", backing.to_str().unwrap(), "1M"]).unwrap();
    (image, backing)
}

/// Runs a row in a program of its own; the bytes then and after all of it has been taken away. `None` where the program
/// does not know an option.
fn observed(program: Program, row: &Row) -> Option<(Vec<u64>, Vec<u64>)> {
    let mut peer = Peer::start(program)?;
    let (image, backing) = images(peer.folder(), row);
    let socket = peer.folder().join("socket");
    let paths = [("IMAGE", image.as_path()), ("BACKING", &backing), ("SOCKET", &socket)];
    let mut exported = false;
    for (command, arguments) in &row.commands {
        let mut arguments = filled(arguments, &paths);
        if *command == "block-export-add" {
            exported = true;
            if program == Program::Ringblk {
                arguments["share-rw"] = json!(true);
            }
        }
        match peer.try_command(command, arguments) {
            Err(e) if e.contains("'active' is unexpected") => {
                eprintln!("without '{}': {e}", row.name);
                return None;
            }
            result => result.unwrap_or_else(|e| panic!("{program:?}: {}: {e}", row.name)),
        };
    }
    let pid = peer.daemon.pid();
    let found = (lock_bytes(pid, &image), lock_bytes(pid, &backing));
    if exported {
        peer.command("block-export-del", json!({"id": "e"}));
        peer.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    }
    peer.command("blockdev-del", json!({"node-name": "n"}));
    let left = [lock_bytes(pid, &image), lock_bytes(pid, &backing)].concat();
    assert!(left.is_empty(), "{program:?}: {}: {left:?} after the end", row.name);
    Some(found)
}

#[test]
fn the_bytes_are_qemus_row_by_row() {
    if Program::StorageDaemon.path().is_none() {
        return;
    }
    for row in rows() {
        let expected = (row.image.to_vec(), row.backing.to_vec());
        for program in [Program::StorageDaemon, Program::Ringblk] {
            if let Some(found) = observed(program, &row) {
                assert_eq!(found, expected, "{program:?}: {}", row.name);
            }
        }
    }
}

#[test]
fn an_export_does_not_share_writing_unless_told() {
    let mut peer = Peer::start(Program::Ringblk).unwrap();
    let image = peer.folder().join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let socket = peer.folder().join("socket");
    let paths = [("IMAGE", image.as_path()), ("SOCKET", &socket)];
    for (command, arguments) in [node("raw", json!({})), export(true)] {
        peer.command(command, filled(&arguments, &paths));
    }
    assert_eq!(lock_bytes(peer.daemon.pid(), &image), [100, 101, 201]);
}

/// Two processes write to one image and each sees what the other wrote.
#[test]
fn two_that_share_write_to_one_image() {
    use client::{Disk, Setup};
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let mut peers: Vec<Peer> = (0..2).map(|_| Peer::start(Program::Ringblk).unwrap()).collect();
    let mut disks = Vec::new();
    for peer in &mut peers {
        let socket = peer.folder().join("socket");
        let paths = [("IMAGE", image.path()), ("SOCKET", &socket)];
        let (_, node) = node("raw", json!({}));
        peer.command("blockdev-add", filled(&node, &paths));
        let (_, mut export) = export(true);
        export["share-rw"] = json!(true);
        peer.command("block-export-add", filled(&export, &paths));
        disks.push(Disk::connect(&socket, &Setup::default()).unwrap());
    }
    for round in 0..8u8 {
        let (writer, reader) = (usize::from(round % 2), usize::from(1 - round % 2));
        disks[writer].write(u64::from(round) * 4096, &[round + 1; 4096]).unwrap();
        assert_eq!(disks[reader].read(u64::from(round) * 4096, 4096).unwrap(), [round + 1; 4096]);
    }
    // A third one that does not share stays out, whoever asks.
    let mut third = Peer::start(Program::Ringblk).unwrap();
    let socket = third.folder().join("socket");
    let paths = [("IMAGE", image.path()), ("SOCKET", &socket)];
    let (_, node) = node("raw", json!({}));
    third.command("blockdev-add", filled(&node, &paths));
    let error = third.try_command("block-export-add", filled(&export(true).1, &paths)).unwrap_err();
    assert!(error.starts_with("Failed to get shared \"write\" lock"), "{error}");
    assert!(error.contains("share-rw=on"), "{error}");
}
