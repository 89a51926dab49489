//! What somebody else holds: images locked by other processes and by us, socket paths of the living and the dead.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use client::daemon::{Daemon, Launch};
use client::qmp;
use ringblk_scenarios::{Rig, Wanted, image, rig};
use serde_json::{Value, json};

use crate::refusal;
use crate::state::snapshot;

const MIB: u64 = 1 << 20;

fn export(path: &Path) -> Value {
    json!({
        "type": "vhost-user-blk", "id": "e", "node-name": "n", "writable": true,
        "addr": {"type": "unix", "path": path.display().to_string()},
    })
}

/// The peer, with the image open for writing.
struct Holder {
    daemon: Daemon,
    control: qmp::Client,
    folder: tempfile::TempDir,
}

impl Holder {
    fn start(program: &Path, image: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let daemon = Launch::new(program)
            .args([
                "--chardev",
                &format!("socket,id=c,path={},server=on,wait=off", at("qmp")),
                "--monitor",
                "c",
            ])
            .args(["--blockdev", &format!("file,node-name=n,filename={}", image.display())])
            .args([
                "--export",
                &format!(
                    "vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}",
                    at("disk")
                ),
            ]);
        let daemon = daemon.spawn().unwrap();
        let control = qmp::Client::connect(&folder.path().join("qmp"))
            .unwrap_or_else(|e| panic!("{e}: {}", daemon.stderr()));
        Self { daemon, control, folder }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Lets go of the image.
    fn release(&mut self) {
        self.control.execute("block-export-del", json!({"id": "e"})).unwrap();
        self.control.wait_event("BLOCK_EXPORT_DELETED").unwrap();
        self.control.execute("blockdev-del", json!({"node-name": "n"})).unwrap();
    }
}

#[test]
fn an_image_that_another_daemon_writes_is_refused_until_it_lets_go() {
    let mut programs = vec![rig::ringblk()];
    programs.extend(crate::peer().map(Path::to_owned));
    for program in programs {
        let mut rig = Rig::start(&[]);
        let path = rig.folder().join("image");
        image::create(&path, MIB);
        let mut holder = Holder::start(&program, &path);
        rig.command(
            "blockdev-add",
            json!({"driver": "file", "node-name": "n", "filename": path.display().to_string()}),
        );
        let before = snapshot(&mut rig.qmp);
        let socket = rig.socket("e");
        let (class, text) = refusal(&mut rig.qmp, "block-export-add", export(&socket));
        assert_eq!(class, "GenericError");
        assert!(text.contains("lock") && text.contains("process"), "held by {}: {text}", program.display());
        assert_eq!(snapshot(&mut rig.qmp), before);
        assert!(!socket.exists(), "a refused export leaves no socket");
        holder.daemon.check_running().unwrap();
        holder.release();
        rig.command("block-export-add", export(&socket));
    }
}

#[test]
fn an_image_that_a_tool_writes_is_refused_until_it_ends() {
    if crate::peer().is_none() {
        return;
    }
    let mut rig = Rig::start(&[]);
    let path = rig.folder().join("image");
    image::create(&path, MIB);
    // The tool has the image open once it has done the first of its commands; it then waits for the next.
    let mut tool = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut orders = tool.stdin.take().unwrap();
    orders.write_all(b"write -P 0x77 0 512\n").unwrap();
    rig.wait_for("write of the tool", |_| image::read_at(&path, 0, 1)[0] == 0x77);
    let node = json!({"driver": "file", "node-name": "n", "filename": path.display().to_string()});
    rig.command("blockdev-add", node);
    let socket = rig.socket("e");
    let (class, text) = refusal(&mut rig.qmp, "block-export-add", export(&socket));
    assert!(class == "GenericError" && text.contains("lock"), "{text}");
    drop(orders);
    assert!(tool.wait().unwrap().success());
    rig.command("block-export-add", export(&socket));
}

#[test]
fn an_image_that_we_write_is_refused_to_others() {
    let rig = Rig::start(&[Wanted::file("e", MIB)]);
    let path = rig.image("e");
    if let Some(peer) = crate::peer() {
        // The same option that would make it work fails at once, with the peer's own words.
        let output = Command::new(peer)
            .args(["--blockdev", &format!("file,node-name=n,filename={}", path.display())])
            .args([
                "--export",
                &format!(
                    "vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}",
                    rig.folder().join("other").display()
                ),
            ])
            .output()
            .unwrap();
        assert!(!output.status.success());
        assert!(text(&output).contains("lock"), "{}", text(&output));
        let write = ["-f", "raw", "-c", "write 0 512", &path.display().to_string()].map(str::to_owned);
        let output = Command::new("qemu-io").args(write).output().unwrap();
        assert!(!output.status.success() && text(&output).contains("lock"), "{}", text(&output));
        // Readers that say so are let in.
        let output = Command::new("qemu-img").args(["info", "-U"]).arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    }
    let output = Command::new(rig::ringblk())
        .args(["--blk-file", &path.display().to_string(), "--socket-path"])
        .arg(rig.folder().join("other"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("lock"), "{}", text(&output));
    assert!(!rig.folder().join("other").exists());
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_socket_that_somebody_serves_is_left_alone_and_a_dead_one_is_replaced() {
    let mut rig = Rig::start(&[Wanted::file("e", MIB)]);
    let path = rig.folder().join("image");
    image::create(&path, MIB);
    rig.command(
        "blockdev-add",
        json!({"driver": "file", "node-name": "n", "filename": path.display().to_string()}),
    );
    let holder = Holder::start(&rig::ringblk(), &{
        let other = rig.folder().join("other.img");
        image::create(&other, MIB);
        other
    });
    let before = snapshot(&mut rig.qmp);
    let mut arguments = export(&holder.socket());
    arguments["id"] = json!("late");
    let (_, said) = refusal(&mut rig.qmp, "block-export-add", arguments.clone());
    assert!(said.contains("another process serves it"), "{said}");
    UnixStream::connect(holder.socket()).expect("the other's socket is as it was");
    // Our own export's, and the control socket.
    for own in [rig.socket("e"), rig.folder().join("qmp")] {
        arguments["addr"]["path"] = json!(own.display().to_string());
        let (_, said) = refusal(&mut rig.qmp, "block-export-add", arguments.clone());
        assert!(said.contains("Address already in use"), "{said}");
    }
    // What is no socket is not removed.
    arguments["addr"]["path"] = json!(path.display().to_string());
    let (_, said) = refusal(&mut rig.qmp, "block-export-add", arguments.clone());
    assert!(said.contains("not a socket"), "{said}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), MIB);
    // Whether a socket is alive is found out by connecting: to our own export a front end came and went.
    rig.wait_disconnected("e");
    assert_eq!(snapshot(&mut rig.qmp), before);
    // A dead one is.
    let dead = rig.folder().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    assert!(dead.exists());
    arguments["addr"]["path"] = json!(dead.display().to_string());
    rig.command("block-export-add", arguments);
    UnixStream::connect(&dead).expect("the new export listens");
}
