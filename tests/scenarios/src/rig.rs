//! A daemon under test with its folder, control channel and exports.
//!
//! `Rig::start` takes what a test wants served; names of nodes, exports, sockets and images follow from the export's
//! id. The rig ends the daemon when it is dropped. It must not judge: tests do.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::daemon::Launch;
use client::{Connection, Daemon, Disk, Setup, qmp};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::image;

/// Longest wait for something that has no event of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// The binary under test.
#[must_use]
pub fn ringblk() -> PathBuf {
    if let Some(path) = std::env::var_os("RINGBLK") {
        return PathBuf::from(path);
    }
    // The test runs as TARGET/PROFILE/deps/NAME; the daemon is TARGET/PROFILE/ringblk.
    let own = std::env::current_exe().expect("a test knows its own path");
    let path = own.ancestors().nth(2).expect("a test lies in a target folder").join("ringblk");
    assert!(path.exists(), "{} is missing: cargo build -p ringblk, or set RINGBLK", path.display());
    path
}

/// One export that a test wants: `ID`, the node below it, and options of the export.
#[derive(Clone, Debug)]
pub struct Wanted {
    id: String,
    /// `--blockdev` text of the node, without its name; `None`: a raw image file of this many bytes.
    node: Result<u64, String>,
    direct: bool,
    options: String,
}

impl Wanted {
    /// A writable export of a file of `size` bytes.
    #[must_use]
    pub fn file(id: &str, size: u64) -> Self {
        Self { id: id.into(), node: Ok(size), direct: false, options: "writable=on".into() }
    }

    /// A writable export of a node: `null-co,size=...`.
    #[must_use]
    pub fn node(id: &str, node: &str) -> Self {
        Self { id: id.into(), node: Err(node.into()), direct: false, options: "writable=on".into() }
    }

    /// Opens the file with O_DIRECT.
    #[must_use]
    pub fn direct(mut self) -> Self {
        self.direct = true;
        self
    }

    /// Other options of the export than `writable=on`.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        self.options = options.into();
        self
    }
}

/// What a daemon holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads, the kernel's io_uring workers left out: they come and go by themselves.
    pub threads: usize,
}

/// A running daemon and its folder.
#[derive(Debug)]
pub struct Rig {
    /// The child process.
    pub daemon: Daemon,
    /// Its control channel.
    pub qmp: qmp::Client,
    folder: TempDir,
}

impl Rig {
    /// Starts a daemon with these exports, each on its own node and socket.
    #[must_use]
    pub fn start(wanted: &[Wanted]) -> Self {
        Self::start_with(wanted, &[])
    }

    /// Starts a daemon with more options in front (`--object iothread,id=...`).
    #[must_use]
    pub fn start_with(wanted: &[Wanted], more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut args: Vec<String> = more.iter().map(|&a| a.to_owned()).collect();
        let at = |name: &str| folder.path().join(name).display().to_string();
        args.extend(["--chardev".into(), format!("socket,id=control,path={},server=on,wait=off", at("qmp"))]);
        args.extend(["--monitor".into(), "chardev=control".into()]);
        for w in wanted {
            let node = match &w.node {
                Ok(size) => {
                    let file = folder.path().join(format!("{}.img", w.id));
                    image::create(&file, *size);
                    let direct = if w.direct { ",cache.direct=on" } else { "" };
                    format!("file,filename={},discard=unmap{direct}", file.display())
                }
                Err(text) => text.clone(),
            };
            args.extend(["--blockdev".into(), format!("{node},node-name=node-{}", w.id)]);
            args.extend([
                "--export".into(),
                format!(
                    "vhost-user-blk,id={0},node-name=node-{0},addr.type=unix,addr.path={1},{2}",
                    w.id,
                    at(&w.id),
                    w.options
                ),
            ]);
        }
        let launch = Launch::new(ringblk()).args(&args).env("RINGBLK_LOG", "info");
        let mut daemon = launch.spawn().expect("the daemon starts");
        // The control socket listens before the exports do, and answers after all of them are there.
        let socket = folder.path().join("qmp");
        let qmp = qmp::Client::connect(&socket).unwrap_or_else(|e| {
            // If it refused its options it is about to end, and then says why.
            let ended = daemon.wait(Duration::from_millis(500));
            panic!("{e}; {ended:?}: {}", daemon.stderr())
        });
        Self { daemon, qmp, folder }
    }

    /// The folder of this daemon.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Socket of export `id`.
    #[must_use]
    pub fn socket(&self, id: &str) -> PathBuf {
        self.folder.path().join(id)
    }

    /// Image behind export `id`, if it was made with `Wanted::file`.
    #[must_use]
    pub fn image(&self, id: &str) -> PathBuf {
        self.folder.path().join(format!("{id}.img"))
    }

    /// A disk on export `id`.
    #[must_use]
    pub fn disk(&self, id: &str, setup: &Setup) -> Disk {
        Disk::connect(&self.socket(id), setup).unwrap_or_else(|e| panic!("{e}: {}", self.daemon.stderr()))
    }

    /// A bare connection to export `id`.
    #[must_use]
    pub fn connection(&self, id: &str) -> Connection {
        Connection::connect(&self.socket(id), Setup::default().limit)
            .unwrap_or_else(|e| panic!("{e}: {}", self.daemon.stderr()))
    }

    /// Runs a QMP command that must succeed.
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        self.qmp.execute(name, arguments).unwrap_or_else(|e| panic!("{e}: {}", self.daemon.stderr()))
    }

    /// Adds an export at run time; the error text if it is refused.
    ///
    /// # Errors
    /// The description of the QMP error.
    pub fn add_export(&mut self, id: &str, node: &str, options: &Value) -> Result<(), String> {
        let path = self.socket(id).display().to_string();
        let mut arguments = json!({
            "type": "vhost-user-blk", "id": id, "node-name": node, "addr": {"type": "unix", "path": path},
        });
        for (key, value) in options.as_object().expect("options are an object") {
            arguments[key.as_str()] = value.clone();
        }
        match self.qmp.execute("block-export-add", arguments) {
            Ok(_) => Ok(()),
            Err(client::Error::Qmp { desc, .. }) => Err(desc),
            Err(e) => panic!("{e}: {}", self.daemon.stderr()),
        }
    }

    /// Whether a front end is connected to export `id`.
    pub fn connected(&mut self, id: &str) -> bool {
        let exports = self.command("query-block-exports", json!({}));
        let export = exports
            .as_array()
            .and_then(|all| all.iter().find(|e| e["id"] == id))
            .unwrap_or_else(|| panic!("no export {id} in {exports}"));
        export["connected"].as_bool().unwrap_or_else(|| panic!("no 'connected' in {export}"))
    }

    /// Waits until no front end is connected to export `id` and everything of the last one is gone.
    pub fn wait_disconnected(&mut self, id: &str) {
        self.wait_for("the end of the connection", |rig| !rig.connected(id));
    }

    /// Waits until `done`, which must become true by itself.
    pub fn wait_for(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}: {}", self.daemon.stderr());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the daemon holds now.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let threads = self.daemon.threads().expect("the daemon runs");
        Holdings {
            descriptors: self.daemon.descriptors().expect("the daemon runs"),
            threads: threads.iter().filter(|t| !t.name.starts_with("iou-")).count(),
        }
    }

    /// Waits until the daemon holds no more than `before`. A thread that has announced its end still exists for a
    /// moment, and a pool keeps its threads for a while; what is leaked never goes away.
    pub fn wait_holdings(&mut self, before: Holdings) {
        self.wait_for(&format!("return to {before:?}"), |rig| {
            let now = rig.holdings();
            now.descriptors <= before.descriptors && now.threads <= before.threads
        });
    }

    /// Fails if the daemon ended.
    pub fn assert_running(&mut self) {
        if let Err(e) = self.daemon.check_running() {
            panic!("{e}");
        }
    }
}
