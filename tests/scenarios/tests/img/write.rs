//! Commands that change images: what comes out is what qemu-img would have made, and qemu-img finds nothing wrong with it.

use serde_json::Value;

use crate::{Folder, corpus, text};

fn json(folder: &Folder, args: &[&str]) -> Value {
    serde_json::from_str(&folder.qemu("qemu-img", args)).unwrap()
}

/// What an image says of itself, without what no two images share.
fn facts(folder: &Folder, format: &str, name: &str) -> Value {
    let mut info = json(folder, &["info", "-f", format, "--output=json", name]);
    forget(&mut info);
    info
}

fn forget(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for name in
                ["actual-size", "filename", "uuid", "iters", "master-key-iters", "date-sec", "date-nsec"]
            {
                map.remove(name);
            }
            // The length of an image's file is its maker's business; that of a raw image is its size.
            if map.get("format") == Some(&Value::from("file")) {
                map.remove("virtual-size");
            }
            map.values_mut().for_each(forget);
        }
        Value::Array(list) => list.iter_mut().for_each(forget),
        _ => {}
    }
}

#[test]
fn created_images_are_what_qemu_img_creates() {
    let Some(folder) = Folder::new() else { return };
    corpus::raw(&folder);
    let cases: &[&[&str]] = &[
        &["-f", "raw", "NAME", "1M"],
        &["NAME", "100"],
        &["-f", "raw", "NAME", "1.5M"],
        &["-f", "raw", "-o", "preallocation=full", "NAME", "1M"],
        &["-f", "raw", "-o", "preallocation=falloc,nocow=off", "NAME", "1M"],
        &["-f", "raw", "-o", "size=2M", "NAME"],
        &["-f", "qcow2", "NAME", "10M"],
        &["-f", "qcow2", "NAME", "1000"],
        &["-f", "qcow2", "NAME", "0"],
        &["-f", "qcow2", "-o", "compat=0.10", "NAME", "10M"],
        &["-f", "qcow2", "-o", "compat=v3,lazy_refcounts=on", "NAME", "10M"],
        &["-f", "qcow2", "-o", "cluster_size=512", "-o", "refcount_bits=1", "NAME", "10M"],
        &["-f", "qcow2", "-o", "cluster_size=2M,extended_l2=on,compression_type=zstd", "NAME", "10M"],
        &["-f", "qcow2", "-o", "preallocation=metadata", "NAME", "10M"],
        &["-f", "qcow2", "-o", "preallocation=falloc", "NAME", "3M"],
        &["-f", "qcow2", "-o", "preallocation=full", "NAME", "3M"],
        &["-f", "qcow2", "-o", "data_file=NAME.data,data_file_raw=on", "NAME", "3M"],
        &["-f", "qcow2", "-b", "sparse.raw", "-F", "raw", "NAME"],
        &["-f", "qcow2", "-b", "sparse.raw", "-F", "raw", "NAME", "20M"],
        &["-f", "qcow2", "-o", "backing_file=sparse.raw,backing_fmt=raw", "NAME"],
        &["-f", "qcow2", "-u", "-b", "nothing", "-F", "qcow2", "NAME", "5M"],
        &["-q", "-f", "qcow2", "NAME", "5M"],
        // Refused by both.
        &["-f", "raw", "NAME"],
        &["-f", "raw", "NAME", "1x"],
        &["-f", "raw", "-o", "foo=1", "NAME", "1M"],
        &["-f", "nope", "NAME", "1M"],
        &["-f", "raw", "-b", "sparse.raw", "-F", "raw", "NAME"],
        &["-f", "qcow2", "-b", "nothing", "-F", "raw", "NAME"],
        &["-f", "qcow2", "-b", "sparse.raw", "NAME"],
        &["-f", "qcow2", "-o", "cluster_size=3", "NAME", "1M"],
        &["-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "NAME", "1M"],
        &["-f", "qcow2", "-o", "compat=2.0", "NAME", "1M"],
        &["-f", "qcow2", "-o", "size=1M", "NAME", "1M"],
        &["-f", "raw", "no/such/folder/NAME", "1M"],
    ];
    for (index, case) in cases.iter().enumerate() {
        // The same name for both, so that the words are the same.
        let args: Vec<String> = case.iter().map(|a| a.replace("NAME", "image")).collect();
        let args: Vec<&str> = ["create"].into_iter().chain(args.iter().map(String::as_str)).collect();
        let theirs = folder.run("qemu-img", &args);
        let format = case.iter().skip_while(|a| **a != "-f").nth(1).unwrap_or(&"raw");
        let made = theirs.status.success().then(|| facts(&folder, format, "image"));
        let _ = std::fs::remove_file(folder.path().join("image"));
        let ours = folder.img(&args);
        let (err, their_err) = (text(&ours.stderr), text(&theirs.stderr));
        assert_eq!(ours.status.code(), theirs.status.code(), "{index} {args:?}: {err} / {their_err}");
        if let Some(made) = made {
            assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{args:?}");
            assert_eq!(facts(&folder, format, "image"), made, "{args:?}");
            if *format == "qcow2" && !case.contains(&"nothing") {
                folder.check("image");
            }
        }
        let _ = std::fs::remove_file(folder.path().join("image"));
    }
}

#[test]
fn created_images_with_a_key_open_in_qemu() {
    let Some(folder) = Folder::new() else { return };
    let object = "secret,id=s,data=sesame";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    folder.ours(&["create", "-q", "-f", "qcow2", "--object", object, "-o", options, "inside", "4M"]);
    folder.ours(&[
        "create",
        "-q",
        "-f",
        "luks",
        "--object",
        object,
        "-o",
        "key-secret=s,iter-time=10",
        "whole",
        "4M",
    ]);
    for opts in [
        "driver=qcow2,encrypt.key-secret=s,file.filename=inside",
        "driver=luks,key-secret=s,file.filename=whole",
    ] {
        let io =
            ["--object", object, "-c", "write -P 5 1M 64k", "-c", "read -P 5 1M 64k", "--image-opts", opts];
        folder.qemu("qemu-io", &io);
        let map = folder.ours(&["measure", "--object", object, "--image-opts", opts]);
        assert!(map.contains("required size: 4194304"), "{map}");
    }
}

#[test]
fn a_file_somebody_uses_is_not_overwritten() {
    let Some(folder) = Folder::new() else { return };
    folder.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "used", "4M"]);
    let path = folder.path().join("used");
    let before = std::fs::read(&path).unwrap();
    let mut holder = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "used"])
        .current_dir(folder.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = holder.stdout.take().unwrap();
    // Its prompt says that the image is open.
    let mut prompt = [0u8; 1];
    std::io::Read::read_exact(&mut out, &mut prompt).unwrap();
    folder.refused(1, &["create", "-q", "-f", "raw", "used", "1M"]);
    folder.refused(1, &["resize", "-q", "-f", "qcow2", "used", "+1M"]);
    folder.refused(1, &["info", "-f", "qcow2", "used"]);
    folder.ours(&["info", "-U", "-f", "qcow2", "used"]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn resized_images_are_what_qemu_img_makes_of_them() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let cases: &[&[&str]] = &[
        &["NAME", "+3M"],
        &["NAME", "12M"],
        &["NAME", "1000000"],
        &["--shrink", "NAME", "3M"],
        &["--shrink", "NAME", "-1500k"],
        &["--preallocation=full", "NAME", "+1M"],
        &["--preallocation=falloc", "NAME", "+1M"],
        &["NAME", "4M"],
        &["NAME", "0"],
        &["NAME", "nonsense"],
        &["--shrink", "NAME", "-80M"],
        &["--preallocation=some", "NAME", "+1M"],
    ];
    for (name, format) in
        corpus::all().filter(|(name, _)| !["ext.qcow2", "over.qcow2", "top.qcow2"].contains(name))
    {
        for case in cases {
            let args: Vec<&str> = ["resize", "-f", format]
                .into_iter()
                .chain(case.iter().map(|a| if *a == "NAME" { "image" } else { a }))
                .collect();
            let copy = || std::fs::copy(folder.path().join(name), folder.path().join("image")).unwrap();
            copy();
            let theirs = folder.run("qemu-img", &args);
            std::fs::rename(folder.path().join("image"), folder.path().join("theirs")).unwrap();
            copy();
            let ours = folder.img(&args);
            let err = text(&ours.stderr);
            assert_eq!(
                ours.status.code(),
                theirs.status.code(),
                "{name} {args:?}: {err} / {}",
                text(&theirs.stderr)
            );
            assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{name} {args:?}");
            assert_eq!(facts(&folder, format, "image"), facts(&folder, format, "theirs"), "{name} {args:?}");
            folder.same(("image", format), ("theirs", format));
            if format == "qcow2" {
                folder.check("image");
            }
        }
    }
}

#[test]
fn snapshots_go_there_and_back() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    folder.both(&["snapshot", "-l", "-f", "raw", "sparse.raw"]);
    folder.both(&["snapshot", "-c", "x", "-f", "raw", "sparse.raw"]);
    for (name, format) in corpus::QCOW2.into_iter().filter(|(name, _)| *name != "ext.qcow2") {
        let args = |more: &[&'static str]| [&["snapshot", "-f", format], more, &[name]].concat();
        folder.qemu("qemu-img", &["convert", "-f", format, "-O", "raw", name, "before"]);
        folder.ours(&args(&["-c", "first"]));
        folder.check(name);
        corpus::scribble(&folder, name, 50);
        folder.ours(&args(&["-c", "second"]));
        folder.check(name);
        let listed = folder.both(&args(&["-l"]));
        assert!(listed.contains("first") && listed.contains("second"), "{listed}");
        folder.qemu("qemu-img", &["convert", "-f", format, "-O", "raw", name, "after"]);
        folder.ours(&args(&["-a", "first"]));
        folder.check(name);
        folder.same((name, format), ("before", "raw"));
        // One of theirs is good for us, and the other way round.
        folder.qemu("qemu-img", &args(&["-a", "second"]));
        folder.same((name, format), ("after", "raw"));
        folder.ours(&args(&["-d", "first"]));
        folder.check(name);
        folder.same((name, format), ("after", "raw"));
        folder.both(&args(&["-d", "first"]));
        folder.ours(&args(&["-d", "second"]));
        folder.check(name);
        assert_eq!(folder.both(&args(&[])), "");
    }
}

#[test]
fn a_snapshot_is_deleted_by_its_name_alone() {
    let Some(folder) = Folder::new() else { return };
    folder.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "4M"]);
    // The first one, whose id is 1, has the id of the second for a name.
    folder.qemu("qemu-img", &["snapshot", "-c", "2", "disk"]);
    folder.qemu("qemu-img", &["snapshot", "-c", "keep", "disk"]);
    folder.both(&["snapshot", "-f", "qcow2", "-d", "1", "disk"]);
    folder.ours(&["snapshot", "-f", "qcow2", "-d", "2", "disk"]);
    let left = folder.both(&["snapshot", "-f", "qcow2", "-l", "disk"]);
    assert!(left.contains("keep") && left.lines().count() == 3, "{left}");
    folder.both(&["snapshot", "-f", "qcow2", "-d", "2", "disk"]);
    folder.both(&["snapshot", "-f", "qcow2", "-l", "disk"]);
}

#[test]
fn an_image_is_not_its_own_backing_file_nor_its_own_data_file() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let before = std::fs::read(folder.path().join("plain.qcow2")).unwrap();
    std::os::unix::fs::symlink("plain.qcow2", folder.path().join("link")).unwrap();
    let line = folder.refused(1, &["create", "-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2", "link"]);
    assert!(line.contains("same filename as the backing file"), "{line}");
    let line =
        folder.refused(1, &["create", "-q", "-f", "qcow2", "-o", "data_file=link", "plain.qcow2", "1M"]);
    assert!(line.contains("data file"), "{line}");
    assert!(std::fs::read(folder.path().join("plain.qcow2")).unwrap() == before);
}

#[test]
fn bitmaps_are_what_qemu_img_makes_of_them() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let steps: &[&[&str]] = &[
        &["--add", "IMAGE", "b0"],
        &["--add", "-g", "1M", "--disable", "IMAGE", "b1"],
        &["--add", "IMAGE", "b0"],
        &["--add", "-g", "3", "IMAGE", "b2"],
        &["WRITE"],
        &["--merge", "b0", "IMAGE", "b1"],
        &["--merge", "nothing", "IMAGE", "b1"],
        &["--disable", "IMAGE", "b0"],
        &["WRITE"],
        &["--enable", "IMAGE", "b0"],
        &["--clear", "IMAGE", "b1"],
        &["--remove", "--add", "IMAGE", "b1"],
        &["--remove", "IMAGE", "b0"],
        &["--remove", "IMAGE", "b0"],
    ];
    for name in ["plain.qcow2", "small.qcow2", "sub.qcow2"] {
        for copy in ["theirs", "ours"] {
            std::fs::copy(folder.path().join(name), folder.path().join(copy)).unwrap();
        }
        for (index, step) in steps.iter().enumerate() {
            if step[0] == "WRITE" {
                corpus::scribble(&folder, "theirs", index as u64);
                corpus::scribble(&folder, "ours", index as u64);
                continue;
            }
            let args = |image: &'static str| -> Vec<&str> {
                let rest = step.iter().map(|a| if *a == "IMAGE" { image } else { a });
                ["bitmap", "-f", "qcow2"].into_iter().chain(rest).collect()
            };
            let theirs = folder.run("qemu-img", &args("theirs"));
            let ours = folder.img(&args("ours"));
            let (their_err, err) = (text(&theirs.stderr), text(&ours.stderr));
            assert_eq!(ours.status.code(), theirs.status.code(), "{name} {step:?}: {err} / {their_err}");
            assert_eq!(facts(&folder, "qcow2", "ours"), facts(&folder, "qcow2", "theirs"), "{name} {step:?}");
            folder.check("ours");
        }
        folder.same(("ours", "qcow2"), ("theirs", "qcow2"));
        let list = folder.ours(&["bitmap", "--list", "-f", "qcow2", "ours"]);
        assert!(list.contains("b1") && !list.contains("b0"), "{list}");
    }
    folder.both(&["bitmap", "--clear", "-f", "raw", "sparse.raw", "b"]);
}
