//! Programs that use images: ringblk, `qemu-storage-daemon`, QEMU itself; each a child with a control channel and a user of
//! an image added and removed by the same calls.

use std::path::{Path, PathBuf};
use std::time::Duration;

use client::daemon::{Daemon, Launch};
use client::{Error, qmp};
use ringblk_scenarios::rig;
use serde_json::{Value, json};

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    Ringblk,
    StorageDaemon,
    System,
}

impl Program {
    /// Where it is; `None` (and a word about it) when it is not installed.
    pub fn path(self) -> Option<PathBuf> {
        let path = match self {
            Program::Ringblk => return Some(rig::ringblk()),
            Program::StorageDaemon => Path::new("/usr/bin/qemu-storage-daemon"),
            Program::System => Path::new("/usr/bin/qemu-system-x86_64"),
        };
        if path.exists() {
            return Some(path.to_owned());
        }
        eprintln!("without comparison: {} is missing", path.display());
        None
    }
}

/// What a user does with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Write,
    Read,
    /// Writes an overlay whose backing file the image is.
    Overlay,
}

/// A user of an image: an export, or a disk of a machine.
#[derive(Clone, Copy, Debug)]
pub struct User {
    pub name: &'static str,
    pub program: Program,
    pub how: How,
    /// `share-rw=on`, where the program has it.
    pub share: bool,
}

/// A running program.
pub struct Peer {
    pub program: Program,
    pub daemon: Daemon,
    pub qmp: qmp::Client,
    folder: tempfile::TempDir,
    made: usize,
}

/// What was added for a user, to be taken away again.
pub struct Using {
    device: String,
    nodes: Vec<String>,
}

impl Peer {
    /// Starts it; `None` when it is not installed.
    pub fn start(program: Program) -> Option<Peer> {
        let path = program.path()?;
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
        let launch = match program {
            // A machine that never runs, with a bus on which disks come and go without the guest's help.
            Program::System => Launch::new(path)
                .args(["-nodefaults", "-display", "none", "-S", "-m", "16"])
                .args(["-machine", "pc,accel=tcg", "-device", "virtio-scsi-pci,id=bus"])
                .args(["-chardev", &chardev, "-mon", "chardev=c,mode=control"]),
            _ => Launch::new(path).args(["--chardev", &chardev, "--monitor", "chardev=c"]),
        };
        let daemon = launch.spawn().unwrap();
        let qmp = qmp::Client::connect(&socket).unwrap_or_else(|e| panic!("{e}: {}", daemon.stderr()));
        Some(Peer { program, daemon, qmp, folder, made: 0 })
    }

    /// Where it may leave files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a command; the description of its error.
    pub fn try_command(&mut self, name: &str, arguments: Value) -> Result<Value, String> {
        match self.qmp.execute(name, arguments) {
            Ok(value) => Ok(value),
            Err(Error::Qmp { desc, .. }) => Err(desc),
            Err(e) => panic!("{name}: {e}: {}", self.daemon.stderr()),
        }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        match self.try_command(name, arguments.clone()) {
            Ok(value) => value,
            Err(e) => panic!("{:?}: {name} {arguments}: {e}", self.program),
        }
    }

    /// Adds a node for `image` and uses it; with `node`, uses a node that is there. Nothing stays behind when it is refused.
    pub fn use_image(&mut self, user: &User, format: &str, image: &Path) -> Result<Using, String> {
        self.made += 1;
        let node = format!("node{}", self.made);
        let options = json!({
            "driver": format, "node-name": node, "read-only": user.how != How::Write,
            "file": {"driver": "file", "filename": image.to_str().unwrap()},
        });
        self.try_command("blockdev-add", options)?;
        self.use_node(user, &node)
            .map(|mut using| {
                using.nodes.push(node.clone());
                using
            })
            .inspect_err(|_| {
                self.command("blockdev-del", json!({"node-name": node}));
            })
    }

    /// Uses a node that is there.
    pub fn use_node(&mut self, user: &User, node: &str) -> Result<Using, String> {
        self.made += 1;
        let device = format!("device{}", self.made);
        let mut using = Using { device: device.clone(), nodes: Vec::new() };
        let mut top = node.to_owned();
        if user.how == How::Overlay {
            let overlay = self.folder().join(format!("{device}.overlay"));
            run("qemu-img", &["create", "-q", "-f", "qcow2", overlay.to_str().unwrap(), "1M"]).unwrap();
            top = format!("{device}-top");
            let options = json!({
                "driver": "qcow2", "node-name": top, "backing": node,
                "file": {"driver": "file", "filename": overlay.to_str().unwrap()},
            });
            self.try_command("blockdev-add", options)?;
            using.nodes.push(top.clone());
        }
        let result = self.attach(user, &device, &top);
        if result.is_err() {
            self.remove_nodes(&using);
        }
        result.map(|()| using)
    }

    fn attach(&mut self, user: &User, device: &str, node: &str) -> Result<(), String> {
        let done = match self.program {
            Program::System => {
                let options =
                    json!({"driver": "scsi-hd", "id": device, "drive": node, "share-rw": user.share});
                self.try_command("device_add", options)
            }
            program => {
                let path = self.folder().join(device).display().to_string();
                let mut options = json!({
                    "type": "vhost-user-blk", "id": device, "node-name": node, "writable": user.how != How::Read,
                    "addr": {"type": "unix", "path": path},
                });
                if program == Program::Ringblk {
                    options["share-rw"] = json!(user.share);
                }
                self.try_command("block-export-add", options)
            }
        };
        done.map(drop)
    }

    /// Takes a user and its nodes away again; they are gone when this returns.
    pub fn release(&mut self, using: Using) {
        let (command, event, key) = match self.program {
            Program::System => ("device_del", "DEVICE_DELETED", "device"),
            _ => ("block-export-del", "BLOCK_EXPORT_DELETED", "id"),
        };
        self.command(command, json!({"id": using.device}));
        let is_it = |data: &Value| data[key] == using.device.as_str();
        self.qmp.wait_event_where(event, is_it).unwrap();
        self.remove_nodes(&using);
    }

    fn remove_nodes(&mut self, using: &Using) {
        for node in &using.nodes {
            self.command("blockdev-del", json!({"node-name": node}));
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Killed in any case; asked first, so that locks and files go in order.
        let _ = self.daemon.terminate(Duration::from_secs(10));
    }
}

/// Runs a tool to its end; what it printed to stderr when it fails.
pub fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The lock bytes that `pid` holds on a file, from the kernel's list; merged ranges taken apart.
pub fn lock_bytes(pid: u32, image: &Path) -> Vec<u64> {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(image).unwrap().ino();
    // Locks of open file descriptions have no process in the kernel's list: which descriptors hold them is told here.
    let mut bytes = std::collections::BTreeSet::new();
    for fd in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().flatten() {
        let Ok(text) = std::fs::read_to_string(fd.path()) else { continue };
        for line in text.lines().filter(|l| l.contains("OFDLCK") && l.contains(&format!(":{inode} "))) {
            let mut words = line.split_whitespace().rev();
            let (end, start) = (words.next().unwrap(), words.next().unwrap());
            bytes.extend(start.parse::<u64>().unwrap()..=end.parse::<u64>().unwrap());
        }
    }
    bytes.into_iter().collect()
}
