//! How the two backends are started for a workload: their command lines, next to each other.
//!
//! Called by `compare` and `probe`. ringblk takes qemu-storage-daemon's command line, so the differences between
//! the two lines are exactly what is compared: where the queues of an export may run.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::Connection;
use client::daemon::{Daemon, Launch};

use crate::Result;

/// Polling time of an iothread unless a workload says otherwise: QEMU's default for virtual machines.
pub const DEFAULT_POLL_NS: u64 = 32_768;

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// qemu-storage-daemon.
    Qsd,
    /// ringblk.
    Ringblk,
}

/// A program to compare.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Which one.
    pub kind: Kind,
    /// Its executable.
    pub path: PathBuf,
}

/// What is behind the export.
#[derive(Clone, Debug)]
pub enum Image {
    /// null-co, which completes without touching data.
    Null,
    /// A raw file.
    File {
        /// Its path.
        path: PathBuf,
        /// O_DIRECT.
        direct: bool,
        /// Throttle nodes above it, of a group without limits.
        filters: u8,
    },
    /// A chain of qcow2 files.
    Qcow2 {
        /// Their paths, the top one first.
        chain: Vec<PathBuf>,
        /// O_DIRECT.
        direct: bool,
    },
}

/// An export to start.
#[derive(Clone, Debug)]
pub struct Export {
    /// What is behind it.
    pub image: Image,
    /// Queues offered.
    pub queues: u16,
    /// Iothreads the queues are spread over; qemu-storage-daemon always uses one.
    pub iothreads: u16,
    /// `poll-max-ns` of each iothread. qemu-storage-daemon takes it too, without effect on a vhost-user export.
    pub poll_ns: u64,
    /// `pin-memory`, for ringblk.
    pub pin_memory: bool,
}

impl Peer {
    /// Name in reports.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Qsd => "qemu-storage-daemon",
            Kind::Ringblk => "ringblk",
        }
    }

    /// The command line after the program.
    pub fn arguments(&self, export: &Export, socket: &Path) -> Vec<String> {
        let mut line = Vec::new();
        let mut option = |name: &str, value: String| line.extend([format!("--{name}"), value]);
        match &export.image {
            Image::Null => {
                option("blockdev", "driver=null-co,node-name=n,size=1073741824,read-zeroes=off".into());
            }
            Image::File { path, direct, filters } => {
                let cache = if *direct { ",cache.direct=on" } else { "" };
                let file = path.display();
                option("blockdev", format!("driver=file,node-name=f,filename={file},aio=io_uring{cache}"));
                let mut below = String::from("f");
                for filter in 0..*filters {
                    if filter == 0 {
                        option("object", "throttle-group,id=unlimited".into());
                    }
                    let node = format!("t{filter}");
                    option(
                        "blockdev",
                        format!("driver=throttle,node-name={node},throttle-group=unlimited,file={below}"),
                    );
                    below = node;
                }
                option("blockdev", format!("driver=raw,node-name=n,file={below}"));
            }
            Image::Qcow2 { chain, direct } => option("blockdev", chain_options(chain, *direct)),
        }
        let iothreads = if self.kind == Kind::Qsd { 1 } else { export.iothreads };
        for thread in 0..iothreads {
            option("object", format!("iothread,id=i{thread},poll-max-ns={}", export.poll_ns));
        }
        let placement = match self.kind {
            Kind::Qsd => "iothread=i0".into(),
            Kind::Ringblk => (0..iothreads)
                .map(|thread| format!("iothread-vq-mapping.{thread}.iothread=i{thread}"))
                .collect::<Vec<_>>()
                .join(","),
        };
        let pin = if export.pin_memory && self.kind == Kind::Ringblk { ",pin-memory=on" } else { "" };
        option(
            "export",
            format!(
                "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},writable=on,num-queues={},{placement}{pin}",
                socket.display(),
                export.queues
            ),
        );
        line
    }

    /// Starts it and connects. The kernel takes the io_uring of an ended process apart a little later, and an image's
    /// locks live until then, so a start that fails over a lock is tried again for a while.
    pub fn connect(&self, export: &Export, socket: &Path, cpus: &[usize]) -> Result<(Daemon, Connection)> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let mut daemon = self.start(export, socket, cpus)?;
            match daemon.connect(socket) {
                Ok(connection) => return Ok((daemon, connection)),
                Err(_) if daemon.stderr().contains("lock") && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Starts it on these processors.
    pub fn start(&self, export: &Export, socket: &Path, cpus: &[usize]) -> Result<Daemon> {
        // What a killed backend leaves behind would answer connects with a refusal until the next one binds.
        let _ = std::fs::remove_file(socket);
        Ok(Launch::new(&self.path).args(self.arguments(export, socket)).cpus(cpus).spawn()?)
    }
}

/// Options of a chain, every file of it named: what follows from names in the images has other defaults.
fn chain_options(chain: &[PathBuf], direct: bool) -> String {
    let mut out = String::from("node-name=n");
    let mut prefix = String::new();
    let cache = if direct { "on" } else { "off" };
    for file in chain {
        let _ = write!(
            out,
            ",{prefix}driver=qcow2,{prefix}file.driver=file,{prefix}file.aio=io_uring,\
             {prefix}file.cache.direct={cache},{prefix}cache.direct={cache},{prefix}file.filename={}",
            file.display()
        );
        prefix.push_str("backing.");
    }
    out
}

/// Ends a backend as an orchestrator would; one that does not end is a failure of the run.
pub fn end(mut daemon: Daemon) -> Result<()> {
    daemon
        .terminate(Duration::from_secs(10))
        .map(drop)
        .map_err(|error| format!("after SIGTERM: {error}").into())
}

/// The programs named on the command line.
#[derive(clap::Args, Clone, Debug)]
pub struct Choice {
    /// qemu-storage-daemon.
    #[arg(long, default_value = "/usr/bin/qemu-storage-daemon")]
    qsd: PathBuf,
    /// ringblk.
    #[arg(long, default_value = "target/release/ringblk")]
    ringblk: PathBuf,
    /// Processors of the backend.
    #[arg(long, default_value = "1", value_delimiter = ',')]
    pub back_cpus: Vec<usize>,
}

impl Choice {
    /// The programs that exist; the others are named, so that a missing column explains itself.
    pub fn peers(&self) -> Result<(Vec<Peer>, Vec<String>)> {
        let all = [
            Peer { kind: Kind::Qsd, path: self.qsd.clone() },
            Peer { kind: Kind::Ringblk, path: self.ringblk.clone() },
        ];
        let (there, missing): (Vec<_>, Vec<_>) = all.into_iter().partition(|peer| peer.path.is_file());
        if there.is_empty() {
            return Err(
                format!("neither {} nor {} exists", self.qsd.display(), self.ringblk.display()).into()
            );
        }
        let notes = missing
            .iter()
            .map(|peer| format!("{} is left out: {} does not exist", peer.name(), peer.path.display()))
            .collect();
        Ok((there, notes))
    }
}
