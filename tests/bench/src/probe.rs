//! What a backend costs besides requests: at rest, at its start, and over many connections.
//!
//! Called by the `idle`, `start` and `connect` commands, for each program that exists.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::daemon::Daemon;
use client::session::{Base, Guest, Session, Setup};
use client::{Connection, Frontend};
use tempfile::TempDir;

use crate::peers::{self, Choice, DEFAULT_POLL_NS, Export, Image};
use crate::report::Spread;
use crate::{Result, host, say};

/// Command line of `idle`.
#[derive(clap::Args, Clone, Debug)]
pub struct IdleArguments {
    #[command(flatten)]
    choice: Choice,
    /// Queues set up.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Seconds watched.
    #[arg(long, default_value_t = 5.0, value_parser = host::parse_seconds)]
    seconds: f64,
}

/// Command line of `start`.
#[derive(clap::Args, Clone, Debug)]
pub struct StartArguments {
    #[command(flatten)]
    choice: Choice,
    /// Starts per program, alternating.
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,
}

/// Command line of `connect`.
#[derive(clap::Args, Clone, Debug)]
pub struct ConnectArguments {
    #[command(flatten)]
    choice: Choice,
    /// Connections made.
    #[arg(long, default_value_t = 10_000)]
    cycles: u32,
    /// Queues set up in each.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
}

/// A raw file of 64 MiB and a place for sockets.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::File::create(folder.path().join("disk.raw"))?.set_len(64 << 20)?;
        Ok(Self { folder })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("vhost.sock")
    }

    fn export(&self, queues: u16) -> Export {
        let image = Image::File { path: self.folder.path().join("disk.raw"), direct: false, filters: 0 };
        Export { image, queues, iothreads: 1, poll_ns: DEFAULT_POLL_NS, pin_memory: false }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The `idle` command.
pub fn idle(arguments: &IdleArguments) -> Result<()> {
    let (peers, notes) = arguments.choice.peers()?;
    notes.iter().for_each(say);
    for peer in peers {
        let place = Place::new()?;
        let cpus = &arguments.choice.back_cpus;
        let (daemon, connection) = peer.connect(&place.export(arguments.queues), &place.socket(), cpus)?;
        let setup = Setup { queues: arguments.queues, ..Setup::default() };
        let session = Session::establish(connection, Guest::new(&setup)?, &setup, &[])?;
        // Polling and set-up work end within milliseconds; what happens later is idleness.
        std::thread::sleep(Duration::from_millis(500));
        let (cpu, before) = (daemon.cpu_ns()?, daemon.threads()?);
        std::thread::sleep(Duration::from_secs_f64(arguments.seconds));
        let (cpu, after) = (daemon.cpu_ns()? - cpu, daemon.threads()?);
        let resident = daemon.resident()?;
        let switches = |threads: &[client::process::Thread]| {
            threads.iter().map(|thread| thread.voluntary_switches).sum::<u64>()
        };
        let names: Vec<&str> = after.iter().map(|thread| thread.name.as_str()).collect();
        say(format!(
            "{}: resident {:.2} MiB (heap and stacks {:.2}, program {:.2}, guest memory touched {:.2}), {} threads ({}), \
             {} descriptors, {:.3} ms of processor time and {} wake-ups in {} s",
            peer.name(),
            mib(resident.total),
            mib(resident.anon),
            mib(resident.file),
            mib(resident.shared),
            names.len(),
            names.join(", "),
            daemon.descriptors()?,
            cpu as f64 / 1e6,
            switches(&after).saturating_sub(switches(&before)),
            arguments.seconds,
        ));
        drop(session);
        peers::end(daemon)?;
    }
    Ok(())
}

/// The `start` command.
pub fn start(arguments: &StartArguments) -> Result<()> {
    let (peers, notes) = arguments.choice.peers()?;
    notes.iter().for_each(say);
    let mut times: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); peers.len()];
    let place = Place::new()?;
    for _ in 0..arguments.starts {
        for (peer, (from_fork, from_exec)) in peers.iter().zip(&mut times) {
            let forked = Instant::now();
            let daemon = peer.start(&place.export(4), &place.socket(), &arguments.choice.back_cpus)?;
            let connection = Connection::connect(&place.socket(), Duration::from_secs(20))?;
            Frontend::new(connection).get_features()?;
            let replied = Instant::now();
            from_fork.push((replied - forked).as_secs_f64() * 1e3);
            from_exec.push((replied - daemon.executed()).as_secs_f64() * 1e3);
            peers::end(daemon)?;
        }
    }
    for (peer, (from_fork, from_exec)) in peers.iter().zip(times) {
        if let (Some(exec), Some(fork)) = (Spread::of(&from_exec), Spread::of(&from_fork)) {
            say(format!(
                "{}: exec to the first reply {:.2} ms ({:.2} to {:.2}); with fork {:.2} ms ({:.2} to {:.2}); {} starts",
                peer.name(),
                exec.median,
                exec.min,
                exec.max,
                fork.median,
                fork.min,
                fork.max,
                arguments.starts,
            ));
        }
    }
    Ok(())
}

/// Descriptors, threads and resident KiB.
fn footprint(daemon: &Daemon) -> Result<[u64; 3]> {
    Ok([daemon.descriptors()? as u64, daemon.threads()?.len() as u64, daemon.resident()?.total / 1024])
}

/// The `connect` command.
pub fn connect(arguments: &ConnectArguments) -> Result<()> {
    let (peers, notes) = arguments.choice.peers()?;
    notes.iter().for_each(say);
    let setup = Setup { queues: arguments.queues, ..Setup::default() };
    for peer in peers {
        let place = Place::new()?;
        let cpus = &arguments.choice.back_cpus;
        let (mut daemon, first) = peer.connect(&place.export(arguments.queues), &place.socket(), cpus)?;
        drop(first);
        let mut guest = Guest::new(&setup)?;
        let mut bases: Vec<Base> = Vec::new();
        let mut cycle = |count: u32| -> Result<()> {
            for _ in 0..count {
                (guest, bases) = one_cycle(&place.socket(), std::mem::take(&mut guest), &setup, &bases)?;
            }
            Ok(())
        };
        // What is allocated once and kept is no leak: it is there after some cycles.
        cycle(arguments.cycles.min(50))?;
        let before = settled(&daemon)?;
        let begin = Instant::now();
        cycle(arguments.cycles)?;
        let elapsed = begin.elapsed();
        let after = settled(&daemon)?;
        daemon.check_running()?;
        let [fds, threads, rss] = [0, 1, 2].map(|at| format!("{} -> {}", before[at], after[at]));
        say(format!(
            "{}: {} cycles in {:.1} s ({:.0} µs each); descriptors {fds}, threads {threads}, resident {rss} KiB",
            peer.name(),
            arguments.cycles,
            elapsed.as_secs_f64(),
            elapsed.as_secs_f64() * 1e6 / f64::from(arguments.cycles.max(1)),
        ));
        peers::end(daemon)?;
    }
    Ok(())
}

/// The footprint once the end of the last connection has been dealt with, as far as can be told from outside.
fn settled(daemon: &Daemon) -> Result<[u64; 3]> {
    let mut last = footprint(daemon)?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        let now = footprint(daemon)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}

fn one_cycle(socket: &Path, guest: Guest, setup: &Setup, bases: &[Base]) -> Result<(Guest, Vec<Base>)> {
    let connection = Connection::connect(socket, setup.limit)?;
    let session = Session::establish(connection, guest, setup, bases)?;
    let bases = session.stop()?;
    Ok((session.disconnect(), bases))
}
