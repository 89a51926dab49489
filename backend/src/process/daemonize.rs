//! `--daemonize`: going to the background without `fork` in our own hands.
//!
//! `main.rs` calls [`begin`] after the first pass over the command line and before anything else is opened, and
//! [`Ready::announce`] once sockets accept. Must not be reached by the vhost-user conventions unless the user asks.
//!
//! # How
//!
//! Continuing after `fork` in the same image is unsafe in Rust and in any program with threads. Instead the program
//! runs itself again: the *launcher* starts `/proc/self/exe` with the same arguments and waits; the *daemon* makes a
//! session of its own, starts up with stderr still the user's, and then announces itself. The launcher's end of the
//! news is the daemon's stdout: a pipe that carries one byte, ASCII ACK, or, if start-up fails, ends. The launcher exits with 0
//! or with the daemon's status. All inherited descriptors pass through, so `--fd` works as without `--daemonize`.
//!
//! After the announcement the standard streams are `/dev/null`, the directory is `/` and the umask 027, as in QEMU:
//! paths that come later over QMP should be absolute, and the log needs `-T file=FILE` (or a service manager instead
//! of `--daemonize`). The daemon leads its session; it never opens a terminal, which could become its controlling one.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

use super::EXIT_FAILURE;

/// Tells the daemon that it is one. Its value is the launcher's process id.
pub const MARKER: &str = "RINGBLK_DAEMON";

/// What the daemon writes when it serves (ASCII ACK). Anything else on the pipe is not from us and is skipped.
const READY: u8 = 0x06;

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Role {
    /// The launcher, at its end: exit with this status.
    Launcher(u8),
    /// The daemon: start up, then announce.
    Daemon(Ready),
}

/// The daemon's duty to report. Dropped without [`Ready::announce`], the launcher takes start-up for failed when
/// the process ends.
#[derive(Debug)]
#[must_use = "the launcher waits for the announcement"]
pub struct Ready(());

/// Splits into launcher and daemon. `args` is the whole command line, the program's name first.
///
/// # Errors
///
/// The second process cannot be started (no `/proc`, no memory), or the session cannot be made.
pub fn begin(args: impl IntoIterator<Item = OsString>) -> io::Result<Role> {
    if std::env::var_os(MARKER).is_some() {
        // Fails if this process leads a group already: the marker was set by hand, in a shell. Nothing is lost.
        let _ = rustix::process::setsid();
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o027));
        return Ok(Role::Daemon(Ready(())));
    }
    let mut args = args.into_iter();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(args.next().unwrap_or_else(|| "ringblk".into())).args(args);
    command.env(MARKER, std::process::id().to_string());
    launch(command).map(Role::Launcher)
}

/// Whether the process with this id launched us: descriptors addressed to it are ours.
#[must_use]
pub fn launched_by(pid: u32) -> bool {
    std::env::var(MARKER).is_ok_and(|value| value == pid.to_string())
}

/// Starts the daemon and waits for its news; returns the launcher's exit status.
fn launch(mut command: Command) -> io::Result<u8> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let Some(news) = child.stdout.take() else {
        return Err(io::Error::other("the daemon's stdout is no pipe"));
    };
    for byte in io::BufReader::new(news).bytes() {
        match byte {
            Ok(READY) => return Ok(super::EXIT_OK),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(failure_status(child.wait()?))
}

/// The daemon's status, never 0: it ended without having served. A signal becomes 128 + its number, as in a shell.
fn failure_status(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or_default();
    u8::try_from(code).ok().filter(|c| *c != 0).unwrap_or(EXIT_FAILURE)
}

impl Ready {
    /// Lets the launcher go and cuts the ties to its terminal and directory.
    ///
    /// # Errors
    ///
    /// `/dev/null` cannot be opened, or the launcher is gone: then nobody knows of this daemon, and it should end.
    pub fn announce(self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        rustix::process::chdir("/")?;
        rustix::stdio::dup2_stdin(&null)?;
        {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&[READY])?;
            stdout.flush()?;
        }
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
