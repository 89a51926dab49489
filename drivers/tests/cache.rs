//! The cache against models: several iothreads in the same blocks, what a crash would leave, a file or a swap node that
//! fails, and what it costs in memory and requests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use common::registry;
use conformance::DriverCase;
use conformance::request::{Client, Way, join_all};
use conformance::rng::Rng;
use conformance::session::{NODE, Session, fresh};
use graph::{Errno, NodeIo, Perm, RootOptions, ZeroFlags};
use host::Engine;
use host::exec::block_on;
use host::sim::{self, Event, Faults, OpKind};
use serde_json::{Value, json};

const SIZE: u64 = 1 << 20;
const SECTOR: u64 = 512;

fn case(more: Value) -> DriverCase {
    DriverCase::new(
        "cache",
        registry(),
        SIZE,
        |dir| {
            for (name, len) in [("image", SIZE), ("swap", SIZE / 2)] {
                std::fs::write(dir.join(name), vec![0; len as usize]).map_err(|e| e.to_string())?;
            }
            Ok(())
        },
        move |dir| {
            let file = |name: &str| json!({"driver": "file", "filename": dir.join(name).to_str().unwrap()});
            let mut options = json!({"driver": "cache", "mode": "writeback", "size": 256 << 10, "block-size": 4096,
                                     "discard": "unmap", "file": file("image")});
            let members = options.as_object_mut().unwrap();
            members.extend(more.as_object().unwrap().clone());
            if members.contains_key("swap") {
                members.insert("swap".into(), file("swap"));
            }
            options
        },
    )
}

fn stat(session: &Session, name: &str) -> u64 {
    let stats = session.node().unwrap().driver().info().driver_stats.unwrap();
    stats[name].as_u64().unwrap_or_else(|| panic!("{name} in {stats}"))
}

fn seeds() -> Vec<u64> {
    conformance::seeds()
}

/// A sector that says who wrote it.
fn stamped(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR as usize / 8)
}

/// What a sector says; `None` if it is torn.
fn stamp(sector: &[u8]) -> Option<u64> {
    let value = u64::from_le_bytes(sector[..8].try_into().unwrap());
    sector.chunks(8).all(|c| c == value.to_le_bytes()).then_some(value)
}

/// Every other sector is one task's: all of them meet in every block. Returns what the sectors of this task hold.
async fn own_sectors(io: NodeIo, task: u64, tasks: u64, seed: u64) -> Vec<(u64, u64)> {
    let mut rng = Rng::new(seed * 1000 + task);
    let client = Client { io, way: Way::Mapped };
    let count = SIZE / SECTOR / tasks;
    let mut model = vec![0u64; count as usize];
    for round in 1..700u64 {
        let nth = rng.below(count);
        let at = (nth * tasks + task) * SECTOR;
        match rng.below(20) {
            0..=9 => {
                let value = (task << 32) | round;
                client.write(at, &stamped(value), rng.one_in(8)).await.unwrap();
                model[nth as usize] = value;
            }
            10 => {
                client.zero(at, SECTOR, ZeroFlags::empty()).await.unwrap();
                model[nth as usize] = 0;
            }
            11 => client.flush().await.unwrap(),
            _ => {
                let data = client.read(at, SECTOR).await.unwrap();
                assert_eq!(stamp(&data), Some(model[nth as usize]), "sector {at}, RINGBLK_SEED={seed}");
            }
        }
    }
    model.iter().enumerate().map(|(nth, value)| ((nth as u64 * tasks + task) * SECTOR, *value)).collect()
}

#[test]
fn iothreads_that_meet_in_every_block_see_their_own_writes() {
    const TASKS: u64 = 8;
    for more in
        [json!({}), json!({"swap": "there"}), json!({"mode": "writethrough"}), json!({"reads": "bypass"})]
    {
        for seed in seeds() {
            let case = case(more.clone());
            let dir = fresh(&case).unwrap();
            let session = Session::open(&case, dir.path(), Engine::Auto, false).unwrap();
            let view = session.view().unwrap();
            let calls: Vec<_> = session
                .threads
                .iter()
                .zip(0u64..)
                .map(|(thread, nth)| {
                    let view = view.clone();
                    thread.call(move |local| {
                        let io = view.io(&local);
                        async move {
                            let mine = (0..TASKS).filter(|t| t % 2 == nth);
                            let tasks: Vec<_> =
                                mine.map(|t| own_sectors(io.clone(), t, TASKS, seed)).collect();
                            join_all(&io, tasks).await
                        }
                    })
                })
                .collect();
            let ended = calls.into_iter().flat_map(|c| block_on(c).expect("the thread runs"));
            let models: Vec<(u64, u64)> = ended.flat_map(|m| m.expect("no panic")).collect();
            assert_eq!(models.len() as u64, SIZE / SECTOR);
            assert!(stat(&session, "evictions") > 0, "more blocks than there is room for");
            drop(view);
            session.close().unwrap();
            // Closed means written: what is on disk is what everybody wrote last.
            let disk = std::fs::read(dir.path().join("image")).unwrap();
            for (at, value) in models {
                let found = stamp(&disk[at as usize..(at + SECTOR) as usize]);
                assert_eq!(found, Some(value), "sector {at}, {more}, RINGBLK_SEED={seed}");
            }
        }
    }
}

/// What a crash right now would leave is what is in the file: each sector whole, nothing older than the last flush.
#[test]
fn a_crash_loses_nothing_that_was_flushed_and_tears_no_sector() {
    for more in [json!({}), json!({"swap": "there", "size": 96 << 10})] {
        for seed in seeds() {
            let case = case(more.clone());
            let dir = fresh(&case).unwrap();
            let session = Session::open(&case, dir.path(), Engine::Auto, false).unwrap();
            let image = dir.path().join("image");
            session
                .on(1, move |io| async move {
                    let client = Client { io, way: Way::Mapped };
                    let mut rng = Rng::new(seed);
                    // What each sector may hold: its content at the last flush and everything since.
                    let mut may = vec![vec![0u64]; (SIZE / SECTOR) as usize];
                    for round in 1..1500u64 {
                        let first = rng.below(SIZE / SECTOR);
                        let count = (1 + rng.below(20)).min(SIZE / SECTOR - first);
                        let data: Vec<u8> = (0..count).flat_map(|_| stamped(round)).collect();
                        client.write(first * SECTOR, &data, false).await.map_err(|e| e.to_string())?;
                        may.iter_mut().skip(first as usize).take(count as usize).for_each(|m| m.push(round));
                        let flushed = rng.one_in(40);
                        if flushed {
                            client.flush().await.map_err(|e| e.to_string())?;
                            may.iter_mut().for_each(|m| m.drain(..m.len() - 1).for_each(drop));
                        }
                        if flushed || rng.one_in(100) {
                            check(&image, &may)
                                .map_err(|e| format!("{e}, round {round}, RINGBLK_SEED={seed}"))?;
                        }
                    }
                    Ok(())
                })
                .unwrap();
            session.close().unwrap();
        }
    }
}

fn check(image: &Path, may: &[Vec<u64>]) -> Result<(), String> {
    let disk = std::fs::read(image).map_err(|e| e.to_string())?;
    for (nth, sector) in disk.chunks(SECTOR as usize).enumerate() {
        match stamp(sector) {
            Some(value) if may[nth].contains(&value) => {}
            found => return Err(format!("sector {nth} holds {found:?}, may hold {:?}", may[nth])),
        }
    }
    Ok(())
}

#[test]
fn nothing_is_written_before_it_has_to_be_and_memory_is_bounded() {
    let case = case(json!({"size": 512 << 10}));
    let dir = fresh(&case).unwrap();
    let session = Session::open(&case, dir.path(), Engine::Auto, false).unwrap();
    let image = dir.path().join("image");
    let path = image.clone();
    session
        .on(0, move |io| async move {
            let client = Client { io, way: Way::Mapped };
            for at in (0..128 << 10).step_by(4096) {
                client.write(at, &[7; 4096], false).await.map_err(|e| e.to_string())?;
            }
            assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0), "not yet");
            client.flush().await.map_err(|e| e.to_string())?;
            assert!(std::fs::read(&path).unwrap()[..128 << 10].iter().all(|b| *b == 7), "now");
            for at in (0..SIZE).step_by(65536) {
                client.read(at, 65536).await.map_err(|e| e.to_string())?;
            }
            Ok(())
        })
        .unwrap();
    let resident = stat(&session, "resident-blocks");
    assert!(resident * (4096 + 256) <= 512 << 10, "{resident} blocks");
    assert!(resident > 64, "{resident} blocks: it is used");
    assert_eq!(stat(&session, "dirty-blocks"), 0);
    assert!(std::fs::read(&image).unwrap()[128 << 10..].iter().all(|b| *b == 0));
    session.close().unwrap();
}

/// Runs something on the simulated host.
fn simulate<F, Fut>(more: Value, faults: Faults, work: F)
where
    F: FnOnce(NodeIo) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    let case = case(more);
    let dir = fresh(&case).unwrap();
    let session = Session::open(&case, dir.path(), Engine::Auto, false).unwrap();
    let view = session.view().unwrap();
    sim::run(1, faults, move |local| work(view.io(&local))).unwrap();
}

fn is_write(e: &Event, name: &str) -> bool {
    matches!(e.kind, OpKind::Write { .. }) && e.path.ends_with(name)
}

#[test]
fn a_file_that_fails_costs_no_data() {
    let broken = Rc::new(Cell::new(true));
    let now = Rc::clone(&broken);
    let fail = move |e: &Event| (now.get() && is_write(e, "image")).then_some(5);
    simulate(json!({}), Faults { fail: Some(Box::new(fail)), ..Faults::default() }, |io| async move {
        let client = Client { io, way: Way::Driven };
        // More than there is room for: where no room can be made, writes fail, and only those.
        let mut taken = Vec::new();
        for block in 0..100u64 {
            if client.write(block * 4096, &[block as u8 + 1; 4096], false).await.is_ok() {
                taken.push(block);
            }
        }
        assert!(taken.len() > 30 && taken.len() < 100, "{}", taken.len());
        assert_eq!(client.flush().await, Err(Errno::EIO));
        assert_eq!(client.flush().await, Err(Errno::EIO), "still not written");
        for &block in &taken {
            assert_eq!(client.read(block * 4096, 4096).await.unwrap(), [block as u8 + 1; 4096], "{block}");
        }
        broken.set(false);
        client.flush().await.unwrap();
        // Others push them out; what comes back comes from the file.
        for block in 128..256u64 {
            client.read(block * 4096, 4096).await.unwrap();
        }
        for &block in &taken {
            assert_eq!(client.read(block * 4096, 4096).await.unwrap(), [block as u8 + 1; 4096], "{block}");
        }
    });
}

#[test]
fn a_swap_node_that_takes_nothing_is_done_without() {
    let fail = |e: &Event| is_write(e, "swap").then_some(28);
    let faults = Faults { fail: Some(Box::new(fail)), ..Faults::default() };
    simulate(json!({"swap": "there"}), faults, |io| async move {
        let client = Client { io, way: Way::Driven };
        for block in 0..200u64 {
            client.write(block * 4096, &[block as u8 + 1; 4096], false).await.unwrap();
        }
        client.flush().await.unwrap();
        for block in 0..200u64 {
            assert_eq!(client.read(block * 4096, 4096).await.unwrap(), [block as u8 + 1; 4096], "{block}");
        }
    });
}

#[test]
fn misses_at_the_same_time_become_one_read() {
    let record = Rc::new(RefCell::new(Vec::new()));
    let faults = Faults { record: Some(Rc::clone(&record)), ..Faults::default() };
    simulate(json!({}), faults, |io| async move {
        let tasks: Vec<_> = (0..8u64)
            .map(|nth| {
                let client = Client { io: io.clone(), way: Way::Driven };
                async move { client.read(nth * SECTOR, SECTOR).await.map(|d| d.len()) }
            })
            .collect();
        assert!(join_all(&io, tasks).await.into_iter().all(|r| r == Some(Ok(512))));
    });
    let reads = record.borrow().iter().filter(|r| r.event.path.ends_with("image")).count();
    assert_eq!(reads, 1, "one block");
}

#[test]
fn others_are_kept_away_from_what_is_cached_and_let_in_before() {
    let case = case(json!({}));
    let dir = fresh(&case).unwrap();
    let mut options = (case.options)(dir.path());
    options["file"]["node-name"] = json!("below");
    let named = DriverCase { options: Box::new(move |_| options.clone()), ..case };
    let mut session = Session::unused(&named, dir.path(), Engine::Auto, false).unwrap();
    let attach = |session: &Session, node: &str, writable: bool| {
        let perm = if writable { Perm::CONSISTENT_READ | Perm::WRITE } else { Perm::CONSISTENT_READ };
        let options = RootOptions { perm, shared: Perm::ALL, ..RootOptions::new("somebody", false) };
        block_on(session.graph.attach(node, options, Rc::new(graph::NoSource)))
    };
    // Made to be put above a node in use: nothing is held yet.
    let early = attach(&session, "below", true).expect("an empty cache is in nobody's way");
    block_on(early.detach());
    session.use_it(true).unwrap();
    assert_eq!(attach(&session, "below", true).unwrap_err().errno(), Errno::EPERM);
    session
        .on(0, |io| async move {
            Client { io, way: Way::Mapped }.write(0, &[1; 512], false).await.map_err(|e| e.to_string())
        })
        .unwrap();
    let refused = attach(&session, "below", false).unwrap_err();
    assert!(refused.to_string().contains(NODE), "who is in the way: {refused}");
    session.close().unwrap();
    assert_eq!(&std::fs::read(dir.path().join("image")).unwrap()[..512], [1; 512]);
}
