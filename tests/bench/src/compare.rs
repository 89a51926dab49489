//! ringblk, qemu-storage-daemon and fio over the same workloads, in turn, in one run.
//!
//! The `compare` command. Per workload all contestants run once a round, in an order that alternates, and ratios are
//! taken within rounds, so that a machine that changes under the run changes both sides. The front end stays on one
//! processor and the backend (or fio) on another. No workload flushes and both backends keep their default write
//! cache, so nothing here depends on what either tells a guest about it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use tempfile::TempDir;

use crate::drive::{self, Load, Mode};
use crate::image::{self, Layout};
use crate::peers::{self, Choice, Export, Image, Kind, Peer};
use crate::report::{Contestant, Results, Sample};
use crate::workload::{self, Against, Backing, Workload};
use crate::{Result, fio, host, say};

/// Bytes per request.
const BLOCK: u64 = 4096;

/// Command line of `compare`.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    choice: Choice,
    /// Processor of the front end.
    #[arg(long, default_value_t = 0)]
    front_cpu: usize,
    /// Measured seconds of each run.
    #[arg(long, default_value_t = 3.0, value_parser = host::parse_seconds)]
    seconds: f64,
    /// Rounds, each contestant once per round.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Only these workloads, by name, with commas between.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave fio out.
    #[arg(long)]
    no_fio: bool,
    /// Folder on the disk's file system for test files.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Folder on tmpfs for test files.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// Bytes of each test file (suffixes K, M, G).
    #[arg(long, default_value = "1G", value_parser = host::parse_size)]
    file_size: u64,
    /// Also write the report to this file.
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// Test files, removed at the end.
struct Files {
    disk: TempDir,
    tmpfs: TempDir,
}

impl Files {
    fn new(arguments: &Arguments) -> Result<Self> {
        let disk = match &arguments.disk {
            Some(folder) => TempDir::new_in(folder)?,
            None => TempDir::new()?,
        };
        Ok(Self { disk, tmpfs: TempDir::new_in(&arguments.tmpfs)? })
    }

    /// The file for a workload, made on first use.
    fn path(&self, backing: Backing, size: u64) -> Result<Option<PathBuf>> {
        let path = match backing {
            Backing::Null => return Ok(None),
            Backing::Cached => self.disk.path().join("cached.raw"),
            Backing::Direct => self.disk.path().join("direct.raw"),
            Backing::Tmpfs => self.tmpfs.path().join("tmpfs.raw"),
        };
        if !path.exists() {
            fio::prepare(path.clone(), size)?;
            if backing == Backing::Direct {
                fadvise(std::fs::File::open(&path)?, 0, None, Advice::DontNeed)?;
            }
        }
        Ok(Some(path))
    }
}

/// The `compare` command.
pub fn main(arguments: &Arguments) -> Result<()> {
    let all = workload::all();
    if let Some(unknown) =
        arguments.only.iter().find(|name| all.iter().all(|workload| workload.name != **name))
    {
        let names: Vec<&str> = all.iter().map(|workload| workload.name).collect();
        return Err(format!("no workload {unknown}; there are {}", names.join(", ")).into());
    }
    let (peers, mut notes) = arguments.choice.peers()?;
    let fio_version = if arguments.no_fio { None } else { fio::find() };
    if fio_version.is_none() {
        notes.push("fio is left out: not wanted or not installed".into());
    }
    let files = Files::new(arguments)?;
    host::pin(&[arguments.front_cpu])?;

    let mut report = heading(arguments, &peers, fio_version.as_deref(), &notes);
    say(&report);
    let mut failures = Vec::new();
    for workload in all {
        if !arguments.only.is_empty() && arguments.only.iter().all(|name| *name != workload.name) {
            continue;
        }
        let file = files.path(workload.backing, arguments.file_size)?;
        let results = rounds(
            arguments,
            &peers,
            fio_version.is_some(),
            workload,
            file.as_deref(),
            &files,
            &mut failures,
        );
        let text = results.markdown();
        say(&text);
        report.push_str(&text);
        report.push('\n');
    }
    if !failures.is_empty() {
        let _ = writeln!(report, "Failed runs:\n\n{}", failures.join("\n"));
    }
    if let Some(path) = &arguments.markdown {
        std::fs::write(path, &report).map_err(|error| format!("writing {}: {error}", path.display()))?;
    }
    if failures.is_empty() { Ok(()) } else { Err(format!("{} runs failed", failures.len()).into()) }
}

fn heading(arguments: &Arguments, peers: &[Peer], fio: Option<&str>, notes: &[String]) -> String {
    let mut out = String::from("## Comparison\n\n");
    let mut line = |text: String| {
        let _ = writeln!(out, "* {text}");
    };
    line(format!("machine: {}, load average {} at the start", host::describe(), host::load_average()));
    for peer in peers {
        line(format!("{}: {}", peer.name(), host::version(&peer.path)));
    }
    if let Some(fio) = fio {
        line(fio.to_owned());
    }
    line(format!(
        "front end on processor {}, backend or fio on {:?}; {} rounds of {} s; 4 KiB, random, files of {} MiB; \
         EVENT_IDX, three direct descriptors per request, front end polling",
        arguments.front_cpu,
        arguments.choice.back_cpus,
        arguments.rounds,
        arguments.seconds,
        arguments.file_size >> 20,
    ));
    line(
        "undisturbed: in flight / p50, for fio 1 / CPU; waited: share of time runnable without a processor"
            .into(),
    );
    line(
        "median (min..max) over the rounds; CPU is all processor time of the backend process or of fio"
            .into(),
    );
    notes.iter().for_each(|note| line(note.clone()));
    out.push('\n');
    out
}

fn rounds(
    arguments: &Arguments,
    peers: &[Peer],
    with_fio: bool,
    workload: Workload,
    file: Option<&Path>,
    files: &Files,
    failures: &mut Vec<String>,
) -> Results {
    let mut contestants = Vec::new();
    for peer in peers {
        match peer.kind {
            Kind::Qsd => contestants.push(Contestant::Qsd),
            Kind::Ringblk => {
                contestants.push(Contestant::Ringblk);
                if workload.queues > 1 {
                    contestants.push(Contestant::RingblkOneQueue);
                }
                if workload.targets.iter().any(|t| t.against == Against::OwnRaw) {
                    contestants.push(Contestant::RingblkRaw);
                }
            }
        }
    }
    if with_fio {
        contestants.extend((0..workload.fio.len()).map(Contestant::Fio));
    }
    let mut results =
        Results { workload, samples: vec![Vec::new(); contestants.len()], contestants: contestants.clone() };
    let mut order: Vec<usize> = (0..contestants.len()).collect();
    for round in 0..arguments.rounds {
        for &at in &order {
            let Some(&contestant) = contestants.get(at) else { continue };
            let sample = run(arguments, peers, &results.workload, contestant, file, files);
            let name =
                format!("{} of {}, round {}", results.name(contestant), results.workload.name, round + 1);
            let sample = sample.map_err(|error| {
                say(format!("{name}: {error}"));
                failures.push(format!("* {name}: {error}"));
            });
            if let Some(samples) = results.samples.get_mut(at) {
                samples.push(sample.ok());
            }
        }
        order.reverse();
    }
    results
}

fn run(
    arguments: &Arguments,
    peers: &[Peer],
    workload: &Workload,
    contestant: Contestant,
    file: Option<&Path>,
    files: &Files,
) -> Result<Sample> {
    let cpus = &arguments.choice.back_cpus;
    let (kind, queues) = match contestant {
        Contestant::Fio(job) => {
            let (Some(job), Some(file)) = (workload.fio.get(job), file) else {
                return Err("fio needs a file".into());
            };
            let figures = job.run(file, workload.rw, BLOCK, arguments.seconds, cpus)?;
            return Ok(Sample {
                iops: figures.iops,
                p50: None,
                p99: None,
                cpu_ns: figures.cpu_ns,
                undisturbed: (workload.backing != Backing::Direct).then(|| 1e9 / figures.cpu_ns),
                waited: None,
            });
        }
        Contestant::Qsd => (Kind::Qsd, workload.queues),
        Contestant::Ringblk => (Kind::Ringblk, workload.queues),
        Contestant::RingblkOneQueue => (Kind::Ringblk, 1),
        Contestant::RingblkRaw => (Kind::Ringblk, workload.queues),
    };
    let raw = contestant == Contestant::RingblkRaw;
    let layout = if raw { Layout::Raw } else { workload.layout };
    let peer = peers.iter().find(|peer| peer.kind == kind).ok_or("the program is not there")?;
    let direct = workload.backing == Backing::Direct;
    let image = match (file, layout) {
        (None, _) => Image::Null,
        // The very file the data of the format lies in, as raw data: the same pages of the page cache, so that what differs is
        // the format. Writes would destroy it.
        (Some(path), _) if raw && workload.rw.reads == 100 => {
            let folder = path.parent().ok_or("a file without a folder")?;
            let chain = image::prepare(workload.layout, path, folder)?;
            Image::File { path: chain.last().ok_or("no image")?.clone(), direct, filters: 0 }
        }
        (Some(path), Layout::Raw) => Image::File { path: path.to_owned(), direct, filters: 0 },
        (Some(path), Layout::Filters(filters)) => Image::File { path: path.to_owned(), direct, filters },
        (Some(path), layout) => {
            let folder = path.parent().ok_or("a file without a folder")?;
            Image::Qcow2 { chain: image::prepare(layout, path, folder)?, direct }
        }
    };
    let chain = if let Image::Qcow2 { chain, .. } = &image { chain.clone() } else { Vec::new() };
    let socket = files.tmpfs.path().join("vhost.sock");
    let export = Export {
        image,
        queues,
        iothreads: queues,
        poll_ns: workload.poll_ns,
        pin_memory: workload.pin_memory,
    };
    let (mut daemon, connection) = peer.connect(&export, &socket, cpus)?;
    let load = Load {
        queues,
        depth: workload.depth,
        block_size: BLOCK,
        rw: workload.rw,
        mode: Mode::Poll,
        seconds: arguments.seconds,
        region: None,
        batch: false,
        indirect: false,
        no_event_idx: false,
    };
    let outcome = drive::run(connection, &load, Some(daemon.pid()))
        .and_then(|outcome| drive::check(&outcome).map(|()| outcome))
        // A backend that died explains itself on stderr, not on the socket.
        .map_err(|error| match daemon.check_running() {
            Ok(()) => error,
            Err(end) => format!("{error}; {end}").into(),
        })?;
    peers::end(daemon)?;
    image::tidy(layout, &chain);
    let [p50, _, p99, ..] = outcome.latency_ns;
    Ok(Sample {
        iops: outcome.iops(),
        p50: Some(p50),
        p99: Some(p99),
        cpu_ns: outcome.cpu_per_request().unwrap_or_default(),
        // With several queues a request's latency says nothing of the others that share the processor, and on the
        // disk it is mostly the disk's.
        undisturbed: (queues == 1 && workload.backing != Backing::Direct)
            .then(|| f64::from(workload.depth) / p50 * 1e9),
        waited: outcome.back_waited.map(|back| (outcome.front_waited, back)),
    })
}
