//! One guest: its script, its disks, its line to the host. Called by the guest tests; it boots through
//! `tests/guest/boot.sh` and must not start or steer a backend.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest life of a guest in seconds. Nothing depends on how much of it passes.
const LIMIT: u32 = 180;

/// A folder of this repository, seen from the repository's root.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Whether guests can be booted here; says so when not. `RINGBLK_GUEST=require` makes it a failure.
pub fn available() -> bool {
    let kernel =
        std::env::var_os("RINGBLK_GUEST_DIR").map_or_else(|| repository("target/guest"), PathBuf::from);
    let missing = if !kernel.join("kernel/complete").exists() {
        Some("the guest's kernel")
    } else if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        Some("qemu-system-x86_64")
    } else {
        None
    };
    if let Some(what) = missing {
        let required = std::env::var("RINGBLK_GUEST").is_ok_and(|v| v == "require");
        assert!(!required, "{what} is missing: tests/guest/setup.sh installs it");
        eprintln!("skipped: {what} is missing, tests/guest/setup.sh installs it");
    }
    missing.is_none()
}

/// The right to run a guest: one at a time on a machine, since two slow each other down beyond use. Held until dropped.
pub fn turn() -> File {
    let file = File::create(std::env::temp_dir().join("ringblk-guest-tests.lock")).expect("a lock file");
    file.lock().expect("a turn");
    file
}

/// What to boot.
#[derive(Debug, Default)]
pub struct Boot {
    args: Vec<String>,
    script: String,
    may_reboot: bool,
}

impl Boot {
    /// A guest with a disk on this socket.
    pub fn new(socket: &Path) -> Self {
        Self::default().disk(socket)
    }

    /// One more disk.
    pub fn disk(self, socket: &Path) -> Self {
        self.arg("--socket", &socket.display().to_string())
    }

    /// An option of boot.sh and its value.
    pub fn arg(mut self, option: &str, value: &str) -> Self {
        self.args.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// An option of boot.sh that stands alone.
    pub fn flag(mut self, option: &str) -> Self {
        self.args.push(option.to_owned());
        self
    }

    /// Runs one of `tests/guest/scripts` next, in a shell of its own; `settings` are its variables.
    pub fn script(self, name: &str, settings: &str) -> Self {
        let path = repository("tests/guest/scripts").join(format!("{name}.sh"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let may_reboot = text.lines().any(|line| line == "# boot: may-reboot");
        let mut boot = self.shell(&format!("{settings}\n{text}"));
        boot.may_reboot |= may_reboot;
        boot
    }

    /// Runs this text next, in a shell of its own.
    pub fn shell(mut self, text: &str) -> Self {
        self.script.push_str(&format!("(\n{text}\n)\n"));
        self
    }

    /// Boots, runs the scripts, and returns what they printed.
    ///
    /// # Panics
    /// With all that was printed when a script fails or the guest does not get to its end.
    pub fn run(self) -> String {
        let folder = tempfile::tempdir().unwrap();
        self.finish(&folder)
    }

    /// As `run`; `answer` is asked each question that a script has for its host.
    pub fn run_with(self, mut answer: impl FnMut(&str) -> String + Send) -> String {
        let folder = tempfile::tempdir().unwrap();
        let channel = folder.path().join("channel");
        let boot = self.arg("--channel", &channel.display().to_string());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let Some(stream) = connect(&channel) else { return };
                let mut reply = stream.try_clone().unwrap();
                for question in BufReader::new(stream).lines() {
                    let Ok(question) = question else { return };
                    if writeln!(reply, "{}", answer(question.trim())).is_err() {
                        return;
                    }
                }
            });
            boot.finish(&folder)
        })
    }

    fn finish(self, folder: &TempDir) -> String {
        let script = folder.path().join("script");
        let head = if self.may_reboot { "# boot: may-reboot\n" } else { "" };
        std::fs::write(&script, format!("{head}{}", self.script)).unwrap();
        let output = Command::new("bash")
            .arg(repository("tests/guest/boot.sh"))
            .args(&self.args)
            .args(["--timeout", &LIMIT.to_string(), "--script"])
            .arg(&script)
            .stdin(Stdio::null())
            .output()
            .expect("bash starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "boot.sh: {}\n{text}\n{errors}", output.status);
        // What the guest did is worth reading when a later comparison fails.
        eprintln!("{text}");
        text
    }
}

/// QEMU makes the socket some time after its start and waits for us before the guest runs; if it never does, boot.sh
/// says why.
fn connect(path: &Path) -> Option<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(u64::from(LIMIT));
    while Instant::now() < deadline {
        if let Ok(stream) = UnixStream::connect(path) {
            return Some(stream);
        }
        if path.parent().is_some_and(|folder| !folder.exists()) {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}
