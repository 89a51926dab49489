//! What a crash may leave behind: from a log to the legal states of the disk.
//!
//! An *epoch* is the time between two barriers that make something durable. At its end everything an earlier barrier
//! covered is on the disk for certain; of what was started since, any part may be. The states of an epoch:
//!
//! | model | states |
//! |---|---|
//! | process crash | every prefix, in the order of effect |
//! | power loss | each operation missing, each one alone, random subsets; all subsets when there are few |
//! | torn writes | single operations in part, by units of 512 bytes and 4 KiB |
//! | several files | each advances to its own barriers; the subsets mix them |
//! | mean disks | what was discarded reads as junk |
//!
//! The end of an epoch is judged by what had been acknowledged then, which is the strictest moment for all of its states.
//! A barrier can be declared void ([`Log::states`], `void`): that is how a test shows that it is needed.

use conformance::rng::Rng;

use crate::disk::{Change, Entry, SECTOR, apply};
use crate::image::Image;

/// A recorded run.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// The files when recording began.
    pub start: Vec<(String, Image)>,
    /// What happened, in the order of effect.
    pub entries: Vec<Entry>,
    /// The clock at the end.
    pub end: u64,
}

/// How many states to make.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Operations of an epoch up to which all subsets are made.
    pub exhaustive: u32,
    /// Random subsets of larger epochs.
    pub random: u32,
    /// Torn variants of each operation that can tear.
    pub torn: u32,
    /// Most prefixes, drops and solitaries of each sort in one epoch; a random choice of them beyond.
    pub each: u32,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan { exhaustive: 6, random: 24, torn: 2, each: 40 }
    }
}

/// One state of the disk after a crash.
#[derive(Clone, Debug)]
pub struct State {
    /// When the crash happened: acknowledgements up to then count.
    pub at: u64,
    /// The files.
    pub files: Vec<(String, Image)>,
    /// What was discarded, and may have been, reads as junk.
    pub mean: bool,
    /// What was made of the operations that were open, for humans.
    pub label: String,
}

/// What becomes of one operation in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lost,
    Done,
    /// In units of so many bytes; this seed says which.
    Torn {
        unit: u64,
        seed: u64,
    },
}

/// Stretch between two barriers.
struct Epoch<'a> {
    at: u64,
    base: Vec<(String, Image)>,
    /// What comes after the base, in the order of effect; `None`: it is on the disk for certain.
    tail: Vec<(&'a Entry, Option<usize>)>,
    open: usize,
}

/// The kinds of barriers a log has, for [`Log::states`].
pub type Void<'a> = &'a dyn Fn(usize, &Entry) -> bool;

impl Log {
    /// The barriers: their place in `entries`.
    pub fn barriers(&self) -> Vec<usize> {
        let flush = |e: &Entry| e.change == Change::Flush || e.fua;
        self.entries.iter().enumerate().filter(|(_, e)| flush(e)).map(|(i, _)| i).collect()
    }

    /// When each entry is durable: the completion of the first barrier that was started after it had completed.
    fn durable_at(&self, void: Void<'_>) -> Vec<u64> {
        let barrier = |i: usize, e: &Entry| e.change == Change::Flush && !void(i, e);
        let flushes: Vec<&Entry> =
            self.entries.iter().enumerate().filter(|(i, e)| barrier(*i, e)).map(|(_, e)| e).collect();
        let failed: Vec<&Entry> = self.entries.iter().filter(|e| e.change == Change::FailedFlush).collect();
        let durable = |(i, e): (usize, &Entry)| {
            let own = if e.fua && !void(i, e) { e.done } else { u64::MAX };
            // The kernel tells of a write it could not do once, and forgets it.
            let forgotten = |f: &Entry| {
                failed.iter().any(|x| x.file == e.file && x.done > e.done && x.started < f.started)
            };
            let covers = |f: &&&Entry| f.file == e.file && f.started > e.done && !forgotten(f);
            flushes.iter().filter(covers).map(|f| f.done).min().unwrap_or(u64::MAX).min(own)
        };
        self.entries.iter().enumerate().map(durable).collect()
    }

    /// Makes the states, one by one, and hands each to `visit` until that fails. `void` tells, for the place of an
    /// entry and the entry, whether it is no barrier after all. Returns the number of states.
    ///
    /// # Errors
    /// The first error of `visit`.
    pub fn states<E>(
        &self,
        plan: Plan,
        seed: u64,
        void: Void<'_>,
        mut visit: impl FnMut(State) -> Result<(), E>,
    ) -> Result<u64, E> {
        let durable = self.durable_at(void);
        // An epoch ends when something becomes durable; the last one with the run.
        let mut ends: Vec<u64> = durable.iter().filter(|d| **d != u64::MAX).map(|d| d - 1).collect();
        ends.push(self.end.max(self.entries.iter().map(|e| e.done).max().unwrap_or(0)));
        ends.sort_unstable();
        ends.dedup();
        let mut count = 0;
        let mut base = self.start.clone();
        let mut applied = 0;
        for (number, at) in ends.into_iter().enumerate() {
            // The base grows up to the first operation that is not durable yet.
            while applied < self.entries.len() && durable[applied] <= at {
                done(&mut base, &self.entries[applied]);
                applied += 1;
            }
            let mut open = 0;
            let mut tail = Vec::new();
            for (entry, durable) in self.entries.iter().zip(&durable).skip(applied) {
                if entry.started > at || matches!(entry.change, Change::Flush | Change::FailedFlush) {
                    continue;
                }
                let certain = *durable <= at;
                tail.push((entry, (!certain).then_some(open)));
                open += usize::from(!certain);
            }
            let epoch = Epoch { at, base: base.clone(), tail, open };
            let mut rng = Rng::new(seed ^ (number as u64).wrapping_mul(0x9e37_79b9));
            for fates in epoch.choices(plan, &mut rng) {
                let mean = rng.one_in(4).then(|| rng.bits());
                visit(epoch.state(number, &fates, mean))?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// The state at the very end, with everything done.
    pub fn last(&self) -> State {
        let mut files = self.start.clone();
        self.entries.iter().for_each(|e| done(&mut files, e));
        State { at: self.end, files, mean: false, label: "the end".to_owned() }
    }
}

fn done(files: &mut [(String, Image)], entry: &Entry) {
    if let Some((_, image)) = files.get_mut(entry.file) {
        apply(image, entry.offset, &entry.change);
    }
}

/// Length of what can tear, bytes.
fn length(entry: &Entry) -> u64 {
    match &entry.change {
        Change::Write(data) => data.len() as u64,
        Change::Zero(len) | Change::Discard(len) => *len,
        Change::Truncate | Change::Flush | Change::FailedFlush => 0,
    }
}

/// `0..n`, or `most` of them at random.
fn some(n: usize, most: u32, rng: &mut Rng) -> Vec<usize> {
    if n <= most as usize {
        return (0..n).collect();
    }
    (0..most).map(|_| rng.below(n as u64) as usize).collect()
}

impl Epoch<'_> {
    /// The fates of the open operations, one list per state.
    fn choices(&self, plan: Plan, rng: &mut Rng) -> Vec<Vec<Fate>> {
        let n = self.open;
        let fate = |there: bool| if there { Fate::Done } else { Fate::Lost };
        let mut all = Vec::new();
        if n <= plan.exhaustive as usize {
            for subset in 0..1u64 << n {
                all.push((0..n).map(|i| fate(subset >> i & 1 == 1)).collect());
            }
        } else {
            for i in some(n + 1, plan.each, rng) {
                all.push((0..n).map(|j| fate(j < i)).collect());
            }
            for i in some(n, plan.each, rng) {
                all.push((0..n).map(|j| fate(j != i)).collect());
                all.push((0..n).map(|j| fate(j == i)).collect());
            }
            for _ in 0..plan.random {
                let among = 2 + rng.below(4);
                let swap = rng.one_in(2);
                all.push((0..n).map(|_| fate(rng.one_in(among) != swap)).collect());
            }
        }
        for i in some(n, plan.each, rng) {
            let entry = self.tail.iter().find(|(_, open)| *open == Some(i)).map(|(e, _)| *e);
            let Some(len) = entry.map(length).filter(|l| *l > SECTOR) else { continue };
            for round in 0..plan.torn {
                let unit = if len > 4096 && round % 2 == 1 { 4096 } else { SECTOR };
                let torn = Fate::Torn { unit, seed: rng.bits() };
                let rest = rng.below(3);
                let mut fates: Vec<Fate> = (0..n)
                    .map(|j| match rest {
                        0 => fate(j < i),
                        1 => Fate::Done,
                        _ => fate(rng.one_in(2)),
                    })
                    .collect();
                fates[i] = torn;
                all.push(fates);
            }
        }
        all
    }

    fn state(&self, number: usize, fates: &[Fate], mean: Option<u64>) -> State {
        let mut files = self.base.clone();
        for (entry, open) in &self.tail {
            let fate = open.map_or(Fate::Done, |i| fates[i]);
            let Some((_, image)) = files.get_mut(entry.file) else { continue };
            match fate {
                Fate::Lost => {}
                Fate::Done => put(image, entry, mean),
                Fate::Torn { unit, seed } => tear(image, entry, unit, seed, mean),
            }
        }
        let letter = |f: &Fate| match f {
            Fate::Lost => '-',
            Fate::Done => '#',
            Fate::Torn { .. } => '/',
        };
        let letters: String = fates.iter().map(letter).collect();
        let junk = if mean.is_some() { ", discards leave junk" } else { "" };
        let label = format!("epoch {number}, crash at {}, open operations [{letters}]{junk}", self.at);
        State { at: self.at, files, mean: mean.is_some(), label }
    }

    #[cfg(test)]
    fn size(&self) -> usize {
        self.open
    }
}

/// A whole operation.
fn put(image: &mut Image, entry: &Entry, mean: Option<u64>) {
    match (&entry.change, mean) {
        (Change::Discard(len), Some(seed)) => junk(image, entry.offset, *len, seed),
        (change, _) => {
            apply(image, entry.offset, change);
        }
    }
}

/// Fills what there is of a range with something nobody wrote.
fn junk(image: &mut Image, offset: u64, len: u64, seed: u64) {
    let len = len.min(image.len().saturating_sub(offset));
    let data = Rng::new(seed ^ offset).data(len);
    image.write(offset, &data);
}

/// A part of an operation: those units of the file (not of the operation) whose bit comes out.
fn tear(image: &mut Image, entry: &Entry, unit: u64, seed: u64, mean: Option<u64>) {
    let mut rng = Rng::new(seed);
    // Halves are likelier than any other pattern, and crueller.
    let pattern = rng.below(4);
    let (start, end) = (entry.offset, entry.offset + length(entry));
    let units = (end.div_ceil(unit) - start / unit).max(1);
    let mut at = start;
    let mut nth = 0;
    while at < end {
        let to = (at / unit + 1).saturating_mul(unit).min(end);
        let there = match pattern {
            0 => nth < units / 2,
            1 => nth >= units.div_ceil(2),
            _ => rng.one_in(2),
        };
        if there {
            match &entry.change {
                Change::Write(data) => {
                    image.write(at, &data[(at - start) as usize..(to - start) as usize]);
                }
                Change::Zero(_) => {
                    image.zero(at, to - at);
                }
                Change::Discard(_) => {
                    let part = Entry { offset: at, change: Change::Discard(to - at), ..entry.clone() };
                    put(image, &part, mean);
                }
                Change::Truncate | Change::Flush | Change::FailedFlush => {}
            }
        }
        at = to;
        nth += 1;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::collections::BTreeSet;

    fn entry(file: usize, at: u64, change: Change, started: u64, done: u64) -> Entry {
        Entry { file, offset: at, change, started, done, fua: false }
    }

    fn byte(file: usize, at: u64, started: u64, done: u64) -> Entry {
        entry(file, at, Change::Write(vec![1]), started, done)
    }

    fn log(files: usize, entries: Vec<Entry>) -> Log {
        let start = (0..files).map(|i| (i.to_string(), Image::from_bytes(&[0; 8]))).collect();
        Log { start, entries, end: 1000 }
    }

    /// The distinct states as bytes of all files, by time.
    fn all(log: &Log) -> BTreeSet<(u64, Vec<u8>)> {
        let mut seen = BTreeSet::new();
        let visit = |s: State| {
            let bytes: Vec<u8> = s.files.iter().flat_map(|(_, i)| i.to_bytes()).collect();
            seen.insert((s.at, bytes));
            Ok::<(), ()>(())
        };
        log.states(Plan::default(), 1, &|_, _| false, visit).unwrap();
        seen
    }

    #[test]
    fn what_a_barrier_covers_is_there_and_the_rest_may_be() {
        // 0 is covered by the flush, 1 was in flight when that began, 2 came later.
        let log = log(
            1,
            vec![byte(0, 0, 1, 2), byte(0, 1, 3, 5), entry(0, 0, Change::Flush, 4, 6), byte(0, 2, 7, 8)],
        );
        let seen = all(&log);
        let at = |t: u64| seen.iter().filter(move |(at, _)| *at == t).map(|(_, b)| (b[0], b[1], b[2]));
        assert_eq!(at(5).collect::<Vec<_>>(), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]);
        assert_eq!(at(1000).collect::<Vec<_>>(), [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]);
    }

    #[test]
    fn files_have_their_own_barriers_and_fua_needs_none() {
        let mut fua = byte(1, 1, 5, 6);
        fua.fua = true;
        let log = log(2, vec![byte(0, 0, 1, 2), byte(1, 0, 1, 3), entry(0, 0, Change::Flush, 4, 5), fua]);
        let seen = all(&log);
        let last: Vec<_> =
            seen.iter().filter(|(at, _)| *at == 1000).map(|(_, b)| (b[0], b[8], b[9])).collect();
        assert_eq!(last, [(1, 0, 1), (1, 1, 1)]);
    }

    #[test]
    fn the_last_writer_of_a_sector_stays_the_last() {
        let mut two = byte(0, 0, 3, 4);
        two.change = Change::Write(vec![2]);
        let seen = all(&log(1, vec![byte(0, 0, 1, 2), two]));
        let values: Vec<_> = seen.iter().map(|(_, b)| b[0]).collect();
        assert_eq!(values, [0, 1, 2]);
    }

    #[test]
    fn a_void_barrier_covers_nothing() {
        let log = log(1, vec![byte(0, 0, 1, 2), entry(0, 0, Change::Flush, 3, 4)]);
        let mut lost = 0;
        let visit = |s: State| {
            lost += u32::from(s.at == 1000 && s.files[0].1.bytes(0, 1) == [0]);
            Ok::<(), ()>(())
        };
        log.states(Plan::default(), 1, &|i, _| i == 1, visit).unwrap();
        assert_eq!(lost, 1);
    }

    #[test]
    fn what_a_failed_flush_lost_no_later_one_brings_back() {
        let flush = |change, t| entry(0, 0, change, t, t + 1);
        let log = log(
            1,
            vec![byte(0, 0, 1, 2), flush(Change::FailedFlush, 3), byte(0, 1, 5, 6), flush(Change::Flush, 7)],
        );
        let last: Vec<_> =
            all(&log).into_iter().filter(|(at, _)| *at == 1000).map(|(_, b)| (b[0], b[1])).collect();
        assert_eq!(last, [(0, 1), (1, 1)]);
    }

    #[test]
    fn torn_writes_keep_whole_sectors() {
        let data = vec![7; 4 * 512];
        let log = log(1, vec![entry(0, 0, Change::Write(data), 1, 2)]);
        let mut torn = 0;
        let plan = Plan { torn: 50, ..Plan::default() };
        let visit = |s: State| {
            let bytes = s.files[0].1.to_bytes();
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|b| *b == sector[0]));
            }
            let there = bytes.iter().filter(|b| **b == 7).count();
            torn += u32::from(there != 0 && there != 4 * 512);
            Ok::<(), ()>(())
        };
        log.states(plan, 1, &|_, _| false, visit).unwrap();
        assert!(torn > 30, "{torn} torn states");
    }

    #[test]
    fn large_epochs_are_sampled() {
        let entries: Vec<_> = (0..60).map(|i| byte(0, i, 2 * i + 1, 2 * i + 2)).collect();
        let log = log(1, entries);
        let n = log.states(Plan::default(), 1, &|_, _| false, |_| Ok::<(), ()>(())).unwrap();
        assert!((100..200).contains(&n), "{n}");
        let tail = log.entries.iter().enumerate().map(|(i, e)| (e, Some(i))).collect();
        assert_eq!(Epoch { at: 0, base: vec![], tail, open: 60 }.size(), 60);
    }
}
