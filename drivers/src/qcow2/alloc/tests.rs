//! Tests of the allocator on small images in a directory, on the simulated host; `qemu-img check` judges what is left.
//! [`Image`] is used by the tests of `commit` as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use conformance::DriverCase;
use conformance::session::Session;
use graph::{Epochs, Errno, NodeIo, Perm, Registry, RootOptions};
use host::Engine;
use host::sim::{self, Faults, OpKind};
use serde_json::json;

use super::free::FreeMap;
use super::*;
use crate::qcow2::commit::{Commits, HeaderIo, Health};
use crate::qcow2::format::{COPIED, Header, Policy, refcount};
use crate::qcow2::table::Tables;

/// An image file with an empty disk.
pub(crate) struct Image {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) lazy: bool,
}

/// An open one, without the node.
pub(crate) struct Open {
    pub(crate) file: NodeIo,
    pub(crate) space: Space,
    pub(crate) tables: Tables,
    pub(crate) commits: Commits,
    pub(crate) header: Arc<HeaderIo>,
}

impl Image {
    /// Header, refcount table, one block, L1 table of one cluster, as QEMU lays them out.
    pub(crate) fn new(cluster_bits: u32, order: u32) -> Image {
        let geo = Geometry::new(cluster_bits, order, false, true, false).unwrap();
        let size = geo.cluster_size() as usize;
        let entries = (geo.cluster_size() / 8).min(1 << 12);
        let mut header = Header::new(3, geo, entries << geo.l1_shift());
        (header.reftable_offset, header.reftable_clusters) = (size as u64, 1);
        (header.l1_offset, header.l1_size) = (3 * size as u64, entries as u32);
        let mut bytes = header.serialise().unwrap();
        bytes.resize(4 * size, 0);
        bytes[size..size + 8].copy_from_slice(&(2 * size as u64).to_be_bytes());
        for cluster in 0..4 {
            refcount::set(&mut bytes[2 * size..3 * size], order, cluster, 1);
        }
        let image = Image { dir: tempfile::tempdir().unwrap(), lazy: false };
        std::fs::write(image.path(), bytes).unwrap();
        image
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// Opens it for one simulated run.
    pub(crate) fn run<R, F, Fut>(&self, seed: u64, faults: Faults, work: F) -> R
    where
        R: 'static,
        F: FnOnce(Rc<Open>) -> Fut,
        Fut: Future<Output = R> + 'static,
    {
        let lazy = self.lazy;
        let case = DriverCase::new(
            "qcow2-file",
            Registry::new(crate::ALL.iter().copied()),
            1 << 20,
            |_| Ok(()),
            |dir| {
                json!({"driver": "raw", "discard": "unmap",
                       "file": {"driver": "file", "filename": dir.join("image").to_str().unwrap()}})
            },
        );
        let mut session = Session::unused(&case, self.dir.path(), Engine::Auto, false).unwrap();
        // As a format does: it writes past the end of its file.
        let mut user = RootOptions::new("the format", true);
        user.perm |= Perm::RESIZE;
        session.use_as(user).unwrap();
        let view = session.view().unwrap();
        let bytes = std::fs::read(self.path()).unwrap();
        sim::run(seed, faults, move |local| {
            // The child: what a parent may do to it.
            let file = view.io(&local).child(0);
            work(Rc::new(open(file, &bytes, lazy)))
        })
        .unwrap()
    }

    /// Corruptions, leaks by `qemu-img check`; `None` without the tool.
    pub(crate) fn check(&self) -> Option<(u64, u64)> {
        let path = self.path();
        let output = std::process::Command::new("qemu-img")
            .args(["check", "-f", "qcow2", "--output=json", path.to_str().unwrap()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else {
            panic!("qemu-img check: {}", String::from_utf8_lossy(&output.stderr));
        };
        let n = |k: &str| json.get(k).and_then(serde_json::Value::as_u64).unwrap_or(0);
        assert_eq!(n("check-errors"), 0, "{text}");
        Some((n("corruptions"), n("leaks")))
    }

    /// `qemu-img check -r all`.
    pub(crate) fn repair(&self) {
        let path = self.path();
        let args = ["check", "-q", "-r", "all", "-f", "qcow2", path.to_str().unwrap()];
        let _ = std::process::Command::new("qemu-img").args(args).output();
    }

    /// The refcount of every cluster of the file, as on disk.
    fn counts(&self) -> Vec<u64> {
        let bytes = std::fs::read(self.path()).unwrap();
        let header = Header::parse(&bytes, Policy::default()).unwrap();
        let geo = header.geometry();
        let be = |at: usize| {
            bytes.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap())) as usize
        };
        let clusters = bytes.len().div_ceil(geo.cluster_size() as usize);
        let count = |c: usize| {
            let index = geo.reftable_index(c as u64) as usize;
            if index as u64 * 8 >= header.reftable_bytes() {
                return 0;
            }
            let block = be(header.reftable_offset as usize + index * 8);
            let Some(data) = bytes.get(block..block + geo.cluster_size() as usize) else { return 0 };
            if block == 0 {
                return 0;
            }
            refcount::get(data, geo.refcount_order(), geo.refblock_index(c as u64) as usize)
        };
        (0..clusters).map(count).collect()
    }
}

fn open(file: NodeIo, bytes: &[u8], lazy: bool) -> Open {
    let header = Header::parse(bytes, Policy { writable: true, ..Policy::default() }).unwrap();
    let geo = header.geometry();
    let words = |at: u64, n: u64| -> Vec<u64> {
        let b = &bytes[at as usize..(at + n * 8) as usize];
        b.chunks_exact(8).map(|c| u64::from_be_bytes(c.try_into().unwrap())).collect()
    };
    let health = Arc::new(Health::new(true, Box::new(|_, _, _, _| {})));
    let config = SpaceConfig {
        geometry: geo,
        reftable: words(header.reftable_offset, header.reftable_bytes() / 8),
        reftable_offset: header.reftable_offset,
        reftable_clusters: header.reftable_clusters,
        cache_bytes: 0,
        pass_discard: PassDiscard { request: true, snapshot: true, other: false },
        guarded: Kinds::ALL,
        lazy,
    };
    let l1 = words(header.l1_offset, header.l1_size.into());
    let tables = Tables::new(geo, header.l1_offset, &l1, 1 << 20, 4096, 512);
    let first = bytes[..geo.cluster_size() as usize].to_vec();
    let header = Arc::new(HeaderIo::new(header, first, Arc::clone(&health)));
    let epochs = Arc::new(Epochs::default());
    let space = Space::new(config, epochs, Arc::clone(&health), Arc::clone(&header));
    let commits = Commits::new(health, Arc::clone(&header), true);
    Open { file, space, tables, commits, header }
}

impl Open {
    pub(crate) async fn flush(&self) -> graph::Result<()> {
        self.commits.flush_test(&self.tables, &self.space, &self.file).await
    }

    pub(crate) async fn close(&self) -> graph::Result<()> {
        self.commits.close_test(&self.tables, &self.space, &self.file).await
    }

    /// Allocates an L2 table and puts it into the L1 table.
    pub(crate) async fn link(&self, index: u64) -> graph::Result<u64> {
        let extent = self.space.alloc_in(&self.file, 1, true).await?;
        if !extent.zero {
            let zeroes = host::IoVecs::alloc(self.space.geo.cluster_size() as usize, 512)?;
            if let Err(e) = self.file.write(extent.offset, &zeroes, graph::WriteFlags::empty()).await {
                self.space.give_back(extent.offset, self.space.geo.cluster_size());
                return Err(e);
            }
        }
        self.tables.set_l1(index, extent.offset | COPIED);
        Ok(extent.offset)
    }

    /// Takes it out again.
    pub(crate) fn unlink(&self, index: u64) {
        let offset = self.tables.l1(index) & !COPIED;
        self.tables.set_l1(index, 0);
        if offset != 0 {
            self.space.free_later(offset, self.space.geo.cluster_size(), FreeKind::Request);
        }
    }
}

#[test]
fn free_runs_merge_split_and_are_found_by_length() {
    let mut free = FreeMap::default();
    free.add(10, 5);
    free.add(20, 2);
    free.add(15, 5);
    assert_eq!(free.longest(), Some((10, 12)));
    assert_eq!(free.total(), 12);
    free.remove(12, 14);
    assert_eq!((free.best(1), free.best(2), free.best(3)), (Some(10), Some(10), Some(14)));
    assert_eq!(free.best(9), None);
    assert_eq!(free.ending_at(22), Some(14));
    assert!(free.contains(11) && !free.contains(12) && !free.contains(22));
    free.remove(0, 100);
    assert_eq!((free.total(), free.longest(), free.shortest()), (0, None, None));
}

#[test]
fn metadata_is_known_by_cluster_and_kind() {
    let mut map = MetaMap::new(9);
    map.add(Kind::ActiveL2, 512 * 10, 1024);
    map.add(Kind::RefcountBlock, 512 * 8191, 1024);
    assert_eq!(map.overlap(0, 512 * 10, Kinds::ALL), None);
    assert_eq!(map.overlap(512 * 11 + 511, 1, Kinds::ALL), Some(Kind::ActiveL2));
    assert_eq!(map.overlap(512 * 12, 512 * 8179, Kinds::ALL), None);
    assert_eq!(map.overlap(512 * 12, 512 * 8179 + 1, Kinds::ALL), Some(Kind::RefcountBlock));
    assert_eq!(map.overlap(512 * 8192, 1, Kinds::ALL), Some(Kind::RefcountBlock));
    // Two of a kind, and each of them can be left out.
    map.add(Kind::ActiveL1, 512 * 10, 512);
    for (kind, other) in [(Kind::ActiveL1, Kind::ActiveL2), (Kind::ActiveL2, Kind::ActiveL1)] {
        assert_eq!(map.overlap(512 * 10, 1, Kinds::ALL.with(other, false)), Some(kind));
        assert_eq!(map.overlap(512 * 10, 1, Kinds::of(&[other])), Some(other));
    }
    assert_eq!(
        map.overlap(512 * 10, 1, Kinds::ALL.without(Kinds::of(&[Kind::ActiveL1, Kind::ActiveL2]))),
        None
    );
    assert_eq!(map.overlap(512 * 11, 512, Kinds::of(&[Kind::ActiveL1])), None);
    map.remove(512 * 10, 1024);
    assert_eq!(map.overlap(0, 512 * 8191, Kinds::ALL), None);
}

#[test]
fn every_width_and_size_grows_blocks_and_tables() {
    for (cluster_bits, order, clusters) in [
        (9, 6, 5000),
        (9, 0, 9000),
        (9, 4, 20000),
        (10, 5, 9000),
        (12, 3, 5000),
        (12, 1, 17000),
        (16, 4, 40000),
    ] {
        let image = Image::new(cluster_bits, order);
        let got = image.run(1, Faults { latency: 0..=100, ..Faults::default() }, move |open| async move {
            let mut got = BTreeSet::new();
            let mut n = 0;
            while n < clusters {
                let extent = open.space.alloc_in(&open.file, 37, n % 2 == 0).await.unwrap();
                for c in 0..extent.clusters {
                    assert!(got.insert((extent.offset >> cluster_bits) + c), "handed out twice");
                }
                n += extent.clusters;
            }
            open.flush().await.unwrap();
            // All are on disk, and the cache has room for four.
            for cluster in &got {
                open.space.refcount(&open.file, cluster << cluster_bits).await.unwrap();
            }
            assert!(lock(&open.space.state).blocks.loaded() <= 5);
            open.close().await.unwrap();
            got
        });
        let counts = image.counts();
        for cluster in &got {
            assert_eq!(counts[*cluster as usize], 1, "2^{cluster_bits} order {order}: {cluster}");
        }
        if let Some((corruptions, leaks)) = image.check() {
            assert_eq!(corruptions, 0, "2^{cluster_bits} order {order}");
            assert_eq!(leaks, got.len() as u64, "nothing but what was taken: 2^{cluster_bits} order {order}");
        }
        let last = got.last().unwrap();
        assert!(counts.len() as u64 <= last + 200, "the file was cut at close");
    }
}

#[test]
fn what_was_freed_comes_back_after_a_commit_and_not_before() {
    let image = Image::new(16, 4);
    image.run(1, Faults::default(), |open| async move {
        let a = open.link(0).await.unwrap();
        open.flush().await.unwrap();
        // As if a request were looking at it.
        open.unlink(0);
        let mut seen = BTreeSet::new();
        for _ in 0..40 {
            seen.insert(open.space.alloc_in(&open.file, 1, true).await.unwrap().offset);
        }
        assert!(!seen.contains(&a), "still on disk");
        assert_eq!(open.space.refcount(&open.file, a).await.unwrap(), 1);
        open.flush().await.unwrap();
        open.space.release(&open.file).await.unwrap();
        assert_eq!(open.space.refcount(&open.file, a).await.unwrap(), 0);
        assert!(lock(&open.space.state).free.contains(a >> 16));
    });
}

#[test]
fn sharing_fails_as_a_whole_where_a_count_is_full() {
    let image = Image::new(12, 1);
    image.run(1, Faults::default(), |open| async move {
        let e = open.space.alloc_in(&open.file, 4, true).await.unwrap();
        let one = (e.offset + 2 * 4096, 4096);
        open.space.add_refs(&open.file, &[one, one]).await.unwrap();
        assert_eq!(open.space.refcount(&open.file, one.0).await.unwrap(), 3);
        let refused = open.space.add_refs(&open.file, &[(e.offset, 4 * 4096)]).await;
        assert_eq!(refused.unwrap_err().errno(), Errno::EINVAL);
        for i in [0, 1, 3] {
            assert_eq!(open.space.refcount(&open.file, e.offset + i * 4096).await.unwrap(), 1);
        }
        assert!(open.commits.is_fine());
        // A reference to what is free is damage.
        let far = e.offset + (2000 << 12);
        assert!(open.space.add_refs(&open.file, &[(far, 4096)]).await.is_err());
        assert!(!open.commits.is_fine());
    });
    let Some((corruptions, _)) = image.check() else { return };
    assert_eq!(corruptions, 0);
}

#[test]
fn compressed_pieces_share_clusters_and_count_in_each() {
    let image = Image::new(12, 2);
    image.run(1, Faults::default(), |open| async move {
        let mut at = Vec::new();
        for n in [1000, 3000, 500, 4096, 1, 4000] {
            let offset = open.space.alloc_bytes_in(&open.file, n).await.unwrap();
            let clash = at.iter().any(|(o, l)| *o < offset + n && offset < *o + *l);
            assert!(!clash, "{offset} {n} in {at:?}");
            at.push((offset, n));
        }
        let counted = |cluster: u64| {
            at.iter().filter(|(o, n)| o >> 12 <= cluster && (o + n - 1) >> 12 >= cluster).count() as u64
        };
        for (offset, n) in &at {
            for cluster in offset >> 12..=(offset + n - 1) >> 12 {
                let count = open.space.refcount(&open.file, cluster << 12).await.unwrap();
                assert_eq!(count, counted(cluster), "cluster {cluster}");
            }
        }
        // All gone: nothing of it stays, and the next piece starts afresh.
        for (offset, n) in &at {
            open.space.give_back(*offset, *n);
        }
        open.space.release(&open.file).await.unwrap();
        for (offset, n) in &at {
            assert_eq!(open.space.refcount(&open.file, *offset).await.unwrap(), 0);
            assert_eq!(open.space.refcount(&open.file, offset + n - 1).await.unwrap(), 0);
        }
        open.close().await.unwrap();
    });
    if let Some(clean) = image.check() {
        assert_eq!(clean, (0, 0));
    }
}

#[test]
fn fresh_clusters_read_as_zeroes_and_come_without_waiting() {
    let image = Image::new(16, 4);
    image.run(1, Faults::default(), |open| async move {
        assert_eq!(open.space.try_fresh(1), None, "nothing set aside");
        let first = open.space.alloc_in(&open.file, 1, true).await.unwrap();
        assert!(first.zero);
        let mut next = first.offset;
        while let Some(offset) = open.space.try_fresh(1) {
            assert_eq!(offset, next + 65536, "in a row");
            next = offset;
            let data = host::IoVecs::alloc(65536, 512).unwrap();
            data.fill(1);
            open.file.read(offset, &data).await.unwrap();
            assert!(data.is_zero());
        }
        assert_eq!(next, first.offset + (1 << 20) - 65536, "a reservation of 1 MiB");
    });
}

#[test]
fn large_pieces_lie_in_holes_of_a_longer_file() {
    let image = Image::new(16, 4);
    let zero = image.run(1, Faults::default(), |open| async move {
        let mut zero = true;
        for _ in 0..64 {
            let extent = open.space.alloc_in(&open.file, 8, true).await.unwrap();
            zero &= extent.zero;
        }
        zero
    });
    assert!(zero, "nothing was ever written there");
    let bytes = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(image.path()).unwrap()) * 512;
    assert!(bytes < 4 << 20, "{bytes} bytes on disk for 32 MiB without data");
}

#[test]
fn freed_space_is_used_again_rather_than_growing_for_ever() {
    let image = Image::new(12, 4);
    image.run(1, Faults { latency: 0..=100, ..Faults::default() }, |open| async move {
        for round in 0..200u64 {
            for i in 0..20 {
                open.unlink(i);
                open.link(i).await.unwrap();
            }
            open.flush().await.unwrap();
            if round == 20 {
                open.flush().await.unwrap();
            }
        }
        let end = lock(&open.space.state).end.unwrap();
        assert!(end < 20000, "{end} clusters for twenty");
        open.close().await.unwrap();
    });
    if let Some(clean) = image.check() {
        assert_eq!(clean, (0, 0));
    }
}

#[test]
fn holes_of_another_writer_are_found_a_few_blocks_at_a_time() {
    let image = Image::new(9, 6);
    // Much is taken, then most of it given up, by one who goes away.
    image.run(1, Faults { latency: 0..=100, ..Faults::default() }, |open| async move {
        let mut all = Vec::new();
        for _ in 0..60 {
            all.push(open.space.alloc_in(&open.file, 32, true).await.unwrap());
        }
        let last = all.pop().unwrap();
        for e in all {
            open.space.free_later(e.offset, e.clusters << 9, FreeKind::Request);
        }
        open.tables.set_l1(0, last.offset | COPIED);
        open.close().await.unwrap();
    });
    let before = std::fs::metadata(image.path()).unwrap().len();
    image.run(2, Faults { latency: 0..=100, ..Faults::default() }, |open| async move {
        for i in 1..64 {
            open.link(i).await.unwrap();
        }
        open.close().await.unwrap();
    });
    assert!(std::fs::metadata(image.path()).unwrap().len() <= before, "holes were filled");
    if let Some((corruptions, _)) = image.check() {
        assert_eq!(corruptions, 0);
    }
}

#[test]
fn the_end_is_found_before_the_last_clusters_go() {
    let image = Image::new(16, 4);
    image.run(1, Faults::default(), |open| async move {
        for i in 0..5 {
            open.link(i).await.unwrap();
        }
        open.close().await.unwrap();
    });
    image.run(2, Faults::default(), |open| async move {
        for i in [4, 3, 1] {
            open.unlink(i);
        }
        open.flush().await.unwrap();
        open.space.release(&open.file).await.unwrap();
        for i in 10..50 {
            open.link(i).await.unwrap();
        }
        assert!(open.commits.is_fine());
        open.close().await.unwrap();
    });
    if let Some(clean) = image.check() {
        assert_eq!(clean, (0, 0));
    }
}

#[test]
fn a_full_file_says_so_and_stays_whole() {
    // No write reaches past 2 MiB.
    let full =
        |e: &sim::Event| (matches!(e.kind, OpKind::Write { .. }) && e.offset + e.len > 2 << 20).then_some(28);
    let image = Image::new(16, 4);
    image.run(1, Faults { fail: Some(Box::new(full)), ..Faults::default() }, |open| async move {
        let mut n = 0;
        let error = loop {
            match open.link(n).await {
                Ok(_) => n += 1,
                Err(e) => break e,
            }
        };
        assert_eq!(error.errno(), Errno::ENOSPC);
        assert_eq!(n, 28, "all of the file but four clusters");
        open.unlink(3);
        open.flush().await.unwrap();
        open.link(3).await.unwrap();
        open.close().await.unwrap();
    });
    if let Some(clean) = image.check() {
        assert_eq!(clean, (0, 0));
    }
}

#[test]
fn damage_stops_writes_and_marks_the_image() {
    let image = Image::new(16, 4);
    image.run(1, Faults::default(), |open| async move {
        // The refcount table points to the L1 table as a block: the metadata map knows both; a count of 0 freed shows it.
        open.space.free_later(40 << 16, 65536, FreeKind::Request);
        open.flush().await.unwrap();
        assert!(open.flush().await.is_err());
        assert!(!open.commits.is_fine());
        assert_eq!(open.link(0).await.unwrap_err().errno(), Errno::EIO);
        assert_eq!(open.close().await.unwrap_err().errno(), Errno::EIO);
    });
    let header = Header::parse(&std::fs::read(image.path()).unwrap(), Policy::default()).unwrap();
    assert!(header.corrupt());
}
