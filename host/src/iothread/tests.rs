//! Tests of iothreads: real threads, real files, both engines.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::*;
use crate::buf::IoVecs;
use crate::file::{File, OpenOptions};

fn start(engine: Engine) -> IoThread {
    IoThread::start(IoThreadOptions { name: "test".into(), engine, ..IoThreadOptions::default() }).unwrap()
}

fn both(f: impl Fn(IoThread)) {
    f(start(Engine::IoUring));
    f(start(Engine::Threads));
}

fn disk_file(size: u64, direct: bool) -> (tempfile::TempDir, Arc<File>) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let o = OpenOptions { writable: true, direct, create: Some(size), ..OpenOptions::default() };
    let f = File::open(&dir.path().join("f"), &o).unwrap();
    (dir, f)
}

fn shm_file(size: u64) -> (tempfile::TempDir, Arc<File>) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let o = OpenOptions { writable: true, create: Some(size), ..OpenOptions::default() };
    let f = File::open(&dir.path().join("f"), &o).unwrap();
    (dir, f)
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn what_was_written_is_read_back() {
    both(|t| {
        for (_d, f) in [disk_file(0, false), disk_file(0, true), shm_file(0)] {
            let data = pattern(3 * 65536);
            let want = data.clone();
            let got = t
                .call_blocking(move |l| async move {
                    // Misaligned memory on purpose: direct I/O must bounce.
                    let mut v = vec![0u8];
                    v.extend_from_slice(&data);
                    let b = IoVecs::from_vec(v).slice(1, data.len());
                    l.write(&f, &b, 4096, true).await?;
                    l.fdatasync(&f).await?;
                    let r = IoVecs::alloc(data.len() + 8192, 4096)?;
                    r.fill(0xee);
                    l.read(&f, &r, 4096).await?;
                    Ok::<_, io::Error>(r.to_vec())
                })
                .unwrap()
                .unwrap();
            assert_eq!(&got[..want.len()], &want[..]);
            assert!(got[want.len()..].iter().all(|b| *b == 0), "zeroes past the end");
        }
        t.stop();
    });
}

#[test]
fn posts_run_in_order_and_answers_cross_threads() {
    let t = start(Engine::Auto);
    let seen = Arc::new(Mutex::new(Vec::new()));
    for i in 0..1000 {
        let seen = Arc::clone(&seen);
        t.post(move |_| seen.lock().unwrap().push(i));
    }
    assert_eq!(t.call_blocking(|_| async { 7 }), Ok(7));
    assert_eq!(*seen.lock().unwrap(), (0..1000).collect::<Vec<_>>());
    let u = start(Engine::Auto);
    let t2 = t.clone();
    let sum = u.call_blocking(move |_| async move { t2.call(|_| async { 20 }).await.unwrap() + 1 });
    assert_eq!(sum, Ok(21));
    t.clone().stop();
    assert_eq!(t.call_blocking(|_| async { 7 }), Err(Gone));
    u.stop();
}

/// As direct I/O wants it.
#[repr(align(512))]
struct Block([u8; 512]);

/// Reads blocks, one per "request" in its queue.
struct TestSource {
    local: Local,
    id: Cell<Option<SourceId>>,
    file: Arc<File>,
    todo: RefCell<Vec<u32>>,
    bufs: RefCell<Vec<Block>>,
    iovs: RefCell<Vec<libc::iovec>>,
    done: RefCell<Vec<(u32, i32)>>,
    since_batch: Cell<usize>,
    max_batch: Cell<usize>,
    armed: Cell<bool>,
    published: Arc<Mutex<Vec<(u32, i32)>>>,
}

impl Source for TestSource {
    fn poll(&self) -> bool {
        let todo = std::mem::take(&mut *self.todo.borrow_mut());
        for slot in &todo {
            let mut bufs = self.bufs.borrow_mut();
            let mut iovs = self.iovs.borrow_mut();
            let iov = &mut iovs[*slot as usize];
            *iov = libc::iovec { iov_base: bufs[*slot as usize].0.as_mut_ptr().cast(), iov_len: 512 };
            // SAFETY: the vectors never change their length, and the source outlives its operations.
            let r = unsafe {
                self.local.submit_fast(
                    self.id.get().unwrap(),
                    *slot,
                    &self.file,
                    FastOp::Readv,
                    &raw const *iov,
                    1,
                    u64::from(*slot) * 512,
                )
            };
            if let Some(r) = r {
                self.done.borrow_mut().push((*slot, r));
            }
        }
        !todo.is_empty()
    }
    fn complete(&self, slot: u32, res: i32) {
        self.since_batch.set(self.since_batch.get() + 1);
        self.max_batch.set(self.max_batch.get().max(self.since_batch.get()));
        self.done.borrow_mut().push((slot, res));
    }
    fn end_batch(&self) {
        self.since_batch.set(0);
        self.published.lock().unwrap().append(&mut self.done.borrow_mut());
    }
    fn has_work(&self) -> bool {
        !self.todo.borrow().is_empty()
    }
    fn arm(&self) -> bool {
        self.armed.set(true);
        self.has_work()
    }
    fn disarm(&self) {
        self.armed.set(false);
    }
}

fn kick(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn a_kicked_source_reads_through_the_fast_path() {
    const N: usize = 500;
    both(|t| {
        for (_d, f) in [disk_file(0, false), disk_file(0, true), shm_file(0)] {
            let direct_ok = f.alignment().offset <= 512;
            std::fs::write(f.path(), pattern(N * 512)).unwrap();
            let fd = eventfd().unwrap();
            let theirs = fd.try_clone().unwrap();
            let published = Arc::new(Mutex::new(Vec::new()));
            let p2 = Arc::clone(&published);
            thread_local!(static SRC: RefCell<Option<Rc<TestSource>>> = const { RefCell::new(None) });
            t.call_blocking(move |local| async move {
                let s = Rc::new(TestSource {
                    local: local.clone(),
                    id: Cell::new(None),
                    file: f,
                    todo: RefCell::new(vec![]),
                    bufs: RefCell::new((0..N).map(|_| Block([0u8; 512])).collect()),
                    iovs: RefCell::new(
                        (0..N).map(|_| libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }).collect(),
                    ),
                    done: RefCell::new(vec![]),
                    since_batch: Cell::new(0),
                    max_batch: Cell::new(0),
                    armed: Cell::new(false),
                    published: p2,
                });
                let id = local.add_source(s.clone());
                s.id.set(Some(id));
                local.set_kick(id, Some(theirs));
                SRC.set(Some(s));
            })
            .unwrap();
            for round in 0..5u32 {
                t.call_blocking(move |_| async move {
                    SRC.with_borrow(|s| s.as_ref().unwrap().todo.borrow_mut().extend(0..N as u32));
                    round
                })
                .unwrap();
                kick(&fd);
                // Ends when everything was published; a lost completion hangs, which is how this test fails.
                while published.lock().unwrap().len() < N * (round as usize + 1) {
                    std::thread::yield_now();
                }
            }
            let (max, ok) = t
                .call_blocking(move |local| async move {
                    let s = SRC.take().unwrap();
                    local.remove_source(s.id.get().unwrap());
                    let flat: Vec<u8> = s.bufs.borrow().iter().flat_map(|b| b.0).collect();
                    (s.max_batch.get(), flat == pattern(N * 512))
                })
                .unwrap();
            assert!(max <= 32, "{max} completions between two batches");
            if direct_ok {
                assert!(ok);
                assert!(published.lock().unwrap().iter().all(|(_, r)| *r == 512));
            }
        }
        t.stop();
    });
}

#[test]
fn a_closed_file_is_really_closed() {
    both(|t| {
        let (_d, f) = disk_file(4096, true);
        f.lock_byte(100).unwrap();
        let other = File::open(f.path(), &OpenOptions::default()).unwrap();
        assert!(!other.byte_is_free_for_write_lock(100).unwrap());
        let path = f.path().to_path_buf();
        t.call_blocking(move |l| async move {
            let b = IoVecs::alloc(4096, 4096).unwrap();
            l.read(&f, &b, 0).await.unwrap();
        })
        .unwrap();
        assert!(other.byte_is_free_for_write_lock(100).unwrap());
        drop(other);
        // One message behind the Forget.
        t.call_blocking(|l| async move { l.yield_now().await }).unwrap();
        let open = |p: &Path| {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|e| std::fs::read_link(e.unwrap().path()).ok())
                .any(|l| l == p)
        };
        assert!(!open(&path.canonicalize().unwrap()));
        t.stop();
    });
}
