//! Host fio on the same files: what the kernel gives a program without rings, graph or guest.
//!
//! Called by `compare`. The jobs take what makes fio fastest without giving it what a backend cannot have: no
//! buffers registered with the kernel (a backend would have to pin all guest memory), no polling of the disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::Result;
use crate::drive::Pattern;

/// How fio does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring with a registered file, submitting 16 at a time of 32 in flight.
    IoUring,
    /// One pread or pwrite after the other.
    Psync,
}

/// One fio run.
#[derive(Clone, Debug)]
pub struct Job {
    /// Engine.
    pub engine: Engine,
    /// O_DIRECT.
    pub direct: bool,
    /// Requests in flight; without meaning for psync.
    pub depth: u16,
}

/// What it measured.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Requests per second.
    pub iops: f64,
    /// Processor time of fio itself per request, nanoseconds.
    pub cpu_ns: f64,
}

impl Job {
    /// Name in reports.
    pub fn name(&self) -> &'static str {
        match (self.engine, self.direct) {
            (Engine::IoUring, false) => "fio io_uring",
            (Engine::IoUring, true) => "fio io_uring O_DIRECT",
            (Engine::Psync, _) => "fio psync",
        }
    }

    /// The command line after the program.
    pub fn arguments(
        &self,
        file: &Path,
        rw: Pattern,
        block: u64,
        seconds: f64,
        cpus: &[usize],
    ) -> Vec<String> {
        let rw = match (rw.random, rw.reads) {
            (true, 100) => "randread".to_owned(),
            (true, 0) => "randwrite".into(),
            (false, 100) => "read".into(),
            (false, 0) => "write".into(),
            (_, reads) => format!("randrw --rwmixread={reads}"),
        };
        let cpus = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let mut line: Vec<String> =
            ["--name=bench", "--output-format=json", "--time_based", "--ramp_time=250ms"]
                .map(String::from)
                .to_vec();
        // A process of its own (no --thread), so that its processor time includes the kernel's io_uring workers.
        // No map of blocks visited, no clock reads per request, no flush at the end: the backends do none of it.
        line.extend(
            [
                "--norandommap",
                "--randrepeat=0",
                "--gtod_reduce=1",
                "--invalidate=0",
                "--end_fsync=0",
                "--thread",
            ]
            .map(String::from),
        );
        line.extend(format!("--rw={rw}").split(' ').map(String::from));
        line.extend([
            format!("--filename={}", file.display()),
            format!("--bs={block}"),
            format!("--direct={}", u8::from(self.direct)),
            format!("--runtime={}ms", (seconds * 1000.0) as u64),
            format!("--cpus_allowed={cpus}"),
        ]);
        match self.engine {
            Engine::Psync => line.push("--ioengine=psync".into()),
            Engine::IoUring => {
                let batch = (self.depth / 2).max(1);
                line.extend(["--ioengine=io_uring", "--registerfiles=1"].map(String::from));
                line.push(format!("--iodepth={}", self.depth));
                line.push(format!("--iodepth_batch_submit={batch}"));
                line.push("--iodepth_batch_complete_min=1".into());
                line.push(format!("--iodepth_batch_complete_max={}", self.depth));
            }
        }
        line
    }

    /// Runs it.
    pub fn run(&self, file: &Path, rw: Pattern, block: u64, seconds: f64, cpus: &[usize]) -> Result<Figures> {
        let output = Command::new("fio")
            .args(self.arguments(file, rw, block, seconds, cpus))
            .output()
            .map_err(|error| format!("fio: {error}"))?;
        if !output.status.success() {
            return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        figures(&String::from_utf8_lossy(&output.stdout))
    }
}

/// Whether fio can be started.
pub fn find() -> Option<String> {
    let output = Command::new("fio").arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Test files are written in pieces of this size, bytes.
pub const PREPARE_CHUNK: usize = 1 << 20;

/// A file of `size` bytes without holes at `path`, its data in the page cache.
pub fn prepare(path: PathBuf, size: u64) -> Result<PathBuf> {
    use std::io::Write;
    let mut file = std::fs::File::create(&path)?;
    let mut chunk = vec![0u8; PREPARE_CHUNK];
    let mut state = 0x0123_4567_89ab_cdefu64;
    let mut left = size;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = left.min(chunk.len() as u64);
        file.write_all(chunk.get(..part as usize).unwrap_or_default())?;
        left -= part;
    }
    file.sync_all()?;
    Ok(path)
}

fn figures(text: &str) -> Result<Figures> {
    // fio may print warnings before the document.
    let start = text.find('{').ok_or("fio printed no JSON")?;
    let document: Value = serde_json::from_str(text.get(start..).unwrap_or_default())?;
    let job = document.pointer("/jobs/0").ok_or("fio reports no job")?;
    let number = |pointer: &str| job.pointer(pointer).and_then(Value::as_f64).unwrap_or_default();
    if number("/error") != 0.0 {
        return Err(format!("fio reports error {}", number("/error")).into());
    }
    let (mut iops, mut requests, mut runtime_ms) = (0.0, 0.0, 0.0f64);
    for direction in ["read", "write"] {
        iops += number(&format!("/{direction}/iops"));
        requests += number(&format!("/{direction}/total_ios"));
        runtime_ms = runtime_ms.max(number(&format!("/{direction}/runtime")));
    }
    if requests == 0.0 {
        return Err("fio completed no request".into());
    }
    // usr_cpu and sys_cpu are percentages of the run time.
    let busy_ns = (number("/usr_cpu") + number("/sys_cpu")) / 100.0 * runtime_ms * 1e6;
    Ok(Figures { iops, cpu_ns: busy_ns / requests })
}

#[cfg(test)]
mod tests;
