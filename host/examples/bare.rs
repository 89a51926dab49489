//! What the loop of an iothread costs, next to the bare system calls: ns of processor time per 4 KiB read.
//!
//! Closed loop of 32 reads from a cached file, for a disk file system (argument 1, default `.`; `null` skips files) and for `/dev/shm`, and a
//! null source that completes everything inside of `poll`. The figures choose the inline strategy; see `src/iothread/inline.rs`.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used, unsafe_code)]

use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use host::{FastOp, File, IoThread, IoThreadOptions, Local, OpenOptions, PollParams, Source, SourceId};
use ringblk_host as host;

const FILE: u64 = 64 << 20;
const OPS: u64 = 1 << 20;
const BLOCK: usize = 4096;

struct Closed {
    local: Local,
    id: Cell<Option<SourceId>>,
    file: Option<Arc<File>>,
    iov: Vec<libc::iovec>,
    _mem: Vec<u8>,
    ready: RefCell<Vec<u32>>,
    rng: Cell<u64>,
    left: Cell<u64>,
    done: Cell<u64>,
    finished: RefCell<Option<host::sync::oneshot::Sender<()>>>,
}

impl Closed {
    fn finish(&self, slot: u32) {
        self.ready.borrow_mut().push(slot);
        self.done.set(self.done.get() + 1);
    }
}

fn offset(rng: &Cell<u64>) -> u64 {
    let mut x = rng.get();
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    rng.set(x);
    x % (FILE / BLOCK as u64) * BLOCK as u64
}

impl Source for Closed {
    fn poll(&self) -> bool {
        let batch = std::mem::take(&mut *self.ready.borrow_mut());
        let mut any = false;
        for slot in batch {
            if self.left.get() == 0 {
                continue;
            }
            any = true;
            self.left.set(self.left.get() - 1);
            let Some(f) = &self.file else {
                self.finish(slot);
                continue;
            };
            let off = offset(&self.rng);
            let iov = &raw const self.iov[slot as usize];
            // SAFETY: the vectors and their memory live as long as the source.
            let r = unsafe {
                self.local.submit_fast(self.id.get().unwrap(), slot, f, FastOp::Readv, iov, 1, off)
            };
            if let Some(r) = r {
                assert_eq!(r as usize, BLOCK);
                self.finish(slot);
            }
        }
        any
    }
    fn complete(&self, slot: u32, res: i32) {
        assert_eq!(res as usize, BLOCK);
        self.finish(slot);
    }
    fn end_batch(&self) {
        if self.done.get() == OPS
            && let Some(tx) = self.finished.borrow_mut().take()
        {
            let _ = tx.send(());
        }
    }
    fn has_work(&self) -> bool {
        self.left.get() > 0 && !self.ready.borrow().is_empty()
    }
    fn arm(&self) -> bool {
        self.has_work()
    }
    fn disarm(&self) {}
}

fn run(name: &str, file: Option<Arc<File>>, depth: usize, inline: bool) {
    let poll = PollParams { max_ns: 0, ..PollParams::default() };
    let t = IoThread::start(IoThreadOptions { name: "bare".into(), poll, ..Default::default() }).unwrap();
    let ns = t
        .call_blocking(move |local| async move {
            let begin = cpu();
            local.set_inline(inline);
            let mut mem = vec![0u8; BLOCK * depth];
            let base = mem.as_mut_ptr();
            let iov = (0..depth)
                .map(|i| libc::iovec { iov_base: base.wrapping_add(i * BLOCK).cast(), iov_len: BLOCK })
                .collect();
            let (tx, rx) = host::sync::oneshot::channel();
            let s = Rc::new(Closed {
                local: local.clone(),
                id: Cell::new(None),
                file,
                iov,
                _mem: mem,
                ready: RefCell::new((0..depth as u32).collect()),
                rng: Cell::new(88172645463325252),
                left: Cell::new(OPS),
                done: Cell::new(0),
                finished: RefCell::new(Some(tx)),
            });
            let id = local.add_source(s.clone());
            s.id.set(Some(id));
            rx.await.unwrap();
            local.remove_source(id);
            begin.elapsed()
        })
        .unwrap();
    let st = t.stats();
    println!(
        "  {name:<44} {ns:8.1} ns/op   enters {:>8} inline {:>8} turns {:>8}",
        st.enters, st.inline_ops, st.turns
    );
    t.stop();
}

/// Processor time of this thread, so that other work on the machine does not count.
struct Cpu(u64);

fn cpu() -> Cpu {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Cpu(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

impl Cpu {
    fn elapsed(&self) -> f64 {
        (cpu().0 - self.0) as f64 / OPS as f64
    }
}

fn bare_pread(f: &File, flags: i32) -> f64 {
    let mut mem = vec![0u8; BLOCK * 32];
    let rng = Cell::new(88172645463325252);
    let begin = cpu();
    for i in 0..OPS {
        let base = mem[(i % 32) as usize * BLOCK..].as_mut_ptr();
        let iov = libc::iovec { iov_base: base.cast(), iov_len: BLOCK };
        // SAFETY: one iovec over our own memory.
        let r = unsafe { libc::preadv2(f.as_fd().as_raw_fd(), &iov, 1, offset(&rng) as i64, flags) };
        if r != BLOCK as isize {
            return f64::NAN;
        }
    }
    begin.elapsed()
}

fn bare_ring(f: &File, depth: usize) -> f64 {
    let mut ring: io_uring::IoUring = io_uring::IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(256)
        .unwrap();
    ring.submitter().register_files(&[f.as_fd().as_raw_fd()]).unwrap();
    let mut mem = vec![0u8; BLOCK * depth];
    let base = mem.as_mut_ptr();
    let mut free: Vec<u64> = (0..depth as u64).collect();
    let rng = Cell::new(88172645463325252);
    let (mut left, mut done) = (OPS, 0);
    let begin = cpu();
    while done < OPS {
        let mut n = 0;
        {
            let mut sq = ring.submission();
            while left > 0
                && let Some(slot) = free.pop()
            {
                let p = base.wrapping_add(slot as usize * BLOCK);
                let e = io_uring::opcode::Read::new(io_uring::types::Fixed(0), p, BLOCK as u32)
                    .offset(offset(&rng))
                    .build()
                    .user_data(slot);
                // SAFETY: our own memory, alive until the end.
                unsafe { sq.push(&e) }.unwrap();
                left -= 1;
                n += 1;
            }
        }
        // SAFETY: plain arguments.
        unsafe { ring.submitter().enter::<libc::sigset_t>(n, u32::from(n == 0), 1, None) }.unwrap();
        for c in ring.completion() {
            assert_eq!(c.result() as usize, BLOCK);
            free.push(c.user_data());
            done += 1;
        }
    }
    begin.elapsed()
}

fn measure(dir: &Path) {
    println!("{}:", dir.display());
    let path = dir.join(format!(".ringblk-bare-{}", std::process::id()));
    std::fs::write(&path, vec![0x5au8; FILE as usize]).unwrap();
    let f = File::open(&path, &OpenOptions::default()).unwrap();
    for _ in 0..2 {
        println!("  {:<44} {:8.1} ns/op", "preadv2", bare_pread(&f, 0));
        println!("  {:<44} {:8.1} ns/op", "preadv2 RWF_NOWAIT", bare_pread(&f, libc::RWF_NOWAIT));
        println!("  {:<44} {:8.1} ns/op", "bare ring, 32", bare_ring(&f, 32));
        run("iothread, ring, 32", Some(Arc::clone(&f)), 32, false);
        run("iothread, as configured, 32", Some(Arc::clone(&f)), 32, true);
        println!("  {:<44} {:8.1} ns/op", "bare ring, 1", bare_ring(&f, 1));
        run("iothread, ring, 1", Some(Arc::clone(&f)), 1, false);
        run("iothread, as configured, 1", Some(Arc::clone(&f)), 1, true);
    }
    let _ = std::fs::remove_file(path);
}

fn main() {
    let dir = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    if dir != "null" {
        measure(Path::new(&dir));
        measure(Path::new("/dev/shm"));
    }
    println!("null source:");
    run("iothread, 32", None, 32, true);
    run("iothread, 1", None, 1, true);
}
