//! The workloads of a comparison and what ringblk is to reach in each.
//!
//! Called by `compare`. Pure data: a workload is added here and nowhere else. All use blocks of 4 KiB at random
//! places and a front end that polls.

use crate::drive::Pattern;
use crate::fio::{Engine, Job};
use crate::image::Layout;
use crate::peers::DEFAULT_POLL_NS;

/// Where the data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// null-co.
    Null,
    /// A raw file in the page cache of the disk's file system.
    Cached,
    /// A raw file in tmpfs.
    Tmpfs,
    /// A raw file opened with O_DIRECT.
    Direct,
}

/// A figure of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Requests per second.
    Iops,
    /// Requests per second while neither side waits for a processor, see `Sample::undisturbed`.
    Undisturbed,
    /// Median latency.
    P50,
    /// Processor time of the backend per request.
    Cpu,
}

/// What ringblk is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// qemu-storage-daemon in the same round.
    Qsd,
    /// The best fio job of the same round.
    BestFio,
    /// ringblk itself with one queue on one iothread.
    OneQueue,
    /// ringblk itself on the raw file.
    OwnRaw,
    /// Nothing: nanoseconds, or requests per second.
    Absolute,
}

/// A promise.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Of which figure.
    pub figure: Figure,
    /// Against what.
    pub against: Against,
    /// The least or the most.
    pub bound: Bound,
}

/// Side of a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Not less than this.
    AtLeast(f64),
    /// Not more than this.
    AtMost(f64),
}

/// One workload.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Name for `--only`.
    pub name: &'static str,
    /// Name in reports.
    pub title: &'static str,
    /// Where the data are.
    pub backing: Backing,
    /// What format they are in; with another than raw, ringblk also runs on the raw file if something is promised
    /// against that.
    pub layout: Layout,
    /// Direction.
    pub rw: Pattern,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Queues; with more than one, ringblk gets an iothread for each and also runs with one as its own reference.
    pub queues: u16,
    /// `poll-max-ns` of the backends' iothreads.
    pub poll_ns: u64,
    /// ringblk's `pin-memory`, which qemu-storage-daemon has no like of.
    pub pin_memory: bool,
    /// fio jobs on the same file.
    pub fio: Vec<Job>,
    /// What is promised.
    pub targets: Vec<Target>,
}

const READ: Pattern = Pattern { random: true, reads: 100 };
const WRITE: Pattern = Pattern { random: true, reads: 0 };
const APPEND: Pattern = Pattern { random: false, reads: 0 };

/// Polling time where the front end sends one request at a time: longer than any pause the front end makes (well
/// under a microsecond unless it loses its processor), so that the path of a polling iothread is measured and not
/// the wake-up of a sleeping one.
const LONG_POLL_NS: u64 = 1_000_000;

fn target(figure: Figure, against: Against, bound: Bound) -> Target {
    Target { figure, against, bound }
}

/// All workloads, in the order they run.
pub fn all() -> Vec<Workload> {
    use Against::{Absolute, BestFio, OneQueue, OwnRaw, Qsd};
    use Bound::{AtLeast, AtMost};
    use Figure::{Cpu, Iops, P50};
    let base = Workload {
        name: "",
        title: "",
        backing: Backing::Null,
        layout: Layout::Raw,
        rw: READ,
        depth: 32,
        queues: 1,
        poll_ns: DEFAULT_POLL_NS,
        pin_memory: false,
        fio: vec![],
        targets: vec![],
    };
    let uring = |direct| Job { engine: Engine::IoUring, direct, depth: 32 };
    let psync = Job { engine: Engine::Psync, direct: false, depth: 1 };
    vec![
        Workload {
            name: "null-d32",
            title: "null node, depth 32",
            targets: vec![target(Iops, Qsd, AtLeast(5.0)), target(Cpu, Absolute, AtMost(200.0))],
            ..base.clone()
        },
        Workload {
            name: "null-d1",
            title: "null node, depth 1",
            depth: 1,
            poll_ns: LONG_POLL_NS,
            targets: vec![target(Iops, Qsd, AtLeast(3.0)), target(P50, Qsd, AtMost(0.6))],
            ..base.clone()
        },
        Workload {
            name: "cache-d32",
            title: "raw file in the page cache, depth 32, reads",
            backing: Backing::Cached,
            fio: vec![uring(false)],
            targets: vec![target(Iops, Qsd, AtLeast(1.6)), target(Iops, BestFio, AtLeast(0.9))],
            ..base.clone()
        },
        Workload {
            name: "cache-d1",
            title: "raw file in the page cache, depth 1, reads",
            backing: Backing::Cached,
            depth: 1,
            poll_ns: LONG_POLL_NS,
            fio: vec![psync.clone()],
            targets: vec![target(P50, Qsd, AtMost(0.6))],
            ..base.clone()
        },
        Workload {
            name: "tmpfs-read",
            title: "raw file in tmpfs, depth 32, reads",
            backing: Backing::Tmpfs,
            fio: vec![psync.clone(), uring(false)],
            targets: vec![target(Iops, BestFio, AtLeast(0.85))],
            ..base.clone()
        },
        Workload {
            name: "tmpfs-write",
            title: "raw file in tmpfs, depth 32, writes",
            backing: Backing::Tmpfs,
            rw: WRITE,
            fio: vec![psync, uring(false)],
            ..base.clone()
        },
        Workload {
            name: "direct-d32",
            title: "raw file with O_DIRECT, depth 32, reads",
            backing: Backing::Direct,
            fio: vec![uring(true)],
            targets: vec![target(Iops, BestFio, AtLeast(0.95))],
            ..base.clone()
        },
        Workload {
            name: "direct-d32-pinned",
            title: "raw file with O_DIRECT, depth 32, reads; ringblk with pin-memory=on",
            backing: Backing::Direct,
            pin_memory: true,
            fio: vec![uring(true)],
            targets: vec![target(Iops, BestFio, AtLeast(0.95)), target(Cpu, Qsd, AtMost(0.5))],
            ..base.clone()
        },
        Workload {
            name: "null-2q",
            title: "null node, two queues, depth 32 each",
            queues: 2,
            targets: vec![target(Iops, OneQueue, AtLeast(1.0))],
            ..base.clone()
        },
        Workload {
            name: "cache-2q",
            title: "raw file in the page cache, two queues, depth 32 each, reads",
            backing: Backing::Cached,
            queues: 2,
            targets: vec![target(Iops, OneQueue, AtLeast(1.0))],
            ..base.clone()
        },
        Workload {
            name: "filters-10",
            title: "raw file in the page cache below ten idle throttle nodes, depth 32, reads",
            backing: Backing::Cached,
            layout: Layout::Filters(10),
            targets: vec![target(Iops, OwnRaw, AtLeast(0.95))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-read",
            title: "qcow2, allocated, in the page cache, depth 32, reads",
            backing: Backing::Cached,
            layout: Layout::Allocated,
            targets: vec![target(Iops, OwnRaw, AtLeast(0.95))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-write",
            title: "qcow2, allocated, in the page cache, depth 32, writes",
            backing: Backing::Cached,
            layout: Layout::Allocated,
            rw: WRITE,
            targets: vec![target(Iops, OwnRaw, AtLeast(0.95))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-overlay",
            title: "empty overlay over an allocated qcow2, in the page cache, depth 32, reads",
            backing: Backing::Cached,
            layout: Layout::Chain(2),
            targets: vec![target(Iops, OwnRaw, AtLeast(0.92))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-chain",
            title: "chain of nine qcow2, data in the lowest, in the page cache, depth 32, reads",
            backing: Backing::Cached,
            layout: Layout::Chain(9),
            targets: vec![target(Iops, OwnRaw, AtLeast(0.85))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-fresh-tmpfs",
            title: "fresh qcow2 in tmpfs, depth 32, allocating writes one after the other",
            backing: Backing::Tmpfs,
            layout: Layout::Fresh,
            rw: APPEND,
            targets: vec![target(Iops, Qsd, AtLeast(2.0))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-fresh-direct",
            title: "fresh qcow2 with O_DIRECT, depth 32, allocating writes one after the other",
            backing: Backing::Direct,
            layout: Layout::Fresh,
            rw: APPEND,
            targets: vec![target(Iops, Qsd, AtLeast(1.3))],
            ..base.clone()
        },
        Workload {
            name: "qcow2-large",
            title: "qcow2 of 200 GiB, metadata preallocated, in the page cache, depth 32, reads",
            backing: Backing::Cached,
            layout: Layout::Large,
            targets: vec![target(Iops, Qsd, AtLeast(1.5))],
            ..base
        },
    ]
}
