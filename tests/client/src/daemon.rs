//! A backend as a child process: started, connected to, measured, and never left behind.
//!
//! Used by the benchmark and by integration tests, for ringblk and for QEMU's daemons alike. It must not interpret
//! what the child prints.

#![allow(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::connection::{Connection, DEFAULT_LIMIT};
use crate::error::{Error, Result};
use crate::process::{self, Resident, Thread};

/// Bytes of stderr that are kept; the rest is read and dropped so that the child never blocks on it.
const MAX_STDERR: usize = 1 << 20;

/// What to start.
#[derive(Clone, Debug)]
pub struct Launch {
    program: PathBuf,
    args: Vec<OsString>,
    cpus: Vec<usize>,
    environment: Vec<(OsString, OsString)>,
}

impl Launch {
    /// A program without arguments.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), args: Vec::new(), cpus: Vec::new(), environment: Vec::new() }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Allows the child only these processors, from before exec on.
    #[must_use]
    pub fn cpus(mut self, cpus: &[usize]) -> Self {
        self.cpus = cpus.to_vec();
        self
    }

    /// Starts the child. It is killed when the returned value is dropped, and when our process dies.
    ///
    /// # Errors
    /// `Io` when it cannot be started.
    pub fn spawn(&self) -> Result<Daemon> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.envs(self.environment.iter().cloned());
        let (mut child, executed) = spawn(command, self.cpus.clone())
            .map_err(Error::io(format!("starting {}", self.program.display())))?;
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|pipe| {
            let stderr = Arc::clone(&stderr);
            std::thread::spawn(move || collect(pipe, &stderr))
        });
        Ok(Daemon { child, stderr, reader, executed })
    }
}

fn collect(mut pipe: ChildStderr, into: &Mutex<Vec<u8>>) {
    let mut chunk = [0; 4096];
    while let Ok(n @ 1..) = pipe.read(&mut chunk) {
        let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_STDERR - kept.len();
        kept.extend_from_slice(chunk.get(..n.min(room)).unwrap_or_default());
    }
}

/// A request to the thread that starts all children.
struct Order {
    command: Command,
    cpus: Vec<usize>,
    answer: Sender<std::io::Result<(Child, Instant)>>,
}

/// Starts a child from a thread that never ends. The death signal is sent when the *thread* that forked ends, so a
/// test's own thread would take its daemon along even after handing it to somebody else.
fn spawn(command: Command, cpus: Vec<usize>) -> std::io::Result<(Child, Instant)> {
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        std::thread::spawn(move || {
            let all = sched_getaffinity(None).ok();
            for Order { mut command, cpus, answer } in orders {
                if !cpus.is_empty() {
                    let mut set = CpuSet::new();
                    cpus.iter().for_each(|&cpu| set.set(cpu));
                    if let Err(error) = sched_setaffinity(None, &set) {
                        let _ = answer.send(Err(error.into()));
                        continue;
                    }
                }
                let die_with_us = || set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into);
                // SAFETY: between fork and exec only prctl runs, a bare system call: no allocation, no lock.
                unsafe { command.pre_exec(die_with_us) };
                // spawn() returns when the exec has closed the pipe between the two.
                let child = command.spawn().map(|child| (child, Instant::now()));
                if let Some(all) = &all {
                    let _ = sched_setaffinity(None, all);
                }
                let _ = answer.send(child);
            }
        });
        Mutex::new(sender)
    });
    let (answer, result) = channel();
    let gone = || std::io::Error::other("the spawning thread is gone");
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send(Order { command, cpus, answer })
        .map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

/// A running child.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    stderr: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
    executed: Instant,
}

impl Daemon {
    /// Starts `program` with `args`.
    ///
    /// # Errors
    /// `Io` when it cannot be started.
    pub fn start<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(program: &Path, args: I) -> Result<Self> {
        Launch::new(program).args(args).spawn()
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When the child's exec had succeeded, as seen from here.
    #[must_use]
    pub fn executed(&self) -> Instant {
        self.executed
    }

    /// Connects to a socket of the child as soon as it listens. The connection is the caller's: probing with one
    /// and using another would show a single-client backend a front end that leaves.
    ///
    /// # Errors
    /// `Usage` with the child's stderr when it ended, `Timeout` when it does not listen.
    pub fn connect(&mut self, socket: &Path) -> Result<Connection> {
        let deadline = Instant::now() + DEFAULT_LIMIT;
        loop {
            let wait = Duration::from_millis(20).min(deadline.saturating_duration_since(Instant::now()));
            match Connection::connect(socket, wait) {
                Err(Error::Timeout { .. }) if Instant::now() < deadline => self.check_running()?,
                other => return other,
            }
        }
    }

    /// Fails with what the child printed if it has ended.
    ///
    /// # Errors
    /// `Usage`.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait().map_err(Error::io("waiting for the child"))? {
            None => Ok(()),
            Some(status) => Err(Error::Usage(format!("the daemon ended with {status}: {}", self.stderr()))),
        }
    }

    /// What the child has written to stderr, up to 1 MiB.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `Io` when the child has been waited for already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).map_err(Error::io("signalling the daemon"))
    }

    /// Waits for the child's end.
    ///
    /// # Errors
    /// `Timeout` when it is still running after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().map_err(Error::io("waiting for the daemon"))? {
                self.finish_reading();
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { waiting_for: "end of the daemon".into(), limit });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets the reader see the end of stderr. Not forever: a grandchild may hold the pipe open.
    fn finish_reading(&mut self) {
        let deadline = Instant::now() + Duration::from_millis(200);
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// SIGTERM, then the end of the child.
    ///
    /// # Errors
    /// `Timeout` when it does not end; it is killed on drop.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit)
    }

    /// SIGKILL, then the end of the child.
    ///
    /// # Errors
    /// `Io`, `Timeout`.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().map_err(Error::io("killing the daemon"))?;
        self.wait(DEFAULT_LIMIT)
    }

    /// Resident memory.
    ///
    /// # Errors
    /// `Io` when the child is gone.
    pub fn resident(&self) -> Result<Resident> {
        process::resident(self.pid())
    }

    /// Threads with their processor time.
    ///
    /// # Errors
    /// `Io` when the child is gone.
    pub fn threads(&self) -> Result<Vec<Thread>> {
        process::threads(self.pid())
    }

    /// Open descriptors.
    ///
    /// # Errors
    /// `Io` when the child is gone.
    pub fn descriptors(&self) -> Result<usize> {
        process::descriptors(self.pid())
    }

    /// Processor time so far, in nanoseconds.
    ///
    /// # Errors
    /// `Io` when the child is gone.
    pub fn cpu_ns(&self) -> Result<u64> {
        process::cpu_ns(self.pid())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
