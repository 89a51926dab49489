//! The asynchronous path against a flat array, and what it makes of requests that do not fit the driver.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;

use host::IoVecs;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::control::testing::{add, graph, mem, record, run};
use crate::*;

/// Runs requests on a node as its user.
fn on<R, F, Fut>(graph: &Graph, node: &str, work: F) -> R
where
    R: Send + 'static,
    F: FnOnce(NodeIo) -> Fut + Send + 'static,
    Fut: Future<Output = R> + 'static,
{
    let options = RootOptions { granularity: 512, ..RootOptions::new("test", true) };
    let root = run(graph.attach(node, options, Rc::new(NoSource))).unwrap();
    let view = root.view().unwrap();
    let iothread = graph.iothread().unwrap();
    let result = run(iothread.call(move |local| work(view.io(&local)))).ok().unwrap();
    run(root.detach());
    result
}

fn node(options: Value) -> Graph {
    let g = graph();
    let mut all = json!({"driver": "mem", "node-name": "n", "size": 65536});
    all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    add(&g, all).unwrap();
    g
}

#[derive(Clone, Debug)]
enum Request {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let range = || (0u64..65536, 1u64..20000).prop_map(|(o, l)| (o, l.min(65536 - o)));
    let one = prop_oneof![
        range().prop_map(|(o, l)| Request::Read(o, l)),
        (range(), any::<u8>()).prop_map(|((o, l), b)| Request::Write(o, l, b)),
        (range(), any::<bool>()).prop_map(|((o, l), u)| Request::Zero(o, l, u)),
    ];
    proptest::collection::vec(one, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any range, any limits of the driver: what is read is what was written.
    #[test]
    fn any_range_works_over_any_limits(
        requests in requests(),
        align in prop_oneof![Just(1u32), Just(512), Just(4096)],
        max in prop_oneof![Just(0u64), Just(4096), Just(8192), Just(5000)],
        zeroes in any::<bool>(),
        zero_align in prop_oneof![Just(0u32), Just(2048), Just(16384)],
        max_zeroes in prop_oneof![Just(0u64), Just(20000)],
        detect in prop_oneof![Just("off"), Just("on")],
    ) {
        let g = node(json!({
            "align": align, "max-transfer": max - max % u64::from(align), "zeroes": zeroes,
            "zero-align": zero_align, "max-zeroes": max_zeroes, "detect-zeroes": detect, "discard": "unmap",
        }));
        let good = on(&g, "n", move |io| async move {
            let mut model = vec![0u8; 65536];
            for request in requests {
                match request {
                    Request::Read(o, l) => {
                        let bufs = IoVecs::from_vec(vec![0xee; l as usize]);
                        io.read(o, &bufs).await.map_err(|e| e.to_string())?;
                        if bufs.to_vec() != model[o as usize..(o + l) as usize] {
                            return Err(format!("wrong data at {o}+{l}"));
                        }
                    }
                    Request::Write(o, l, b) => {
                        // Zeroes are as likely as everything else together.
                        let b = if b < 128 { 0 } else { b };
                        io.write(o, &IoVecs::from_vec(vec![b; l as usize]), WriteFlags::FUA)
                            .await
                            .map_err(|e| e.to_string())?;
                        model[o as usize..(o + l) as usize].fill(b);
                    }
                    Request::Zero(o, l, unmap) => {
                        let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                        io.write_zeroes(o, l, flags).await.map_err(|e| e.to_string())?;
                        model[o as usize..(o + l) as usize].fill(0);
                    }
                }
            }
            let all = IoVecs::from_vec(vec![0; 65536]);
            io.read(0, &all).await.map_err(|e| e.to_string())?;
            if all.to_vec() == model { Ok(()) } else { Err("wrong data at the end".to_owned()) }
        });
        prop_assert_eq!(good, Ok(()));
    }
}

/// Small writes into one block at the same time, from two iothreads, the driver being slow: none is lost.
#[test]
fn neighbours_in_a_block_do_not_lose_each_others_data() {
    let g = node(json!({"align": 4096, "yields": 3}));
    let options = RootOptions::new("test", true);
    let root = run(g.attach("n", options, Rc::new(NoSource))).unwrap();
    let view = root.view().unwrap();
    let other = host::IoThread::start(host::IoThreadOptions::default()).unwrap();
    let both = [g.iothread().unwrap(), other];
    let calls: Vec<_> = both
        .iter()
        .zip(0u64..)
        .map(|(iothread, half)| {
            let view = view.clone();
            iothread.call(move |local| async move {
                let io = view.io(&local);
                let left = Rc::new(std::cell::Cell::new(0));
                for i in 0..64u64 {
                    let (io, left) = (io.clone(), left.clone());
                    left.set(left.get() + 1);
                    local.spawn(async move {
                        // Every eighth one covers a whole block of its own.
                        let at = (i * 2 + half) * 256;
                        let (at, len) =
                            if i % 8 == 0 { (65536 - 8192 + half * 4096, 4096) } else { (at, 256) };
                        let data = IoVecs::from_vec(vec![i as u8 + 1; len]);
                        io.write(at, &data, WriteFlags::empty()).await.unwrap();
                        left.set(left.get() - 1);
                    });
                }
                while left.get() > 0 {
                    local.yield_now().await;
                }
            })
        })
        .collect();
    for call in calls {
        run(call).ok().unwrap();
    }
    drop(view);
    run(root.detach());
    let data = on(&g, "n", |io| async move {
        let all = IoVecs::from_vec(vec![0; 32768]);
        io.read(0, &all).await.unwrap();
        all.to_vec()
    });
    for i in (0..64usize).filter(|i| i % 8 != 0) {
        for half in 0..2 {
            let at = (i * 2 + half) * 256;
            assert!(data[at..at + 256].iter().all(|b| *b == i as u8 + 1), "lost {i}/{half}");
        }
    }
    both[1].clone().stop();
}

#[test]
fn users_end_where_the_node_ends_and_parents_see_zeroes_beyond() {
    let g = graph();
    mem(&g, "n");
    let size = 1u64 << 20;
    let errors = on(&g, "n", move |io| async move {
        let buf = IoVecs::from_vec(vec![1; 512]);
        let mut errors = Vec::new();
        errors.push(io.read(size - 256, &buf).await.unwrap_err().errno());
        errors.push(io.write(size, &buf, WriteFlags::empty()).await.unwrap_err().errno());
        errors.push(io.write_zeroes(u64::MAX, 2, ZeroFlags::empty()).await.unwrap_err().errno());
        errors.push(io.discard(1, size).await.unwrap_err().errno());
        errors.push(io.child(0).read(0, &buf).await.unwrap_err().errno());
        let parent = io.clone().into_parent();
        io.write(size - 256, &buf.slice(0, 256), WriteFlags::empty()).await.unwrap();
        parent.read(size - 256, &buf).await.unwrap();
        assert!(buf.slice(256, 256).is_zero() && !buf.slice(0, 256).is_zero());
        parent.read(size + 4096, &buf).await.unwrap();
        assert!(buf.is_zero());
        errors
    });
    assert_eq!(errors, [Errno::EIO, Errno::EIO, Errno::EIO, Errno::EIO, Errno::ENODEV]);
}

#[test]
fn discards_are_dropped_unless_wanted_and_cut_to_blocks() {
    let g = node(json!({"align": 512}));
    on(&g, "n", |io| async move { io.discard(0, 4096).await.unwrap() });
    assert!(!record("n").io().iter().any(|l| l.starts_with('d')));
    let g = node(json!({"align": 512, "discard": "unmap"}));
    on(&g, "n", |io| async move {
        io.discard(100, 4096).await.unwrap();
        io.discard(10, 20).await.unwrap();
    });
    assert_eq!(record("n").io(), ["d 512 3584"]);
}

#[test]
fn zeroes_are_unmapped_only_where_discards_pass() {
    for (discard, unmap) in [("ignore", false), ("unmap", true)] {
        let g = node(json!({"zeroes": true, "discard": discard}));
        on(&g, "n", |io| async move { io.write_zeroes(0, 4096, ZeroFlags::MAY_UNMAP).await.unwrap() });
        assert_eq!(record("n").io(), [format!("z 0 4096 {unmap}")]);
    }
    let g = node(json!({}));
    let errno = on(&g, "n", |io| async move {
        io.write_zeroes(0, 4096, ZeroFlags::NO_FALLBACK).await.unwrap_err().errno()
    });
    assert_eq!(errno, Errno::ENOTSUP);
}

#[test]
fn fua_becomes_a_flush_where_the_driver_has_none() {
    for (fua, expected) in [(false, vec!["w 0 512", "f"]), (true, vec!["w 0 512"])] {
        let g = node(json!({"fua": fua}));
        on(&g, "n", |io| async move {
            io.write(0, &IoVecs::from_vec(vec![1; 512]), WriteFlags::FUA).await.unwrap();
        });
        assert_eq!(record("n").io(), expected);
    }
}

#[test]
fn a_failed_flush_is_remembered() {
    let g = node(json!({}));
    record("n").fail_flush.store(true, SeqCst);
    assert!(on(&g, "n", |io| async move { io.flush().await }).is_err());
    record("n").fail_flush.store(false, SeqCst);
    assert!(on(&g, "n", |io| async move { io.flush().await }).is_err());
    let view = g.state().view(g.node("n").unwrap().id(), Perm::ALL).unwrap();
    assert!(matches!(view.resolve(Op::Flush, 0, 0).target, Target::Error(Errno::EIO)));
    g.node("n").unwrap().clear_flush_error();
    assert!(on(&g, "n", |io| async move { io.flush().await }).is_ok());
    let g = node(json!({"cache": {"no-flush": true}}));
    record("n").fail_flush.store(true, SeqCst);
    assert!(on(&g, "n", |io| async move { io.flush().await }).is_ok());
}

#[test]
fn driven_requests_are_counted_at_every_node() {
    let g = graph();
    mem(&g, "disk");
    add(&g, json!({"driver": "filter", "node-name": "top", "file": "disk"})).unwrap();
    on(&g, "top", |io| async move {
        let buf = IoVecs::from_vec(vec![1; 4096]);
        io.write(8192, &buf, WriteFlags::empty()).await.unwrap();
        io.read(0, &buf).await.unwrap();
        io.flush().await.unwrap();
        assert!(io.read(1 << 20, &buf).await.is_err());
    });
    let stats = g.query_blockstats(true);
    for (name, failed) in [("top", 1), ("disk", 0)] {
        let s = &stats.iter().find(|s| s.node_name.as_deref() == Some(name)).unwrap().stats;
        assert_eq!((s.rd_operations, s.wr_operations, s.flush_operations), (1, 1, 1), "{name}");
        assert_eq!((s.rd_bytes, s.wr_bytes, s.failed_rd_operations), (4096, 4096, failed), "{name}");
        assert_eq!(s.wr_highest_offset, 12288);
        assert!(s.idle_time_ns.is_some() && s.rd_latency_histogram.is_some());
    }
}

#[test]
fn status_is_cut_to_what_was_asked() {
    let g = node(json!({"align": 4096}));
    on(&g, "n", |io| async move {
        let s = io.block_status(100, 1000).await.unwrap();
        assert_eq!((s.len, s.location), (1000, Some(Location::File { offset: 100 })));
        assert!(!s.flags.contains(StatusFlags::EOF));
        let s = io.block_status(60000, 1 << 20).await.unwrap();
        assert_eq!(s.len, 5536);
        assert!(s.flags.contains(StatusFlags::EOF));
        let s = io.block_status(1 << 20, 512).await.unwrap();
        assert!(s.flags.contains(StatusFlags::ZERO | StatusFlags::EOF));
    });
}
