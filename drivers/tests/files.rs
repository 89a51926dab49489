//! Files of odd length, sparse files, and what resizing leaves on the host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::registry;
use conformance::request::{Client, Way};
use conformance::session::{NODE, Session};
use conformance::{Discarded, DriverCase};
use graph::{Prealloc, StatusFlags, Truncate, ZeroFlags};
use host::Engine;
use serde_json::{Value, json};

fn case(more: Value) -> DriverCase {
    DriverCase::new(
        "file",
        registry(),
        1024,
        |_| Ok(()),
        move |dir| {
            let mut options = json!({"driver": "file", "filename": image(dir).to_str().unwrap()});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            options
        },
    )
}

fn image(dir: &Path) -> PathBuf {
    dir.join("image")
}

fn open(case: &DriverCase, dir: &Path) -> Session {
    Session::open(case, dir, Engine::Auto, false).unwrap()
}

#[test]
fn the_tail_of_an_odd_file_is_written_and_read_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(image(dir.path()), [7; 1000]).unwrap();
    let session = open(&case(json!({"discard": "unmap"})), dir.path());
    assert_eq!(session.node().unwrap().size(), 1024);
    session
        .on(1, |io| async move {
            for way in [Way::Driven, Way::Mapped] {
                let client = Client { io: io.clone(), way };
                let mut expected = vec![7; 488];
                expected.resize(512, 0);
                assert_eq!(client.read(512, 512).await.unwrap(), expected);
                assert_eq!(client.read(1000, 24).await.unwrap(), [0; 24]);
            }
            // Zeroes that end past the end of the file, by a hole: the file need not grow for that.
            let client = Client { io: io.clone(), way: Way::Driven };
            client.zero(900, 124, ZeroFlags::MAY_UNMAP).await.unwrap();
            assert_eq!(client.read(0, 1024).await.unwrap()[899..902], [7, 0, 0]);
            // The mapped write goes behind the driver's back; reads must find it all the same.
            let mapped = Client { io, way: Way::Mapped };
            mapped.write(1010, &[9; 10], false).await.unwrap();
            for client in [&client, &mapped] {
                let tail = client.read(1000, 24).await.unwrap();
                assert_eq!(tail, [&[0; 10][..], &[9; 10], &[0; 4]].concat());
            }
            assert!(client.read(1024, 1).await.is_err());
            Ok(())
        })
        .unwrap();
    session.close().unwrap();
    assert_eq!(std::fs::metadata(image(dir.path())).unwrap().len(), 1020);
}

#[test]
fn holes_are_seen_and_made() {
    const M: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(image(dir.path())).unwrap();
    file.set_len(4 * M).unwrap();
    let case = DriverCase { discarded: Discarded::Zeroes, ..case(json!({"discard": "unmap"})) };
    let session = open(&case, dir.path());
    session
        .on(0, |io| async move {
            let client = Client { io: io.clone(), way: Way::Driven };
            client.write(M, &vec![1; 2 * M as usize], false).await.unwrap();
            let mut extents = Vec::new();
            let mut at = 0;
            while at < 4 * M {
                let status = io.block_status(at, 4 * M - at).await.unwrap();
                extents.push((status.flags.contains(StatusFlags::DATA), status.len));
                at += status.len;
            }
            assert_eq!(extents, [(false, M), (true, 2 * M), (false, M)]);
            client.discard(M, M).await.unwrap();
            client.zero(2 * M, M / 2, ZeroFlags::MAY_UNMAP).await.unwrap();
            assert_eq!(
                client.read(M, 2 * M).await.unwrap(),
                [vec![0; 3 * M as usize / 2], vec![1; M as usize / 2]].concat()
            );
            Ok(())
        })
        .unwrap();
    let stats = session.node().unwrap().driver().info().driver_stats.unwrap();
    assert_eq!(stats["discard-nb-ok"], 1);
    assert_eq!(stats["discard-bytes-ok"], M);
    session.close().unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, M / 2);
}

#[test]
fn preallocation_takes_the_space_it_says() {
    const M: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    for (prealloc, blocks) in [(Prealloc::Off, 0), (Prealloc::Falloc, 2 * M), (Prealloc::Full, 2 * M)] {
        for direct in [false, true] {
            let file = std::fs::File::create(image(dir.path())).unwrap();
            file.set_len(M).unwrap();
            let session = open(&case(json!({"cache": {"direct": direct}})), dir.path());
            session.let_resize().unwrap();
            let how = Truncate { prealloc, ..Truncate::default() };
            session
                .on(0, move |io| async move {
                    io.truncate(3 * M, how).await.unwrap();
                    assert_eq!(io.size(), 3 * M);
                    let client = Client { io, way: Way::Driven };
                    assert!(client.read(0, 3 * M).await.unwrap().iter().all(|b| *b == 0));
                    Ok(())
                })
                .unwrap();
            session.close().unwrap();
            let meta = file.metadata().unwrap();
            assert_eq!((meta.len(), meta.blocks() * 512), (3 * M, blocks), "{prealloc:?} {direct}");
        }
    }
}

#[test]
fn preallocation_that_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::File::create(image(dir.path())).unwrap().set_len(8192).unwrap();
    let session = open(&case(json!({})), dir.path());
    session.let_resize().unwrap();
    session
        .on(0, |io| async move {
            for (size, prealloc, words) in [
                (4096, Prealloc::Full, "Preallocation can't be used for shrinking files"),
                (16384, Prealloc::Metadata, "Unsupported preallocation mode 'metadata'"),
            ] {
                let how = Truncate { prealloc, ..Truncate::default() };
                assert_eq!(io.truncate(size, how).await.unwrap_err().to_string(), words);
                assert_eq!(io.size(), 8192);
            }
            Ok(())
        })
        .unwrap();
    session.close().unwrap();
}

#[test]
fn a_device_keeps_its_size() {
    let Some(device) = common::LoopDevice::new(1 << 20) else { return };
    let options = json!({"driver": "host_device", "filename": device.path()});
    let case = DriverCase::new("host_device", registry(), 1 << 20, |_| Ok(()), move |_| options.clone());
    let session = open(&case, Path::new("/"));
    session.let_resize().unwrap();
    session
        .on(0, |io| async move {
            let truncate = |size, exact| {
                let io = io.clone();
                async move {
                    let how = Truncate { exact, ..Truncate::default() };
                    io.truncate(size, how).await.map_err(|e| e.to_string())
                }
            };
            assert_eq!(truncate(1 << 20, true).await, Ok(()));
            assert_eq!(truncate(4096, false).await, Ok(()));
            assert_eq!(truncate(4096, true).await, Err("Cannot resize device files".to_owned()));
            assert_eq!(truncate(2 << 20, false).await, Err("Cannot grow device files".to_owned()));
            assert_eq!(io.size(), 1 << 20);
            Ok(())
        })
        .unwrap();
    let error = host::exec::block_on(session.graph.block_resize(NODE, 2 << 20)).unwrap_err();
    assert_eq!(error.to_string(), "Cannot grow device files");
    session.close().unwrap();
}
