//! Tests of the simulation, and through it of the transfer rules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::buf::IoVecs;
use crate::file::OpenOptions;
use crate::iothread::FallocMode;

fn file(direct: bool) -> (tempfile::TempDir, Arc<File>) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let o = OpenOptions { writable: true, direct, create: Some(0), ..OpenOptions::default() };
    let f = File::open(&dir.path().join("f"), &o).unwrap();
    (dir, f)
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn transfers_come_out_whole_on_a_rough_disk() {
    for seed in 0..50 {
        for direct in [false, true] {
            let (_d, f) = file(direct);
            let (rec, seen) = (Rc::new(RefCell::new(vec![])), Rc::new(RefCell::new(vec![])));
            *seen.borrow_mut() = Vec::<Record>::new();
            let faults = Faults { record: Some(Rc::clone(&rec)), ..Faults::rough() };
            run(seed, faults, move |l| async move {
                let data = pattern(20 * 4096);
                l.write(&f, &IoVecs::from_vec(data.clone()), 4096, false).await.unwrap();
                l.fdatasync(&f).await.unwrap();
                let r = IoVecs::from_vec(vec![0xee; 30 * 4096]);
                l.read(&f, &r, 0).await.unwrap();
                let got = r.to_vec();
                assert!(got[..4096].iter().all(|b| *b == 0));
                assert_eq!(&got[4096..21 * 4096], &data[..]);
                assert!(got[21 * 4096..].iter().all(|b| *b == 0));
            })
            .unwrap();
            seen.borrow_mut().append(&mut rec.borrow_mut());
            assert!(seen.borrow().iter().any(|r| r.event.kind == OpKind::Sync));
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let trace = |seed| {
        let (_d, f) = file(false);
        let rec = Rc::new(RefCell::new(vec![]));
        let faults = Faults { record: Some(Rc::clone(&rec)), ..Faults::rough() };
        run(seed, faults, move |l| async move {
            let left = Rc::new(Cell::new(16));
            for i in 0..16u64 {
                let (l2, f, left) = (l.clone(), f.clone(), Rc::clone(&left));
                l.spawn(async move {
                    let b = IoVecs::from_vec(pattern(8192));
                    l2.write(&f, &b, i * 8192, i % 2 == 0).await.unwrap();
                    left.set(left.get() - 1);
                });
            }
            while left.get() > 0 {
                l.sleep(1000).await;
            }
        })
        .unwrap();
        let v: Vec<_> =
            rec.borrow().iter().map(|r| (r.event.index, r.result, r.event.offset, r.started_after)).collect();
        v
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
    let t = trace(7);
    assert!(t.windows(2).any(|w| w[0].0 > w[1].0), "completions are reordered");
}

#[test]
fn errors_reach_the_caller_and_full_disks_are_full() {
    let (_d, f) = file(false);
    let faults = Faults::default()
        .fail_nth(1, libc::EIO, |e| matches!(e.kind, OpKind::Write { .. }))
        .fail_nth(0, libc::ENOSPC, |e| e.kind == OpKind::Fallocate { mode: 0 });
    run(3, faults, move |l| async move {
        let b = IoVecs::from_vec(vec![1; 512]);
        l.write(&f, &b, 0, false).await.unwrap();
        assert_eq!(l.write(&f, &b, 0, false).await.unwrap_err().raw_os_error(), Some(libc::EIO));
        l.write(&f, &b, 0, false).await.unwrap();
        let alloc = FallocMode::Allocate { keep_size: false };
        let e = l.fallocate(&f, alloc, 0, 4096).await.unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
        l.fallocate(&f, alloc, 0, 4096).await.unwrap();
        assert_eq!(f.len().unwrap(), 4096);
        for (off, len) in [(u64::MAX, 512), (i64::MAX as u64, 512), (0, u64::MAX)] {
            let e = l.fallocate(&f, FallocMode::PunchHole, off, len).await.unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
        }
    })
    .unwrap();
}

#[test]
fn misaligned_ranges_are_refused_with_direct_io() {
    let (_d, f) = file(true);
    if f.alignment().offset <= 1 {
        return;
    }
    run(1, Faults::default(), move |l| async move {
        let b = IoVecs::from_vec(vec![1; 100]);
        assert_eq!(l.write(&f, &b, 0, false).await.unwrap_err().raw_os_error(), Some(libc::EINVAL));
        let b = IoVecs::from_vec(vec![1; 4096]);
        assert_eq!(l.read(&f, &b, 1).await.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    })
    .unwrap();
}

#[test]
fn long_vectors_are_split_and_stay_aligned() {
    for direct in [false, true] {
        let (_d, f) = file(direct);
        run(5, Faults { short: 300, ..Faults::default() }, move |l| async move {
            // 3000 pieces of odd sizes in one allocation; aligned as a whole only when bounced.
            let mem = IoVecs::alloc(3000 * 64, 4096).unwrap();
            let (base, _) = {
                let mut v = Vec::new();
                mem.gather(1, &mut v);
                (v[0].iov_base, v[0].iov_len)
            };
            let iov: Vec<_> = (0..3000)
                .map(|i| libc::iovec { iov_base: base.wrapping_byte_add(i * 64), iov_len: 64 })
                .collect();
            // SAFETY: pieces of `mem`, which is kept.
            let list = unsafe { IoVecs::from_raw(&iov, Rc::new(mem.clone())) };
            let len = 3000 * 64 / 4096 * 4096;
            let list = list.slice(0, len);
            let data = pattern(len);
            list.copy_from(0, &data);
            l.write(&f, &list, 0, false).await.unwrap();
            list.fill(0);
            assert!(list.is_zero());
            l.read(&f, &list, 0).await.unwrap();
            assert_eq!(list.to_vec(), data);
        })
        .unwrap();
    }
}

#[test]
fn a_dropped_read_leaves_its_memory_alone_until_it_is_done() {
    let (_d, f) = file(false);
    std::fs::write(f.path(), [9u8; 4096]).unwrap();
    run(2, Faults::default(), move |l| async move {
        let b = IoVecs::from_vec(vec![0; 4096]);
        {
            let mut r = Box::pin(l.read(&f, &b, 0));
            std::future::poll_fn(|cx| {
                assert!(r.as_mut().poll(cx).is_pending());
                Poll::Ready(())
            })
            .await;
        }
        assert_eq!(l.inner().ops.borrow().pending(), 1);
        let keep = b.clone();
        drop(b);
        l.sleep(2_000_000).await;
        assert_eq!(l.inner().ops.borrow().pending(), 0);
        assert!(keep.to_vec().iter().all(|b| *b == 9), "the detached read still had its memory");
    })
    .unwrap();
}

#[test]
fn time_is_virtual_and_a_stall_is_found() {
    let r = run(1, Faults::default(), |l| async move {
        let begin = l.now();
        l.sleep(3_600_000_000_000).await;
        l.now() - begin
    });
    assert_eq!(r, Ok(3_600_000_000_000));
    assert_eq!(run(1, Faults::default(), |_| std::future::pending::<()>()), Err(SimError::Stalled));
    let r = run(1, Faults::default(), |l| async move {
        l.spawn(async { panic!("as intended") });
        l.yield_now().await;
        l.yield_now().await;
    });
    assert_eq!(r, Err(SimError::TaskPanicked));
}

#[test]
#[should_panic(expected = "seen by the test")]
fn a_panic_of_the_main_future_fails_the_test() {
    let _ = run(1, Faults::default(), |_| async { panic!("seen by the test") });
}
