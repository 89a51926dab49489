//! Random sequences of operations, by ringblk and by QEMU in turns, on one image: each must read what the other wrote, and
//! find nothing wrong with it.
//!
//! `RINGBLK_SEQUENCES=n` runs n of them (a few dozen otherwise), `RINGBLK_SEED=n` begins with that seed; what fails says its
//! own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod ours;
mod shape;
mod theirs;

use conformance::model::Model;
use conformance::rng::Rng;
use ringblk_replay::qemu::{self, must};

use shape::Shape;

/// One thing to do to an image.
#[derive(Clone, Debug)]
enum Step {
    Write { offset: u64, len: u64, pattern: u8 },
    Compressed { offset: u64, len: u64, pattern: u8 },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
    Read { offset: u64, len: u64 },
    Create { name: String },
    Apply { name: String },
    Delete { name: String },
    Resize { size: u64 },
    Reopen,
}

/// What an image must hold.
struct Truth {
    disk: Model,
    snapshots: Vec<(String, Vec<u8>)>,
    made: u32,
}

/// One sequence.
struct Sequence {
    shape: Shape,
    dir: tempfile::TempDir,
    truth: Truth,
    rng: Rng,
    log: Vec<String>,
}

impl Sequence {
    fn new(seed: u64) -> Result<Sequence, String> {
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let dir = qemu::scratch()?;
        let content = shape.make(dir.path())?;
        let mut disk = Model::zeroes(content.len() as u64);
        disk.write(0, &content);
        let truth = Truth { disk, snapshots: Vec::new(), made: 0 };
        Ok(Sequence { shape, dir, truth, rng, log: Vec::new() })
    }

    fn step(&mut self, theirs: bool) -> Step {
        let size = self.truth.disk.size();
        let rng = &mut self.rng;
        let (mut offset, mut len) = rng.range(size);
        if self.shape.sectors || theirs {
            offset -= offset % 512;
            len = len.next_multiple_of(512).min(size - offset);
        }
        let pattern = 1 + rng.below(255) as u8;
        let cluster = self.shape.cluster.min(size);
        match rng.below(24) {
            0..=2 => Step::Zero { offset, len, unmap: false },
            3 | 4 => Step::Zero { offset, len, unmap: true },
            5..=7 => Step::Discard { offset, len },
            8 => Step::Flush,
            9 if self.shape.compress() => {
                let offset = rng.below(size / cluster) * cluster;
                Step::Compressed { offset, len: cluster, pattern }
            }
            10..=12 => Step::Read { offset, len },
            13 if self.shape.snapshots() && self.truth.snapshots.len() < 4 => {
                self.truth.made += 1;
                Step::Create { name: format!("snap{}", self.truth.made) }
            }
            14 if !self.truth.snapshots.is_empty() => {
                let n = rng.below(self.truth.snapshots.len() as u64) as usize;
                let name = self.truth.snapshots[n].0.clone();
                if rng.one_in(2) { Step::Apply { name } } else { Step::Delete { name } }
            }
            15 if self.shape.resize() && (self.truth.snapshots.is_empty() || !self.shape.version_2) => {
                Step::Resize { size: (1 + rng.below(2 * size / 512)) * 512 }
            }
            16 => Step::Reopen,
            _ => Step::Write { offset, len, pattern },
        }
    }

    /// What the step does to the truth.
    fn note(&mut self, step: &Step, theirs: bool) -> Result<(), String> {
        let cluster = self.shape.cluster;
        let truth = &mut self.truth;
        match step {
            Step::Write { offset, len, pattern } | Step::Compressed { offset, len, pattern } => {
                truth.disk.write(*offset, &vec![*pattern; *len as usize]);
            }
            Step::Zero { offset, len, .. } => truth.disk.zero(*offset, *len),
            Step::Discard { offset, len } => truth.disk.maybe_zero(*offset, *len),
            Step::Resize { size } => {
                let old = truth.disk.size();
                truth.disk.resize(*size);
                if theirs && *size > old {
                    // QEMU shows again what it cut off inside of a cluster.
                    truth.disk.forget(old, old.next_multiple_of(cluster) - old);
                }
            }
            Step::Delete { name } => truth.snapshots.retain(|(n, _)| n != name),
            Step::Apply { name } => {
                let found = truth.snapshots.iter().find(|(n, _)| n == name);
                let content = &found.ok_or("no such snapshot")?.1;
                truth.disk.resize(content.len() as u64);
                truth.disk.write(0, content);
            }
            Step::Create { .. } | Step::Flush | Step::Read { .. } | Step::Reopen => {}
        }
        Ok(())
    }

    /// The whole disk as somebody read it: it must be the truth, and becomes it where that was open.
    fn seen(&mut self, content: &[u8]) -> Result<(), String> {
        if content.len() as u64 != self.truth.disk.size() {
            return Err(format!("{} bytes, must be {}", content.len(), self.truth.disk.size()));
        }
        self.truth.disk.read(0, content)
    }

    /// Both look at the image: check, content, every snapshot.
    fn look(&mut self) -> Result<(), String> {
        theirs::check(&self.shape, self.dir.path())?;
        let content = theirs::content(&self.shape, self.dir.path(), None)?;
        self.seen(&content).map_err(|e| format!("read by QEMU: {e}"))?;
        for (name, must) in &self.truth.snapshots {
            let found = theirs::content(&self.shape, self.dir.path(), Some(name))?;
            // A snapshot is shown with the size the disk has now.
            let n = found.len().min(must.len());
            if found[..n] != must[..n] {
                return Err(format!("'{name}', read by QEMU, has changed"));
            }
        }
        let content = ours::content_and_check(&self.shape, self.dir.path())?;
        self.seen(&content).map_err(|e| format!("read by ringblk: {e}"))?;
        self.shape.backing_untouched(self.dir.path())
    }

    fn round(&mut self, theirs: bool) -> Result<(), String> {
        let steps = 4 + self.rng.below(12);
        if theirs {
            theirs::session(self, steps)?;
        } else {
            ours::session(self, steps)?;
        }
        self.look()
    }

    fn run(&mut self) -> Result<(), String> {
        let first = self.rng.one_in(2);
        for round in 0..3 {
            let theirs = first == (round % 2 == 0);
            let who = if theirs { "QEMU" } else { "ringblk" };
            self.log.push(format!("-- {who}"));
            self.round(theirs).map_err(|e| format!("round {round}, after {who}: {e}"))?;
        }
        Ok(())
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|s| s.parse().ok())
}

#[test]
fn both_ways() {
    if must(std::path::Path::new("/"), "qemu-img", &["--version"]).is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let (first, count) = (number("RINGBLK_SEED").unwrap_or(1), number("RINGBLK_SEQUENCES"));
    let count = count.unwrap_or(if number("RINGBLK_SEED").is_some() { 1 } else { 48 });
    eprintln!("sequences {first} to {}", first + count - 1);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(count);
    std::thread::scope(|scope| {
        let work = |worker: u64| {
            for seed in (first + worker..first + count).step_by(workers as usize) {
                let mut sequence = Sequence::new(seed).unwrap_or_else(|e| panic!("RINGBLK_SEED={seed}: {e}"));
                if let Err(e) = sequence.run() {
                    let log = sequence.log.join("\n");
                    panic!("RINGBLK_SEED={seed}: {:?}\n{log}\n{e}", sequence.shape);
                }
            }
        };
        let threads: Vec<_> = (0..workers).map(|w| scope.spawn(move || work(w))).collect();
        for thread in threads {
            if let Err(e) = thread.join() {
                std::panic::resume_unwind(e);
            }
        }
    });
}
