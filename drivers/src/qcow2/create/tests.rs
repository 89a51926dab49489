//! Tests of new images: refusals in QEMU's words, and the same image as `qemu-img create` makes for the same options.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

use graph::{CreateContext, Graph, JobControl, Registry};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions};
use serde_json::{Value, json};

/// Creates an image in a directory; `blockdev-create`'s members without `driver` and `file`.
fn make(dir: &Path, name: &str, options: &Value) -> Result<(), String> {
    let iothread =
        IoThread::start(IoThreadOptions { name: "create".into(), ..IoThreadOptions::default() }).unwrap();
    let graph = Graph::new(Registry::new(crate::ALL.iter().copied()), Some(iothread.clone()));
    graph.secrets().add("key", graph::Secret::new(b"password".to_vec())).unwrap();
    let path = dir.join(name);
    std::fs::write(&path, b"old content").unwrap();
    let mut options = options.clone();
    options["file"] = json!({"driver": "file", "filename": path.to_str().unwrap()});
    if options.get("data-file").is_some() {
        let data = dir.join(options["data-file"].as_str().unwrap());
        std::fs::write(&data, b"").unwrap();
        options["data-file"] = json!({"driver": "file", "filename": data.to_str().unwrap()});
    }
    let cx = CreateContext::new(graph.clone(), std::sync::Arc::new(JobControl::default()));
    let def = crate::ALL.iter().find(|d| d.name == "qcow2").unwrap().create.unwrap();
    let result = block_on((def.create)(cx, options)).map_err(|e| e.to_string());
    block_on(graph.close_all());
    graph.set_iothread(None);
    iothread.stop();
    result
}

fn qemu_img(dir: &Path, args: &[&str]) -> Option<(bool, String)> {
    let output = Command::new("qemu-img").current_dir(dir).args(args).output().ok()?;
    let text = if output.status.success() { &output.stdout } else { &output.stderr };
    Some((output.status.success(), String::from_utf8_lossy(text).into_owned()))
}

/// What `qemu-img info` says, but for the name and the space taken.
fn info(dir: &Path, name: &str, encrypted: bool) -> Option<Value> {
    let spec = format!("driver=qcow2,file.filename={}", dir.join(name).to_str().unwrap());
    let spec = if encrypted { format!("{spec},encrypt.key-secret=key,encrypt.format=luks") } else { spec };
    let args = ["info", "--output=json", "--object", "secret,id=key,data=password", "--image-opts", &spec];
    let (ok, text) = qemu_img(dir, &args)?;
    assert!(ok, "{text}");
    let mut info: Value = serde_json::from_str(&text).unwrap();
    let map = info.as_object_mut().unwrap();
    for key in ["filename", "actual-size", "children", "full-backing-filename"] {
        map.remove(key);
    }
    if let Some(data) = info.pointer_mut("/format-specific/data").and_then(Value::as_object_mut) {
        data.remove("data-file");
        if let Some(encrypt) = data.get_mut("encrypt").and_then(Value::as_object_mut) {
            for key in ["uuid", "master-key-iters", "slots"] {
                encrypt.remove(key);
            }
        }
    }
    Some(info)
}

fn check(dir: &Path, name: &str) -> Option<Value> {
    let (_, text) = qemu_img(dir, &["check", "-f", "qcow2", "--output=json", name])?;
    let mut result: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}"));
    for key in ["filename", "image-end-offset", "fragmented-clusters"] {
        result.as_object_mut().unwrap().remove(key);
    }
    Some(result)
}

/// (the members of `blockdev-create`, the `-o` of `qemu-img create`)
fn matrix() -> Vec<(Value, String)> {
    let sizes: [u64; 4] = [0, 512, (1 << 20) + 512 * 3, 5 << 30];
    let mut out = Vec::new();
    for size in sizes {
        for cluster in [512u64, 4096, 65536, 2 << 20] {
            for (version, compat) in [("v2", "0.10"), ("v3", "1.1")] {
                out.push((
                    json!({"size": size, "cluster-size": cluster, "version": version}),
                    format!("cluster_size={cluster},compat={compat}"),
                ));
            }
        }
        for bits in [1, 2, 4, 8, 32, 64] {
            out.push((json!({"size": size, "refcount-bits": bits}), format!("refcount_bits={bits}")));
        }
        out.push((
            json!({"size": size, "lazy-refcounts": true, "compression-type": "zstd"}),
            "lazy_refcounts=on,compression_type=zstd".into(),
        ));
        out.push((
            json!({"size": size, "extended-l2": true, "cluster-size": 131072}),
            "extended_l2=on,cluster_size=131072".into(),
        ));
        out.push((
            json!({"size": size, "backing-file": "a backing file.img", "backing-fmt": "raw"}),
            "backing_file=a backing file.img,backing_fmt=raw".into(),
        ));
        out.push((json!({"size": size, "data-file": "ours.data"}), "data_file=theirs.data".into()));
        if size < 1 << 30 {
            for (mode, cluster) in [("metadata", 512), ("metadata", 65536), ("falloc", 4096), ("full", 65536)]
            {
                out.push((
                    json!({"size": size, "preallocation": mode, "cluster-size": cluster}),
                    format!("preallocation={mode},cluster_size={cluster}"),
                ));
            }
            out.push((
                json!({"size": size, "preallocation": "metadata", "refcount-bits": 64, "cluster-size": 512}),
                "preallocation=metadata,refcount_bits=64,cluster_size=512".into(),
            ));
            out.push((
                json!({"size": size, "preallocation": "metadata", "extended-l2": true,
                       "backing-file": "b", "backing-fmt": "raw"}),
                "preallocation=metadata,extended_l2=on,backing_file=b,backing_fmt=raw".into(),
            ));
            out.push((
                json!({"size": size, "data-file": "ours.data", "data-file-raw": true}),
                "data_file=theirs.data,data_file_raw=on".into(),
            ));
            out.push((
                json!({"size": size, "data-file": "ours.data", "preallocation": "falloc"}),
                "data_file=theirs.data,preallocation=falloc".into(),
            ));
        }
    }
    out
}

#[test]
fn the_same_image_as_qemu_makes() {
    let mut identical = 0;
    let all = matrix();
    for (options, theirs) in &all {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        make(dir, "ours", options).unwrap_or_else(|e| panic!("{options}: {e}"));
        let size = options["size"].to_string();
        let args = ["create", "-q", "-u", "-f", "qcow2", "-o", theirs, "theirs", &size];
        let Some((ok, text)) = qemu_img(dir, &args) else { return };
        assert!(ok, "{theirs}: {text}");
        assert_eq!(info(dir, "ours", false), info(dir, "theirs", false), "{options}");
        // Without the backing file there.
        if options.get("backing-file").is_none() {
            let ours = check(dir, "ours").unwrap();
            assert_eq!(ours, check(dir, "theirs").unwrap(), "{options}");
            assert!(ours.get("leaks").is_none() && ours.get("corruptions").is_none(), "{options}: {ours}");
        }
        let length = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
        if options.get("data-file").is_some() {
            assert_eq!(length("ours.data"), length("theirs.data"), "{options}");
        } else if options.get("preallocation").is_none() {
            // The very same bytes; QEMU leaves the last cluster short.
            let (mut a, mut b) =
                (std::fs::read(dir.join("ours")).unwrap(), std::fs::read(dir.join("theirs")).unwrap());
            assert!(a.len() >= b.len(), "{options}");
            let whole = a.len();
            b.resize(whole, 0);
            // Where QEMU puts the feature names is its affair as long as the meaning is the same, which `info` has shown.
            identical += u32::from(a == b);
            a.clear();
        }
    }
    assert!(identical as usize * 2 > all.len(), "{identical} of {} are the same to the byte", all.len());
}

#[test]
fn encrypted_images_open_with_their_passphrase() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (i, more) in
        [json!({}), json!({"preallocation": "metadata"}), json!({"data-file": "d"})].iter().enumerate()
    {
        let name = format!("image{i}");
        let mut options =
            json!({"size": 4 << 20, "encrypt": {"format": "luks", "key-secret": "key", "iter-time": 10}});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        make(dir, &name, &options).unwrap();
        let Some(info) = info(dir, &name, true) else { return };
        assert_eq!(info.pointer("/format-specific/data/encrypt/format"), Some(&json!("luks")), "{info}");
        let spec = format!("driver=qcow2,file.filename={name},encrypt.key-secret=key,encrypt.format=luks");
        let object = "secret,id=key,data=password";
        let (ok, text) = qemu_img(dir, &["check", "--object", object, "--image-opts", &spec]).unwrap();
        assert!(ok, "{text}");
        // Reads as zeroes, takes data.
        let io = |command: &str| {
            let output = Command::new("qemu-io")
                .current_dir(dir)
                .args(["--object", object, "--image-opts", &spec, "-c", command])
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        if i < 2 {
            let text = io("read -P 0 0 4M");
            assert!(text.contains("read 4194304") && !text.contains("failed"), "{text}");
        }
        assert!(io("write -P 7 1M 64k").contains("wrote"));
        let text = io("read -P 7 1M 64k");
        assert!(text.contains("read 65536") && !text.contains("failed"), "{text}");
    }
    let wrong = json!({"size": 1 << 20, "encrypt": {"format": "luks"}});
    assert_eq!(make(dir, "x", &wrong).unwrap_err(), "Parameter 'encrypt.key-secret' is required for cipher");
}

#[test]
fn what_does_not_go_together_is_refused_in_qemus_words() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |more: Value| {
        let mut options = json!({"size": 1 << 20});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let e = make(dir.path(), "x", &options).expect_err("refused");
        // Nothing has been touched.
        assert_eq!(std::fs::read(dir.path().join("x")).unwrap(), b"old content");
        e
    };
    let v3 = "compatibility level 1.1";
    let newer = "(use version=v3 or greater)";
    for (more, words) in [
        (json!({"size": 1000}), "Image size must be a multiple of 512 bytes".to_owned()),
        (json!({"cluster-size": 1000}), "Cluster size must be a power of two between 512 and 2048k".into()),
        (
            json!({"cluster-size": 4 << 20}),
            "Cluster size must be a power of two between 512 and 2048k".into(),
        ),
        (json!({"cluster-size": 0}), "Cluster size must be a power of two between 512 and 2048k".into()),
        (
            json!({"extended-l2": true, "version": "v2"}),
            format!("Extended L2 entries are only supported with {v3} and above {newer}"),
        ),
        (
            json!({"extended-l2": true, "cluster-size": 8192}),
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".into(),
        ),
        (
            json!({"lazy-refcounts": true, "version": "v2"}),
            format!("Lazy refcounts only supported with {v3} and above {newer}"),
        ),
        (
            json!({"refcount-bits": 3}),
            "Refcount width must be a power of two and may not exceed 64 bits".into(),
        ),
        (
            json!({"refcount-bits": 128}),
            "Refcount width must be a power of two and may not exceed 64 bits".into(),
        ),
        (
            json!({"refcount-bits": 32, "version": "v2"}),
            format!("Different refcount widths than 16 bits require {v3} or above {newer}"),
        ),
        (json!({"data-file-raw": true}), "data-file-raw requires data-file".into()),
        (
            json!({"data-file": "d", "version": "v2"}),
            format!("External data files are only supported with {v3} and above {newer}"),
        ),
        (
            json!({"compression-type": "zstd", "version": "v2"}),
            format!("Non-zlib compression type is only supported with {v3} and above {newer}"),
        ),
        (json!({"backing-fmt": "raw"}), "Backing format cannot be used without backing file".into()),
        (
            json!({"cluster-size": 512, "size": 1u64 << 40}),
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)".into(),
        ),
    ] {
        assert_eq!(refusal(more.clone()), words, "{more}");
    }
}
