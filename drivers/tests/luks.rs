//! LUKS images against QEMU: what either side makes, the other opens; what either writes, the other reads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{registry, tool};
use conformance::DriverCase;
use graph::{CreateContext, Graph, JobControl, NoSource, Purpose, Root, RootOptions, Secret, WriteFlags};
use host::exec::block_on;
use host::{IoThread, IoThreadOptions, IoVecs};
use serde_json::{Value, json};

const SIZE: u64 = 3 << 19;
const PASSPHRASE: &str = "correct horse";

/// A graph with a passphrase in it, and its iothread.
struct Rig {
    graph: Graph,
    thread: IoThread,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let thread = IoThread::start(IoThreadOptions::default()).unwrap();
        let graph = Graph::new(registry(), Some(thread.clone()));
        graph.secrets().add("key", Secret::new(PASSPHRASE.into())).unwrap();
        graph.secrets().add("wrong", Secret::new(b"battery staple".to_vec())).unwrap();
        graph.secrets().add("binary", Secret::new(vec![0xff, 0xfe])).unwrap();
        Rig { graph, thread, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str) -> Value {
        json!({"driver": "file", "filename": self.path(name)})
    }

    fn create(&self, mut options: Value) -> Result<(), String> {
        let members = options.as_object_mut().unwrap();
        members.entry("key-secret").or_insert(json!("key"));
        members.entry("iter-time").or_insert(json!(1));
        members.entry("size").or_insert(json!(SIZE));
        for child in ["file", "header"] {
            if let Some(Value::Object(file)) = members.get(child) {
                let path = file["filename"].as_str().unwrap();
                std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
            }
        }
        self.create_with("luks", options)
    }

    fn create_with(&self, driver: &str, options: Value) -> Result<(), String> {
        let def = *self.graph.registry().get(driver).unwrap();
        let cx = CreateContext::new(self.graph.clone(), Arc::new(JobControl::default()));
        block_on((def.create.unwrap().create)(cx, options)).map_err(|e| e.to_string())
    }

    fn open(&self, options: Value) -> Result<(), String> {
        let mut all = json!({"driver": "luks", "node-name": "disk"});
        all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        block_on(self.graph.blockdev_add(all)).map_err(|e| e.to_string())
    }

    fn attach(&self) -> Root {
        let options = RootOptions::new("a test", true);
        block_on(self.graph.attach("disk", options, std::rc::Rc::new(NoSource))).unwrap()
    }

    /// Writes `data` at 0 through a node over the image, reads it back in odd pieces, and closes.
    fn write(&self, options: Value, data: &[u8]) {
        self.open(options).unwrap();
        let root = self.attach();
        let (view, data) = (root.view().unwrap(), data.to_vec());
        let result = self.thread.call_blocking(move |local| async move {
            let io = view.io(&local);
            io.write(0, &IoVecs::from_vec(data.clone()), WriteFlags::empty()).await?;
            let bufs = IoVecs::from_vec(vec![0; 70_000]);
            io.read(777, &bufs).await?;
            assert_eq!(bufs.to_vec(), data[777..70_777]);
            io.flush().await
        });
        result.unwrap().unwrap();
        block_on(root.detach());
        block_on(self.graph.blockdev_del("disk")).unwrap();
    }

    fn read(&self, options: Value, len: usize) -> Vec<u8> {
        self.open(options).unwrap();
        let root = self.attach();
        let view = root.view().unwrap();
        let result = self.thread.call_blocking(move |local| async move {
            let bufs = IoVecs::from_vec(vec![0; len]);
            view.io(&local).read(0, &bufs).await.map(|()| bufs.to_vec())
        });
        block_on(root.detach());
        block_on(self.graph.blockdev_del("disk")).unwrap();
        result.unwrap().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        block_on(self.graph.close_all());
        self.graph.set_iothread(None);
        self.thread.clone().stop();
    }
}

/// Runs a tool of QEMU's with the passphrase as secret `key`; `None` where it is not installed.
fn qemu(name: &str, args: &[&str]) -> Option<String> {
    let secret = format!("secret,id=key,data={PASSPHRASE}");
    let mut all: Vec<&str> = Vec::new();
    // qemu-img wants its command first.
    let rest = if name == "qemu-img" {
        all.push(args[0]);
        &args[1..]
    } else {
        args
    };
    all.extend(["--object", &secret]);
    all.extend(rest);
    let output = tool(name, &all)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{name} {all:?}: {}{}", text(&output.stdout), text(&output.stderr));
    Some(text(&output.stdout))
}

/// Bytes without a pattern that could hide a shift.
fn noise(len: usize) -> Vec<u8> {
    let mut rng = conformance::rng::Rng::new(7);
    rng.data(len as u64)
}

/// Every combination of cipher, mode and IV generator QEMU makes, and every hash.
fn combinations() -> Vec<Vec<(&'static str, &'static str)>> {
    let mut all = Vec::new();
    let wide = ["aes-128", "aes-256", "serpent-128", "serpent-256", "twofish-128", "twofish-256"];
    for cipher in wide {
        for (mode, ivgen) in
            [("xts", "plain64"), ("cbc", "essiv"), ("cbc", "plain"), ("ecb", "plain64"), ("ctr", "plain64")]
        {
            all.push(vec![("cipher-alg", cipher), ("cipher-mode", mode), ("ivgen-alg", ivgen)]);
        }
    }
    for cipher in ["aes-192", "twofish-192"] {
        all.push(vec![("cipher-alg", cipher)]);
    }
    for mode in ["cbc", "ecb", "ctr"] {
        all.push(vec![("cipher-alg", "cast5-128"), ("cipher-mode", mode)]);
    }
    all.push(vec![
        ("cipher-alg", "cast5-128"),
        ("cipher-mode", "cbc"),
        ("ivgen-alg", "essiv"),
        ("ivgen-hash-alg", "md5"),
    ]);
    all.push(vec![("ivgen-alg", "essiv"), ("ivgen-hash-alg", "sha256"), ("hash-alg", "sha512")]);
    for hash in ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"] {
        all.push(vec![("hash-alg", hash)]);
    }
    all
}

#[test]
fn what_qemu_makes_and_writes_we_read() {
    let rig = Rig::new();
    let data = noise(SIZE as usize);
    std::fs::write(rig.path("plain"), &data).unwrap();
    // QEMU takes seconds to make one, whatever is asked: the other test has all combinations.
    for combination in combinations().into_iter().step_by(7) {
        let path = rig.path("image");
        let _ = std::fs::remove_file(&path);
        let mut options = "key-secret=key,iter-time=1".to_owned();
        for (name, value) in &combination {
            options += &format!(",{name}={value}");
        }
        let plain = rig.path("plain");
        let args = ["convert", "-f", "raw", "-O", "luks", "-o", &options, &plain, &path];
        if qemu("qemu-img", &args).is_none() {
            return;
        }
        let seen = rig.read(json!({"file": rig.file("image"), "key-secret": "key"}), SIZE as usize);
        assert!(seen == data, "{combination:?}");
    }
}

#[test]
fn what_we_make_and_write_qemu_reads() {
    let rig = Rig::new();
    let data = noise(SIZE as usize);
    std::fs::write(rig.path("plain"), &data).unwrap();
    for combination in combinations() {
        let path = rig.path("image");
        let _ = std::fs::remove_file(&path);
        let mut options = json!({"file": rig.file("image")});
        for (name, value) in &combination {
            options[name] = json!(value);
        }
        rig.create(options).unwrap_or_else(|e| panic!("{combination:?}: {e}"));
        rig.write(json!({"file": rig.file("image"), "key-secret": "key"}), &data);
        let image = format!("driver=luks,key-secret=key,file.filename={path}");
        let plain = format!("driver=raw,file.filename={}", rig.path("plain"));
        if qemu("qemu-img", &["compare", "--image-opts", &image, &plain]).is_none() {
            return;
        }
    }
}

/// The members that are random, or depend on the machine, are left out.
fn comparable(info: &Value) -> Value {
    let mut data = info["format-specific"]["data"].clone();
    let members = data.as_object_mut().unwrap();
    members.remove("uuid");
    members.remove("master-key-iters");
    data["slots"][0].as_object_mut().unwrap().remove("iters");
    data
}

#[test]
fn both_tell_the_same_of_an_image() {
    let rig = Rig::new();
    for options in [
        json!({}),
        json!({"cipher-mode": "cbc", "ivgen-alg": "essiv", "cipher-alg": "serpent-256", "hash-alg": "sha1"}),
    ] {
        let _ = std::fs::remove_file(rig.path("image"));
        let mut create = options.clone();
        create["file"] = rig.file("image");
        rig.create(create).unwrap();
        let Some(text) = qemu("qemu-img", &["info", "--output=json", "-f", "luks", &rig.path("image")])
        else {
            return;
        };
        let theirs: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(theirs["virtual-size"], SIZE);
        assert_eq!(theirs["encrypted"], true);
        // Ours of the same image, with the key and without.
        for (purpose, more) in [(Purpose::Use, json!({"key-secret": "key"})), (Purpose::Inspect, json!({}))] {
            let mut open = json!({"driver": "luks", "node-name": "disk", "file": rig.file("image")});
            open.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            block_on(rig.graph.blockdev_add_for(open, purpose)).unwrap();
            let info = rig.graph.node("disk").unwrap().driver().info();
            assert!(info.encrypted);
            assert_eq!(info.format_specific.unwrap(), theirs["format-specific"]);
            block_on(rig.graph.blockdev_del("disk")).unwrap();
        }
        // And QEMU's image made with the same options.
        let words: Vec<String> = options
            .as_object()
            .unwrap()
            .iter()
            .map(|(k, v)| format!(",{k}={}", v.as_str().unwrap()))
            .collect();
        let create = format!("key-secret=key,iter-time=1{}", words.concat());
        let path = rig.path("theirs");
        qemu("qemu-img", &["create", "-q", "-f", "luks", "-o", &create, &path, &SIZE.to_string()]);
        let text = qemu("qemu-img", &["info", "--output=json", "-f", "luks", &path]).unwrap();
        let made: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(comparable(&made), comparable(&theirs));
    }
}

#[test]
fn a_detached_header_works_both_ways() {
    let rig = Rig::new();
    let data = noise(SIZE as usize);
    std::fs::write(rig.path("plain"), &data).unwrap();
    rig.create(json!({"file": rig.file("data"), "header": rig.file("header")})).unwrap();
    assert_eq!(std::fs::metadata(rig.path("data")).unwrap().len(), SIZE);
    rig.write(json!({"file": rig.file("data"), "header": rig.file("header"), "key-secret": "key"}), &data);
    let image = json!({"driver": "luks", "key-secret": "key", "file": rig.file("data"), "header": rig.file("header")});
    let plain = json!({"driver": "raw", "file": rig.file("plain")});
    let (image, plain) = (format!("json:{image}"), format!("json:{plain}"));
    if qemu("qemu-img", &["compare", &image, &plain]).is_none() {
        return;
    }
    qemu("qemu-io", &["-c", "write -P 0x5a 4096 65536", &image]);
    let seen = rig.read(
        json!({"file": rig.file("data"), "header": rig.file("header"), "key-secret": "key"}),
        SIZE as usize,
    );
    assert!(seen[4096..4096 + 65536].iter().all(|b| *b == 0x5a));
    assert!(seen[4096 + 65536..] == data[4096 + 65536..]);
}

#[test]
fn what_cannot_be_opened_is_refused_in_qemus_words() {
    let rig = Rig::new();
    rig.create(json!({"file": rig.file("image")})).unwrap();
    let refused = |more: Value| {
        let mut options = json!({"file": rig.file("image")});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rig.open(options).unwrap_err()
    };
    assert_eq!(refused(json!({})), "Parameter 'key-secret' is required for cipher");
    assert_eq!(refused(json!({"key-secret": "nobody"})), "No secret with id 'nobody'");
    assert_eq!(refused(json!({"key-secret": "binary"})), "Data from secret binary is not valid UTF-8");
    assert_eq!(refused(json!({"key-secret": "wrong"})), "Invalid password, cannot unlock any keyslot");

    let image = std::fs::read(rig.path("image")).unwrap();
    std::fs::write(rig.path("image"), &image[..512]).unwrap();
    let error = refused(json!({"key-secret": "key"}));
    assert!(error.contains("Unable to read LUKS header"), "{error}");
    std::fs::write(rig.path("image"), &image[..8192]).unwrap();
    assert!(refused(json!({"key-secret": "key"})).contains("Key material of keyslot 0"));
    std::fs::write(rig.path("image"), &image[..300_000]).unwrap();
    assert!(refused(json!({"key-secret": "key"})).contains("payload offset (2068480) lies past the end"));
    std::fs::write(rig.path("image"), vec![0; 1 << 20]).unwrap();
    assert_eq!(refused(json!({"key-secret": "key"})), "Volume is not in LUKS format");
}

#[test]
fn what_cannot_be_created_is_refused_and_leaves_the_file_alone() {
    let rig = Rig::new();
    std::fs::write(rig.path("image"), b"as it was").unwrap();
    let refused = |more: Value| {
        let mut options = json!({"file": rig.file("image")});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let error = rig.create(options).unwrap_err();
        assert_eq!(std::fs::read(rig.path("image")).unwrap(), b"as it was", "{error}");
        error
    };
    assert_eq!(refused(json!({"key-secret": "nobody"})), "No secret with id 'nobody'");
    assert_eq!(refused(json!({"iter-time": 0})), "iteration time must be greater than zero");
    assert_eq!(refused(json!({"cipher-alg": "cast5-128"})), "Unsupported cipher mode xts");
    assert_eq!(refused(json!({"size": i64::MAX - 511})), "The requested file size is too large");
    assert_eq!(
        rig.create(json!({})).unwrap_err(),
        "Either the parameter 'header' or 'file' must be specified"
    );
}

#[test]
fn two_nodes_share_a_volume_as_two_raw_ones_would() {
    // A LUKS node writes its file only where its user writes: it stands in nobody's way.
    let rig = Rig::new();
    rig.create(json!({"file": rig.file("image")})).unwrap();
    rig.open(json!({"file": rig.file("image"), "key-secret": "key"})).unwrap();
    let other =
        json!({"driver": "luks", "node-name": "other", "file": rig.file("image"), "key-secret": "key"});
    block_on(rig.graph.blockdev_add(other)).unwrap();
    let root = rig.attach();
    let options = RootOptions::new("another", true);
    let second = block_on(rig.graph.attach("other", options, std::rc::Rc::new(NoSource)));
    assert!(second.is_ok(), "{:?}", second.err());
    block_on(root.detach());
    block_on(second.unwrap().detach());
}

/// An image that reads as zeroes, as the suite wants it.
fn zeroed(dir: &Path) -> Result<(), String> {
    let rig = Rig::new();
    let file = json!({"driver": "file", "filename": dir.join("image").to_str().unwrap()});
    rig.create(json!({"file": file.clone()}))?;
    rig.write(json!({"file": file, "key-secret": "key"}), &vec![0; SIZE as usize]);
    Ok(())
}

#[test]
fn luks_over_a_file() {
    let dir = tempfile::tempdir().unwrap();
    zeroed(dir.path()).unwrap();
    let image = std::fs::read(dir.path().join("image")).unwrap();
    for direct in [false, true] {
        let image = image.clone();
        let mut case = DriverCase::new(
            format!("luks cache.direct={direct}"),
            registry(),
            SIZE,
            move |dir| std::fs::write(dir.join("image"), &image).map_err(|e| e.to_string()),
            move |dir| {
                let path = dir.join("image");
                json!({"driver": "luks", "key-secret": "key", "cache": {"direct": direct},
                       "file": {"driver": "file", "filename": path.to_str().unwrap()}})
            },
        );
        case.resizable = true;
        case.grows_zeroed = false;
        case.torn_unit = 512;
        case.secrets = vec![("key".to_owned(), PASSPHRASE.as_bytes().to_vec())];
        if let Err(e) = conformance::run(&case) {
            panic!("{e}");
        }
    }
}

#[test]
fn an_image_that_is_inspected_gives_no_data() {
    let rig = Rig::new();
    rig.create(json!({"file": rig.file("image")})).unwrap();
    let open = json!({"driver": "luks", "node-name": "disk", "file": rig.file("image")});
    block_on(rig.graph.blockdev_add_for(open, Purpose::Inspect)).unwrap();
    let root = rig.attach();
    let view = root.view().unwrap();
    let result = rig.thread.call_blocking(move |local| async move {
        view.io(&local).read(0, &IoVecs::from_vec(vec![0; 512])).await
    });
    assert_eq!(result.unwrap().unwrap_err().errno(), graph::Errno::EIO);
    block_on(root.detach());
}

#[test]
fn a_child_may_be_a_node_that_exists() {
    let rig = Rig::new();
    rig.create(json!({"file": rig.file("image")})).unwrap();
    let mut file = rig.file("image");
    file["node-name"] = json!("below");
    block_on(rig.graph.blockdev_add(file)).unwrap();
    rig.open(json!({"file": "below", "key-secret": "key"})).unwrap();
}

/// Options of a qcow2 node over `image`.
fn qcow2(rig: &Rig, format: &str) -> Value {
    json!({"driver": "qcow2", "file": rig.file("image"), "encrypt": {"format": format, "key-secret": "key"}})
}

/// What QEMU reads of the qcow2 image, or of a snapshot in it.
fn content(rig: &Rig, snapshot: Option<&str>) -> Vec<u8> {
    let (image, raw) = (rig.path("image"), rig.path("raw"));
    let image = format!("driver=qcow2,file.filename={image},encrypt.key-secret=key");
    let mut args = vec!["convert", "--image-opts", &image, "-O", "raw"];
    let snapshot = snapshot.map(|s| format!("snapshot.name={s}"));
    if let Some(snapshot) = &snapshot {
        args.extend(["-l", snapshot]);
    }
    args.push(&raw);
    qemu("qemu-img", &args);
    std::fs::read(&raw).unwrap()
}

fn check_qcow2(rig: &Rig) {
    let image = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", rig.path("image"));
    qemu("qemu-img", &["check", "--image-opts", &image]);
}

/// What one side writes the other reads, in an encrypted qcow2 image; with clusters that are shared with a snapshot, so that they
/// move and are encrypted anew.
fn exchange(rig: &Rig, format: &str) {
    let data = noise(SIZE as usize);
    rig.write(qcow2(rig, format), &data);
    check_qcow2(rig);
    assert!(content(rig, None) == data, "{format}: what we wrote");
    let image = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", rig.path("image"));
    qemu("qemu-img", &["snapshot", "--image-opts", "-c", "before", &image]);
    qemu("qemu-io", &["--image-opts", &image, "-c", "write -P 0x5a 70000 300000"]);
    let mut now = data.clone();
    now[70_000..370_000].fill(0x5a);
    assert!(rig.read(qcow2(rig, format), SIZE as usize) == now, "{format}: what QEMU wrote");
    // 100,000 bytes from 0: an end inside of a cluster that the snapshot holds, too.
    let more = vec![0xa5; 100_000];
    rig.write(qcow2(rig, format), &more);
    now[..100_000].copy_from_slice(&more);
    check_qcow2(rig);
    assert!(content(rig, None) == now, "{format}: after copying on write");
    assert!(content(rig, Some("before")) == data, "{format}: the snapshot");
}

#[test]
fn a_qcow2_image_we_encrypt_is_one_to_qemu() {
    if tool("qemu-img", &["--version"]).is_none() {
        return;
    }
    for more in [
        json!({}),
        json!({"cipher-alg": "twofish-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"}),
    ] {
        let rig = Rig::new();
        std::fs::write(rig.path("image"), b"").unwrap();
        let mut encrypt = json!({"format": "luks", "key-secret": "key", "iter-time": 1});
        encrypt.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let options = json!({"file": rig.file("image"), "size": SIZE, "encrypt": encrypt});
        rig.create_with("qcow2", options).unwrap();
        check_qcow2(&rig);
        assert!(content(&rig, None).iter().all(|b| *b == 0), "a new image reads as zeroes");
        exchange(&rig, "luks");
    }
}

#[test]
fn a_qcow2_image_qemu_encrypts_is_one_to_us() {
    for format in ["luks", "aes"] {
        let rig = Rig::new();
        let iterations = if format == "luks" { ",encrypt.iter-time=1" } else { "" };
        let options = format!("encrypt.format={format},encrypt.key-secret=key{iterations}");
        let args = ["create", "-q", "-f", "qcow2", "-o", &options, &rig.path("image"), &SIZE.to_string()];
        if qemu("qemu-img", &args).is_none() {
            return;
        }
        exchange(&rig, format);
    }
}

#[test]
fn an_encrypted_qcow2_image_is_not_opened_without_its_key() {
    let rig = Rig::new();
    std::fs::write(rig.path("image"), b"").unwrap();
    let encrypt = json!({"format": "luks", "key-secret": "key", "iter-time": 1});
    let options = json!({"file": rig.file("image"), "size": SIZE, "encrypt": encrypt});
    rig.create_with("qcow2", options).unwrap();
    let refused = |encrypt: Value| {
        let mut options = json!({"driver": "qcow2", "file": rig.file("image")});
        if !encrypt.is_null() {
            options["encrypt"] = encrypt;
        }
        rig.open(options).unwrap_err()
    };
    assert_eq!(refused(Value::Null), "Parameter 'encrypt.key-secret' is required for cipher");
    assert_eq!(
        refused(json!({"format": "luks", "key-secret": "wrong"})),
        "Invalid password, cannot unlock any keyslot"
    );
    assert_eq!(
        refused(json!({"format": "aes", "key-secret": "key"})),
        "Header reported 'luks' encryption format but options specify 'aes'"
    );
}
