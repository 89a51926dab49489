//! Together with QEMU's own tools: locks are understood both ways, and both see the same bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;

use common::{registry, same_content, tool};
use conformance::DriverCase;
use conformance::data::{Setting, Subject};
use conformance::request::Way;
use conformance::rng::Rng;
use conformance::session::{NODE, Session};
use graph::{NoSource, Perm, Root, RootOptions};
use host::Engine;
use host::exec::block_on;
use serde_json::{Value, json};

const SIZE: u64 = 1 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    case: DriverCase,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture::with(json!({}))
    }

    fn with(more: Value) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(dir.path().join("image")).unwrap().set_len(SIZE).unwrap();
        let options = move |dir: &Path| {
            let mut options = json!({"driver": "file", "filename": dir.join("image").to_str().unwrap()});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            options
        };
        Fixture { dir, case: DriverCase::new("file", registry(), SIZE, |_| Ok(()), options) }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn path(&self) -> String {
        self.image().to_str().unwrap().to_owned()
    }

    /// Our node, not used by anybody yet.
    fn open(&self) -> Session {
        Session::unused(&self.case, self.dir.path(), Engine::Auto, false).unwrap()
    }
}

fn use_as(session: &Session, perm: Perm, shared: Perm) -> Result<Root, String> {
    let options = RootOptions { perm, shared, ..RootOptions::new("a test", false) };
    block_on(session.graph.attach(NODE, options, Rc::new(NoSource))).map_err(|e| e.to_string())
}

const READ: Perm = Perm::CONSISTENT_READ;
const RW: Perm = Perm::CONSISTENT_READ.union(Perm::WRITE);

/// Whether a tool succeeds; its words otherwise.
fn run(name: &str, args: &[&str]) -> Option<Result<(), String>> {
    let output = tool(name, args)?;
    Some(if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    })
}

/// The lock bytes somebody holds on the image, from the kernel's list, as (first, last).
fn lock_bytes(image: &Path) -> Vec<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(image).unwrap().ino();
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let mut found: Vec<(u64, u64)> = locks
        .lines()
        .filter(|l| l.contains("OFDLCK") && l.contains(&format!(":{inode} ")))
        .filter_map(|l| {
            let mut words = l.split_whitespace().rev();
            let (end, start) = (words.next()?, words.next()?);
            Some((start.parse().ok()?, end.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found
}

#[test]
fn the_bytes_are_those_qemu_takes() {
    let f = Fixture::new();
    let session = f.open();
    assert_eq!(lock_bytes(&f.image()), [], "a node nobody uses locks nothing");
    let reader = use_as(&session, READ, Perm::ALL).unwrap();
    assert_eq!(lock_bytes(&f.image()), [(100, 100)]);
    let writer = use_as(&session, RW, Perm::ALL).unwrap();
    assert_eq!(lock_bytes(&f.image()), [(100, 101)]);
    block_on(writer.set_perm(RW | Perm::RESIZE, READ | Perm::WRITE_UNCHANGED))
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(lock_bytes(&f.image()), [(100, 101), (103, 103), (201, 201), (203, 203)]);
    block_on(writer.detach());
    assert_eq!(lock_bytes(&f.image()), [(100, 100)]);
    block_on(reader.detach());
    assert_eq!(lock_bytes(&f.image()), []);
    session.close().unwrap();
}

#[test]
fn qemu_img_is_kept_out_of_an_image_that_is_written() {
    let f = Fixture::new();
    let path = f.path();
    // A format, since QEMU reads raw images beside any writer.
    let Some(created) = run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]) else { return };
    created.unwrap();
    let length = std::fs::metadata(f.image()).unwrap().len();
    let copy = f.dir.path().join("copy");
    let info = ["info", "-f", "qcow2", &path];
    let convert = ["convert", "-f", "qcow2", "-O", "raw", &path, copy.to_str().unwrap()];
    let resize = ["resize", "-f", "qcow2", &path, "2M"];
    let write = ["-f", "qcow2", "-c", "write 0 512", &path];
    let session = f.open();
    run("qemu-img", &info).unwrap().unwrap();

    // As a format uses its file: writes, and lets nobody else.
    let root = use_as(&session, RW | Perm::RESIZE, READ | Perm::WRITE_UNCHANGED).unwrap();
    for (tool, args) in [("qemu-img", &resize[..]), ("qemu-io", &write)] {
        let error = run(tool, args).unwrap().unwrap_err();
        assert!(error.contains("Failed to get \"write\" lock"), "{error}");
        assert!(error.contains("Is another process using the image"), "{error}");
    }
    // Readers that want a stable image are kept out, one that forces sharing is not.
    for args in [&info[..], &convert] {
        let error = run("qemu-img", args).unwrap().unwrap_err();
        assert!(error.contains("Failed to get shared \"write\" lock"), "{error}");
    }
    run("qemu-img", &["info", "-U", "-f", "qcow2", &path]).unwrap().unwrap();

    // Only reading: everybody may read, and nobody who minds may write.
    block_on(root.set_perm(READ, Perm::ALL)).unwrap_or_else(|e| panic!("{e}"));
    run("qemu-img", &convert).unwrap().unwrap();
    run("qemu-io", &write).unwrap().unwrap();
    block_on(root.set_perm(READ, Perm::ALL - Perm::WRITE)).unwrap_or_else(|e| panic!("{e}"));
    let error = run("qemu-io", &write).unwrap().unwrap_err();
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
    block_on(root.detach());
    session.close().unwrap();
    // And all is given back.
    run("qemu-img", &resize).unwrap().unwrap();
    assert!(std::fs::metadata(f.image()).unwrap().len() >= length);
}

/// A storage daemon of QEMU's with a monitor on its standard streams.
struct Qsd {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Qsd {
    fn start() -> Option<Qsd> {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--chardev", "stdio,id=c", "--monitor", "c"]);
        match command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
            Ok(mut child) => {
                let out = BufReader::new(child.stdout.take().unwrap());
                let mut qsd = Qsd { child, out };
                qsd.line();
                qsd.execute("qmp_capabilities", json!({})).unwrap();
                Some(qsd)
            }
            Err(e) => {
                eprintln!("skipped what needs qemu-storage-daemon: {e}");
                None
            }
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.child.stdin.as_mut().unwrap(), "{request}").unwrap();
        loop {
            let reply = self.line();
            if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = reply.get("error") {
                return Err(error["desc"].as_str().unwrap_or_default().to_owned());
            }
        }
    }

    fn add(&mut self, name: &str, path: &str, read_only: bool) {
        let options = json!({"driver": "file", "filename": path, "node-name": name, "read-only": read_only});
        self.execute("blockdev-add", options).unwrap();
    }

    /// Exports a node over NBD, which takes the permissions of an export.
    fn export(&mut self, name: &str, socket: &Path, writable: bool) -> Result<Value, String> {
        let address = json!({"type": "unix", "data": {"path": socket.to_str().unwrap()}});
        // The second time it is running already.
        let _ = self.execute("nbd-server-start", json!({"addr": address}));
        let export = json!({"type": "nbd", "id": name, "node-name": name, "writable": writable});
        self.execute("block-export-add", export)
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_storage_daemon_and_we_refuse_each_other() {
    let Some(mut qsd) = Qsd::start() else { return };
    let f = Fixture::new();
    let socket = f.dir.path().join("nbd");
    let session = f.open();
    qsd.add("theirs", &f.path(), false);

    // Ours first.
    let root = use_as(&session, RW | Perm::RESIZE, READ | Perm::WRITE_UNCHANGED).unwrap();
    let error = qsd.export("theirs", &socket, true).unwrap_err();
    assert_eq!(error, "Failed to get \"write\" lock");
    block_on(root.detach());

    // Theirs first: an NBD export does not share RESIZE, and writes.
    qsd.export("theirs", &socket, true).unwrap();
    let error = use_as(&session, READ, Perm::ALL - Perm::WRITE).unwrap_err();
    let hint = format!("\nIs another process using the image [{}]?", f.path());
    assert!(error.starts_with(&format!("Failed to get shared \"write\" lock{hint}\nWay out: ")), "{error}");
    let error = use_as(&session, Perm::RESIZE, Perm::ALL).unwrap_err();
    assert!(error.starts_with(&format!("Failed to get \"resize\" lock{hint}\nWay out: ")), "{error}");
    let root = use_as(&session, RW, Perm::ALL).unwrap();
    // A refusal leaves what was held before.
    assert!(block_on(root.set_perm(RW | Perm::RESIZE, Perm::ALL)).is_err());
    assert!(block_on(root.set_perm(RW, Perm::ALL)).is_ok());
    block_on(root.detach());
    session.close().unwrap();
}

#[test]
fn force_share_and_locking_off_stand_aside() {
    let Some(mut qsd) = Qsd::start() else { return };
    let f = Fixture::with(json!({"read-only": true, "force-share": true}));
    qsd.add("theirs", &f.path(), false);
    qsd.export("theirs", &f.dir.path().join("nbd"), true).unwrap();
    // Wants nobody to write beside it; forced to share all the same.
    let session = f.open();
    let root = use_as(&session, READ, Perm::ALL - Perm::WRITE).unwrap();
    block_on(root.detach());
    session.close().unwrap();

    let off = Fixture { dir: f.dir, ..Fixture::with(json!({"locking": "off"})) };
    let session = off.open();
    let root = use_as(&session, RW | Perm::RESIZE, Perm::NONE).unwrap();
    block_on(root.detach());
    session.close().unwrap();
}

#[test]
fn qemu_reads_what_we_wrote_and_the_other_way_round() {
    for options in [json!({}), json!({"cache": {"direct": true}}), json!({"aio": "threads"})] {
        let f = Fixture::with(options);
        let mut session = f.open();
        session.use_it(true).unwrap();
        let setting = Setting::new(&f.case, 7, false);
        let model = session
            .on(1, move |io| async move {
                let mut rng = Rng::new(7);
                let mut subject = Subject::new(io, Way::Mapped, setting);
                for _ in 0..200 {
                    subject.step(&mut rng).await?;
                }
                let mut data = vec![0; SIZE as usize];
                for (at, block) in data.chunks_mut(4096).enumerate() {
                    let client = conformance::request::Client { io: subject.io().clone(), way: Way::Driven };
                    block.copy_from_slice(
                        &client.read(at as u64 * 4096, 4096).await.map_err(|e| e.to_string())?,
                    );
                }
                Ok((data, subject.model))
            })
            .unwrap();
        session.close().unwrap();
        let copy = f.dir.path().join("ours");
        std::fs::write(&copy, &model.0).unwrap();
        match same_content(&f.image(), &copy) {
            Some(same) => assert!(same, "qemu-img sees other bytes"),
            None => return,
        }
        let write = ["-f", "raw", "-c", "write -P 0x5a 4096 70000", "-c", "flush", &f.path()];
        run("qemu-io", &write).unwrap().unwrap();
        let mut expected = model.1;
        expected.write(4096, &[0x5a; 70000]);
        let session = Session::open(&f.case, f.dir.path(), Engine::Auto, false).unwrap();
        session
            .on(0, move |io| async move {
                Subject::with_model(io, Way::Driven, setting, expected).read_all().await
            })
            .unwrap();
        session.close().unwrap();
    }
}

#[test]
fn query_answers_look_like_a_storage_daemons() {
    let Some(mut qsd) = Qsd::start() else { return };
    let f = Fixture::new();
    let null = json!({"driver": "null-co", "size": 1000, "node-name": "null"});
    let raw = json!({"driver": "raw", "node-name": "raw", "file": {"driver": "file", "filename": f.path(), "node-name": "file"}});
    let graph = graph::Graph::new(registry(), None);
    for options in [null, raw] {
        qsd.execute("blockdev-add", options.clone()).unwrap();
        block_on(graph.blockdev_add(options)).unwrap();
    }
    let theirs = qsd.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    let ours = serde_json::to_value(graph.query_named_block_nodes(true)).unwrap();
    let by_name = |list: &Value, name: &str| {
        list.as_array().unwrap().iter().find(|n| n["node-name"] == name).cloned().unwrap()
    };
    for name in ["null", "raw", "file"] {
        let (ours, theirs) = (by_name(&ours, name), by_name(&theirs, name));
        for member in ["drv", "file", "ro", "encrypted", "detect_zeroes", "cache"] {
            assert_eq!(ours[member], theirs[member], "{name} {member}");
        }
        for member in ["virtual-size", "actual-size", "filename", "format", "format-specific"] {
            assert_eq!(ours["image"][member], theirs["image"][member], "{name} image.{member}");
        }
    }
    block_on(graph.close_all());
}
