//! The engine over real files: content, holes, order, concatenation, pausing by drains, cancelling.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use graph::{Graph, Registry};
use host::exec::{MainExecutor, block_on};
use host::{IoThread, IoThreadOptions, IoVecs};
use proptest::prelude::*;
use serde_json::json;

use super::limit::{Limiter, SLICE_NS};
use super::sparse::{Span, spans};
use super::*;

struct Rig {
    graph: Graph,
    threads: Vec<IoThread>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new(threads: usize) -> Rig {
        Rig::with(threads, drivers::ALL.iter().copied())
    }

    fn with(threads: usize, drivers: impl Iterator<Item = graph::DriverDef>) -> Rig {
        let start = |i| {
            let options = IoThreadOptions { name: format!("copy{i}"), ..IoThreadOptions::default() };
            IoThread::start(options).unwrap()
        };
        let threads: Vec<_> = (0..threads).map(start).collect();
        let registry = Registry::new(drivers);
        let graph = Graph::new(registry, threads.first().cloned());
        Rig { graph, threads, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A raw image with this content, as a node of the same name.
    fn node(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).unwrap();
        self.open(name);
    }

    fn empty(&self, name: &str, size: u64) {
        fs::File::create(self.path(name)).unwrap().set_len(size).unwrap();
        self.open(name);
    }

    fn open(&self, name: &str) {
        let options = json!({
            "driver": "raw", "node-name": name, "discard": "unmap",
            "file": {"driver": "file", "filename": self.path(name), "discard": "unmap"},
        });
        block_on(self.graph.blockdev_add(options)).unwrap();
    }

    fn copy(&self, sources: &[&str], options: &CopyOptions) -> Result<CopyReport> {
        block_on(copy(&self.graph, sources, "to", &self.threads, options, &Control::new()))
    }

    fn content(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        block_on(self.graph.close_all());
        self.graph.set_iothread(None);
        self.threads.drain(..).for_each(IoThread::stop);
    }
}

fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() * 512
}

/// Data that differs from sector to sector.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + i % 7) as u8 ^ seed | 1).collect()
}

#[test]
fn data_arrives_and_holes_stay_holes() {
    for threads in [1, 2] {
        for ordered in [true, false] {
            let rig = Rig::new(threads);
            let mut data = pattern(8 << 20, 3);
            data[1 << 20..4 << 20].fill(0);
            data[5 << 20..(5 << 20) + 4096].fill(0);
            rig.node("from", &data);
            rig.empty("to", 8 << 20);
            let options = CopyOptions {
                ordered,
                target_zero: TargetZero::Yes,
                buffer: 256 << 10,
                ..CopyOptions::default()
            };
            let report = rig.copy(&["from"], &options).unwrap();
            assert_eq!(rig.content("to"), data);
            assert_eq!(report.written, (5 << 20) - 4096);
            assert_eq!(report.written + report.skipped + report.zeroed, 8 << 20);
            assert!(blocks(&rig.path("to")) <= (5 << 20) - 4096 + (64 << 10));
        }
    }
}

#[test]
fn what_the_target_had_is_overwritten_with_zeroes_too() {
    for target_zero in [TargetZero::No, TargetZero::Try] {
        let rig = Rig::new(2);
        let mut data = pattern(2 << 20, 9);
        data[64 << 10..1 << 20].fill(0);
        rig.node("from", &data);
        rig.node("to", &pattern(2 << 20, 77));
        rig.copy(&["from"], &CopyOptions { target_zero, ..CopyOptions::default() }).unwrap();
        assert_eq!(rig.content("to"), data);
    }
}

#[test]
fn without_sparseness_everything_is_allocated() {
    let rig = Rig::new(1);
    rig.empty("from", 1 << 20);
    rig.empty("to", 1 << 20);
    let options = CopyOptions { min_sparse: 0, target_zero: TargetZero::Yes, ..CopyOptions::default() };
    let report = rig.copy(&["from"], &options).unwrap();
    assert_eq!(report.written, 1 << 20);
    assert_eq!(blocks(&rig.path("to")), 1 << 20);
}

#[test]
fn several_sources_come_one_after_the_other() {
    let rig = Rig::new(2);
    let (a, b) = (pattern(100 * 512, 1), pattern(3 << 20, 2));
    rig.node("a", &a);
    rig.node("b", &b);
    rig.empty("to", (100 * 512) + (3 << 20) + 512);
    rig.copy(&["a", "b"], &CopyOptions::default()).unwrap();
    let mut both = a;
    both.extend(b);
    both.extend([0; 512]);
    assert!(rig.content("to") == both);
}

#[test]
fn a_target_that_is_too_small_is_refused_before_anything_is_written() {
    let rig = Rig::new(1);
    rig.node("from", &pattern(1 << 20, 1));
    rig.empty("to", 1 << 19);
    let e = rig.copy(&["from"], &CopyOptions::default()).unwrap_err();
    assert_eq!(e.to_string(), "output file is smaller than input file");
    assert!(rig.content("to").iter().all(|b| *b == 0));
}

#[test]
fn compression_is_refused_where_the_target_has_none() {
    let rig = Rig::new(1);
    rig.node("from", &pattern(1 << 20, 1));
    rig.empty("to", 1 << 20);
    let options = CopyOptions { compressed: true, buffer: 64 << 10, ..CopyOptions::default() };
    let e = rig.copy(&["from"], &options).unwrap_err();
    assert_eq!(e.errno(), Errno::ENOTSUP);
}

#[test]
fn salvage_leaves_out_what_cannot_be_read_and_says_so() {
    let rig = Rig::with(1, drivers::ALL.iter().copied().chain([bad::DEF]));
    rig.empty("to", bad::SIZE);
    block_on(rig.graph.blockdev_add(json!({"driver": "bad", "node-name": "from"}))).unwrap();
    let e = rig.copy(&["from"], &CopyOptions::default()).unwrap_err();
    assert_eq!(e.errno(), Errno::EIO);
    assert!(e.to_string().starts_with("error while reading at byte 0: "), "{e}");
    let options = CopyOptions { salvage: true, tasks: 1, ..CopyOptions::default() };
    let report = rig.copy(&["from"], &options).unwrap();
    let entry = |offset, len| Unreadable { offset, len, errno: Errno::EIO };
    // Two sectors side by side are one entry.
    assert_eq!(report.unreadable, [entry(512 * 10, 1024), entry(512 * 300, 512)]);
    assert_eq!(report.unreadable_bytes, 1536);
    let mut expected = vec![0x5a; bad::SIZE as usize];
    for sector in bad::SECTORS {
        expected[sector as usize * 512..][..512].fill(0);
    }
    assert!(rig.content("to") == expected);
}

/// A disk with bad sectors.
mod bad {
    use super::*;
    use graph::{
        BlockStatus, BoxFut, Driver, DriverDef, DriverKind, Limits, Map, NodeIo, Op, Opened, Roles,
        StatusFlags, WriteFlags,
    };

    pub const SIZE: u64 = 1 << 20;
    pub const SECTORS: [u64; 3] = [10, 11, 300];

    pub const DEF: DriverDef = DriverDef {
        name: "bad",
        kind: DriverKind::Protocol,
        schema: || schemars::Schema::default(),
        open: |_, _| Box::pin(std::future::ready(Ok(Opened::new(Bad)))),
        create: None,
    };

    struct Bad;

    impl Driver for Bad {
        fn map(&self, _: Op, _: u64, _: u64) -> Map<'_> {
            Map::Drive
        }
        fn size(&self) -> u64 {
            SIZE
        }
        fn limits(&self) -> Limits {
            Limits { request_alignment: 512, ..Limits::default() }
        }
        fn read<'a>(&'a self, _: &'a NodeIo, offset: u64, bufs: &'a IoVecs) -> BoxFut<'a, ()> {
            let hit = move |s: &u64| s * 512 < offset + bufs.len() as u64 && (s + 1) * 512 > offset;
            Box::pin(async move {
                if SECTORS.iter().any(hit) {
                    return Err(Errno::EIO.into());
                }
                bufs.fill(0x5a);
                Ok(())
            })
        }
        fn write<'a>(&'a self, _: &'a NodeIo, _: u64, _: &'a IoVecs, _: WriteFlags) -> BoxFut<'a, ()> {
            graph::not_supported()
        }
        fn flush<'a>(&'a self, _: &'a NodeIo) -> BoxFut<'a, ()> {
            Box::pin(std::future::ready(Ok(())))
        }
        // Its status cannot be told either: salvage goes on all the same.
        fn block_status<'a>(&'a self, _: &'a NodeIo, offset: u64, len: u64) -> BoxFut<'a, BlockStatus> {
            let flags = StatusFlags::DATA | StatusFlags::ALLOCATED;
            Box::pin(std::future::ready(if offset >= SIZE / 2 {
                Err(Errno::EIO.into())
            } else {
                Ok(BlockStatus { flags, len: len.min(SIZE / 2 - offset), location: None })
            }))
        }
        fn child_perm(&self, _: usize, _: Roles, _: Perm, _: Perm) -> (Perm, Perm) {
            (Perm::NONE, Perm::ALL)
        }
    }
}

#[test]
fn a_cancelled_copy_ends_and_leaves_no_user() {
    let rig = Rig::new(2);
    rig.node("from", &pattern(4 << 20, 1));
    rig.empty("to", 4 << 20);
    let control = Control::new();
    control.cancel();
    let options = CopyOptions::default();
    let e = block_on(copy(&rig.graph, &["from"], "to", &rig.threads, &options, &control)).unwrap_err();
    assert_eq!(e.errno(), Errno::ECANCELED);
    block_on(rig.graph.blockdev_del("from")).unwrap();
    block_on(rig.graph.blockdev_del("to")).unwrap();
}

#[test]
fn drains_stop_it_and_it_goes_on_afterwards() {
    let executor = MainExecutor::new().unwrap();
    let rig = Rig::new(2);
    let data = pattern(8 << 20, 5);
    rig.node("from", &data);
    rig.empty("to", 8 << 20);
    let control = Control::new();
    let (graph, threads, shared) = (rig.graph.clone(), rig.threads.clone(), Arc::clone(&control));
    let copying = std::rc::Rc::new(std::cell::Cell::new(true));
    let done = std::rc::Rc::clone(&copying);
    executor.spawn_local(async move {
        let options = CopyOptions { buffer: 64 << 10, tasks: 2, ..CopyOptions::default() };
        copy(&graph, &["from"], "to", &threads, &options, &shared).await.unwrap();
        done.set(false);
    });
    let (graph, watched) = (rig.graph.clone(), Arc::clone(&control));
    let drains = executor.block_on(async move {
        let mut drains = 0;
        while copying.get() {
            let name = if drains % 2 == 0 { "from" } else { "to" };
            let guard = graph.drain(name).await.unwrap();
            let before = watched.progress();
            // Nothing is in flight: nothing moves however long this takes.
            host::pool::run(std::thread::yield_now).await;
            assert_eq!(watched.progress(), before);
            drop(guard);
            drains += 1;
            host::pool::run(std::thread::yield_now).await;
        }
        drains
    });
    assert!(drains > 0);
    assert!(rig.content("to") == data);
}

#[test]
fn progress_ends_at_the_total() {
    let rig = Rig::new(2);
    let mut data = pattern(3 << 20, 5);
    data[1 << 20..2 << 20].fill(0);
    rig.node("from", &data);
    rig.empty("to", 3 << 20);
    let control = Control::new();
    let options = CopyOptions { target_zero: TargetZero::Yes, ..CopyOptions::default() };
    block_on(copy(&rig.graph, &["from"], "to", &rig.threads, &options, &control)).unwrap();
    assert_eq!(control.progress(), (3 << 20, 3 << 20));
}

#[test]
fn a_rate_is_kept_on_the_average() {
    let limiter = Limiter::default();
    let rate = 10_000_000;
    let (mut now, mut moved) = (5_000_000_000u64, 0u64);
    let start = now;
    while moved < 100_000_000 {
        match limiter.wait_ns(rate, now) {
            0 => {
                limiter.charge(2 << 20);
                moved += 2 << 20;
            }
            wait => now += wait,
        }
    }
    let ideal = moved * 100;
    assert!((now - start).abs_diff(ideal) <= 3 * SLICE_NS, "{} against {ideal}", now - start);
    assert_eq!(limiter.wait_ns(0, now), 0);
}

proptest! {
    #[test]
    fn spans_cover_the_buffer_and_zero_spans_are_zero(
        cells in proptest::collection::vec((any::<bool>(), 1usize..40), 1..12),
        sector in 0u64..64,
        min in 1usize..12,
        granule in prop_oneof![Just(512usize), Just(1024), Just(4096)],
    ) {
        let mut bytes = Vec::new();
        for (data, sectors) in &cells {
            bytes.extend(std::iter::repeat_n(u8::from(*data), sectors * 512));
        }
        let buffer = IoVecs::from_vec(bytes.clone());
        let found = spans(&buffer, sector * 512, min * 512, granule);
        let mut at = 0;
        for (i, Span { at: start, len, zero }) in found.iter().copied().enumerate() {
            prop_assert_eq!(start, at);
            prop_assert!(len > 0);
            at += len;
            if zero {
                prop_assert!(bytes[start..at].iter().all(|b| *b == 0));
                prop_assert!(len >= min * 512 || found.len() == 1);
                let aligned = |x: usize| (sector as usize * 512 + x).is_multiple_of(granule);
                prop_assert!(start == 0 || aligned(start));
                prop_assert!(at == bytes.len() || aligned(at));
            }
            if i > 0 {
                prop_assert!(found[i - 1].zero != zero);
            }
        }
        prop_assert_eq!(at, bytes.len());
    }
}
