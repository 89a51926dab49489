//! Tests of commits on the simulated host: their order on disk, what a failure of any operation leaves behind, who joins
//! whom.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use host::sim::{Event, Faults, OpKind, Record};

use super::group::Group;
use super::*;
use crate::qcow2::alloc::FreeKind;
use crate::qcow2::alloc::tests::{Image, Open};
use crate::qcow2::format::{Header, Policy};

impl Commits {
    pub(crate) async fn flush_test(&self, tables: &Tables, space: &Space, file: &NodeIo) -> Result<()> {
        self.flush_parts(Parts { tables, space, file, data: None }).await
    }

    pub(crate) async fn close_test(&self, tables: &Tables, space: &Space, file: &NodeIo) -> Result<()> {
        self.close_parts(Parts { tables, space, file, data: None }).await
    }
}

fn quick() -> Faults {
    Faults { latency: 0..=100, ..Faults::default() }
}

/// Takes, links, unlinks and flushes; errors are let go by, as a guest's would be.
async fn workload(open: Rc<Open>) -> bool {
    let mut ok = true;
    for i in 0..30u64 {
        ok &= open.link(i % 11).await.is_ok();
        if i % 3 == 1 {
            open.unlink((i * 7) % 11);
        }
        if i % 4 == 3 {
            ok &= open.flush().await.is_ok();
        }
    }
    ok &= open.close().await.is_ok();
    ok
}

#[test]
fn any_operation_may_fail_and_at_worst_something_leaks() {
    for (cluster_bits, order, lazy) in [(9, 6, false), (9, 4, true), (12, 4, false)] {
        let mut nth = 0;
        loop {
            let mut image = Image::new(cluster_bits, order);
            image.lazy = lazy;
            let hit = Rc::new(Cell::new(None));
            let seen = Rc::clone(&hit);
            let faults = quick().fail_nth(nth, [5, 28][(nth % 2) as usize], move |e: &Event| {
                if e.kind != OpKind::Read && e.index >= nth {
                    seen.set(Some(e.clone().kind));
                }
                e.kind != OpKind::Read
            });
            let ok = image.run(nth, faults, |open| {
                // A replaced table is a leak of the test's own: unlink first.
                async move { workload(open).await }
            });
            if lazy && header_of(&image).dirty() {
                // Left to be repaired, which the bit says.
                image.repair();
            }
            let Some((corruptions, leaks)) = image.check() else { return };
            assert_eq!(corruptions, 0, "operation {nth} of 2^{cluster_bits}, order {order}, lazy {lazy}");
            if hit.take().is_none() {
                assert!(ok);
                assert_eq!(leaks, leaks_of_workload(cluster_bits, order));
                break;
            }
            nth += 1;
        }
        assert!(nth > 30, "{nth} operations");
    }
}

fn header_of(image: &Image) -> Header {
    Header::parse(&std::fs::read(image.path()).unwrap(), Policy::default()).unwrap()
}

/// `workload` overwrites links without freeing them first; those clusters leak by its own doing.
fn leaks_of_workload(cluster_bits: u32, order: u32) -> u64 {
    let image = Image::new(cluster_bits, order);
    image.run(0, quick(), |open| async move { workload(open).await });
    image.check().map_or(0, |(_, leaks)| leaks)
}

/// Writes and syncs of a run, by what they touch: "refs", "l1", "head", "sync".
fn story(records: &[Record], refs: std::ops::Range<u64>, l1: std::ops::Range<u64>) -> Vec<&'static str> {
    let mut out: Vec<&'static str> = Vec::new();
    for r in records {
        let word = match r.event.kind {
            OpKind::Sync => "sync",
            OpKind::Write { .. } if refs.contains(&r.event.offset) => "refs",
            OpKind::Write { .. } if l1.contains(&r.event.offset) => "l1",
            OpKind::Write { .. } if r.event.offset == 0 => "head",
            _ => continue,
        };
        if out.last() != Some(&word) || word == "sync" {
            out.push(word);
        }
    }
    out
}

fn recorded<F, Fut>(lazy: bool, work: F) -> Vec<&'static str>
where
    F: FnOnce(Rc<Open>) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    let mut image = Image::new(16, 4);
    image.lazy = lazy;
    let log = Rc::new(RefCell::new(Vec::new()));
    let faults = Faults { record: Some(Rc::clone(&log)), ..Faults::default() };
    image.run(3, faults, work);
    let log = log.borrow();
    story(&log, 0x2_0000..0x3_0000, 0x3_0000..0x4_0000)
}

#[test]
fn counts_then_barrier_then_pointers_then_barrier() {
    let order = recorded(false, |open| async move {
        open.flush().await.unwrap();
        for i in 0..20 {
            open.link(i).await.unwrap();
        }
        open.flush().await.unwrap();
        open.flush().await.unwrap();
    });
    assert_eq!(order, ["sync", "refs", "sync", "l1", "sync", "sync"]);
}

#[test]
fn the_dirty_bit_stands_in_for_the_counts_and_goes_at_close() {
    let order = recorded(true, |open| async move {
        open.link(0).await.unwrap();
        open.flush().await.unwrap();
        assert!(open.header.header().dirty());
        open.link(1).await.unwrap();
        open.flush().await.unwrap();
        open.close().await.unwrap();
        assert!(!open.header.header().dirty());
    });
    // The close flushes first: nothing is dirty then.
    let expected =
        ["head", "sync", "l1", "sync", "sync", "l1", "sync", "sync", "refs", "sync", "head", "sync"];
    assert_eq!(order, expected);
}

#[test]
fn counts_go_down_a_commit_after_the_pointer() {
    let order = recorded(false, |open| async move {
        open.link(0).await.unwrap();
        open.flush().await.unwrap();
        open.unlink(0);
        open.flush().await.unwrap();
        open.flush().await.unwrap();
        open.flush().await.unwrap();
    });
    // The third flush has the count alone: one barrier. The fourth has nothing.
    assert_eq!(order, ["refs", "sync", "l1", "sync", "sync", "l1", "sync", "refs", "sync", "sync"]);
}

#[test]
fn a_failed_barrier_stops_the_image_for_good() {
    let image = Image::new(16, 4);
    let faults = quick().fail_nth(0, 5, |e: &Event| e.kind == OpKind::Sync);
    image.run(1, faults, |open| async move {
        open.link(0).await.unwrap();
        assert!(open.flush().await.is_err());
        assert!(open.flush().await.is_err());
        assert!(open.link(1).await.is_err());
        assert!(open.close().await.is_err());
    });
    // No sign of damage: the disk may be all right.
    assert!(!Header::parse(&std::fs::read(image.path()).unwrap(), Policy::default()).unwrap().corrupt());
    if let Some((corruptions, _)) = image.check() {
        assert_eq!(corruptions, 0);
    }
}

#[test]
fn a_failed_write_of_pointers_is_tried_again() {
    let image = Image::new(16, 4);
    let l1 = |e: &Event| matches!(e.kind, OpKind::Write { .. }) && (0x3_0000..0x4_0000).contains(&e.offset);
    image.run(1, quick().fail_nth(0, 5, l1), |open| async move {
        open.link(0).await.unwrap();
        open.space.free_later(0x1_0000 * 4, 0, FreeKind::Other);
        assert!(open.flush().await.is_err());
        open.flush().await.unwrap();
        open.close().await.unwrap();
    });
    if let Some(clean) = image.check() {
        assert_eq!(clean, (0, 0));
    }
}

#[test]
fn names_in_the_header_change_without_a_moment_of_nonsense() {
    let image = Image::new(16, 4);
    let log = Rc::new(RefCell::new(Vec::new()));
    let before = std::fs::read(image.path()).unwrap();
    let faults = Faults { record: Some(Rc::clone(&log)), ..quick() };
    image.run(1, faults, |open| async move {
        for name in ["base.qcow2", "a much longer name of a backing file.img", ""] {
            let change = |h: &mut Header| {
                h.backing_file = (!name.is_empty()).then(|| name.as_bytes().to_vec());
                h.backing_format = (!name.is_empty()).then(|| b"raw".to_vec());
            };
            open.header.rewrite(&open.file, change).await.unwrap();
        }
    });
    // Every prefix, sector by sector in both orders, is a header with one of the names.
    let mut disk = before;
    for record in log.borrow().iter().filter(|r| matches!(r.event.kind, OpKind::Write { .. })) {
        let sectors: Vec<_> = record.data.chunks(512).enumerate().collect();
        for backwards in [true, false] {
            let mut torn = disk.clone();
            let order: Vec<_> =
                if backwards { sectors.iter().rev().collect() } else { sectors.iter().collect() };
            for (i, sector) in order {
                let at = record.event.offset as usize + i * 512;
                torn[at..at + sector.len()].copy_from_slice(sector);
                let header = Header::parse(&torn, Policy::default()).unwrap();
                let name = header.backing_file.clone().unwrap_or_default();
                assert!(
                    ["", "base.qcow2", "a much longer name of a backing file.img"]
                        .contains(&std::str::from_utf8(&name).unwrap())
                );
                assert_eq!(header.backing_format.is_some(), !name.is_empty());
            }
        }
        let at = record.event.offset as usize;
        disk[at..at + record.data.len()].copy_from_slice(&record.data);
    }
    assert_eq!(disk[..65536], std::fs::read(image.path()).unwrap()[..65536]);
}

#[test]
fn flushes_join_the_run_that_begins_after_them() {
    let group = Rc::new(Group::default());
    let runs = Rc::new(Cell::new(0));
    let served = Rc::new(Cell::new(0));
    host::sim::run(1, Faults::default(), |local| async move {
        for _ in 0..10 {
            let (group, runs, served, local2) =
                (Rc::clone(&group), Rc::clone(&runs), Rc::clone(&served), local.clone());
            local.spawn(async move {
                let result = group
                    .join(|| async {
                        runs.set(runs.get() + 1);
                        local2.sleep(1000).await;
                        if runs.get() == 2 { Err(graph::Errno::EIO.into()) } else { Ok(()) }
                    })
                    .await;
                served.set(served.get() + 1);
                // The first leads alone; the nine others share the second.
                assert_eq!(result.is_err(), served.get() > 1);
            });
        }
        local.sleep(100_000).await;
        assert_eq!((runs.get(), served.get()), (2, 10));
        assert!(!group.is_running());
    })
    .unwrap();
}
