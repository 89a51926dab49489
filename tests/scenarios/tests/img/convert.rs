//! `convert`: what the copy shows is what the original shows, and it is laid out as qemu-img would lay it out.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::{Folder, corpus, text};

/// The parts of the disk that the image itself stores as data. In raw images qemu-img sets a block aside at the beginning,
/// whatever it holds: left out.
fn stored(folder: &Folder, format: &str, name: &str) -> Vec<(u64, u64)> {
    let map = folder.qemu("qemu-img", &["map", "-f", format, "--output=json", name]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for entry in map.as_array().unwrap().iter().filter(|e| e["data"] == true && e["depth"] == 0) {
        let (mut start, mut len) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        if format == "raw" && start == 0 {
            (start, len) = (4096, len.saturating_sub(4096));
        }
        match runs.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ if len > 0 => runs.push((start, len)),
            _ => {}
        }
    }
    runs
}

#[test]
fn copies_show_and_store_the_same() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let ways: &[&[&str]] = &[
        &["-O", "raw"],
        &["-O", "qcow2"],
        &["-O", "qcow2", "-o", "cluster_size=4k"],
        &["-O", "qcow2", "-c"],
        &["-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=16k"],
        &["-O", "raw", "-S", "0"],
        &["-O", "raw", "-W", "-m", "16"],
    ];
    for (name, format) in corpus::all() {
        for way in ways {
            let target = if way.contains(&"qcow2") { "qcow2" } else { "raw" };
            let args: Vec<&str> = ["convert", "-f", format]
                .into_iter()
                .chain(way.iter().copied())
                .chain([name, "copy"])
                .collect();
            let _ = std::fs::remove_file(folder.path().join("copy"));
            folder.qemu("qemu-img", &args);
            std::fs::rename(folder.path().join("copy"), folder.path().join("theirs")).unwrap();
            assert_eq!(folder.ours(&args), "", "{args:?}");
            folder.same((name, format), ("copy", target));
            assert_eq!(stored(&folder, target, "copy"), stored(&folder, target, "theirs"), "{args:?}");
            if target == "qcow2" {
                folder.check("copy");
            }
        }
    }
}

#[test]
fn a_target_that_exists_is_overwritten_as_a_whole() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    for (name, format) in [("sparse.raw", "raw"), ("plain.qcow2", "qcow2")] {
        for target in ["raw", "qcow2"] {
            folder.qemu("qemu-img", &["convert", "-f", "raw", "-O", target, "dense.raw", "copy"]);
            folder.ours(&["convert", "-n", "-f", format, "-O", target, name, "copy"]);
            folder.same((name, format), ("copy", target));
            let opts = format!("driver={target},file.filename=copy");
            folder.qemu("qemu-img", &["create", "-q", "-f", target, "copy", "8M"]);
            folder.ours(&[
                "convert",
                "-n",
                "--target-is-zero",
                "--target-image-opts",
                "-f",
                format,
                name,
                &opts,
            ]);
            folder.same((name, format), ("copy", target));
        }
    }
    folder.qemu("qemu-img", &["create", "-q", "-f", "raw", "short", "1M"]);
    folder.both(&["convert", "-n", "-f", "raw", "-O", "raw", "sparse.raw", "short"]);
}

#[test]
fn a_source_and_what_lies_below_it_are_never_the_target() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let file = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    folder.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "dense.raw", "-F", "raw", "above", "2M"]);
    std::fs::hard_link(folder.path().join("dense.raw"), folder.path().join("link")).unwrap();
    let (dense, plain) = (file("dense.raw"), file("plain.qcow2"));
    let cases: &[&[&str]] = &[
        &["-f", "raw", "-O", "raw", "dense.raw", "dense.raw"],
        &["-f", "raw", "-O", "qcow2", "dense.raw", "link"],
        &["-n", "-f", "raw", "-O", "raw", "dense.raw", "link"],
        &["-f", "raw", "-O", "qcow2", "sparse.raw", "dense.raw", "dense.raw"],
        &["-f", "qcow2", "-O", "raw", "above", "dense.raw"],
        &["-n", "-f", "qcow2", "-O", "raw", "above", "dense.raw"],
        &["-f", "qcow2", "-O", "raw", "plain.qcow2", "plain.qcow2"],
        &["-f", "raw", "-O", "qcow2", "-o", "data_file=dense.raw", "dense.raw", "copy"],
    ];
    for case in cases {
        let line = folder.refused(1, &[&["convert"], *case].concat());
        assert!(line.contains("lock"), "{case:?}: {line}");
        assert!(file("dense.raw") == dense && file("plain.qcow2") == plain, "{case:?}");
    }
}

#[test]
fn what_is_set_aside_in_an_encrypted_image_reads_as_zeroes() {
    let Some(folder) = Folder::new() else { return };
    corpus::raw(&folder);
    let key = ["--object", "secret,id=s,data=sesame"];
    let encrypt = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let opts = |name: &str| format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}");
    let source = "driver=raw,file.filename=sparse.raw";
    for (number, more) in [
        "preallocation=full",
        "compat=0.10,preallocation=metadata",
        "data_file=data,preallocation=metadata",
        "data_file=data,data_file_raw=on",
        "extended_l2=on,preallocation=metadata",
    ]
    .iter()
    .enumerate()
    {
        let (name, options) = (format!("copy{number}"), format!("{encrypt},{more}"));
        let args = ["-f", "raw", "-O", "qcow2", "-o", &options, "sparse.raw", &name];
        folder.ours(&[&["convert"], &key[..], &args].concat());
        folder.qemu("qemu-img", &[&["compare"], &key[..], &["--image-opts", &opts(&name), source]].concat());
        if more.contains("data_file") {
            continue;
        }
        let size = std::fs::metadata(folder.path().join("sparse.raw")).unwrap().len();
        let bigger = ["--image-opts", "--preallocation=full", &opts(&name), "+1M"];
        folder.ours(&[&["resize", "-q"], &key[..], &bigger].concat());
        let read = format!("read -P 0 {} {}", size.next_multiple_of(512), 1 << 20);
        let said = folder.qemu("qemu-io", &[&key[..], &["-c", &read, "--image-opts", &opts(&name)]].concat());
        assert!(!said.contains("failed"), "{more}: {said}");
    }
}

#[test]
fn several_images_become_one() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    folder.ours(&["convert", "-f", "qcow2", "-O", "raw", "plain.qcow2", "sub.qcow2", "small.qcow2", "copy"]);
    folder.qemu(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", "plain.qcow2", "sub.qcow2", "small.qcow2", "theirs"],
    );
    folder.same(("copy", "raw"), ("theirs", "raw"));
}

#[test]
fn a_copy_above_a_backing_file_holds_the_difference() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let args =
        ["convert", "-f", "qcow2", "-O", "qcow2", "-B", "over.qcow2", "-F", "qcow2", "top.qcow2", "copy"];
    folder.qemu("qemu-img", &args);
    std::fs::rename(folder.path().join("copy"), folder.path().join("theirs")).unwrap();
    folder.ours(&args);
    folder.same(("top.qcow2", "qcow2"), ("copy", "qcow2"));
    assert_eq!(stored(&folder, "qcow2", "copy"), stored(&folder, "qcow2", "theirs"));
}

#[test]
fn a_snapshot_inside_is_copied() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    folder.qemu("qemu-img", &["snapshot", "-c", "then", "plain.qcow2"]);
    folder.qemu("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "plain.qcow2", "then.raw"]);
    corpus::scribble(&folder, "plain.qcow2", 60);
    for which in ["then", "1", "snapshot.id=1", "snapshot.name=then", "snapshot.id=1,snapshot.name=then"] {
        folder.ours(&["convert", "-l", which, "-f", "qcow2", "-O", "raw", "plain.qcow2", "copy"]);
        folder.same(("copy", "raw"), ("then.raw", "raw"));
    }
    let line =
        folder.refused(1, &["convert", "-l", "never", "-f", "qcow2", "-O", "raw", "plain.qcow2", "copy"]);
    assert!(line.contains("Can't find snapshot"), "{line}");
}

#[test]
fn what_cannot_be_read_ends_the_copy_or_is_reported() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    // A cluster whose compressed data is nonsense: it cannot be read, everything else can.
    folder.qemu("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "sparse.raw", "bad"]);
    let map = folder.qemu("qemu-img", &["map", "-f", "qcow2", "--output=json", "bad"]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let start =
        map.as_array().unwrap().iter().find(|e| e["compressed"] == true).unwrap()["start"].as_u64().unwrap();
    let file = File::options().read(true).write(true).open(folder.path().join("bad")).unwrap();
    let at = |offset: u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, offset).unwrap();
        u64::from_be_bytes(word)
    };
    let table = at(at(40)) & 0x00ff_ffff_ffff_fe00;
    let host = at(table + start / 65536 * 8) & ((1 << 54) - 1);
    file.write_all_at(&[0xff; 512], host).unwrap();
    let args = ["convert", "-f", "qcow2", "-O", "raw", "bad", "copy"];
    folder.both(&args);
    let salvage = [&args[..1], &["--salvage"], &args[1..]].concat();
    let output = folder.img(&salvage);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(err.contains(&format!("error while reading offset {start}")), "{err}");
    folder.qemu("qemu-img", &salvage);
    let ours = std::fs::read(folder.path().join("copy")).unwrap();
    let original = std::fs::read(folder.path().join("sparse.raw")).unwrap();
    let (start, end) = (start as usize, start as usize + 65536);
    assert!(ours[..start] == original[..start] && ours[end..] == original[end..]);
    assert!(ours[start..end].iter().all(|b| *b == 0));
}

#[test]
fn progress_is_told_as_qemu_img_tells_it() {
    let Some(folder) = Folder::new() else { return };
    corpus::raw(&folder);
    let out = folder.ours(&["convert", "-p", "-f", "raw", "-O", "raw", "dense.raw", "copy"]);
    assert!(out.starts_with("    (0.00/100%)\r"), "{out:?}");
    assert!(out.ends_with("    (100.00/100%)\r\n"), "{out:?}");
}

#[test]
fn bitmaps_are_copied_with_the_image() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    folder.qemu("qemu-img", &["bitmap", "--add", "plain.qcow2", "on"]);
    folder.qemu("qemu-img", &["bitmap", "--add", "-g", "4k", "plain.qcow2", "off"]);
    corpus::scribble(&folder, "plain.qcow2", 70);
    folder.qemu("qemu-img", &["bitmap", "--disable", "plain.qcow2", "off"]);
    folder.ours(&["convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", "plain.qcow2", "copy"]);
    folder.check("copy");
    let bitmaps = |name: &str| {
        let info: Value =
            serde_json::from_str(&folder.qemu("qemu-img", &["info", "--output=json", name])).unwrap();
        let mut list = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
        list.sort_by_key(|b| b["name"].to_string());
        list
    };
    assert_eq!(bitmaps("copy"), bitmaps("plain.qcow2"));
    // What they mark is the same: merging one into the other changes nothing that a reader of dirty parts would see.
    for name in ["on", "off"] {
        let dirty = |image: &str| {
            let opts = format!("driver=qcow2,file.filename={image}");
            folder.ours(&["bitmap", "--list", "--image-opts", &opts])
        };
        let line = |text: String| text.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
        assert_eq!(line(dirty("copy")), line(dirty("plain.qcow2")));
    }
}
