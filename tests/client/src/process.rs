//! What another process uses: memory, threads, descriptors, processor time.
//!
//! Used by `daemon`, by the benchmark and by leak tests. It reads /proc and the process' processor clock; it
//! changes nothing.

#![allow(unsafe_code)]

use std::fs;

use crate::error::{Error, Result};

/// Resident memory in bytes (proc_pid_status(5)).
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident {
    /// Everything resident.
    pub total: u64,
    /// Anonymous memory: heap and stacks.
    pub anon: u64,
    /// Mapped files: the program and its libraries, shared with others.
    pub file: u64,
    /// Shared memory: the guest's pages that the process has touched.
    pub shared: u64,
}

/// One thread's time on a processor.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Thread id.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// Nanoseconds on a processor (first field of /proc/PID/task/TID/schedstat).
    pub cpu_ns: u64,
    /// Nanoseconds runnable without a processor (second field): others were running there.
    pub waiting_ns: u64,
    /// Times it gave the processor away itself.
    pub voluntary_switches: u64,
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(Error::io(format!("reading {path}")))
}

fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

fn nth(schedstat: &str, at: usize) -> u64 {
    schedstat.split_whitespace().nth(at).and_then(|ns| ns.parse().ok()).unwrap_or_default()
}

/// Nanoseconds the calling thread was runnable without a processor.
///
/// # Errors
/// `Io` when the kernel keeps no scheduler statistics.
pub fn own_waiting_ns() -> Result<u64> {
    Ok(nth(&read("/proc/thread-self/schedstat")?, 1))
}

/// Resident memory of `pid`.
///
/// # Errors
/// `Io` when the process is gone.
pub fn resident(pid: u32) -> Result<Resident> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let bytes = |name| field(&status, name) * 1024;
    Ok(Resident {
        total: bytes("VmRSS"),
        anon: bytes("RssAnon"),
        file: bytes("RssFile"),
        shared: bytes("RssShmem"),
    })
}

/// Threads of `pid`, kernel workers of its io_uring included.
///
/// # Errors
/// `Io` when the process is gone.
pub fn threads(pid: u32) -> Result<Vec<Thread>> {
    let folder = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&folder).map_err(Error::io(format!("reading {folder}")))?;
    let mut threads = Vec::new();
    for entry in entries.flatten() {
        let Ok(tid) = entry.file_name().to_string_lossy().parse() else { continue };
        // A thread may end between listing and reading.
        let part = |name: &str| fs::read_to_string(format!("{folder}/{tid}/{name}"));
        let (Ok(stat), Ok(name), Ok(status)) = (part("schedstat"), part("comm"), part("status")) else {
            continue;
        };
        threads.push(Thread {
            tid,
            name: name.trim_end().to_owned(),
            cpu_ns: nth(&stat, 0),
            waiting_ns: nth(&stat, 1),
            voluntary_switches: field(&status, "voluntary_ctxt_switches"),
        });
    }
    threads.sort_by_key(|thread| thread.tid);
    Ok(threads)
}

/// Open descriptors of `pid`.
///
/// # Errors
/// `Io` when the process is gone or not ours.
pub fn descriptors(pid: u32) -> Result<usize> {
    let folder = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&folder).map_err(Error::io(format!("reading {folder}")))?.count())
}

/// Processor time of the whole process in nanoseconds, threads that ended included: the sum the scheduler keeps,
/// current to the nanosecond, where schedstat lags behind by up to a tick and forgets ended threads.
///
/// # Errors
/// `Io` when the process is gone.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let gone =
        || Error::io(format!("processor clock of {pid}"))(std::io::Error::from_raw_os_error(libc::ESRCH));
    let mut clock = 0;
    // SAFETY: the call writes one clock id to a live local.
    if unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) } != 0 {
        return Err(gone());
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to a live local.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(gone());
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}
