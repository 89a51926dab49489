//! The front end under load: one thread keeps every queue of one backend full and measures.
//!
//! Called by the `drive`, `compare` and `selftest` commands. It must stay cheaper than any backend: per batch it
//! reads the clock twice and publishes one index; it kicks and interrupts only as the ring's flags ask.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use client::blk::SECTOR;
use client::clock::{self, Clock};
use client::fast::{FastQueue, Format, ring_size};
use client::session::{Guest, Session, Setup};
use client::wire::feature;
use client::{Connection, process};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::histogram::Histogram;
use crate::{Result, host, say};

/// A backend that completes nothing for this long is taken for dead.
const STALL: Duration = Duration::from_secs(20);

/// Entries of a ring at least: the default of QEMU and cloud-hypervisor.
const MIN_RING: u16 = 128;

/// Command line of `drive`.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// The backend's vhost-user socket.
    #[arg(long)]
    socket: PathBuf,
    /// Process id of the backend, to account its processor time.
    #[arg(long)]
    pid: Option<u32>,
    /// Run the front end on this processor.
    #[arg(long)]
    cpu: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: Load,
}

/// What to do to the disk.
#[derive(clap::Args, Clone, Debug)]
pub struct Load {
    /// Queues, all driven by one thread.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// Requests kept in flight per queue.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub depth: u16,
    /// Bytes per request (suffixes K, M).
    #[arg(long, default_value = "4K", value_parser = host::parse_size)]
    pub block_size: u64,
    /// randread, randwrite, read, write or randrw:PERCENT-OF-READS.
    #[arg(long, default_value = "randread", value_parser = parse_pattern)]
    pub rw: Pattern,
    /// Wait for completions by reading the used ring or asleep on the call eventfd.
    #[arg(long, value_enum, default_value_t = Mode::Poll)]
    pub mode: Mode,
    /// Measured seconds; a quarter of a second before them is not counted.
    #[arg(long, default_value_t = 5.0, value_parser = host::parse_seconds)]
    pub seconds: f64,
    /// Bytes of the disk to touch, from its start (suffixes K, M, G); all of it by default.
    #[arg(long, value_parser = host::parse_size)]
    pub region: Option<u64>,
    /// Submit all requests of a queue at once and only when all have completed.
    #[arg(long)]
    pub batch: bool,
    /// Put each request behind one indirect descriptor, as Linux guests do, instead of three in the ring.
    #[arg(long)]
    pub indirect: bool,
    /// Refuse EVENT_IDX.
    #[arg(long)]
    pub no_event_idx: bool,
}

/// How completions are noticed.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reading the used ring without pause, interrupts off.
    Poll,
    /// Sleeping until the backend writes the call eventfd.
    Sleep,
}

/// Order and direction of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Uniformly random blocks, or one after the other.
    pub random: bool,
    /// Share of reads in 1/100.
    pub reads: u8,
}

fn parse_pattern(text: &str) -> std::result::Result<Pattern, String> {
    let (random, reads) = match text {
        "randread" => (true, 100),
        "randwrite" => (true, 0),
        "read" => (false, 100),
        "write" => (false, 0),
        _ => match text.strip_prefix("randrw:").and_then(|share| share.parse().ok()) {
            Some(reads @ 0..=100) => (true, reads),
            _ => return Err("randread, randwrite, read, write or randrw:0..100".into()),
        },
    };
    Ok(Pattern { random, reads })
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Requests completed in the measured window.
    pub requests: u64,
    /// Length of the window.
    pub seconds: f64,
    /// Requests that did not end with status 0, warm-up included.
    pub errors: u64,
    /// Latencies in nanoseconds: p50, p90, p99, p99.9, maximum.
    pub latency_ns: [f64; 5],
    /// Processor time of the backend in nanoseconds over the window, if a process was named.
    pub cpu_ns: Option<u64>,
    /// Processor time per thread of the backend: name, nanoseconds.
    pub threads: Vec<(String, u64)>,
    /// Writes to kick eventfds in the window.
    pub kicks: u64,
    /// Share of the window in which the front end was runnable without a processor.
    pub front_waited: f64,
    /// The same for the backend's thread that waited most, if a process was named.
    pub back_waited: Option<f64>,
}

impl Outcome {
    /// Requests per second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// Nanoseconds of backend processor time per request.
    pub fn cpu_per_request(&self) -> Option<f64> {
        self.cpu_ns.map(|ns| ns as f64 / self.requests.max(1) as f64)
    }

    fn to_json(&self) -> Value {
        let [p50, p90, p99, p999, max] = self.latency_ns;
        json!({
            "iops": self.iops(), "requests": self.requests, "seconds": self.seconds, "errors": self.errors,
            "latency_ns": {"p50": p50, "p90": p90, "p99": p99, "p99.9": p999, "max": max},
            "cpu_ns_per_request": self.cpu_per_request(),
            "waited_for_processor": {"front": self.front_waited, "back": self.back_waited},
            "kicks_per_request": self.kicks as f64 / self.requests.max(1) as f64,
            "threads": self.threads.iter().map(|(name, ns)| json!({"name": name, "cpu_ns": ns})).collect::<Vec<_>>(),
        })
    }
}

/// The `drive` command.
pub fn main(arguments: &Arguments) -> Result<()> {
    if let Some(cpu) = arguments.cpu {
        host::pin(&[cpu])?;
    }
    let connection = Connection::connect(&arguments.socket, Duration::from_secs(20))?;
    let outcome = run(connection, &arguments.load, arguments.pid)?;
    if arguments.json {
        say(outcome.to_json());
    } else {
        let [p50, p90, p99, p999, max] = outcome.latency_ns.map(|ns| ns / 1000.0);
        say(format!("{:.0} requests/s ({} in {:.2} s)", outcome.iops(), outcome.requests, outcome.seconds));
        say(format!("latency µs: p50 {p50:.2}  p90 {p90:.2}  p99 {p99:.2}  p99.9 {p999:.2}  max {max:.1}"));
        if let Some(cpu) = outcome.cpu_per_request() {
            say(format!("backend: {cpu:.0} ns of processor time per request"));
            for (name, ns) in &outcome.threads {
                say(format!("  {name}: {:.1} % of a core", *ns as f64 / outcome.seconds / 1e7));
            }
        }
        say(format!(
            "waited for a processor: front end {:.1} %, backend {} of the time",
            outcome.front_waited * 100.0,
            outcome.back_waited.map_or("?".into(), |share| format!("{:.1} %", share * 100.0)),
        ));
        say(format!("kicks: {:.4} per request", outcome.kicks as f64 / outcome.requests.max(1) as f64));
    }
    check(&outcome)
}

/// Fails when a request did not succeed: figures of a failing disk mean nothing.
pub fn check(outcome: &Outcome) -> Result<()> {
    if outcome.errors > 0 {
        return Err(format!("{} requests ended with a status other than 0", outcome.errors).into());
    }
    if outcome.requests == 0 {
        return Err("no request completed in the measured window".into());
    }
    Ok(())
}

/// Sets a session up over `connection`, drives it and stops it.
pub fn run(connection: Connection, load: &Load, pid: Option<u32>) -> Result<Outcome> {
    let mut setup = layout(load);
    if load.no_event_idx {
        setup.features &= !feature::EVENT_IDX;
    }
    let guest = Guest::new(&setup)?;
    let mut session = Session::establish(connection, guest, &setup, &[])?;
    let capacity = session.config.capacity * SECTOR;
    let mut queues = prepare(&mut session.guest, load)?;
    let outcome = drive(&mut queues, load, capacity, pid)?;
    for queue in &queues {
        session.frontend.get_vring_base(u32::from(queue.queue().index()))?;
    }
    Ok(outcome)
}

/// The ring format a load asks for.
pub fn format(load: &Load) -> Format {
    if load.indirect { Format::Indirect } else { Format::Direct }
}

/// Memory and rings for a load.
pub fn layout(load: &Load) -> Setup {
    let queue_size = ring_size(load.depth, format(load)).max(MIN_RING);
    let per_queue =
        u64::from(queue_size) * (4096 + 64) + u64::from(load.depth) * load.block_size + (64 << 10);
    let memory = vec![(1 << 20, per_queue * u64::from(load.queues))];
    Setup { queues: load.queues, queue_size, memory, ..Setup::default() }
}

/// Turns a guest's rings into prepared ones.
pub fn prepare(guest: &mut Guest, load: &Load) -> Result<Vec<FastQueue>> {
    let block = u32::try_from(load.block_size)?;
    std::mem::take(&mut guest.queues)
        .into_iter()
        .map(|queue| Ok(FastQueue::new(queue, &mut guest.memory, load.depth, block, format(load))?))
        .collect()
}

/// Chooses direction and place of each request.
struct Chooser {
    state: u64,
    next: u64,
    blocks: u64,
    sectors_per_block: u64,
    pattern: Pattern,
}

impl Chooser {
    #[inline]
    fn random(&mut self) -> u64 {
        // xorshift64*: a few cycles, and uniform enough for offsets.
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    #[inline]
    fn choose(&mut self) -> (bool, u64) {
        let block = if self.pattern.random {
            ((u128::from(self.random()) * u128::from(self.blocks)) >> 64) as u64
        } else {
            let block = self.next;
            self.next = if block + 1 == self.blocks { 0 } else { block + 1 };
            block
        };
        let write = match self.pattern.reads {
            100 => false,
            0 => true,
            reads => self.random() >> 32 >= (u64::from(reads) << 32) / 100,
        };
        (write, block * self.sectors_per_block)
    }
}

/// Moments between which the load is counted.
struct Window {
    opened: Instant,
    open_tick: u64,
    cpu: Option<u64>,
    threads: Vec<process::Thread>,
    waiting: u64,
    kicks: u64,
}

impl Window {
    fn open(queues: &[FastQueue], pid: Option<u32>) -> Result<Self> {
        let threads = pid.map(process::threads).transpose()?.unwrap_or_default();
        Ok(Self {
            kicks: kicks(queues),
            threads,
            waiting: process::own_waiting_ns()?,
            cpu: pid.map(process::cpu_ns).transpose()?,
            opened: Instant::now(),
            open_tick: clock::now(),
        })
    }
}

fn kicks(queues: &[FastQueue]) -> u64 {
    queues.iter().map(|queue| queue.queue().kicks).sum()
}

/// Keeps `queues` full for the load's time.
pub fn drive(queues: &mut [FastQueue], load: &Load, capacity: u64, pid: Option<u32>) -> Result<Outcome> {
    let region = load.region.unwrap_or(capacity).min(capacity);
    if load.block_size == 0 || !load.block_size.is_multiple_of(SECTOR) || region < load.block_size {
        return Err(format!("blocks of {} bytes on {region} bytes of disk", load.block_size).into());
    }
    let clock = Clock::calibrate();
    let mut chooser = Chooser {
        state: 0x9e37_79b9_7f4a_7c15,
        next: 0,
        blocks: region / load.block_size,
        sectors_per_block: load.block_size / SECTOR,
        pattern: load.rw,
    };
    let mut histogram = Histogram::new();
    let mut started: Vec<Vec<u64>> = queues.iter().map(|queue| vec![0; usize::from(queue.slots())]).collect();
    let mut ready: Vec<u16> = Vec::with_capacity(usize::from(load.depth));
    for (queue, started) in queues.iter_mut().zip(&mut started) {
        queue.queue_mut().suppress_interrupts();
        ready.extend(0..queue.slots());
        submit(queue, &mut ready, &mut chooser, started)?;
    }

    let begin = clock::now();
    let warm = begin + clock.ticks(0.25);
    let (stall, length) = (clock.ticks(STALL.as_secs_f64()), clock.ticks(load.seconds));
    let mut window: Option<Window> = None;
    let mut last = begin;
    let mut idle = 0u32;
    loop {
        let mut progress = false;
        for (queue, started) in queues.iter_mut().zip(&mut started) {
            queue.reap(&mut ready)?;
            if ready.is_empty() {
                continue;
            }
            progress = true;
            last = clock::now();
            for &slot in &ready {
                histogram.record(last.wrapping_sub(started[usize::from(slot)]));
            }
            if load.batch {
                if queue.in_flight() > 0 {
                    ready.clear();
                    continue;
                }
                ready.clear();
                ready.extend(0..queue.slots());
            }
            submit(queue, &mut ready, &mut chooser, started)?;
        }
        let mut now = last;
        if !progress {
            idle = idle.wrapping_add(1);
            if load.mode == Mode::Sleep {
                sleep(queues)?;
            } else if !idle.is_multiple_of(64) {
                std::hint::spin_loop();
                continue;
            }
            now = clock::now();
            if now.saturating_sub(last) > stall {
                return Err(format!("no request completed for {STALL:?}").into());
            }
        }
        match &window {
            None if now >= warm => {
                window = Some(Window::open(queues, pid)?);
                histogram.clear();
            }
            Some(window) if now.saturating_sub(window.open_tick) >= length => break,
            _ => {}
        }
    }
    let outcome = close(window, &histogram, &clock, queues, pid)?;
    drain(queues)?;
    Ok(Outcome { errors: queues.iter().map(|queue| queue.errors).sum(), ..outcome })
}

fn close(
    window: Option<Window>,
    histogram: &Histogram,
    clock: &Clock,
    queues: &[FastQueue],
    pid: Option<u32>,
) -> Result<Outcome> {
    let window = window.ok_or("the measured window never opened")?;
    let seconds = window.opened.elapsed().as_secs_f64();
    let cpu = pid.map(process::cpu_ns).transpose()?;
    let waiting = process::own_waiting_ns()?.saturating_sub(window.waiting);
    let mut threads = pid.map(process::threads).transpose()?.unwrap_or_default();
    for thread in &mut threads {
        if let Some(before) = window.threads.iter().find(|before| before.tid == thread.tid) {
            thread.cpu_ns = thread.cpu_ns.saturating_sub(before.cpu_ns);
            thread.waiting_ns = thread.waiting_ns.saturating_sub(before.waiting_ns);
        }
    }
    let share = |ns: u64| (ns as f64 / 1e9 / seconds).min(1.0);
    let quantile = |share| clock.ns(histogram.quantile(share));
    Ok(Outcome {
        requests: histogram.total(),
        seconds,
        errors: 0,
        latency_ns: [
            quantile(0.5),
            quantile(0.9),
            quantile(0.99),
            quantile(0.999),
            clock.ns(histogram.max()),
        ],
        cpu_ns: cpu.zip(window.cpu).map(|(after, before)| after.saturating_sub(before)),
        front_waited: share(waiting),
        back_waited: threads.iter().map(|thread| share(thread.waiting_ns)).max_by(f64::total_cmp),
        threads: threads.into_iter().map(|thread| (thread.name, thread.cpu_ns)).collect(),
        kicks: kicks(queues) - window.kicks,
    })
}

#[inline]
fn submit(
    queue: &mut FastQueue,
    ready: &mut Vec<u16>,
    chooser: &mut Chooser,
    started: &mut [u64],
) -> Result<()> {
    for &slot in &*ready {
        let (write, sector) = chooser.choose();
        queue.submit(slot, write, sector)?;
    }
    let now = clock::now();
    for slot in ready.drain(..) {
        started[usize::from(slot)] = now;
    }
    queue.publish()?;
    Ok(())
}

/// Sleeps until a queue interrupts, or a second at most.
fn sleep(queues: &mut [FastQueue]) -> Result<()> {
    let mut waiting = true;
    for queue in queues.iter_mut() {
        queue.queue_mut().request_interrupt();
        waiting &= queue.queue().used_idx() == queue.queue().taken_idx();
    }
    if waiting {
        let mut fds: Vec<PollFd<'_>> = queues
            .iter()
            .map(|queue| PollFd::from_borrowed_fd(queue.queue().call_fd(), PollFlags::IN))
            .collect();
        match poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for queue in queues {
        queue.queue_mut().take_interrupts();
        queue.queue_mut().suppress_interrupts();
    }
    Ok(())
}

/// Waits for everything in flight, so that statuses of the last requests count and the backend can stop cleanly.
fn drain(queues: &mut [FastQueue]) -> Result<()> {
    let deadline = Instant::now() + STALL;
    let mut done = Vec::new();
    while queues.iter().any(|queue| queue.in_flight() > 0) {
        for queue in queues.iter_mut() {
            queue.reap(&mut done)?;
        }
        done.clear();
        if Instant::now() > deadline {
            return Err(format!("requests in flight did not complete within {STALL:?}").into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
