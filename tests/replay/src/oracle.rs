//! What a disk may hold after a crash: the history of a workload's requests, and the verdict over what was read.
//!
//! A sector must be the last write that was flushed (or was durable by itself), or any later one, acknowledged or not.
//! Writes that ran at the same time may both be. A discarded sector may have become zero or stayed. Changes of everything
//! (a snapshot applied) happen wholly or not at all. Must not know the format.

use std::sync::Arc;

use crate::stamp::{self, Found, SECTOR};

/// What a request did to its sectors.
#[derive(Clone, Debug)]
pub enum What {
    /// Wrote its own number (the index of the event).
    Stamp,
    /// Made them zero.
    Zero,
    /// Gave them up.
    Discard,
    /// Everything written before it began is durable when it is acknowledged.
    Flush,
    /// The whole disk has this content; durable when acknowledged.
    Content(Arc<Vec<u8>>),
    /// The disk has this size in sectors; durable when acknowledged.
    Resize(u64),
}

/// One request.
#[derive(Clone, Debug)]
pub struct Event {
    /// When it was sent.
    pub start: u64,
    /// When it succeeded. `None`: it failed, or had no answer yet.
    pub ack: Option<u64>,
    /// First sector.
    pub first: u64,
    /// Sectors.
    pub count: u64,
    /// What it is.
    pub what: What,
    /// Durable when acknowledged.
    pub fua: bool,
}

/// A snapshot inside the image.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// The disk then.
    pub content: Arc<Vec<u8>>,
    /// When its creation began.
    pub create: u64,
    /// When it was there for certain.
    pub created: Option<u64>,
    /// When its deletion began.
    pub delete: Option<u64>,
    /// When it was gone for certain.
    pub deleted: Option<u64>,
}

/// All requests of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The content before the first request.
    pub initial: Arc<Vec<u8>>,
    /// The requests, in the order of sending; numbers of stamps are places in this list.
    pub events: Vec<Event>,
    /// The snapshots that were made.
    pub snapshots: Vec<Snapshot>,
}

/// What one sector may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// As before the run.
    Initial,
    Zero,
    /// Zero, or whatever a disk shows of a place that was given up.
    Discarded,
    Stamp(u64),
    /// As in the content of this event.
    Content(usize),
}

/// What the disk may be at one moment.
#[derive(Clone, Debug)]
pub struct Expect<'a> {
    history: &'a History,
    sizes: Vec<u64>,
    alternatives: Vec<Vec<Vec<Value>>>,
    present: Vec<&'a Snapshot>,
    possible: Vec<&'a Snapshot>,
}

impl History {
    /// A disk of this content.
    pub fn new(initial: Vec<u8>) -> History {
        History { initial: Arc::new(initial), ..History::default() }
    }

    /// A request was sent; returns its number.
    pub fn begin(&mut self, start: u64, what: What, first: u64, count: u64) -> usize {
        self.events.push(Event { start, ack: None, first, count, what, fua: false });
        self.events.len() - 1
    }

    /// A request succeeded.
    pub fn end(&mut self, number: usize, ack: u64) {
        if let Some(event) = self.events.get_mut(number) {
            event.ack = Some(ack);
        }
    }

    /// What the disk may be after a crash at `at`.
    pub fn expect(&self, at: u64) -> Expect<'_> {
        let flushed = |e: &&Event| matches!(e.what, What::Flush) && e.ack.is_some_and(|a| a <= at);
        // Everything acknowledged before this began is durable.
        let horizon = self.events.iter().filter(flushed).map(|e| e.start).max().unwrap_or(0);
        self.expect_from(at, horizon)
    }

    /// What a read sees at `at`: everything acknowledged is there.
    pub fn now(&self, at: u64) -> Expect<'_> {
        self.expect_from(at, u64::MAX)
    }

    fn expect_from(&self, at: u64, horizon: u64) -> Expect<'_> {
        let acked = |e: &Event| e.ack.filter(|a| *a <= at);
        let mut sizes = vec![(self.initial.len() / SECTOR) as u64];
        for event in self.events.iter().filter(|e| e.start <= at) {
            if let What::Resize(size) = event.what {
                if acked(event).is_some() {
                    sizes.clear();
                }
                sizes.push(size);
            }
        }
        let open = |e: &Event| matches!(e.what, What::Content(_)) && e.start <= at && acked(e).is_none();
        let alternatives = match self.events.iter().position(open) {
            // Wholly or not at all.
            Some(i) => vec![
                self.values(at, horizon, Some(i)),
                vec![vec![Value::Content(i)]; self.sectors() as usize],
            ],
            None => vec![self.values(at, horizon, None)],
        };
        let before = |t: Option<u64>| t.is_some_and(|t| t <= at);
        let present = |s: &&Snapshot| before(s.created) && !before(s.delete);
        let possible = |s: &&Snapshot| s.create <= at && !before(s.deleted);
        Expect {
            history: self,
            sizes,
            alternatives,
            present: self.snapshots.iter().filter(present).collect(),
            possible: self.snapshots.iter().filter(possible).collect(),
        }
    }

    /// The largest size the disk had, in sectors.
    fn sectors(&self) -> u64 {
        let sizes = self.events.iter().filter_map(|e| match e.what {
            What::Resize(size) => Some(size),
            _ => None,
        });
        sizes.chain([(self.initial.len() / SECTOR) as u64]).max().unwrap_or(0)
    }

    fn values(&self, at: u64, horizon: u64, without: Option<usize>) -> Vec<Vec<Value>> {
        let total = self.sectors() as usize;
        // By sector: the start of the latest durable write, and what may be there.
        let mut latest = vec![0; total];
        let mut values: Vec<Vec<(Value, u64)>> = vec![Vec::new(); total];
        for (number, event) in self.events.iter().enumerate() {
            if event.start > at || Some(number) == without {
                continue;
            }
            let ack = event.ack.filter(|a| *a <= at);
            let own = event.fua || matches!(event.what, What::Content(_) | What::Resize(_));
            let durable = ack.is_some_and(|a| a < horizon || own);
            let (range, value) = match event.what {
                What::Stamp => (event.first..event.first + event.count, Value::Stamp(number as u64)),
                What::Zero => (event.first..event.first + event.count, Value::Zero),
                What::Discard => (event.first..event.first + event.count, Value::Discarded),
                What::Content(_) => (0..total as u64, Value::Content(number)),
                // What a disk loses and gets again is zero.
                What::Resize(size) => (size..total as u64, Value::Zero),
                What::Flush => continue,
            };
            for sector in range {
                let Some(list) = values.get_mut(sector as usize) else { continue };
                list.push((value, ack.unwrap_or(u64::MAX)));
                if durable && !matches!(event.what, What::Discard) {
                    latest[sector as usize] = event.start.max(latest[sector as usize]);
                }
            }
        }
        let initial = |sector: usize| match self.initial.get(sector * SECTOR) {
            Some(_) => Value::Initial,
            None => Value::Zero,
        };
        let pick = |(sector, list): (usize, Vec<(Value, u64)>)| {
            let latest = latest[sector];
            let first = (latest == 0).then(|| initial(sector));
            let rest = list.into_iter().filter(|(_, ack)| *ack >= latest).map(|(v, _)| v);
            first.into_iter().chain(rest).collect()
        };
        values.into_iter().enumerate().map(pick).collect()
    }
}

impl Expect<'_> {
    /// Sizes the disk may have, bytes.
    pub fn sizes(&self) -> Vec<u64> {
        self.sizes.iter().map(|s| s * SECTOR as u64).collect()
    }

    /// Snapshots that must be there, and those that may.
    pub fn snapshots(&self) -> (&[&Snapshot], &[&Snapshot]) {
        (&self.present, &self.possible)
    }

    /// Checks the content of the whole disk.
    ///
    /// # Errors
    /// The first sector that cannot be, in words.
    pub fn check(&self, disk: &[u8]) -> Result<(), String> {
        self.check_with(disk, false)
    }

    /// As [`Expect::check`]; `junk`: what was discarded may be anything.
    ///
    /// # Errors
    /// As there.
    pub fn check_with(&self, disk: &[u8], junk: bool) -> Result<(), String> {
        if !self.sizes().contains(&(disk.len() as u64)) {
            return Err(format!("the disk has {} bytes, must have one of {:?}", disk.len(), self.sizes()));
        }
        let mut first = None;
        for values in &self.alternatives {
            match self.check_one(values, disk, junk) {
                Ok(()) => return Ok(()),
                Err(e) => first = first.or(Some(e)),
            }
        }
        Err(first.unwrap_or_default())
    }

    fn check_one(&self, values: &[Vec<Value>], disk: &[u8], junk: bool) -> Result<(), String> {
        for (sector, data) in disk.chunks(SECTOR).enumerate() {
            let none = Vec::new();
            let allowed = values.get(sector).unwrap_or(&none);
            let found = stamp::recognise(data);
            let fits = |value: &Value| match *value {
                Value::Zero => found == Found::Zero,
                Value::Discarded => junk || found == Found::Zero,
                Value::Stamp(number) => found == Found::Stamp { lba: sector as u64, number },
                Value::Initial => part(&self.history.initial, sector, data),
                Value::Content(event) => match self.history.events.get(event).map(|e| &e.what) {
                    Some(What::Content(content)) => part(content, sector, data),
                    _ => false,
                },
            };
            if !allowed.iter().any(fits) {
                return Err(format!("sector {sector} is {found:?}, must be one of {allowed:?}"));
            }
        }
        Ok(())
    }
}

/// Whether a sector of some content is this; past its end it is zero.
fn part(content: &[u8], sector: usize, data: &[u8]) -> bool {
    match content.get(sector * SECTOR..(sector + 1) * SECTOR) {
        Some(there) => there == data,
        None => data.iter().all(|b| *b == 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(stamps: [Option<u64>; 4]) -> Vec<u8> {
        let sector =
            |(lba, number): (u64, &Option<u64>)| number.map_or([0; SECTOR], |n| stamp::sector(lba, n));
        (0..).zip(&stamps).flat_map(sector).collect()
    }

    /// Write 0 acknowledged and flushed (1), write 2 acknowledged, write 3 not.
    fn history() -> History {
        let mut h = History::new(vec![0; 4 * SECTOR]);
        let request = |h: &mut History, t: u64, what: What, first: u64, count: u64| {
            let n = h.begin(t, what, first, count);
            h.end(n, t + 1);
        };
        request(&mut h, 1, What::Stamp, 0, 4);
        request(&mut h, 3, What::Flush, 0, 0);
        request(&mut h, 5, What::Stamp, 0, 2);
        h.begin(7, What::Stamp, 1, 2);
        h
    }

    #[test]
    fn flushed_data_stays_or_is_overtaken() {
        let h = history();
        let ok = |at, stamps| h.expect(at).check(&disk(stamps)).is_ok();
        assert!(ok(4, [Some(0); 4]) && ok(9, [Some(0); 4]) && ok(9, [Some(2), Some(3), Some(3), Some(0)]));
        // Before the flush was acknowledged nothing was promised.
        assert!(ok(3, [None, Some(0), None, Some(0)]));
        assert!(!ok(4, [None, Some(0), Some(0), Some(0)]), "lost");
        assert!(!ok(6, [Some(0), Some(3), Some(0), Some(0)]), "from the future");
        assert!(!ok(9, [Some(0), Some(0), Some(0), Some(2)]), "never written there");
        let mut foreign = disk([Some(0); 4]);
        foreign.copy_within(0..SECTOR, SECTOR);
        assert!(h.expect(9).check(&foreign).is_err_and(|e| e.contains("sector 1")));
    }

    #[test]
    fn a_discard_may_do_nothing_and_everything_else_must_be_flushed() {
        let mut h = history();
        for (t, what) in [(10, What::Discard), (12, What::Flush), (14, What::Zero), (16, What::Flush)] {
            let n = h.begin(t, what, 3, 1);
            h.end(n, t + 1);
        }
        let ok = |at, last| h.expect(at).check(&disk([Some(2), Some(3), Some(3), last])).is_ok();
        assert!(ok(13, Some(0)) && ok(13, None) && ok(15, Some(0)) && ok(17, None));
        assert!(!ok(17, Some(0)));
    }

    #[test]
    fn all_changes_at_once_or_none() {
        let mut h = history();
        let content = Arc::new(disk([Some(0), Some(0), None, None]));
        let n = h.begin(10, What::Content(content), 0, 0);
        let ok = |h: &History, at, stamps| h.expect(at).check(&disk(stamps)).is_ok();
        assert!(
            ok(&h, 11, [Some(0), Some(0), None, None]) && ok(&h, 11, [Some(2), Some(3), Some(0), Some(0)])
        );
        assert!(!ok(&h, 11, [Some(0), Some(0), None, Some(0)]), "half of it");
        h.end(n, 12);
        assert!(ok(&h, 12, [Some(0), Some(0), None, None]));
        assert!(!ok(&h, 12, [Some(2), Some(3), Some(0), Some(0)]));
    }

    #[test]
    fn sizes_are_old_or_new_and_what_comes_back_is_zero() {
        let mut h = history();
        let n = h.begin(10, What::Resize(2), 0, 0);
        assert_eq!(h.expect(11).sizes(), [2048, 1024]);
        h.end(n, 12);
        assert_eq!(h.expect(12).sizes(), [1024]);
        let n = h.begin(13, What::Resize(4), 0, 0);
        h.end(n, 14);
        assert!(h.expect(15).check(&disk([Some(0), Some(0), None, None])).is_ok());
        assert!(h.expect(15).check(&disk([Some(0), Some(0), Some(0), None])).is_err());
    }
}
