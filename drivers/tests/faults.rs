//! What a file node does when its disk fails: the error arrives as it is, and a failed flush is not forgotten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::future::Future;

use common::registry;
use conformance::DriverCase;
use conformance::request::{Client, Way};
use conformance::session::{Session, fresh};
use graph::{Errno, NodeIo, ZeroFlags};
use host::Engine;
use host::sim::{self, Event, Faults, OpKind};
use serde_json::{Value, json};

fn run<F, Fut>(more: Value, faults: Faults, work: F)
where
    F: FnOnce(NodeIo) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    let case = DriverCase::new(
        "file",
        registry(),
        1 << 20,
        |dir| std::fs::write(dir.join("image"), vec![7; 1 << 20]).map_err(|e| e.to_string()),
        move |dir| {
            let mut options = json!({"driver": "file", "filename": dir.join("image").to_str().unwrap()});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            options
        },
    );
    let dir = fresh(&case).unwrap();
    let session = Session::open(&case, dir.path(), Engine::Auto, false).unwrap();
    let view = session.view().unwrap();
    sim::run(1, faults, move |local| work(view.io(&local))).unwrap();
}

fn syncs(e: &Event) -> bool {
    e.kind == OpKind::Sync
}

fn clients(io: &NodeIo) -> [Client; 2] {
    [Way::Driven, Way::Mapped].map(|way| Client { io: io.clone(), way })
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EOPNOTSUPP: i32 = 95;

#[test]
fn a_failed_flush_is_remembered() {
    run(json!({}), Faults::default().fail_nth(0, EIO, syncs), |io| async move {
        let [driven, mapped] = clients(&io);
        driven.write(0, &[1; 512], false).await.unwrap();
        assert_eq!(driven.flush().await, Err(Errno::EIO));
        // The kernel would say yes now; the data may be gone all the same.
        assert_eq!(driven.flush().await, Err(Errno::EIO));
        assert_eq!(mapped.flush().await, Err(Errno::EIO));
        // Reads and writes go on.
        driven.write(0, &[2; 512], false).await.unwrap();
        assert_eq!(driven.read(0, 512).await.unwrap(), [2; 512]);
    });
}

#[test]
fn a_failed_synchronous_write_counts_as_a_failed_flush() {
    let fua = |e: &Event| e.kind == OpKind::Write { dsync: true };
    run(json!({}), Faults::default().fail_nth(0, EIO, fua), |io| async move {
        let [driven, mapped] = clients(&io);
        driven.write(0, &[1; 512], false).await.unwrap();
        driven.flush().await.unwrap();
        assert_eq!(driven.write(512, &[1; 512], true).await, Err(Errno::EIO));
        assert_eq!(driven.flush().await, Err(Errno::EIO));
        assert_eq!(mapped.flush().await, Err(Errno::EIO));
    });
}

#[test]
fn the_same_for_zeroes_that_are_made_durable() {
    run(json!({}), Faults::default().fail_nth(0, EIO, syncs), |io| async move {
        let [driven, _] = clients(&io);
        assert_eq!(driven.zero(0, 4096, ZeroFlags::FUA).await, Err(Errno::EIO));
        assert_eq!(driven.flush().await, Err(Errno::EIO));
    });
}

#[test]
fn past_the_page_cache_a_failed_write_concerns_itself_alone() {
    let fua = |e: &Event| e.kind == OpKind::Write { dsync: true };
    run(json!({"cache": {"direct": true}}), Faults::default().fail_nth(0, EIO, fua), |io| async move {
        let [driven, _] = clients(&io);
        assert_eq!(driven.write(0, &[1; 4096], true).await, Err(Errno::EIO));
        driven.flush().await.unwrap();
    });
}

#[test]
fn ignored_flushes_reach_no_disk() {
    let faults = Faults { fail: Some(Box::new(|e| syncs(e).then_some(EIO))), ..Faults::default() };
    run(json!({"cache": {"no-flush": true}}), faults, |io| async move {
        for client in clients(&io) {
            client.flush().await.unwrap();
        }
    });
}

#[test]
fn a_full_disk_is_told_as_such() {
    let writes = |e: &Event| matches!(e.kind, OpKind::Write { .. });
    let full = move |e: &Event| writes(e).then_some(ENOSPC);
    run(json!({}), Faults { fail: Some(Box::new(full)), ..Faults::default() }, |io| async move {
        for client in clients(&io) {
            assert_eq!(client.write(0, &[1; 512], false).await, Err(Errno::ENOSPC));
            // Nothing was lost that had been acknowledged.
            client.flush().await.unwrap();
        }
    });
}

#[test]
fn zeroing_falls_back_step_by_step() {
    // No sort of fallocate: the graph writes zeroes, and NO_FALLBACK is told so.
    let lacking = |e: &Event| matches!(e.kind, OpKind::Fallocate { .. }).then_some(EOPNOTSUPP);
    let faults = Faults { fail: Some(Box::new(lacking)), ..Faults::default() };
    run(json!({"discard": "unmap"}), faults, |io| async move {
        let [driven, _] = clients(&io);
        let flags = ZeroFlags::MAY_UNMAP;
        assert_eq!(driven.zero(0, 4096, flags | ZeroFlags::NO_FALLBACK).await, Err(Errno::ENOTSUP));
        assert_eq!(driven.read(0, 4096).await.unwrap(), [7; 4096]);
        driven.zero(0, 4096, flags).await.unwrap();
        assert_eq!(driven.read(0, 8192).await.unwrap(), [[0; 4096], [7; 4096]].concat());
        // A discard that cannot be had is none.
        driven.discard(4096, 4096).await.unwrap();
        assert_eq!(driven.read(4096, 4096).await.unwrap(), [7; 4096]);
        // A real error is not taken for a missing feature.
    });
    let broken = |e: &Event| matches!(e.kind, OpKind::Fallocate { .. }).then_some(EIO);
    let faults = Faults { fail: Some(Box::new(broken)), ..Faults::default() };
    run(json!({"discard": "unmap"}), faults, |io| async move {
        let [driven, _] = clients(&io);
        assert_eq!(driven.zero(0, 4096, ZeroFlags::MAY_UNMAP).await, Err(Errno::EIO));
        assert_eq!(driven.discard(0, 4096).await, Err(Errno::EIO));
    });
}

#[test]
fn without_zero_range_a_hole_is_made_and_filled() {
    // FALLOC_FL_ZERO_RANGE, which tmpfs does not have.
    let lacking =
        |e: &Event| matches!(e.kind, OpKind::Fallocate { mode } if mode & 0x10 != 0).then_some(EOPNOTSUPP);
    let seen = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let faults = Faults {
        fail: Some(Box::new(lacking)),
        record: Some(std::rc::Rc::clone(&seen)),
        ..Faults::default()
    };
    run(json!({}), faults, |io| async move {
        let [driven, _] = clients(&io);
        driven.zero(4096, 4096, ZeroFlags::NO_FALLBACK).await.unwrap();
        driven.zero(8192, 4096, ZeroFlags::NO_FALLBACK).await.unwrap();
        assert_eq!(driven.read(4096, 12288).await.unwrap(), [vec![0; 8192], vec![7; 4096]].concat());
    });
    let modes: Vec<_> = seen
        .borrow()
        .iter()
        .filter_map(|r| match r.event.kind {
            OpKind::Fallocate { mode } => Some(mode),
            _ => None,
        })
        .collect();
    // Asked for once; then punched and allocated, twice.
    assert_eq!(modes, [0x10, 3, 0, 3, 0]);
}
