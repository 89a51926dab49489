//! qcow2 images behind an export, with `qemu-img` as the judge: internal snapshots and sizes under a front end's requests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use client::Setup;
use client::blk::Segment;
use client::disk::Disk;
use ringblk_scenarios::{Rig, Rng, Wanted, image::pattern};
use serde_json::json;

const SIZE: u64 = 4 << 20;

fn setup() -> Setup {
    Setup { memory: vec![(0, 16 << 20)], ..Setup::default() }
}

/// Runs `qemu-img`; its exit code and what it printed.
fn qemu_img(arguments: &[&str]) -> (i32, String) {
    let out = Command::new("qemu-img").args(arguments).output().expect("qemu-img");
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap_or(-1), text)
}

fn done(arguments: &[&str]) -> String {
    let (code, text) = qemu_img(arguments);
    assert_eq!(code, 0, "qemu-img {arguments:?}: {text}");
    text
}

/// The content of an image, or of a snapshot inside.
fn content(image: &str, snapshot: Option<&str>, folder: &Path) -> Vec<u8> {
    let copy = folder.join("copy.raw").display().to_string();
    let mut line = vec!["convert", "-f", "qcow2", "-O", "raw"];
    let of = snapshot.map(|s| format!("snapshot.id={s}"));
    if let Some(of) = &of {
        line.extend(["-l", of]);
    }
    line.extend([image, &copy]);
    done(&line);
    std::fs::read(copy).unwrap()
}

fn random_writes(disk: &mut Disk, model: &mut [u8], rng: &mut Rng, count: u64) {
    let blocks = model.len() as u64 / 512;
    for _ in 0..count {
        let sectors = 1 + rng.below(200).min(blocks - 1);
        let at = rng.below(blocks - sectors);
        let range = at as usize * 512..(at + sectors) as usize * 512;
        match rng.below(6) {
            0 => {
                let segment = Segment { sector: at, sectors: sectors as u32, flags: rng.below(2) as u32 };
                disk.write_zeroes(&[segment]).unwrap();
                model[range].fill(0);
            }
            1 => disk.flush().unwrap(),
            _ => {
                let data = pattern(rng.below(1 << 30), range.len());
                disk.write(at * 512, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
}

fn wanted(path: &str) -> Wanted {
    Wanted::node(
        "disk",
        &format!("qcow2,discard=unmap,file.driver=file,file.filename={path},file.discard=unmap"),
    )
}

#[test]
fn snapshots_come_and_go_under_a_front_end() {
    for (seed, options) in [
        (1, "compat=v3,cluster_size=64k"),
        (2, "compat=v3,cluster_size=4k,refcount_bits=8"),
        (3, "compat=0.10,cluster_size=8k"),
        (4, "compat=v3,extended_l2=on,cluster_size=32k"),
        (5, "compat=v3,lazy_refcounts=on,cluster_size=512"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2").display().to_string();
        done(&["create", "-q", "-f", "qcow2", "-o", options, &path, &SIZE.to_string()]);
        let mut rig = Rig::start(&[wanted(&path)]);
        let mut disk = rig.disk("disk", &setup());
        let mut rng = Rng::new(seed);
        let mut model = vec![0; SIZE as usize];
        // (name, content), in the order they were made
        let mut taken: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..12 {
            random_writes(&mut disk, &mut model, &mut rng, 12);
            match rng.below(4) {
                0 | 1 => {
                    let name = format!("s{round}");
                    rig.command(
                        "blockdev-snapshot-internal-sync",
                        json!({"device": "node-disk", "name": name}),
                    );
                    taken.push((name, model.clone()));
                }
                2 if !taken.is_empty() => {
                    let (name, _) = taken.remove(rng.below(taken.len() as u64) as usize);
                    let arguments = json!({"device": "node-disk", "name": name});
                    let gone = rig.command("blockdev-snapshot-delete-internal-sync", arguments);
                    assert_eq!(gone["name"], json!(name));
                }
                3 if !taken.is_empty() => {
                    drop(disk);
                    rig.wait_disconnected("disk");
                    rig.command("block-export-del", json!({"id": "disk"}));
                    rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
                    let (name, then) = &taken[rng.below(taken.len() as u64) as usize];
                    rig.command("blockdev-snapshot-apply", json!({"device": "node-disk", "name": name}));
                    model.clone_from(then);
                    rig.add_export("disk", "node-disk", &json!({"writable": true})).unwrap();
                    disk = rig.disk("disk", &setup());
                }
                _ => {}
            }
            let at = rng.below(SIZE - 65536) / 512 * 512;
            assert!(
                disk.read(at, 65536).unwrap() == model[at as usize..at as usize + 65536],
                "{options}, round {round}"
            );
        }
        random_writes(&mut disk, &mut model, &mut rng, 10);
        drop(disk);
        assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
        let (code, text) = qemu_img(&["check", "-f", "qcow2", &path]);
        assert_eq!(code, 0, "{options}: {text}");
        assert!(content(&path, None, folder.path()) == model, "{options}: the disk");
        let list: serde_json::Value = serde_json::from_str(&done(&["info", "--output=json", &path])).unwrap();
        let listed = list["snapshots"].as_array().cloned().unwrap_or_default();
        let names: Vec<&str> = listed.iter().map(|s| s["name"].as_str().unwrap()).collect();
        assert_eq!(names, taken.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), "{options}");
        for (entry, (name, then)) in listed.iter().zip(&taken) {
            let id = entry["id"].as_str().unwrap();
            assert!(content(&path, Some(id), folder.path()) == *then, "{options}: snapshot {name}");
        }
    }
}

#[test]
fn snapshots_that_qemu_made_are_kept_used_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2").display().to_string();
    done(&["create", "-q", "-f", "qcow2", &path, &SIZE.to_string()]);
    let io = |command: &str| {
        let out = Command::new("qemu-io").args(["-f", "qcow2", "-c", command, &path]).output().unwrap();
        assert!(out.status.success());
    };
    io("write -P 1 0 2M");
    done(&["snapshot", "-c", "first", &path]);
    io("write -P 2 1M 2M");
    done(&["snapshot", "-c", "second", &path]);
    let mut rig = Rig::start(&[wanted(&path)]);
    let mut disk = rig.disk("disk", &setup());
    disk.write(0, &vec![3; 4 << 20]).unwrap();
    let wrong = rig
        .qmp
        .execute("blockdev-snapshot-delete-internal-sync", json!({"device": "node-disk", "name": "third"}));
    assert!(wrong.unwrap_err().to_string().contains("does not exist on device 'node-disk'"));
    rig.command("blockdev-snapshot-delete-internal-sync", json!({"device": "node-disk", "name": "first"}));
    drop(disk);
    assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success());
    let (code, text) = qemu_img(&["check", "-f", "qcow2", &path]);
    assert_eq!(code, 0, "{text}");
    assert!(content(&path, None, folder.path()) == vec![3; 4 << 20]);
    let second = [vec![1; 1 << 20], vec![2; 2 << 20], vec![0; 1 << 20]].concat();
    assert!(content(&path, Some("2"), folder.path()) == second);
}

#[test]
fn a_snapshot_is_read_while_a_front_end_writes() {
    for (seed, options) in [
        (1, "cluster_size=64k"),
        (2, "cluster_size=4k,refcount_bits=8"),
        (3, "extended_l2=on,cluster_size=32k"),
        (4, "cluster_size=512"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2").display().to_string();
        done(&["create", "-q", "-f", "qcow2", "-o", options, &path, &SIZE.to_string()]);
        let node = format!(
            "qcow2,discard=unmap,l2-cache-size=16384,l2-cache-entry-size=512,file.driver=file,\
             file.node-name=disk-file,file.discard=unmap,file.filename={path}"
        );
        let mut rig = Rig::start(&[Wanted::node("disk", &node)]);
        let mut disk = rig.disk("disk", &setup());
        let mut rng = Rng::new(seed);
        let mut model = vec![0; SIZE as usize];
        random_writes(&mut disk, &mut model, &mut rng, 30);
        rig.command("blockdev-snapshot-internal-sync", json!({"device": "node-disk", "name": "then"}));
        let then = model.clone();
        random_writes(&mut disk, &mut model, &mut rng, 10);
        let reader = json!({"driver": "qcow2", "node-name": "reader", "read-only": true, "snapshot": "then",
                            "file": "disk-file"});
        rig.command("blockdev-add", reader);
        rig.add_export("past", "reader", &json!({})).unwrap();
        let mut past = rig.disk("past", &setup());
        // The one writes, gives up, allocates; the other sees the disk as it was.
        for _ in 0..40 {
            random_writes(&mut disk, &mut model, &mut rng, 6);
            let len = (1 + rng.below(256)) * 512;
            let at = rng.below((SIZE - len) / 512) * 512;
            let range = at as usize..(at + len) as usize;
            assert!(past.read(at, len as u32).unwrap() == then[range.clone()], "{options} at {at}");
            assert!(disk.read(at, len as u32).unwrap() == model[range], "{options} at {at}");
        }
        let whole: Vec<u8> = (0..SIZE / 65536).flat_map(|n| past.read(n * 65536, 65536).unwrap()).collect();
        assert!(whole == then, "{options}");
        assert!(past.write(0, &[1; 512]).is_err());
        // What is being read is not deleted, and a check is the writer's.
        let delete = json!({"device": "node-disk", "name": "then"});
        let refused = rig.qmp.execute("blockdev-snapshot-delete-internal-sync", delete.clone());
        assert!(refused.unwrap_err().to_string().contains("in use"));
        drop(past);
        rig.wait_disconnected("past");
        rig.command("block-export-del", json!({"id": "past"}));
        rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
        rig.command("blockdev-del", json!({"node-name": "reader"}));
        rig.command("blockdev-snapshot-delete-internal-sync", delete);
        drop(disk);
        assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
        done(&["check", "-q", "-f", "qcow2", &path]);
        assert!(content(&path, None, folder.path()) == model, "{options}: the disk");
    }
}

/// Resident memory of a process, KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn memory_of_the_caches_goes_back_when_nobody_uses_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2").display().to_string();
    // 16 MiB of L2 tables.
    done(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4k", &path, "8G"]);
    let node = |interval: u64| {
        Wanted::node(
            "disk",
            &format!("qcow2,cache-clean-interval={interval},file.driver=file,file.filename={path}"),
        )
        .options("writable=off")
    };
    for interval in [1, 0] {
        let mut rig = Rig::start(&[node(interval)]);
        let mut disk = rig.disk("disk", &setup());
        disk.read(0, 512).unwrap();
        let pid = rig.daemon.pid();
        let before = resident(pid);
        for slice in 0..(8u64 << 30) / (2 << 20) {
            disk.read(slice * (2 << 20), 512).unwrap();
        }
        let full = resident(pid);
        if interval == 0 {
            // Never.
            assert!(full > before + (8 << 10), "{before} KiB, then {full} KiB");
            continue;
        }
        rig.wait_for("return of the memory", |_| resident(pid) < before + (4 << 10));
        // Used again, it is there again.
        disk.read(4 << 30, 512).unwrap();
        drop(disk);
        assert!(rig.daemon.terminate(Duration::from_secs(20)).unwrap().success(), "{}", rig.daemon.stderr());
    }
}

#[test]
fn a_node_that_reads_a_snapshot_on_a_file_of_its_own_keeps_writers_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image").display().to_string();
    done(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    done(&["snapshot", "-c", "then", &path]);
    let mut rig = Rig::start(&[]);
    let file = json!({"driver": "file", "filename": path});
    let reader = json!({
        "driver": "qcow2", "node-name": "reader", "read-only": true, "snapshot": "then", "file": file,
    });
    // A writer with another file node could delete the snapshot without knowing of its reader.
    rig.command("blockdev-add", json!({"driver": "qcow2", "node-name": "writer", "file": file}));
    let refused = rig.qmp.execute("blockdev-add", reader.clone()).unwrap_err().to_string();
    assert!(refused.contains("lock"), "{refused}");
    rig.command("blockdev-del", json!({"node-name": "writer"}));
    rig.command("blockdev-add", reader);
    let (code, text) = qemu_img(&["snapshot", "-d", "then", &path]);
    assert!(code != 0 && text.contains("lock"), "{text}");
    rig.command("blockdev-del", json!({"node-name": "reader"}));
    done(&["snapshot", "-d", "then", &path]);
}
