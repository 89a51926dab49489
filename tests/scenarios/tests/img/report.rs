//! Commands that tell something about images: the same words and members as qemu-img's.

use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::{Folder, corpus};

#[test]
fn info_tells_the_same() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    folder.qemu("qemu-img", &["snapshot", "-c", "before", "plain.qcow2"]);
    folder.qemu("qemu-img", &["snapshot", "-c", "after", "plain.qcow2"]);
    for (name, format) in corpus::all() {
        for output in ["human", "json"] {
            let output = format!("--output={output}");
            folder.both(&["info", "-f", format, &output, name]);
            folder.both(&["info", &output, name]);
            folder.both(&["info", &output, "--backing-chain", name]);
        }
    }
    folder.both(&["info", "--image-opts", "driver=raw,offset=512,size=1024,file.filename=sparse.raw"]);
    folder.both(&["info", "--image-opts", "driver=qcow2,file.driver=file,file.filename=plain.qcow2"]);
    folder.both(&["info", "-U", "-f", "raw", "sparse.raw"]);
    folder.both(&["info", "-f", "raw", "missing.raw"]);
}

#[test]
fn info_of_encrypted_images_needs_no_key() {
    let Some(folder) = Folder::new() else { return };
    let secret = ["--object", "secret,id=s,data=sesame"];
    let create = |format: &str, options: &str, name: &str| {
        let options = format!("{options},{}iter-time=10", if format == "luks" { "" } else { "encrypt." });
        let mut args = vec!["create", "-q", "-f", format, "-o", &options];
        args.extend(secret);
        args.extend([name, "4M"]);
        folder.qemu("qemu-img", &args);
    };
    create("luks", "key-secret=s", "whole.luks");
    create("qcow2", "encrypt.format=luks,encrypt.key-secret=s", "inside.qcow2");
    for name in ["whole.luks", "inside.qcow2"] {
        folder.both(&["info", name]);
        folder.both(&["info", "--output=json", name]);
    }
}

#[test]
fn info_opens_nothing_but_the_image() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    std::fs::remove_file(folder.path().join("ext.data")).unwrap();
    std::fs::remove_file(folder.path().join("sparse.raw")).unwrap();
    folder.ours(&["info", "-f", "qcow2", "ext.qcow2"]);
    folder.ours(&["info", "-f", "qcow2", "over.qcow2"]);
    folder.refused(1, &["info", "-f", "qcow2", "--backing-chain", "over.qcow2"]);
}

#[test]
fn an_image_below_itself_is_told_of() {
    let Some(folder) = Folder::new() else { return };
    folder.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "b", "-F", "qcow2", "a", "1M"]);
    folder.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "a", "-F", "qcow2", "b", "1M"]);
    let line = folder.refused(1, &["info", "--backing-chain", "a"]);
    assert!(line.contains("infinite loop"), "{line}");
    folder.both(&["info", "a"]);
}

/// A map where holes inside of allocated clusters leave no trace: qemu-img looks for them in some images, ours in all. Nor
/// do places of what is zero, which ours does not tell for clusters.
fn coarse(text: String) -> String {
    let map: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut out: Vec<Value> = Vec::new();
    let end = |e: &Value, of: &str| Some(e[of].as_u64()? + e["length"].as_u64()?);
    for mut entry in map {
        if entry["data"] == true {
            entry["zero"] = json!(false);
        } else if let Some(entry) = entry.as_object_mut() {
            entry.remove("offset");
        }
        let same = |last: &Value| {
            let members = ["depth", "present", "zero", "data", "compressed"];
            members.iter().all(|m| last[m] == entry[m])
                && last["offset"].is_u64() == entry["offset"].is_u64()
                && (!entry["offset"].is_u64() || end(last, "offset") == entry["offset"].as_u64())
        };
        match out.last_mut().filter(|last| same(last)) {
            Some(last) => {
                last["length"] = json!(last["length"].as_u64().unwrap() + entry["length"].as_u64().unwrap())
            }
            None => out.push(entry),
        }
    }
    serde_json::to_string(&out).unwrap()
}

#[test]
fn map_tells_the_same() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    for (name, format) in corpus::all() {
        let json = ["map", "-f", format, "--output=json"];
        folder.both_but(&[&json[..], &[name]].concat(), coarse);
        let part = ["--start-offset", "1000k", "--max-length", "3M", name];
        folder.both_but(&[&json[..], &part[..]].concat(), coarse);
        let ours: Vec<Value> = serde_json::from_str(&folder.ours(&[&json[..], &[name]].concat())).unwrap();
        if !ours.iter().any(|e| e["data"] == true && e["zero"] == true) {
            folder.both(&["map", "-f", format, name]);
        }
    }
    folder.both(&["map", "-f", "raw", "--start-offset", "100G", "sparse.raw"]);
    folder.both(&["map", "--image-opts", "--output=json", "driver=raw,offset=1M,file.filename=sparse.raw"]);
}

/// The same answer; but where ours finds holes that qemu-img did not look for, less is required.
fn measured(folder: &Folder, args: &[&str]) {
    let mut theirs: Value = serde_json::from_str(&folder.qemu("qemu-img", args)).unwrap();
    let ours: Value = serde_json::from_str(&folder.ours(args)).unwrap();
    assert!(ours["required"].as_u64().unwrap() <= theirs["required"].as_u64().unwrap(), "{args:?}");
    theirs["required"] = ours["required"].clone();
    assert_eq!(ours, theirs, "{args:?}");
}

#[test]
fn measure_tells_the_same() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    for (name, format) in corpus::all() {
        for target in ["raw", "qcow2"] {
            measured(&folder, &["measure", "-f", format, "-O", target, "--output=json", name]);
        }
        let finer = ["-o", "cluster_size=4k", "--output=json"];
        measured(&folder, &[&["measure", "-f", format, "-O", "qcow2"], &finer[..], &[name]].concat());
    }
    for size in ["0", "1", "1M", "1G", "3T"] {
        for options in [
            "cluster_size=64k",
            "cluster_size=512,size=1",
            "cluster_size=2M,extended_l2=on",
            "preallocation=full",
            "preallocation=metadata",
            "refcount_bits=1",
            "compat=0.10",
            "cluster_size=3",
        ] {
            let options = options.trim_end_matches(",size=1");
            folder.both(&["measure", "--size", size, "-O", "qcow2", "-o", options]);
        }
    }
    folder.both(&["measure", "--size", "8E", "-O", "qcow2"]);
    folder.both(&["measure"]);
}

#[test]
fn compare_says_the_same() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    let all: Vec<_> = corpus::all().collect();
    for (index, a) in all.iter().enumerate() {
        for b in &all[index..] {
            folder.both(&["compare", "-f", a.1, "-F", b.1, a.0, b.0]);
        }
    }
    folder.both(&["compare", "-s", "-f", "raw", "-F", "qcow2", "sparse.raw", "top.qcow2"]);
    folder.both(&["compare", "-s", "-f", "raw", "-F", "raw", "sparse.raw", "sparse.raw"]);
    folder.both(&["compare", "-q", "-f", "raw", "-F", "raw", "sparse.raw", "dense.raw"]);
    folder.both(&["compare", "-f", "raw", "-F", "raw", "sparse.raw", "missing.raw"]);
}

#[test]
fn check_finds_the_same() {
    let Some(folder) = Folder::new() else { return };
    corpus::make(&folder);
    for (name, format) in corpus::all() {
        folder.both(&["check", "-f", format, name]);
        folder.both(&["check", "-f", format, "--output=json", name]);
        folder.both(&["check", "-q", "-f", format, name]);
    }
    // The refcount of the last cluster: one too many.
    let damage = |name: &str, value: u16| {
        let copy = format!("bad-{name}");
        std::fs::copy(folder.path().join(name), folder.path().join(&copy)).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(folder.path().join(&copy)).unwrap();
        let clusters = file.metadata().unwrap().len() / 65536;
        file.write_all_at(&value.to_be_bytes(), 2 * 65536 + 2 * (clusters - 1)).unwrap();
        copy
    };
    for (name, value) in [("plain.qcow2", 0), ("plain.qcow2", 2), ("lazy.qcow2", 0)] {
        let bad = damage(name, value);
        folder.both(&["check", "-f", "qcow2", &bad]);
        folder.both(&["check", "-f", "qcow2", "--output=json", &bad]);
        for repair in ["leaks", "all"] {
            // Each repairs a copy of its own under the same name.
            let output = |tool: &dyn Fn(&[&str]) -> std::process::Output| {
                std::fs::copy(folder.path().join(&bad), folder.path().join("patient")).unwrap();
                let output = tool(&["check", "-f", "qcow2", "-r", repair, "--output=json", "patient"]);
                let again = folder.run("qemu-img", &["check", "-f", "qcow2", "--output=json", "patient"]);
                // Nothing is said about what cannot be repaired so.
                let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or(Value::Null);
                (output.status.code(), json(&output.stdout), again.status.code(), json(&again.stdout))
            };
            let theirs = output(&|args| folder.run("qemu-img", args));
            let ours = output(&|args| folder.img(args));
            assert_eq!(ours, theirs, "{bad}: {repair}");
        }
    }
}
